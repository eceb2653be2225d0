"""Weights of Keras: files through h5py, without Keras or TensorFlow, and models in memory.

Keras stores a kernel as [in, out], and that of a convolution as [..., in, out]. Here they are [out, in, ...], as
everywhere in fastopt. Metadata say which axes were turned, so that `fastopt.formats.keras` turns them back.

A file in the layout of Keras 3 numbers the variables of a layer, and names the layer by its class:
``layers/conv2d_1/vars/0``. The older layout has names: ``conv2d_1/conv2d_1/kernel:0``.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from fastopt._text import shown
from fastopt._types import Array
from fastopt.files.atomic import open_regular
from fastopt.files.numpy_files import sound, zip_archive
from fastopt.files.safetensors_file import MOST_OF_ONE_BYTE
from fastopt.files.weights import Source
from fastopt.formats.common import require_package
from fastopt.models.model import Imported, PackedModel
from fastopt.tensors.packed import Weight, unpacked

METADATA = "keras"
MEMBER = "model.weights.h5"  # of a .keras file
_DEEPEST, _MOST = 64, 1_000_000  # groups in groups, and objects of a file
_LONGEST_CONFIG = 100_000_000

Axes = tuple[int, ...]


@dataclass
class Layout:
    """The parts of a file besides its arrays, so that it can be written again.

    Attributes
    ----------
    turned : dict from name to axes
        The axes of the file in the order in which the array has them here.
    groups : dict from path to attributes
        Texts, and lists of texts, of each group.
    """

    turned: dict[str, Axes] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def numbers(self) -> bool:
        """True if variables are numbered, as Keras 3 does, and not named."""
        return "layer_names" not in self.groups.get("", {}) and "layer_names0" not in self.groups.get("", {})

    def to_json(self) -> str:
        """Return all of it as a text."""
        return json.dumps({"turned": self.turned, "groups": self.groups})

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Return what `to_json` wrote, or raise ValueError."""
        try:
            found = json.loads(text)
            turned = {name: tuple(axes) for name, axes in found["turned"].items()}
            if not all(sorted(axes) == list(range(len(axes))) for axes in turned.values()):
                raise ValueError("expected axes")
            groups = {path: dict(attributes) for path, attributes in found["groups"].items()}
            return cls(turned, groups)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ValueError(f"metadata: {METADATA!r} is not what a file of Keras left: {error}") from error


# ---- which axes are turned ----------------------------------------------------------------------------------------


# The variables that a class of layers numbers, where they are not kernel and bias.
_VARIABLES = {
    "separable_conv": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "embedding": ("embeddings",),
    "cell": ("kernel", "recurrent_kernel", "bias"),
}
_KERNELS = re.compile(
    r"dense|einsum_dense|query|key|value|attention_output|cell|(lstm|gru|simple_rnn|conv_lstm\d?d?)_cell"
    r"|(separable_|depthwise_)?conv(\d?d)?(_transpose)?|convolution\dd"
)
_AXES_OF_EINSUM = {"query": (1, 2, 0), "key": (1, 2, 0), "value": (1, 2, 0), "attention_output": (2, 0, 1)}


def turned_axes(
    kind: str, variable: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, equation: str | None = None
) -> Axes | None:
    """Return the axes of a variable in the order [out, in, ...]; None if it stays as it is.

    Parameters
    ----------
    kind : str
        The class of the layer in snake case, or its name if the class is not known.
    variable : str
        Its name, as "kernel".
    shape : tuple of int
    bias : tuple of int, optional
        The shape of the bias beside it.
    equation : str, optional
        The equation of an EinsumDense layer.
    """
    axes = tuple(range(len(shape)))
    if not variable.endswith("kernel") or len(axes) < 2:
        return None
    if kind == "einsum_dense" or equation is not None:
        found = _axes_of_equation(equation or "")
        if found is not None and len(found) == len(axes):
            return found
        if kind == "einsum_dense":
            return None
    if kind in _AXES_OF_EINSUM and len(axes) == 3:
        return _AXES_OF_EINSUM[kind]
    window, (one, other) = axes[:-2], axes[-2:]
    if kind.startswith("depthwise") or variable == "depthwise_kernel":
        return (one, other, *window)
    transposed = "transpose" in kind or (
        bias is not None and len(axes) > 2 and bias == shape[-2:-1] and bias != shape[-1:]
    )
    return (one, other, *window) if transposed else (other, one, *window)


