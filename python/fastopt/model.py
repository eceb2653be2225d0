"""Whole models: a mapping of arrays in, a mapping of packed tensors out, and the file that holds it.

The file is safetensors. A tensor NAME that is quantized is stored as NAME.codes, NAME.scale and NAME.minimum; a sparse
one as NAME.positions, NAME.row_offsets and NAME.values (or NAME.values.codes ... where the values are quantized). One
JSON text under ``__metadata__["fastopt"]`` says what each is; any reader of safetensors opens the file.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastopt.linear import Weight
from fastopt.prune import prune
from fastopt.quant import GroupSize, Outliers, QuantizedTensor, quantize, require_bits, require_group_size
from fastopt.sparse import BLOCK, SparseTensor, require_layout

Array: TypeAlias = NDArray[Any]

FORMAT_VERSION = 1

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
_FLOATS = {str(_DTYPES[name]): _DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}


class PackedModel(Mapping[str, Weight]):
    """A model as a mapping from name to array, `QuantizedTensor` or `SparseTensor`.

    Made by `pack` or `load`.

    Parameters
    ----------
    tensors : mapping
    """

    def __init__(self, tensors: Mapping[str, Weight]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Weight:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"PackedModel({len(self)} tensors, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def unpack(self) -> dict[str, Array]:
        """Return all tensors as plain arrays of their original shapes and dtypes.

        Returns
        -------
        dict of arrays
            Tensors that were not packed are returned as they are, without a copy.
        """
        return {name: unpacked(tensor) for name, tensor in self._tensors.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one safetensors file.

        The file is written beside its place and moved there when it is complete and on the disk: whatever
        happens, there is either the old file or the new one.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        OSError
            If the file cannot be written.
        ValueError
            If two tensors would be stored under one name.
        """
        arrays: dict[str, Array] = {}
        entries: dict[str, Any] = {}

        def add(name: str, array: Array) -> None:
            if name in arrays:
                raise ValueError(f"tensors: two would be stored as {name!r}")
            if array.dtype.newbyteorder("=") not in _DTYPES.values():
                raise TypeError(f"tensors: {name!r} has dtype {array.dtype}, which the file cannot hold")
            arrays[name] = np.ascontiguousarray(array).reshape(array.shape)

        def add_quantized(name: str, q: QuantizedTensor) -> dict[str, Any]:
            add(f"{name}.codes", q.codes)
            add(f"{name}.scale", q.scale)
            add(f"{name}.minimum", q.minimum)
            if q.outliers is not None:
                add(f"{name}.outlier_index", q.outliers.indices)
                add(f"{name}.outlier_value", q.outliers.values)
                outliers = {"outliers": len(q.outliers.indices)}
            else:
                outliers = {}
            return {**outliers, "kind": "quantized", "bits": q.bits, "group_size": q.group_size, "dtype": str(q.dtype)}

        for name, tensor in self._tensors.items():
            if isinstance(tensor, QuantizedTensor):
                entries[name] = {**add_quantized(name, tensor), "shape": tensor.shape}
            elif isinstance(tensor, SparseTensor):
                add(f"{name}.positions", tensor.positions)
                add(f"{name}.row_offsets", tensor.row_offsets)
                entries[name] = {"kind": "sparse", "layout": tensor.layout, "shape": tensor.shape}
                if isinstance(tensor.values, QuantizedTensor):
                    entries[name]["values"] = add_quantized(f"{name}.values", tensor.values)
                else:
                    add(f"{name}.values", tensor.values)
            else:
                add(name, tensor)
        order = list(self._tensors)
        text = json.dumps({"version": FORMAT_VERSION, "order": order, "tensors": entries}, sort_keys=True)
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata={"fastopt": text})


