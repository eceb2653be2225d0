"""Whole models: a mapping of arrays in, a mapping of packed tensors out, and the file that holds it.

The file is safetensors. A tensor NAME that is quantized is stored as NAME.codes, NAME.scale and NAME.minimum; a sparse
one as NAME.positions, NAME.row_offsets and NAME.values (or NAME.values.codes ... where the values are quantized). One
JSON text under ``__metadata__["fastopt"]`` says what each is; any reader of safetensors opens the file. docs/format.md
specifies it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from fastopt._text import html_table, shape_text, size_text, storage_text
from fastopt._types import Array, PathLike
from fastopt.files.container import CHECKPOINT, assemble, describe, disassemble, require_readable
from fastopt.files.safetensors_file import Part, file_nbytes, part_of, read_arrays, write
from fastopt.files.shards import is_placed_in, opened_shards
from fastopt.files.sources import READERS, is_safetensors, model_files, naming_formats, open_weights
from fastopt.files.torch_files import without_tensors
from fastopt.files.weights import Weights, stored_of, tied_in
from fastopt.models.bias import BiasCorrection
from fastopt.models.calibration import CALIBRATION
from fastopt.models.choose import Check, make_to_fit
from fastopt.models.recipe import (
    Recipe,
    RecipeOptions,
    naming_tensor,
    pack_tensor,
    recipe_of,
    same_options,
    warn_if_nothing_is_packed,
    warn_of_overrides,
)
from fastopt.models.report import Report, Reporter
from fastopt.tensors.packed import PackedTensor, Weight, storage_of, unpacked

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Files of other formats, whose tensors are never packed.
NOT_PACKED = (".npz", ".npy", ".pt", ".pth", ".bin", ".keras", ".hdf5")


class PackedModel(Mapping[str, Weight]):
    """A model as a mapping from name to array, `QuantizedTensor` or `SparseTensor`.

    Made by `pack` or `load`.

    Parameters
    ----------
    tensors : mapping
    recipe : Recipe, optional
        The recipe that packed them.
    metadata : mapping of str, optional
        Texts of other programs that go with the model, such as its licence.
    """

    def __init__(
        self,
        tensors: Mapping[str, Weight],
        recipe: Recipe | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.recipe = recipe
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> Weight:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"PackedModel({len(self)} tensors, {self.nbytes:,} bytes)"

    def _repr_html_(self) -> str:
        rows = []
        for name, w in self.items():
            per_weight = f"{8 * w.nbytes / max(math.prod(w.shape), 1):.2f}"
            rows.append(
                [
                    name,
                    shape_text(w.shape),
                    storage_text(*storage_of(w), getattr(w, "param_bits", None)),
                    per_weight,
                    size_text(w.nbytes),
                ]
            )
        return html_table(repr(self), ["tensor", "shape", "stored", "bits/w", "size"], rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; one with several names counts once."""
        tied = self._tied()
        return sum(tensor.nbytes for name, tensor in self._tensors.items() if name not in tied)

    def unpack(self) -> dict[str, Array]:
        """Return all tensors as plain arrays of their original shapes and dtypes.

        Returns
        -------
        dict of arrays
            Tensors that were not packed are returned as they are, without a copy.
        """
        return {name: unpacked(tensor) for name, tensor in self._tensors.items()}

    def report(self, weights: Any = None) -> Report:
        """Return how each tensor is stored, its size, and its error.

        Parameters
        ----------
        weights : mapping from name to array or packed tensor, or what `pack` takes beside these, optional
            The originals. Errors are measured for the names that it has.

        Returns
        -------
        Report

        Raises
        ------
        TypeError, ValueError
            If `weights` is nothing that `pack` takes, or an original has another shape.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> weights = {"w": 15 * np.eye(64, dtype=np.float32), "b": np.zeros(64, dtype=np.float32)}
        >>> for tensor in fo.pack(weights, bits=4).report(weights).tensors:
        ...     print(tensor.name, tensor.kind, tensor.nbytes, tensor.error.max, tensor.reason)
        w quantized 2560 0.0 for all
        b dense 256 0.0 64 weights, fewer than min_size 4096
        """
        if isinstance(weights, str | os.PathLike):
            weights = open_weights(weights)
        elif isinstance(weights, Mapping):
            weights = without_tensors(weights)
        elif weights is not None:
            weights = _imported(weights).weights
        reporter, tied = Reporter(self.recipe), self._tied()
        for name, tensor in self._tensors.items():
            reason = self.recipe.of(name, tensor.shape, tensor.dtype)[1] if self.recipe else ""
            original = None if weights is None or name not in weights else stored_of(weights, name)
            with naming_tensor(name):
                if name in tied:
                    reporter.add_tied(name, tied[name])
                elif original is None:
                    reporter.add(name, tensor, None, reason)
                else:
                    reporter.add(name, tensor, unpacked(original), reason, nbytes_before=original.nbytes)
        return reporter.report()

    def save(self, path: PathLike) -> None:
        """Write the model to one safetensors file.

        The file is written beside its place, read back, and moved there when it is complete and on the disk: whatever
        happens, there is either the old file or the new one. A process that is killed may leave ``.NAME.*.part``, which
        the next save to this path removes. The same model makes the same bytes.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        OSError
            If the file cannot be written, or `path` is a folder, a pipe or a device.
        TypeError, ValueError
            If a tensor has a dtype that the file cannot hold, or two tensors would be stored under one name.
        """
        write(path, *self._content(), require_readable)

    def _content(self) -> tuple[list[Part], dict[str, str]]:
        """Return the parts and the metadata of the file."""
        parts: list[Part] = []
        entries: dict[str, Any] = {}
        tied = self._tied()
        for name, tensor in self._tensors.items():
            if name in tied:
                continue
            arrays, entry = disassemble(name, tensor)
            parts += [part_of(stored, array) for stored, array in arrays.items()]
            if entry is not None:
                entries[name] = entry
        recipe = None if self.recipe is None else self.recipe.to_dict()
        return parts, describe(self._tensors, entries, recipe, tied, self.metadata)

    def _tied(self) -> dict[str, str]:
        return tied_in(self._tensors, self._tensors)