def _axes_of_equation(equation: str) -> Axes | None:
    """Return the axes of the kernel of an EinsumDense layer: first those of its output."""
    match = re.fullmatch(r"([\w.]*),(\w+)->([\w.]*)", equation.replace(" ", ""))
    if match is None:
        return None
    kernel, result = match[2], match[3]
    outputs = [axis for axis, letter in enumerate(kernel) if letter in result]
    return (*outputs, *(axis for axis in range(len(kernel)) if axis not in outputs))


def _snake(name: str) -> str:
    """Return the name that Keras makes of a class."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _without_number(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


# ---- files --------------------------------------------------------------------------------------------------------


def keras_sources(
    path: Path, skipped: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, Source], dict[str, str]]:
    """Return the weights of a ``.keras`` or ``.h5`` file but those of the optimizer, and what else is in it.

    Parameters
    ----------
    path : Path
    skipped : callable
        Says of a name whether it is left out.

    Returns
    -------
    sources : dict from name to Source
    metadata : dict of str

    Raises
    ------
    ImportError
        If h5py is not installed.
    OSError
        If the file cannot be opened.
    ValueError
        If it is not such a file, or not sound, or has links to other files.
    """
    try:
        require_package("h5py")
    except ImportError as error:
        raise ImportError(f"{path}: {error}") from error
    import h5py

    what = f"{path}: not a sound file of Keras"
    content, size, config = _opened(path)
    opened = _Opened()
    try:
        with sound(what):
            file = h5py.File(content, "r")
            opened.close_later(file, content)
            root, config = _root(file, config, what)
            layout, sources = _walked(root, what, skipped, _kinds(config), opened)
    except BaseException:
        content.close()
        raise
    left = MOST_OF_ONE_BYTE * size
    for name, source in sources.items():
        left -= source.nbytes
        if left < 0:
            raise ValueError(f"{path}: {name!r} takes {source.nbytes} bytes, the file has {size}; skip leaves it out")
    return sources, {METADATA: layout.to_json()}


class _Opened:
    """An open file, which is closed when nobody holds this object any more."""

    def close_later(self, *files: Any) -> None:
        for file in files:
            weakref.finalize(self, file.close)


def _opened(path: Path) -> tuple[IO[bytes], int, str]:
    """Return the HDF5 file, the bytes of all, and the config of the model as far as it is in a zip archive."""
    file = open_regular(path)
    size = os.fstat(file.fileno()).st_size
    start = file.read(2)
    file.seek(0)
    if start != b"PK":
        return file, size, ""
    file.close()
    archive, what = zip_archive(path, "a .keras file"), f"{path}: not a .keras file"
    names = {info.filename: info for info in archive.infolist()}
    if MEMBER not in names:
        raise ValueError(f"{what}: has no {MEMBER}")
    config = ""
    if "config.json" in names and names["config.json"].file_size <= _LONGEST_CONFIG:
        with sound(what), archive.open("config.json") as member:
            config = member.read(_LONGEST_CONFIG).decode()
    info = names[MEMBER]
    if info.file_size > MOST_OF_ONE_BYTE * (info.compress_size + 1):
        raise ValueError(f"{what}: {MEMBER!r} has {info.file_size} bytes, of {info.compress_size} compressed")
    # Reading backwards in a compressed file, as HDF5 does, would decompress it again and again.
    content = io.BytesIO() if info.file_size < 1 << 26 else tempfile.TemporaryFile()  # noqa: SIM115
    with sound(what), archive.open(info) as member:
        shutil.copyfileobj(member, content, 1 << 20)
    content.seek(0)
    return content, size, config


def _root(file: Any, config: str, what: str) -> tuple[Any, str]:
    """Return the group with the weights, and the config of the model."""
    if "model_weights" not in file or "layer_names" in file.attrs:
        return file, config
    config = file.attrs.get("model_config", config)
    return _child(file, "model_weights", what), config.decode() if isinstance(config, bytes) else str(config)


def _kinds(config: str) -> dict[str, tuple[str, str | None]]:
    """Return the class of each layer by its name, and its equation if it is an EinsumDense."""
    kinds: dict[str, tuple[str, str | None]] = {}
    try:
        stack = [json.loads(config)] if config else []
    except (ValueError, RecursionError):  # names and shapes tell enough
        return kinds
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            stack += node.values()
            about = node.get("config")
            if (
                isinstance(node.get("class_name"), str)
                and isinstance(about, dict)
                and isinstance(about.get("name"), str)
            ):
                equation = about.get("equation")
                kinds[about["name"]] = (_snake(node["class_name"]), equation if isinstance(equation, str) else None)
    return kinds


def _child(group: Any, name: str, what: str) -> Any:
    """Return a member of a group, or raise if it is a link to another place."""
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{what}: {shown(name)} is a link, which is not followed")
    return group[name]


def _walked(
    root: Any,
    what: str,
    skipped: Callable[[str], bool],
    kinds: Mapping[str, tuple[str, str | None]],
    opened: _Opened,
) -> tuple[Layout, dict[str, Source]]:
    """Return all groups, and how all datasets below are read, by their paths."""
    import h5py

    layout, sources = Layout(), {}
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    seen: set[int] = set()
    while stack:
        path, group, depth = stack.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen or depth > _DEEPEST or len(seen) > _MOST:
            raise ValueError(f"{what}: {shown(path)} is nested in itself, or too deeply")
        seen.add(address)
        attributes = layout.groups[path] = _texts(group)
        children = {name: _child(group, name, what) for name in group}
        datasets = {name: child for name, child in children.items() if isinstance(child, h5py.Dataset)}
        for name, child in children.items():
            at = f"{path}/{name}" if path else name
            if at.split("/")[0] in ("optimizer", "optimizer_weights"):
                continue
            if isinstance(child, h5py.Group):
                stack.append((at, child, depth + 1))
            elif not isinstance(child, h5py.Dataset):
                raise ValueError(f"{what}: {shown(at)} is neither a group nor a dataset")
            elif not skipped(at):
                axes = _axes_in_file(path, name, datasets, attributes, kinds)
                if axes is not None:
                    layout.turned[at] = axes
                sources[at] = _source(child, axes, f"{what}: {at!r}", opened)
    return layout, dict(sorted(sources.items(), key=lambda item: _natural(item[0])))


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts numbers in names by their values."""
    parts = re.findall(r"\d+|\D+", path)
    return [(part.isdecimal(), int(part) if part.isdecimal() and len(part) < 20 else 0, part) for part in parts]