def unpacked(tensor: Weight) -> Array:
    """Return a tensor of any kind as a plain array."""
    if isinstance(tensor, QuantizedTensor):
        return tensor.dequantize()
    return tensor.to_dense() if isinstance(tensor, SparseTensor) else tensor


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to; on success move it there, durably, else remove it."""
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory")
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            yield temporary
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(f"{target}: {error}") from error
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(
    weights: Mapping[str, Array],
    *,
    bits: int | None = None,
    group_size: GroupSize = "auto",
    param_dtype: DTypeLike = "float16",
    sparsity: float | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    min_size: int = 4096,
) -> PackedModel:
    """Pack the tensors of a model: quantized, sparse, or both.

    Parameters
    ----------
    weights : mapping from name to array
    bits : 8, 4, 2 or None
        None: do not quantize.
    group_size, param_dtype
        As in `quantize`.
    sparsity : float, optional
        Prune each tensor to this share of zeros and store it sparse; with `bits` the non-zeros are quantized.
        A tensor that has been pruned before keeps its zeros.
    include, exclude : sequences of glob patterns
        Tensors to pack, by name; the others are kept as they are.
    overrides : mapping from glob pattern to options
        Other ``bits``, ``group_size``, ``param_dtype`` or ``sparsity`` for the names that match; the first
        pattern that matches counts.
    min_size : int
        Smaller tensors are kept as they are.

    Returns
    -------
    PackedModel

    Raises
    ------
    TypeError, ValueError
        If an option is unknown or out of range, or a tensor has NaN or infinity; the message names it.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> weights = {"fc.weight": np.eye(64, dtype=np.float32), "fc.bias": np.zeros(64, dtype=np.float32)}
    >>> fo.pack(weights, bits=4)
    PackedModel(2 tensors, 2,816 bytes)
    """
    defaults: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "param_dtype": param_dtype,
        "sparsity": sparsity,
    }
    if bits is not None:
        require_bits(bits)
    tensors: dict[str, Weight] = {}
    for name, array in weights.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"weights: {name!r} is a {type(array).__name__}, expected a NumPy array")
        options = dict(defaults)
        for pattern, changed in (overrides or {}).items():
            if fnmatchcase(name, pattern):
                unknown = sorted(set(changed) - set(defaults))
                if unknown:
                    raise ValueError(f"overrides: {pattern!r} has unknown options {unknown}")
                options |= changed
                break
        wanted = any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
        if not wanted or array.size < min_size or array.dtype.name not in _FLOATS:
            tensors[name] = array
            continue
        try:
            tensors[name] = _packed(array, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name!r}: {error}") from error
    return PackedModel(tensors)


def _packed(
    array: Array, bits: int | None, group_size: GroupSize, param_dtype: DTypeLike, sparsity: float | None
) -> Weight:
    if sparsity is not None:
        pruned: SparseTensor = prune(array, sparsity=sparsity)
        return pruned if bits is None else pruned.quantize(bits, group_size=group_size)
    return array if bits is None else quantize(array, bits, group_size=group_size, param_dtype=param_dtype)


def load(path: str | os.PathLike[str]) -> PackedModel:
    """Map a model that `PackedModel.save` wrote, or any safetensors file, into memory.

    Nothing is copied: tensors are read-only views of the file, and the kernels read it where it lies. Everything that
    the file says is checked before it is trusted.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    PackedModel

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not a safetensors file, or its content does not fit together; the message says where.
    """
    arrays, metadata = read_arrays(path)
    if "fastopt" not in metadata:
        return PackedModel(arrays)
    try:
        return PackedModel(_assemble(metadata["fastopt"], arrays))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays of a safetensors file as views of it, and its metadata; raise as `load` does."""
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(8)
    try:
        # The library checks the header: its length, its JSON, and that tensors fill the file without overlap or hole.
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            specs = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            stored = [(name, spec.get_dtype(), tuple(spec.get_shape())) for name, spec in specs]
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    return _map(path, 8 + int.from_bytes(head, "little"), stored), metadata


def _map(path: Path, start: int, stored: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, Array]:
    """Return views of a file whose tensors follow each other from `start`."""
    size = path.stat().st_size
    content = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    arrays: dict[str, Array] = {}
    for name, dtype_name, shape in stored:
        dtype = _DTYPES.get(dtype_name)
        if dtype is None:
            raise ValueError(f"{path}: {name!r} has dtype {dtype_name}, which NumPy does not have")
        end = start + math.prod(shape) * dtype.itemsize
        if end > size:
            raise ValueError(f"{path}: {name!r} ends at byte {end} of {size}")
        array = np.asarray(content[start:end]).view(dtype).reshape(shape)
        # Files of other writers may place a tensor on an address that its dtype does not allow.
        arrays[name] = array if array.flags.aligned else array.copy()
        start = end
    return arrays