class Imported(NamedTuple):
    """An object of another library, such as a Keras model, as `pack` takes it.

    Attributes
    ----------
    weights : PackedModel
        Its arrays, with metadata.
    options : dict
        Options of `Recipe` that hold unless the caller gives others.
    finish : callable
        Makes the result of `pack` from the packed model.
    """

    weights: PackedModel
    options: dict[str, Any]
    finish: Callable[[PackedModel], PackedModel]


# Each returns None for an object that it does not know. The layer above fills it.
IMPORTERS: list[Callable[[Any], Imported | None]] = []

# Metadata that say that a file holds the packed weights of such an object, and the function that makes `pack`'s result
# of the model that was loaded.
RESTORERS: dict[str, Callable[[PackedModel], PackedModel]] = {}


@overload
def pack(
    weights: Mapping[str, Weight] | PathLike,
    recipe: Recipe | None = None,
    *,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    **options: Unpack[RecipeOptions],
) -> PackedModel: ...
@overload
def pack(  # a model of another framework: the result has methods of its own
    weights: Any,
    recipe: Recipe | None = None,
    *,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    **options: Unpack[RecipeOptions],
) -> Any: ...
def pack(
    weights: Mapping[str, Weight] | PathLike | Any,
    recipe: Recipe | None = None,
    *,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    **options: Unpack[RecipeOptions],
) -> PackedModel:
    """Pack the tensors of a model: quantized, sparse, or both.

    A tensor that is packed already stays as it is, unless the recipe selects it and asks for other bits or groups, or
    prunes it. Then it is packed from its decoded values, which are also those that errors are measured against. A
    sparse tensor whose values are quantized stays sparse: zeros stay zero.

    Parameters
    ----------
    weights : mapping from name to array or packed tensor, path-like, Keras model or estimator of scikit-learn
        A dict, also a state dict of torch, a `PackedModel`, the result of `open_weights`, or the path of a file that
        `open_weights` opens. A Keras model is packed by the paths of its variables, and the result has the method
        ``assign(model)``. An estimator of scikit-learn with ``coef_`` or ``coefs_`` gives a model that predicts, see
        Notes.
    recipe : Recipe, optional
        All options in one object, instead of the keywords below.
    target_bits : float, optional
        Choose bits and group size of each tensor by its error, so that the model has this many bits per weight at
        most, as `choose_bits` does.
    target_size : int or str, optional
        The same for the bytes of the saved model, as ``12_000_000`` or ``"12MB"``.
    **options
        The fields of `Recipe`: `bits`, `group_size`, `param_dtype`, `param_bits`, `param_group`, `fit`, `outliers` and
        `importance` as in `quantize`; `threshold`, `sparsity` and `pattern` as in `prune`; `include`, `exclude`,
        `overrides` and `min_size` select tensors by name and size. With `bits` and a pruning option the non-zeros are
        quantized. `calibration` makes the errors of the outputs small instead of those of the weights. `preset`,
        "small", "balanced" or "safe", gives those of these options that are not given; "Choosing bits" in the
        documentation shows what each costs.

    Returns
    -------
    PackedModel

    Raises
    ------
    TypeError, ValueError
        If an option is unknown or out of range, or a tensor has NaN or infinity; the message names it.

    Warns
    -----
    UserWarning
        If no tensor is packed: because nothing is asked for, or all are too small or excluded. If a pattern of
        `overrides` matches no tensor.

    Notes
    -----
    The kernels of Keras and ``coefs_`` of scikit-learn are [in, out] and are turned to [out, in], as fastopt has
    weights. ``metadata`` say which were turned.

    An estimator gives a model with its methods ``predict``, ``predict_proba``, ``decision_function`` and ``score``,
    which are scikit-learn's own and multiply with the packed weights. All of its coefficients are packed, however few
    they are, and intercepts are kept, unless options say otherwise.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> weights = {"fc.weight": np.eye(64, dtype=np.float32), "fc.bias": np.zeros(64, dtype=np.float32)}
    >>> fo.pack(weights, bits=4)
    PackedModel(2 tensors, 2,816 bytes)
    """
    finish: Callable[[PackedModel], PackedModel] | None = None
    if isinstance(weights, str | os.PathLike):
        weights = open_weights(weights)
    elif isinstance(weights, Mapping):
        weights = without_tensors(weights)
    else:
        weights, defaults, finish = _imported(weights)
        options = options if recipe is not None else {**defaults, **options}  # type: ignore[typeddict-item]
    recipe = recipe_of(recipe, options)
    warn_of_overrides(recipe, weights)
    source: Mapping[str, Weight] = weights
    tied = tied_in(source._tensors if isinstance(source, PackedModel) else source, source)

    def make(chosen: Recipe, check: Check) -> PackedModel:
        made: dict[str, tuple[Weight, str]] = {}
        biases = BiasCorrection(chosen, [*source])
        for name in biases.order:
            if name in tied and same_options(source, name, tied[name], chosen):
                made[name] = made[tied[name]]
            else:
                stored = stored_of(source, name)
                made[name] = pack_tensor(name, stored, chosen)
                if chosen.bias_correction:
                    made[name] = biases.add(name, unpacked(stored), *made[name])
        made = {name: made[name] for name in source}
        made.update((name, (bias, reason)) for name, bias, reason in biases.rest())
        warn_if_nothing_is_packed(chosen, [(isinstance(tensor, PackedTensor), why) for tensor, why in made.values()])
        tensors = {name: tensor for name, (tensor, _) in made.items()}
        model = PackedModel(tensors, chosen, getattr(source, "metadata", None))
        check(model.nbytes, 0 if target_size is None else file_nbytes(*model._content()))
        return model

    packed = make_to_fit(source, recipe, make, target_bits=target_bits, target_size=target_size)
    return (finish or _restored)(packed)