def _texts(group: Any) -> dict[str, Any]:
    """Return the attributes of a group that are texts or lists of texts."""
    found: dict[str, Any] = {}
    for name, value in group.attrs.items():
        if isinstance(value, str | bytes):
            found[name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        elif isinstance(value, np.ndarray) and value.ndim == 1 and (value.dtype.kind in "SUO" or not value.size):
            found[name] = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in value.tolist()]
    return found


def _axes_in_file(
    path: str,
    name: str,
    datasets: Mapping[str, Any],
    attributes: Mapping[str, Any],
    kinds: Mapping[str, tuple[str, str | None]],
) -> Axes | None:
    steps = path.split("/")
    shape = datasets[name].shape
    if steps[-1] != "vars":  # the older layout, with names
        variable = name.partition(":")[0]
        bias = next((d.shape for other, d in datasets.items() if other.partition(":")[0] == "bias"), None)
        own = next((s for s in reversed(steps) if s in kinds or _without_number(s) in _AXES_OF_EINSUM), steps[0])
        kind, equation = kinds.get(own, (_without_number(own), None))
        return turned_axes(kind, variable, shape, bias, equation)
    layer = attributes.get("name", "")
    kind, equation = kinds.get(layer, ("", None)) if isinstance(layer, str) else ("", None)
    if not kind:
        # In a container the path has the class of the layer, and elsewhere the attribute of its owner.
        names = [_without_number(str(layer)), _without_number(steps[-2]) if len(steps) > 1 else ""]
        if steps[-3:-2] == ["layers"]:
            names.reverse()
        kind = next((n for n in names if _KERNELS.fullmatch(n)), "")
    if names_of := next((v for known, v in _VARIABLES.items() if kind.startswith(known) or kind.endswith(known)), None):
        variable = names_of[int(name)] if name.isdecimal() and int(name) < len(names_of) else ""
        bias = None
    else:
        variable = {"0": "kernel", "1": "bias"}.get(name, "")
        bias = datasets["1"].shape if "1" in datasets else None
    # In a layer of an unknown class, a matrix with a bias for each column is a kernel.
    kernel = variable == "kernel" and bias == shape[-1:] and len(datasets) == 2 and not kind
    if not kernel and not _KERNELS.fullmatch(kind):
        return None
    return turned_axes(kind, variable, shape, bias, equation)


