"""Packed tensors as arrays of a file, and back."""

import json
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastopt._checks import require_bits, require_group_size
from fastopt._text import shown
from fastopt._types import FLOATS, Array
from fastopt.files.safetensors_file import DTYPES, MOST_OF_ONE_BYTE, PAD, MappedFile, as_shape, parse_json
from fastopt.tensors.packed import Weight, unpacked
from fastopt.tensors.quantized import Outliers, QuantizedTensor
from fastopt.tensors.sparse import SparseTensor
from fastopt.tensors.sparse_layout import BLOCK, require_layout

FORMAT_VERSION = 3  # 1 had no padding and no recipe, 2 had 8, 4 and 2 bits only
_FLOATS = {dtype.name: dtype for dtype in DTYPES.values() if dtype.name in FLOATS}
# The metadata key of a checkpoint, which `load` refuses.
CHECKPOINT = "fastopt.checkpoint"


class Content(NamedTuple):
    """Everything that a file holds: its tensors, the recipe that made them, and texts of other programs."""

    tensors: dict[str, Weight]
    recipe: dict[str, Any] | None
    metadata: dict[str, str]


def disassemble(name: str, tensor: Weight) -> tuple[dict[str, Array], dict[str, Any] | None]:
    """Return the arrays that store a tensor, and its description in the metadata: None if it is a plain array."""
    if isinstance(tensor, QuantizedTensor):
        arrays, entry = _disassemble_quantized(name, tensor)
        return arrays, {**entry, "shape": tensor.shape}
    if not isinstance(tensor, SparseTensor):
        return {name: unpacked(tensor)}, None
    arrays = {f"{name}.positions": tensor.positions, f"{name}.row_offsets": tensor.row_offsets}
    entry = {"kind": "sparse", "layout": tensor.layout, "shape": tensor.shape}
    if not isinstance(tensor.values, QuantizedTensor):
        return {**arrays, f"{name}.values": tensor.values}, entry
    values, entry["values"] = _disassemble_quantized(f"{name}.values", tensor.values)
    return {**arrays, **values}, entry


def _disassemble_quantized(name: str, q: QuantizedTensor) -> tuple[dict[str, Array], dict[str, Any]]:
    arrays = {f"{name}.codes": q.codes, f"{name}.scale": q.scale, f"{name}.minimum": q.minimum}
    entry = {"kind": "quantized", "bits": q.bits, "group_size": q.group_size, "dtype": q.dtype.name}
    if q.param_floats is not None:
        arrays[f"{name}.param_floats"] = q.param_floats
        entry |= {"param_bits": q.param_bits, "param_group": q.param_group}
    if q.outliers is not None:
        arrays |= {f"{name}.outlier_index": q.outliers.indices, f"{name}.outlier_value": q.outliers.values}
        entry["outliers"] = len(q.outliers.indices)
    return arrays, entry