def _imported(model: Any) -> Imported:
    for importer in IMPORTERS:
        found = importer(model)
        if found is not None:
            return found
    torch = any(cls.__module__.partition(".")[0] == "torch" for cls in type(model).__mro__)
    raise TypeError(
        "weights: expected a mapping from name to array, a path, a Keras model or an estimator of scikit-learn, "
        f"got {type(model).__name__}{'; fastopt.torch.pack_ packs modules of torch' * torch}"
    )


def open_model(path: PathLike, *, key: str | None = None, skip: str | Iterable[str] = ()) -> PackedModel | Weights:
    """Open a file or folder in any format that `open_weights` reads, with its options; packed tensors stay packed."""
    found = model_files(Path(path))
    if isinstance(found, list) or not is_safetensors(found):
        return open_weights(path, key=key, skip=skip).as_stored()
    if not skip and key is None:
        with naming_formats(found):
            return load(found)
    weights = open_weights(found, key=key, skip=skip)
    return PackedModel({name: stored_of(weights, name) for name in weights}, metadata=weights.metadata)


def load(path: PathLike) -> PackedModel:
    """Map a model that `PackedModel.save` or `pack_file` wrote, or any safetensors file, into memory.

    Nothing is copied: tensors are read-only views of the file, and the kernels read it where it lies. Everything that
    the file says is checked before it is trusted. While it is mapped it may be replaced, as `save` does, but must not
    be changed in place.

    Parameters
    ----------
    path : path-like
        A safetensors file, the ``.index.json`` of one in shards, or a folder with one of them.

    Returns
    -------
    PackedModel

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not a safetensors file, it is a checkpoint, or its content is inconsistent; the message says where.
    """
    found = model_files(Path(path))
    if isinstance(found, list) or (found != Path(path) and not is_safetensors(found)):
        raise ValueError(f"{path}: holds no safetensors file; open_weights reads other formats")
    path = found
    if not path.name.endswith(".index.json"):
        try:
            return _restored(_model_of(path, *read_arrays(path)))
        except ValueError as error:
            if path.suffix in READERS and "not a safetensors file" in str(error):
                raise ValueError(f"{error}; fastopt.open_weights and fastopt.pack read it") from error
            raise
    tensors: dict[str, Weight] = {}
    recipe = None
    others: dict[str, str] = {}
    opened = opened_shards(path, read_arrays)
    placed = {name: shard for shard, (_, names) in opened.items() for name in names}
    for shard, ((arrays, metadata), names) in opened.items():
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"{path}: {missing[0]!r} is not in {shard}")
        model = _model_of(path.parent / shard, arrays, metadata)
        for name, tensor in model.items():
            if is_placed_in(shard, disassemble(name, tensor)[0], placed):
                if name in tensors:
                    raise ValueError(f"{path}: {name!r} is in two shards")
                tensors[name] = tensor
        recipe = recipe or model.recipe
        others = {**model.metadata, **others}
    return _restored(PackedModel(tensors, recipe, others))


def _restored(model: PackedModel) -> PackedModel:
    for name, restore in RESTORERS.items():
        if name in model.metadata:
            return restore(model)
    return model


def _model_of(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> PackedModel:
    if CHECKPOINT in metadata:
        raise ValueError(f"{path}: is a checkpoint, not a model; read it with fastopt.load_checkpoint")
    if CALIBRATION in metadata:
        raise ValueError(f"{path}: is a calibration, not a model; read it with fastopt.Calibration.load")
    tensors, recipe, others = assemble(path, arrays, metadata)
    try:
        return PackedModel(tensors, None if recipe is None else Recipe.from_dict(recipe), others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