def _source(dataset: Any, axes: Axes | None, what: str, opened: _Opened) -> Source:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{what} is stored in another file, which is not opened; skip leaves it out")
    dtype = dataset.dtype
    brain = dtype.kind == "V" and dtype.itemsize == 2 and dataset.attrs.get("dtype") == "bfloat16"
    if brain:
        dtype = np.dtype(ml_dtypes.bfloat16)
    if dataset.shape is None or (dtype.kind not in "biufc" and not brain):
        raise ValueError(f"{what} holds {dtype}, expected numbers; skip leaves it out")
    shape = tuple(dataset.shape)
    if math.prod(max(size, 1) for size in shape) >= 1 << 59:
        raise ValueError(f"{what}: expected a shape that memory could hold, got {shape}")

    def read(keep: _Opened = opened) -> Array:
        with sound(what):
            array = np.asarray(dataset[()])
        if brain:
            array = array.view(dtype)
        return array if axes is None else np.ascontiguousarray(array.transpose(axes))

    seen = shape if axes is None else tuple(shape[axis] for axis in axes)
    return Source(seen, dtype, read)


# ---- models in memory ---------------------------------------------------------------------------------------------


class PackedKeras(PackedModel):
    """The packed weights of a Keras model, by the paths of its variables."""

    def assign(self, model: Any) -> None:
        """Assign the decoded weights to the variables of a Keras model of the same architecture.

        Parameters
        ----------
        model : keras.Model

        Raises
        ------
        ValueError
            If it has other variables.
        """
        assign(model, self)


def import_keras(model: Any) -> Imported | None:
    """Return the weights of a Keras model; None if it is no Keras model."""
    if not _is_keras(model):
        return None
    layout, arrays = Layout(), {}
    for name, variable, axes in _variables(model):
        array = np.asarray(variable.numpy() if hasattr(variable, "numpy") else variable)
        if axes is not None:
            layout.turned[name] = axes
            array = np.ascontiguousarray(array.transpose(axes))
        arrays[name] = array
    return Imported(PackedModel(arrays, metadata={METADATA: layout.to_json()}), {}, restore_keras)


def restore_keras(model: PackedModel) -> PackedModel:
    """Return a packed model with the method `PackedKeras.assign`, unless its weights came from a file of Keras."""
    with contextlib.suppress(ValueError):  # metadata from elsewhere, which only `export` has to understand
        if Layout.from_json(model.metadata[METADATA]).groups:
            return model
    return PackedKeras(dict(model), model.recipe, model.metadata)


def assign(model: Any, weights: Mapping[str, Weight]) -> None:
    """Assign weights to the variables of a Keras model, as `PackedKeras.assign` does.

    Parameters
    ----------
    model : keras.Model
    weights : mapping from path to array or packed tensor
        As `fastopt.pack` makes it from a model of the same architecture, be it loaded from a file in between.

    Raises
    ------
    ValueError
        If the model has variables of other names or shapes.
    """
    found = list(_variables(model))
    missing = [name for name, _, _ in found if name not in weights]
    if missing or len(found) != len(weights):
        extra = [name for name in weights if name not in {name for name, _, _ in found}]
        raise ValueError(f"weights: expected the variables of the model; missing {missing[:3]}, unexpected {extra[:3]}")
    values = []
    for name, variable, axes in found:
        array = unpacked(weights[name])
        back = array if axes is None or len(axes) != array.ndim else array.transpose(np.argsort(axes))
        if back.shape != tuple(variable.shape):
            raise ValueError(f"weights: {name!r} has shape {back.shape}, expected {tuple(variable.shape)}")
        values.append((variable, np.ascontiguousarray(back)))
    for variable, value in values:
        variable.assign(value)


def _is_keras(model: Any) -> bool:
    homes = (cls.__module__.partition(".")[0] for cls in type(model).__mro__)
    return hasattr(model, "weights") and any(home in ("keras", "tf_keras") for home in homes)


def _variables(model: Any) -> Iterator[tuple[str, Any, Axes | None]]:
    """Yield path, variable and turned axes of each weight."""
    layers = model._flatten_layers() if hasattr(model, "_flatten_layers") else [model]
    owners: dict[int, Any] = {}
    for layer in layers:  # an outer layer comes before those in it
        owners.update((id(variable), layer) for variable in layer.weights)
    seen: set[str] = set()
    for variable in model.weights:
        name = str(getattr(variable, "path", variable.name)).removesuffix(":0")
        while name in seen:  # as of layers that their owner made with one name
            base, _, count = name.partition("#")
            name = f"{base}#{int(count or 1) + 1}"
        seen.add(name)
        owner = owners.get(id(variable))
        kind = _snake(type(owner).__name__) if owner is not None else ""
        shape, equation = tuple(variable.shape), getattr(owner, "equation", None)
        own = name.partition("#")[0].rpartition("/")[2]
        yield name, variable, turned_axes(kind, own, shape, None, equation)
