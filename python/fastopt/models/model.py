"""Whole models: a mapping of arrays in, a mapping of packed tensors out, and the file that holds it.

The file is safetensors. A tensor NAME that is quantized is stored as NAME.codes, NAME.scale and NAME.minimum; a sparse
one as NAME.positions, NAME.row_offsets and NAME.values (or NAME.values.codes ... where the values are quantized). One
JSON text under ``__metadata__["fastopt"]`` says what each is; any reader of safetensors opens the file. docs/format.md
specifies it.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastopt.choose import choose_bits
from fastopt.files import (
    DTYPES,
    PAD,
    Part,
    PathLike,
    parse_json,
    part_of,
    read_arrays,
    read_index,
    require_shape,
    write,
)
from fastopt.linear import Weight
from fastopt.quant import (
    FLOATS,
    Error,
    ErrorSums,
    GroupSize,
    Outliers,
    QuantizedTensor,
    require_bits,
    require_group_size,
)
from fastopt.recipe import Recipe, naming_tensor, pack_tensor
from fastopt.sparse import BLOCK, SparseTensor, require_layout

Array: TypeAlias = NDArray[Any]

FORMAT_VERSION = 2  # 1 had no tensors that only fill, and no recipe

_FLOATS = {str(dtype): dtype for dtype in DTYPES.values() if dtype.name in FLOATS}


# ---- reports -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorReport:
    """What became of a tensor.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : str
        Before it was packed.
    kind : "dense", "quantized", "sparse" or "sparse+quantized"
    bits, group_size : int or None
        Of the codes, as in `QuantizedTensor`.
    density : float
        Share of weights that is stored.
    bits_per_weight : float
        Bits stored for each weight, all parts included.
    nbytes_before, nbytes : int
    error : Error or None
        Distance from the original, where that was at hand and of a float type.
    reason : str
        Which part of the recipe chose this, or why the tensor was kept as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Literal["dense", "quantized", "sparse", "sparse+quantized"]
    bits: int | None
    group_size: int | None
    density: float
    bits_per_weight: float
    nbytes_before: int
    nbytes: int
    error: Error | None
    reason: str


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a model, one by one and all together.

    Attributes
    ----------
    tensors : tuple of TensorReport
    error : Error or None
        Over all tensors whose error is known.
    """

    tensors: tuple[TensorReport, ...]
    error: Error | None

    @property
    def nbytes_before(self) -> int:
        """Bytes of all tensors before they were packed."""
        return sum(tensor.nbytes_before for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; a file has some more for its header."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight of all tensors."""
        return 8 * self.nbytes / max(sum(math.prod(tensor.shape) for tensor in self.tensors), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as a plain dict; what is not finite, which JSON cannot say, as None.

        Returns
        -------
        dict
        """
        return {
            "nbytes_before": self.nbytes_before,
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "error": _plain_error(self.error),
            "tensors": [
                {**asdict(tensor), "shape": list(tensor.shape), "error": _plain_error(tensor.error)}
                for tensor in self.tensors
            ],
        }


def _plain_error(error: Error | None) -> dict[str, float | None] | None:
    if error is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in error._asdict().items()}


class Reporter:
    """Collects a `Report`, tensor by tensor."""

    def __init__(self) -> None:
        self._tensors: list[TensorReport] = []
        self._sums = ErrorSums()
        self._measured = False

    def add(self, name: str, tensor: Weight, original: Array | None, reason: str) -> None:
        """Add a tensor as it was stored; with the original its error is measured."""
        sums = None if original is None else _error_sums(tensor, original)
        if sums is not None:
            self._sums += sums
            self._measured = True
        kind, bits, group_size = storage_of(tensor)
        self.add_planned(
            name,
            tensor.shape,
            tensor.dtype,
            kind,
            tensor.nbytes,
            reason,
            bits=bits,
            group_size=group_size,
            density=tensor.density if isinstance(tensor, SparseTensor) else 1.0,
            error=None if sums is None else sums.error(),
        )

    def add_planned(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        kind: Literal["dense", "quantized", "sparse", "sparse+quantized"],
        nbytes: int,
        reason: str,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        density: float = 1.0,
        error: Error | None = None,
    ) -> None:
        """Add a tensor of which only this is known."""
        size = math.prod(shape)
        per_weight, before = 8 * nbytes / max(size, 1), size * dtype.itemsize
        self._tensors.append(
            TensorReport(
                name, shape, dtype.name, kind, bits, group_size, density, per_weight, before, nbytes, error, reason
            )
        )

    def report(self) -> Report:
        """Return what was collected."""
        return Report(tuple(self._tensors), self._sums.error() if self._measured else None)


def storage_of(
    tensor: Weight,
) -> tuple[Literal["dense", "quantized", "sparse", "sparse+quantized"], int | None, int | None]:
    """Return how a tensor is stored: its kind, bits and group size."""
    if isinstance(tensor, QuantizedTensor):
        return "quantized", tensor.bits, tensor.group_size
    if not isinstance(tensor, SparseTensor):
        return "dense", None, None
    if isinstance(tensor.values, QuantizedTensor):
        return "sparse+quantized", tensor.values.bits, tensor.values.group_size
    return "sparse", None, None


def _error_sums(tensor: Weight, original: Array) -> ErrorSums | None:
    """Return the sums of the error of a tensor, None if it is not of a float type."""
    if tensor.dtype.name not in FLOATS:
        return None
    if tensor.shape != original.shape:
        raise ValueError(f"weights: expected shape {tensor.shape}, got {original.shape}")
    if isinstance(tensor, QuantizedTensor):
        return tensor.error_sums(original)
    sums = ErrorSums()
    ours, theirs, step = unpacked(tensor).reshape(-1), original.reshape(-1), 1 << 20
    for at in range(0, theirs.size, step):
        sums.add(ours[at : at + step], theirs[at : at + step])
    return sums


# ---- models ------------------------------------------------------------------------------------------------------


class PackedModel(Mapping[str, Weight]):
    """A model as a mapping from name to array, `QuantizedTensor` or `SparseTensor`.

    Made by `pack` or `load`.

    Parameters
    ----------
    tensors : mapping
    recipe : Recipe, optional
        What they were packed by.
    """

    def __init__(self, tensors: Mapping[str, Weight], recipe: Recipe | None = None) -> None:
        self._tensors = dict(tensors)
        self.recipe = recipe

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

    def report(self, weights: Mapping[str, Array] | None = None) -> Report:
        """Return what became of each tensor.

        Parameters
        ----------
        weights : mapping from name to array, optional
            The originals: with them errors are measured, for the names that are in it.

        Returns
        -------
        Report

        Raises
        ------
        ValueError
            If an original has another shape.

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
        reporter = Reporter()
        for name, tensor in self._tensors.items():
            reason = self.recipe.of(name, tensor.shape, tensor.dtype)[1] if self.recipe else ""
            original = None if weights is None or name not in weights else weights[name]
            with naming_tensor(name):
                reporter.add(name, tensor, original, reason)
        return reporter.report()

    def save(self, path: PathLike) -> None:
        """Write the model to one safetensors file.

        The file is written beside its place and moved there when it is complete and on the disk: whatever
        happens, there is either the old file or the new one; a process that is killed may leave ``.NAME.*.part``.
        The same model makes the same bytes.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        OSError
            If the file cannot be written.
        TypeError, ValueError
            If a tensor has a dtype that the file cannot hold, or two tensors would be stored under one name.
        """
        parts: list[Part] = []
        entries: dict[str, Any] = {}
        for name, tensor in self._tensors.items():
            arrays, entry = disassemble(name, tensor)
            parts += [part_of(stored, array) for stored, array in arrays.items()]
            if entry is not None:
                entries[name] = entry
        write(path, parts, describe(self._tensors, entries, self.recipe))


def unpacked(tensor: Weight) -> Array:
    """Return a tensor of any kind as a plain array."""
    if isinstance(tensor, QuantizedTensor):
        return tensor.dequantize()
    return tensor.to_dense() if isinstance(tensor, SparseTensor) else tensor


def disassemble(name: str, tensor: Weight) -> tuple[dict[str, Array], dict[str, Any] | None]:
    """Return the arrays that a file holds of a tensor, and what its metadata say of it: None if it is an array."""
    if isinstance(tensor, QuantizedTensor):
        arrays, entry = _disassemble_quantized(name, tensor)
        return arrays, {**entry, "shape": tensor.shape}
    if not isinstance(tensor, SparseTensor):
        return {name: tensor}, None
    arrays = {f"{name}.positions": tensor.positions, f"{name}.row_offsets": tensor.row_offsets}
    entry = {"kind": "sparse", "layout": tensor.layout, "shape": tensor.shape}
    if not isinstance(tensor.values, QuantizedTensor):
        return {**arrays, f"{name}.values": tensor.values}, entry
    values, entry["values"] = _disassemble_quantized(f"{name}.values", tensor.values)
    return {**arrays, **values}, entry


def _disassemble_quantized(name: str, q: QuantizedTensor) -> tuple[dict[str, Array], dict[str, Any]]:
    arrays = {f"{name}.codes": q.codes, f"{name}.scale": q.scale, f"{name}.minimum": q.minimum}
    entry = {"kind": "quantized", "bits": q.bits, "group_size": q.group_size, "dtype": str(q.dtype)}
    if q.outliers is not None:
        arrays |= {f"{name}.outlier_index": q.outliers.indices, f"{name}.outlier_value": q.outliers.values}
        entry["outliers"] = len(q.outliers.indices)
    return arrays, entry


def describe(order: Iterable[str], entries: Mapping[str, Any], recipe: Recipe | None) -> dict[str, str]:
    """Return the metadata of a file: what order tensors have, and what those are that are not arrays."""
    about = {"version": FORMAT_VERSION, "order": list(order), "tensors": entries}
    if recipe is not None:
        about["recipe"] = recipe.to_dict()
    return {"fastopt": json.dumps(about, ensure_ascii=False, separators=(",", ":"))}


def pack(
    weights: Mapping[str, Array],
    *,
    bits: int | None = None,
    group_size: GroupSize = "auto",
    param_dtype: DTypeLike = "float16",
    fit: Literal["minmax", "lsq"] = "minmax",
    outliers: float | None = None,
    threshold: float | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    min_size: int = 4096,
    recipe: Recipe | None = None,
    target_bits: float | None = None,
    target_size: int | str | None = None,
) -> PackedModel:
    """Pack the tensors of a model: quantized, sparse, or both.

    Parameters
    ----------
    weights : mapping from name to array
        A dict, or what `open_weights` returns.
    bits : 8, 4, 2 or None
        None: do not quantize.
    group_size, param_dtype, fit, outliers
        As in `quantize`.
    threshold, sparsity, pattern
        As in `prune`: prune each tensor and store it sparse; with `bits` the non-zeros are quantized.
        A tensor that has been pruned before keeps its zeros.
    include, exclude : sequences of glob patterns
        Tensors to pack, by name; the others are kept as they are.
    overrides : mapping from glob pattern to options
        Other options, by the names above, for the names that match; the first pattern that matches counts.
    min_size : int
        Smaller tensors are kept as they are.
    recipe : Recipe, optional
        All of these at once, instead of them.
    target_bits : float, optional
        Choose bits and group size of each tensor by its error, so that the model has this many bits per weight at
        most, as `choose_bits` does.
    target_size : int or str, optional
        The same for the bytes of the saved model, as ``12_000_000`` or ``"12MB"``.

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
    given = Recipe(
        bits=bits,
        group_size=group_size,
        param_dtype=param_dtype,
        fit=fit,
        outliers=outliers,
        threshold=threshold,
        sparsity=sparsity,
        pattern=pattern,
        include=include,
        exclude=exclude,
        overrides=overrides or {},
        min_size=min_size,
    )
    if recipe is not None:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe: expected a Recipe, got {type(recipe).__name__}")
        if given != Recipe():
            raise ValueError("recipe: cannot be given together with other options; use recipe.replace")
        given = recipe
    given = choose_bits(weights, given, target_bits=target_bits, target_size=target_size)
    return PackedModel({name: pack_tensor(name, array, given)[0] for name, array in weights.items()}, given)


def load(path: PathLike) -> PackedModel:
    """Map a model that `PackedModel.save` or `pack_file` wrote, or any safetensors file, into memory.

    Nothing is copied: tensors are read-only views of the file, and the kernels read it where it lies. Everything that
    the file says is checked before it is trusted. While it is mapped it may be replaced, as `save` does, but must not
    be changed in place.

    Parameters
    ----------
    path : path-like
        A safetensors file, or the ``.index.json`` of one in shards.

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
    path = Path(path)
    if not path.name.endswith(".index.json"):
        return assemble(path, *read_arrays(path))
    tensors: dict[str, Weight] = {}
    recipe = None
    for shard, names in read_index(path).items():
        arrays, metadata = read_arrays(path.parent / shard)
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"{path}: {missing[0]!r} is not in {shard}")
        model = assemble(path.parent / shard, arrays, metadata)
        both = sorted(tensors.keys() & model.keys())
        if both:
            raise ValueError(f"{path}: {both[0]!r} is in two shards")
        tensors |= model
        recipe = recipe or model.recipe
    return PackedModel(tensors, recipe)