def _assemble(text: str, arrays: dict[str, Array]) -> dict[str, Weight]:
    """Put the tensors together that the metadata describes."""
    try:
        described = json.loads(text)
    except RecursionError as error:
        raise ValueError("metadata: nested too deeply") from error
    description = _Object(described, "metadata")
    version = description.get("version", int)
    if version != FORMAT_VERSION:
        raise ValueError(f"metadata: expected format version {FORMAT_VERSION}, got {version}")
    rest = dict(arrays)

    def take(name: str) -> Array:
        if name not in rest:
            raise ValueError(f"{name!r} is missing, or belongs to two tensors")
        return rest.pop(name)

    def quantized(name: str, entry: _Object, shape: tuple[int, ...]) -> QuantizedTensor:
        group_size = entry.get("group_size", int, type(None))
        bits = require_bits(entry.get("bits", int))
        dtype = entry.get("dtype", str)
        if dtype not in _FLOATS:
            raise ValueError(f"dtype: expected one of {sorted(_FLOATS)}, got {dtype!r}")
        codes, scale, minimum = take(f"{name}.codes"), take(f"{name}.scale"), take(f"{name}.minimum")
        group = require_group_size(group_size, bits)
        outliers = None
        if "outliers" in entry:
            outliers = Outliers(take(f"{name}.outlier_index"), take(f"{name}.outlier_value"))
            if outliers.indices.shape != (entry.get("outliers", int),):
                raise ValueError(f"outliers: expected {entry.get('outliers', int)}, got shape {outliers.indices.shape}")
        return QuantizedTensor(codes, scale, minimum, bits, group, shape, _FLOATS[dtype], outliers)

    def sparse(name: str, entry: _Object, shape: tuple[int, ...]) -> SparseTensor:
        layout = require_layout(entry.get("layout", str))
        positions, row_offsets = take(f"{name}.positions"), take(f"{name}.row_offsets")
        values: Array | QuantizedTensor
        if "values" in entry:
            if row_offsets.dtype != np.int64 or row_offsets.size == 0:
                raise ValueError("row_offsets: expected int64, at least one")
            count = int(row_offsets[-1]) * (BLOCK if layout == "1x16" else 1)
            if not 0 <= count < 1 << 62:
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
                raise ValueError(f"kind: expected one of {sorted(kinds)}, got {kind!r}")
            packed[name] = kinds[kind](name, entry, _shape(entry.get("shape", list)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name!r}: {error}") from error
    both = sorted(packed.keys() & rest.keys())
    if both:
        raise ValueError(f"{both[0]!r} is stored both packed and plain")
    tensors = {**rest, **packed}
    order = description.get("order", list)
    if sorted(map(str, order)) != sorted(tensors):
        raise ValueError("metadata: order does not name the tensors of the file")
    return {name: tensors[name] for name in order}


class _Object:
    """A JSON object of an untrusted file: every value is asked for with its type."""

    def __init__(self, raw: Any, what: str) -> None:
        if not isinstance(raw, dict):
            raise ValueError(f"{what}: expected a JSON object, got {type(raw).__name__}")
        self._raw = raw

    def __contains__(self, key: str) -> bool:
        return key in self._raw

    def get(self, key: str, *types: type) -> Any:
        value = self._raw.get(key)
        if not isinstance(value, types) or isinstance(value, bool):
            raise ValueError(f"{key}: expected {' or '.join(t.__name__ for t in types)}, got {value!r:.100}")
        return value


def _shape(sizes: list[Any]) -> tuple[int, ...]:
    if len(sizes) > 32 or not all(type(n) is int and n >= 0 for n in sizes) or math.prod(sizes) >= 1 << 62:
        raise ValueError(f"shape: expected the sizes of up to 32 axes, got {sizes!r:.100}")
    return tuple(sizes)