def describe(
    order: Iterable[str],
    entries: Mapping[str, Any],
    recipe: Mapping[str, Any] | None,
    tied: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the metadata of a file.

    Parameters
    ----------
    order : iterable of str
        All names, in the order of the model.
    entries : mapping
        The descriptions of the tensors that are not plain arrays.
    recipe : mapping or None
    tied : mapping of str, optional
        Names that are stored under another name.
    metadata : mapping of str, optional
        Texts of other programs.
    """
    about = {"version": FORMAT_VERSION, "order": list(order), "tensors": entries}
    if tied:
        about["tied"] = dict(tied)
    if recipe is not None:
        about["recipe"] = dict(recipe)
    return {**others(metadata or {}), "fastopt": json.dumps(about, ensure_ascii=False, separators=(",", ":"))}


def others(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of other programs."""
    return {key: text for key, text in metadata.items() if not key.startswith("fastopt")}


def tied_names(metadata: Mapping[str, str], stored: Container[str]) -> dict[str, str]:
    """Return the names of a plain file that are stored under another one, as safetensors' `save_model` writes them."""
    return {name: to for name, to in metadata.items() if to in stored and name not in stored}


def assemble(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> Content:
    """Return the content of a file with these arrays and metadata; raise ValueError if they contradict each other."""
    if "fastopt" not in metadata:
        tensors: dict[str, Weight] = {name: array for name, array in arrays.items() if not name.startswith(PAD)}
        tied = tied_names(metadata, tensors)
        _add_tied(tensors, tied)
        return Content(tensors, None, {key: text for key, text in others(metadata).items() if key not in tied})
    try:
        tensors, recipe = _assemble(metadata["fastopt"], arrays)
        return Content(tensors, recipe, others(metadata))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def require_readable(file: MappedFile) -> None:
    """Raise unless `assemble` accepts a file: a writer's last check before the file replaces another."""
    try:
        _assemble(file.metadata["fastopt"], {name: file.array(name) for name in file.stored})
    except (TypeError, ValueError) as error:
        raise ValueError(f"tensors: no reader would accept them: {error}") from error


def _assemble(text: str, arrays: Mapping[str, Array]) -> tuple[dict[str, Weight], dict[str, Any] | None]:
    """Return the tensors that the metadata describes, and the recipe."""
    description = _Object(parse_json(text), "metadata")
    version = description.get("version", int)
    if not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"metadata: expected format version 1 to {FORMAT_VERSION}, got {version}")
    recipe = description.get("recipe", dict) if "recipe" in description else None
    rest = {name: array for name, array in arrays.items() if version == 1 or not name.startswith(PAD)}

    def take(name: str) -> Array:
        if name not in rest:
            raise ValueError(f"{name!r} is missing, or belongs to two tensors")
        return rest.pop(name)

    def quantized(name: str, entry: _Object, shape: tuple[int, ...]) -> QuantizedTensor:
        group_size = entry.get("group_size", int, type(None))
        bits = require_bits(entry.get("bits", int))
        dtype = entry.get("dtype", str)
        if dtype not in _FLOATS:
            raise ValueError(f"dtype: expected one of {sorted(_FLOATS)}, got {shown(dtype)}")
        codes, scale, minimum = take(f"{name}.codes"), take(f"{name}.scale"), take(f"{name}.minimum")
        group = require_group_size(group_size, bits)
        outliers = None
        if "outliers" in entry:
            outliers = Outliers(take(f"{name}.outlier_index"), take(f"{name}.outlier_value"))
            if outliers.indices.shape != (entry.get("outliers", int),):
                raise ValueError(f"outliers: expected {entry.get('outliers', int)}, got shape {outliers.indices.shape}")
        own = codes, scale, minimum, bits, group, shape, _FLOATS[dtype], outliers
        if "param_bits" not in entry:
            return QuantizedTensor(*own)
        floats = take(f"{name}.param_floats")
        return QuantizedTensor(*own, entry.get("param_bits", int), entry.get("param_group", int), floats)

    def sparse(name: str, entry: _Object, shape: tuple[int, ...]) -> SparseTensor:
        layout = require_layout(entry.get("layout", str))
        positions, row_offsets = take(f"{name}.positions"), take(f"{name}.row_offsets")
        values: Array | QuantizedTensor
        if "values" in entry:
            if row_offsets.dtype != np.int64 or row_offsets.size == 0:
                raise ValueError("row_offsets: expected int64, at least one")
            count = int(row_offsets[-1]) * (BLOCK if layout == "1x16" else 1)
            if not 0 <= count < 1 << 59:
                raise ValueError("row_offsets: expected to rise from 0")
            values = quantized(f"{name}.values", _Object(entry.get("values", dict), "values"), (count,))
        else:
            values = take(f"{name}.values")
        return SparseTensor(layout, positions, row_offsets, values, shape)

    kinds: dict[str, Callable[..., Weight]] = {"quantized": quantized, "sparse": sparse}
    packed: dict[str, Weight] = {}
    for name, raw in description.get("tensors", dict).items():
        try:
            entry = _Object(raw, "entry")
            kind = entry.get("kind", str)
            if kind not in kinds:
                raise ValueError(f"kind: expected one of {sorted(kinds)}, got {shown(kind)}")
            packed[name] = kinds[kind](name, entry, as_shape(entry.get("shape", list), "shape"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name!r}: {error}") from error
    both = sorted(packed.keys() & rest.keys())
    if both:
        raise ValueError(f"{both[0]!r} is stored both packed and plain")
    tensors: dict[str, Weight] = {**rest, **packed}
    if "tied" in description:
        _add_tied(tensors, description.get("tied", dict))
    order = description.get("order", list)
    if not all(isinstance(name, str) for name in order) or sorted(order) != sorted(tensors):
        raise ValueError("metadata: order does not name the tensors of the file")
    return {name: tensors[name] for name in order}, recipe


def _add_tied(tensors: dict[str, Weight], tied: Mapping[str, Any]) -> None:
    """Add the names that are stored under another one, or raise if that is not there."""
    most = MOST_OF_ONE_BYTE * sum(tensor.nbytes for tensor in tensors.values())
    stored = dict(tensors)
    for name, to in tied.items():
        if not isinstance(to, str) or to not in stored or name in stored:
            raise ValueError(f"tied: {name!r}: expected another name of a stored tensor, got {shown(to)}")
        tensors[name] = stored[to]
        most -= stored[to].nbytes
    if most < 0:
        raise ValueError(f"tied: expected names of at most {MOST_OF_ONE_BYTE} times the bytes of the tensors")


class _Object:
    """A JSON object of an untrusted file, whose values are read with the types that they must have."""

    def __init__(self, raw: Any, what: str) -> None:
        if not isinstance(raw, dict):
            raise ValueError(f"{what}: expected a JSON object, got {type(raw).__name__}")
        self._raw = raw

    def __contains__(self, key: str) -> bool:
        return key in self._raw

    def get(self, key: str, *types: type) -> Any:
        value = self._raw.get(key)
        if not isinstance(value, types) or isinstance(value, bool):
            raise ValueError(f"{key}: expected {' or '.join(t.__name__ for t in types)}, got {shown(value)}")
        return value