def assemble(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> PackedModel:
    """Return the model that the arrays and the metadata of a file make; raise as `load` does."""
    if "fastopt" not in metadata:
        return PackedModel(arrays)
    try:
        return _assemble(metadata["fastopt"], arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _assemble(text: str, arrays: Mapping[str, Array]) -> PackedModel:
    """Put the tensors together that the metadata describes."""
    description = _Object(parse_json(text), "metadata")
    version = description.get("version", int)
    if not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"metadata: expected format version 1 to {FORMAT_VERSION}, got {version}")
    recipe = Recipe.from_dict(description.get("recipe", dict)) if "recipe" in description else None
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
                raise ValueError(f"kind: expected one of {sorted(kinds)}, got {kind!r}")
            packed[name] = kinds[kind](name, entry, require_shape(entry.get("shape", list), "shape"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name!r}: {error}") from error
    both = sorted(packed.keys() & rest.keys())
    if both:
        raise ValueError(f"{both[0]!r} is stored both packed and plain")
    tensors = {**rest, **packed}
    order = description.get("order", list)
    if not all(isinstance(name, str) for name in order) or sorted(order) != sorted(tensors):
        raise ValueError("metadata: order does not name the tensors of the file")
    return PackedModel({name: tensors[name] for name in order}, recipe)


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
