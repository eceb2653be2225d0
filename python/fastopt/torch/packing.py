"""Pack the weights of a module in place, unpack them, save and load them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fastopt._text import shown
from fastopt._types import PathLike
from fastopt.models.calibration import Calibration
from fastopt.models.choose import choose_bits
from fastopt.models.model import PackedModel, load
from fastopt.models.recipe import Recipe, pack_tensor, recipe_of, require_no_correction, warn_of_overrides
from fastopt.models.report import Report, Reporter
from fastopt.tensors.packed import PackedTensor, Precision, Weight, unpacked
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.torch.modules import PACKED, PackedConv1D, PackedEmbedding, PackedModule, is_layer, tensor_of, tensors_of
from fastopt.torch.names import names_in
from fastopt.train.param_tree import as_array, as_parameter

# Ends the name of a saved weight that is packed the other way round than its layer has it: [out, in].
TRANSPOSED = ".T"


class _Place(NamedTuple):
    """A parameter, and all modules that hold it: more than one if it is tied."""

    name: str
    weight: torch.nn.Parameter
    owners: list[tuple[str, torch.nn.Module]]  # names of the parameter there, and the modules

    @property
    def obstacle(self) -> str:
        """The reason why its modules cannot hold it packed; empty if they can."""
        weight = self.weight
        for name, module in self.owners:
            cls = type(module)
            if name != "weight" or not any(is_layer(cls, packed.layer) for packed in PACKED):
                return f"is {name!r} of a {cls.__name__}, which is not packed"
            if isinstance(module, torch.nn.Embedding) and module.max_norm is not None:
                return "has max_norm, which changes it"
        if not (weight.is_cpu and weight.is_floating_point() and weight.layout is torch.strided):
            return f"is {weight.dtype} on {weight.device}"
        orders = {self._is_transposed(owner) for owner in self.owners}
        return "is [in, out] in some layers and [out, in] in others" if len(orders) > 1 else ""

    @staticmethod
    def _is_transposed(owner: tuple[str, torch.nn.Module]) -> bool:
        name, module = owner
        return name == "weight" and is_layer(type(module), PackedConv1D.layer)

    @property
    def transposed(self) -> bool:
        """True if its layers hold it as [in, out]."""
        return self._is_transposed(self.owners[0])

    def array(self) -> Any:
        """Return its values as an array, as [out, in]."""
        weight = self.weight.detach().T if self.transposed else self.weight.detach()
        return as_array(weight.contiguous())

    def hold(self, packed: PackedTensor, precision: Precision) -> None:
        """Make all its modules hold it packed, in the same tensors."""
        tensors, about = tensors_of(packed)
        for _, module in self.owners:
            PackedModule.hold(module, tensors, about, self.weight.dtype, precision)


def places_of(module: torch.nn.Module) -> Iterator[_Place]:
    """Yield all parameters."""
    owners: dict[int, list[tuple[str, torch.nn.Module]]] = {}
    for child in module.modules():
        for name, param in child._parameters.items():
            if param is not None:
                owners.setdefault(id(param), []).append((name, child))
    for name, param in module.named_parameters():
        yield _Place(name, param, owners[id(param)])


def pack_(
    module: torch.nn.Module,
    recipe: Recipe | None = None,
    *,
    bits: int | None = 4,
    calibration: Calibration | None = None,
    precision: Precision = "exact",
    target_bits: float | None = None,
    target_size: int | str | None = None,
    **options: Any,
) -> Report:
    """Pack the weights of a module in place, chosen by the same options as `fastopt.pack` takes.

    ``Linear``, ``Embedding``, ``Conv1d`` and ``Conv2d``, and transformers' ``Conv1D``, become modules that hold their
    weight packed and multiply by it as it is; convolutions decode it for each call. Other parameters stay. Weights
    that modules share stay shared.

    Parameters
    ----------
    module : torch.nn.Module
    recipe : Recipe, optional
        All options in one object, instead of `bits` and the keywords below.
    bits : 8, 6, 5, 4, 3, 2 or None
        None with a pruning option: weights are stored sparse, not quantized.
    calibration : fastopt.Calibration, optional
        Inputs of the layers, as `calibrate` collects them: codes are then chosen for the outputs.
    precision : "exact", "int8" or "blas"
        As in `fastopt.linear`; an attribute of each packed module.
    target_bits, target_size
        As in `fastopt.pack`, instead of `bits`.
    **options
        The fields of `fastopt.Recipe`; patterns match names of ``named_parameters()``.

    Returns
    -------
    Report
        How each parameter is stored, and why.

    Raises
    ------
    TypeError, ValueError
        If an option is unknown or out of range, or a weight has NaN or infinity. The module is then as it was.

    Examples
    --------
    >>> import torch
    >>> import fastopt.torch as ft
    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> report = ft.pack_(model, bits=4)
    >>> model[0]
    PackedLinear(in_features=128, out_features=64, bias=True, quantized, bits=4, group_size=32, precision='exact')
    >>> [tensor.kind for tensor in report.tensors]
    ['quantized', 'dense', 'dense', 'dense']
    """
    require_module(module)
    if precision not in ("exact", "int8", "blas"):
        raise ValueError(f"precision: expected 'exact', 'int8' or 'blas', got {shown(precision)}")
    targeted = target_bits is not None or target_size is not None
    given: dict[str, Any] = dict(options)
    if calibration is not None:
        given["calibration"] = calibration
    if bits != 4 or (recipe is None and not targeted):
        given["bits"] = bits
    recipe = recipe_of(recipe, given)
    require_no_correction(recipe, "for a module")
    places = list(places_of(module))
    warn_of_overrides(recipe, [place.name for place in places])
    if recipe.calibration is not None:
        recipe.require_fitting({place.name: place.array() for place in places})
    if targeted:
        weights = {place.name: place.array() for place in places if not place.obstacle}
        recipe = choose_bits(weights, recipe, target_bits=target_bits, target_size=target_size)

    reporter = Reporter(recipe)
    todo: list[tuple[_Place, PackedTensor]] = []
    for place in places:
        if place.weight.dtype not in _DTYPES or not place.weight.is_cpu:
            continue
        array, obstacle = place.array(), place.obstacle
        packed, reason = (array, obstacle) if obstacle else pack_tensor(place.name, array, recipe)
        if isinstance(packed, PackedTensor):
            if _holds(place, packed):
                todo.append((place, packed))
            else:
                packed, reason = array, "an embedding is not stored sparse"
        reporter.add(place.name, packed, array, reason)
    for place, packed in todo:
        place.hold(packed, precision)
    return reporter.report()


def unpack_(module: torch.nn.Module) -> None:
    """Undo `pack_`: packed modules become layers of torch again, with the decoded weights as parameters.

    Parameters
    ----------
    module : torch.nn.Module

    Examples
    --------
    >>> import torch
    >>> import fastopt.torch as ft
    >>> model = torch.nn.Linear(128, 64)
    >>> _ = ft.pack_(model)
    >>> ft.unpack_(model)
    >>> model
    Linear(in_features=128, out_features=64, bias=True)
    """
    require_module(module)
    made: dict[int, torch.nn.Parameter] = {}
    for child in list(module.modules()):
        if isinstance(child, PackedModule):
            held = child.buffers_of_weight[0]
            if id(held) not in made:
                made[id(held)] = torch.nn.Parameter(child.dense(), child.weight_requires_grad)
            child.release(made[id(held)])


def save(module: torch.nn.Module, path: PathLike) -> None:
    """Write the parameters and buffers of a module to one safetensors file, which `load_` and `fastopt.load` read.

    Parameters
    ----------
    module : torch.nn.Module
        Packed by `pack_`, or not.
    path : path-like

    Raises
    ------
    OSError
        If the file cannot be written.
    TypeError, ValueError
        If the file cannot hold a tensor, naming it.
    """
    require_module(module)
    PackedModel(weights_of(module)).save(path)


def weights_of(module: torch.nn.Module) -> dict[str, Weight]:
    """Return the parameters and persistent buffers of a module; what is tied once."""
    tensors: dict[str, Weight] = {}
    seen: set[int] = set()
    for prefix, child in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        packed = isinstance(child, PackedModule)
        if packed:
            held = child.buffers_of_weight[0]
            if id(held) not in seen:
                seen.add(id(held))
                transposed = TRANSPOSED if isinstance(child, PackedConv1D) else ""
                tensors[f"{dot}weight{transposed}"] = child.packed
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            skip = name in child._non_persistent_buffers_set or (packed and name in child.stored)
            if tensor is None or skip or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            tensors[f"{dot}{name}"] = as_parameter(tensor.detach().cpu().contiguous(), f"{dot}{name}")
    return tensors


def load_(module: torch.nn.Module, path: PathLike, *, precision: Precision = "exact") -> None:
    """Load the weights of a file into a module, whose layers become packed where the file holds packed weights.

    Parameters
    ----------
    module : torch.nn.Module
        Packed or not, on the CPU or made on the device "meta"; its parameters and buffers have the names and shapes of
        the file.
    path : path-like
        A file of `save`, or a file or folder of ``fastopt pack`` from the same model's weights. Models of transformers
        may have other names in the file: the rules of ``from_pretrained`` hold.
    precision : "exact", "int8" or "blas"
        As in `pack_`.

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If names or shapes differ, or the module has a buffer on the device "meta" that is in no file. The module is
        then as it was, but for layers that were packed: these are unpacked.
    """
    require_module(module)
    model: Mapping[str, Weight] = load(path)
    unpack_(module)
    names = names_in(module, list(model))
    model = {names[name]: tensor for name, tensor in model.items()}
    fill_(module, model, precision, str(path))


def fill_(module: torch.nn.Module, model: Mapping[str, Weight], precision: Precision, path: str | None = None) -> None:
    """Give the weights of a model to a module that is not packed; see `load_`.

    With a path, all names must be the same, or the error names it.
    """
    persistent = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in persistent:
            raise ValueError(f"module: {name!r} is on the device 'meta', and no file holds it; make it on the CPU")
    places = {place.name: place for place in places_of(module)}
    alias = {
        other: name
        for other, param in module.named_parameters(remove_duplicate=False)
        for name, place in places.items()
        if place.weight is param
    }
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    found: dict[str, tuple[Weight, bool]] = {}
    unexpected: list[str] = []
    for name, tensor in model.items():
        transposed = name.endswith(TRANSPOSED) and name not in alias and name not in buffers
        plain = alias.get(name.removesuffix(TRANSPOSED) if transposed else name, name)
        if plain in places or plain in buffers:
            found.setdefault(plain, (tensor, transposed))
        else:
            unexpected.append(name)
    missing = sorted((places.keys() | buffers.keys()) - found.keys())
    if path is not None and (missing or unexpected):
        raise ValueError(f"{path}: expected the names of the module; missing {missing}, unexpected {unexpected}")
    for name, (tensor, transposed) in found.items():
        shape = tuple((places[name].weight if name in places else buffers[name]).shape)
        got = tuple(tensor.shape[::-1]) if transposed else tuple(tensor.shape)
        if got != shape:
            raise ValueError(f"{path or 'model'}: {name!r}: expected shape {shape}, got {got}")

    if _leave_meta(module):
        places = {place.name: place for place in places_of(module)}
        buffers = dict(module.named_buffers())
    for name, (tensor, transposed) in found.items():
        place = places.get(name)
        if (
            isinstance(tensor, PackedTensor)
            and place is not None
            and not place.obstacle
            and place.transposed == transposed
            and _holds(place, tensor)
        ):
            place.hold(tensor, precision)
            continue
        dense = unpacked(tensor)
        target = buffers[name] if place is None else place.weight
        with torch.no_grad():
            target.copy_(tensor_of(dense.T if transposed else dense))


def _leave_meta(module: torch.nn.Module) -> bool:
    """Give memory to what is on the device "meta"; return whether anything was. What is tied stays tied."""
    found = False
    for place in list(places_of(module)):
        if place.weight.is_meta:
            found = True
            made = torch.nn.Parameter(torch.empty_like(place.weight, device="cpu"), place.weight.requires_grad)
            for name, owner in place.owners:
                owner._parameters[name] = made
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_meta:
                found = True
                child._buffers[name] = torch.empty_like(buffer, device="cpu")
    return found


def _holds(place: _Place, tensor: PackedTensor) -> bool:
    """Return whether the layers of a parameter can use a packed tensor: an embedding takes no sparse one."""
    embedded = any(isinstance(owner, PackedEmbedding | torch.nn.Embedding) for _, owner in place.owners)
    return isinstance(tensor, QuantizedTensor) or not embedded


_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def require_module(module: Any) -> None:
    """Raise unless `module` is one of torch."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
