"""Statistics of the tensors of a model, and differences between two models."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastopt._checks import as_matrix
from fastopt._text import fitted_table, html_table, percent_text, printable, shape_text
from fastopt._types import DEFAULT_GROUP_SIZE, FLOATS, Array, Notify, PathLike
from fastopt.files.sources import open_weights
from fastopt.files.torch_files import without_tensors
from fastopt.files.weights import Origin, Weights, stored_of
from fastopt.models.model import open_model
from fastopt.models.tasks import Task, dealt, files_of, naming_task, opened, origin_of, placed_in, results, run_nbytes
from fastopt.progress import Progress
from fastopt.tensors.error import Error, ErrorSums, unit_of
from fastopt.tensors.packed import Weight, storage_of, unpacked
from fastopt.tensors.quantization import quantize

# An outlier is more than so many standard deviations away from the mean; of normal values, one in 500 million is.
_OUTLIER = 6
# The suggestion is the fewest bits whose relative error is at most this.
_TOLERABLE = 0.12
_SMALL = 4096  # weights; smaller tensors are not worth packing
_PIECE = 1 << 20  # elements that are converted at a time


@dataclass(frozen=True)
class TensorFacts:
    """Statistics of one tensor.

    Attributes
    ----------
    name : str
    kind : "dense", "quantized", "sparse" or "sparse+quantized"
        How it is stored.
    bits : int or None
        The bits of a code; None if values are not quantized.
    group_size : int or None
    param_bits : int or None
        The bits of the codes of scale and minimum, as in `QuantizedTensor`.
    shape : tuple of int
    dtype : str
        The dtype of the decoded values.
    size : int
        Number of values.
    nbytes : int
        Bytes stored.
    bits_per_weight : float
        Bits stored for each value, parameters and positions included.
    minimum, maximum : float, int or None
        The range of the finite values, exact for integers. None if there are none, or if they have no order (complex
        numbers, texts).
    mean, std : float or None
        Mean and standard deviation of the finite values. The mean of complex numbers is None.
    zeros : int
        Values that are exactly 0.
    outliers : int
        Values further than 6 standard deviations from the mean.
    non_finite : int
        NaN and infinities.
    suggested_bits : int or None
        The fewest bits, in groups of the default size, whose root mean square error is below 12 % of
        the weight's root mean square, measured on up to a million weights; None if none is, if the tensor is packed
        already, has fewer than 4096 values, or values that cannot be quantized.
    """

    name: str
    kind: str
    bits: int | None
    group_size: int | None
    param_bits: int | None
    shape: tuple[int, ...]
    dtype: str
    size: int
    nbytes: int
    bits_per_weight: float
    minimum: float | int | None
    maximum: float | int | None
    mean: float | None
    std: float | None
    zeros: int
    outliers: int
    non_finite: int
    suggested_bits: int | None


def inspect(weights: Mapping[str, Weight] | PathLike, *, executor: Executor | None = None) -> list[TensorFacts]:
    """Return statistics of the tensors of a model: size, range, outliers, zeros, and the bits that are enough.

    Parameters
    ----------
    weights : mapping from name to array, QuantizedTensor or SparseTensor, or path-like
        Packed tensors are decoded one at a time.
    executor : concurrent.futures.Executor, optional
        Reads the tensors of a path by tasks, as `pack_file` does.

    Returns
    -------
    list of TensorFacts

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> w = np.random.default_rng(0).standard_normal((128, 64)).astype(np.float32)
    >>> [facts] = fo.inspect({"w": w})
    >>> facts.suggested_bits, facts.outliers, facts.bits_per_weight
    (4, 0, 32.0)
    """
    if executor is not None:
        return facts_by(executor, open_weights(_path(weights, "weights")))
    weights = _opened(weights)
    return [facts_of(name, weights[name]) for name in weights]


def _opened(weights: Mapping[str, Weight] | PathLike) -> Mapping[str, Weight]:
    return without_tensors(weights) if isinstance(weights, Mapping) else open_model(weights)


def _path(weights: Mapping[str, Weight] | PathLike, name: str) -> PathLike:
    if isinstance(weights, Mapping):
        raise TypeError(f"{name}: expected a path together with an executor, got {type(weights).__name__}")
    return weights


@dataclass(frozen=True, eq=False)
class _Facts:
    origin: Origin
    sources: tuple[str, ...]
    names: tuple[str, ...]

    def __call__(self) -> list[TensorFacts]:
        weights, found = opened(self.origin, self.sources, self.names), []
        for name in self.names:
            with naming_task(name):
                found.append(facts_of(name, stored_of(weights, name)))
            weights.release(name)
        return found


def facts_by(executor: Executor, weights: Weights, notify: Notify | None = None) -> list[TensorFacts]:
    """Return statistics as `inspect` does, by tasks."""
    origin = origin_of(weights, "weights")
    nbytes, placed, progress = weights.sizes, placed_in(weights), Progress(weights.sizes, notify)
    tasks = [
        _Facts(origin, files_of(placed, run), tuple(run))
        for run in dealt(weights, nbytes.__getitem__, run_nbytes(weights.nbytes))
    ]
    return [facts for found in results(executor, tasks, _counted(progress, nbytes)) for facts in found]


def _counted(progress: Progress, nbytes: Mapping[str, int]) -> Callable[[Task[Any]], None]:
    return lambda task: progress.add(task.names, sum(nbytes[name] for name in task.names))


def facts_of(name: str, tensor: Weight) -> TensorFacts:
    """Return the statistics of one tensor."""
    array = unpacked(tensor)
    kind, bits, group_size = storage_of(tensor)
    found = _statistics(array) if is_numeric(array.dtype) else {"non_finite": 0}
    return TensorFacts(
        name=name,
        kind=kind,
        bits=bits,
        group_size=group_size,
        param_bits=getattr(tensor, "param_bits", None),
        shape=array.shape,
        dtype=array.dtype.name,
        size=array.size,
        nbytes=tensor.nbytes,
        bits_per_weight=8 * tensor.nbytes / max(array.size, 1),
        suggested_bits=_suggested_bits(array) if kind == "dense" and found["non_finite"] == 0 else None,
        **{**dict.fromkeys(("minimum", "maximum", "mean", "std")), "zeros": 0, "outliers": 0, **found},
    )


def _statistics(array: Array) -> dict[str, Any]:
    """Return the statistics of the finite values of an array of numbers."""
    ordered = array.dtype.kind != "c"
    count = zeros = 0
    total: complex = 0.0
    ends: list[Any] = []
    largest = 0.0
    for piece in _finite_pieces(array):
        count += piece.size
        zeros += piece.size - int(np.count_nonzero(piece))
        if piece.size and ordered:
            ends += [piece.min().item(), piece.max().item()]
            largest = max(largest, abs(float(ends[-2])), abs(float(ends[-1])))
        elif piece.size:
            largest = max(largest, float(np.abs(piece).max()))
        total += _sum(piece)
    if count == 0:
        return {"non_finite": array.size}
    unit = unit_of(largest)
    if unit != 1:  # squares of very large or very small values do not fit into float64
        total = sum(_sum(_in_units(piece, unit)) for piece in _finite_pieces(array))
    mean = total / count
    squares = sum(_sum(np.square(_distance(piece, mean, unit))) for piece in _finite_pieces(array))
    std = math.sqrt(squares.real / count)
    outliers = sum(
        int(np.count_nonzero(_distance(piece, mean, unit) > _OUTLIER * std)) for piece in _finite_pieces(array)
    )
    return {
        "minimum": min(ends, default=None),
        "maximum": max(ends, default=None),
        "mean": mean.real * unit if ordered else None,
        "std": std * unit,
        "zeros": zeros,
        "outliers": outliers,
        "non_finite": array.size - count,
    }


def _sum(piece: Array) -> complex:
    with np.errstate(over="ignore", invalid="ignore"):
        return (
            complex(piece.sum(dtype=np.complex128)) if piece.dtype.kind == "c" else float(piece.sum(dtype=np.float64))
        )


def _distance(piece: Array, mean: complex, unit: float) -> NDArray[np.float64]:
    """Return how far numbers, in units, are from their mean."""
    centered = _in_units(piece, unit) - (mean if piece.dtype.kind == "c" else mean.real)
    return np.abs(centered, out=None if piece.dtype.kind == "c" else centered)


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Return whether statistics and differences of this dtype are known."""
    return dtype.kind in "biufc" or is_float(dtype)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return whether numbers of this dtype are rounded: floating point and complex."""
    if dtype.kind in "fc":
        return True
    try:
        ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]  # NumPy does not know bfloat16 and the 8-bit types
    except (TypeError, ValueError, KeyError):
        return False
    return True


def _finite_pieces(array: Array) -> Iterator[Array]:
    """Give the finite values of an array, some at a time: as integers, in float64 or in complex128."""
    flat = array.reshape(-1)
    for at in range(0, flat.size, _PIECE):
        piece = flat[at : at + _PIECE]
        if piece.dtype.kind in "iu":
            yield piece
        elif piece.dtype.kind == "b":
            yield piece.view(np.uint8)
        else:
            piece = piece.astype(np.complex128 if piece.dtype.kind == "c" else np.float64)
            finite = np.isfinite(piece)
            yield piece if finite.all() else piece[finite]


def _in_units(piece: Array, unit: float) -> Array:
    """Return numbers in float64 or complex128, divided by a power of 2."""
    wide = piece.astype(np.complex128 if piece.dtype.kind == "c" else np.float64, copy=False)
    return wide if unit == 1 else wide / unit


def _suggested_bits(array: Array) -> int | None:
    if array.dtype.name not in FLOATS or array.size < _SMALL:
        return None
    rows, cols = as_matrix(array.shape)
    step = max(1, rows * cols // _PIECE)
    sample = array.reshape(rows, cols)[::step]
    for bits in sorted(DEFAULT_GROUP_SIZE):
        if quantize(sample, bits).error(sample).relative <= _TOLERABLE:
            return bits
    return None


# ---- two models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorDifference:
    """The difference between a tensor of one model and that of another.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtypes : (str, str)
        The dtypes of the decoded values in the first and in the second model.
    size : int
    different : int
        Values that are not equal; 0 means that the tensors are. NaN equals NaN, and -0.0 equals 0.0.
    nbytes : (int, int)
        Bytes stored in the first and in the second model.
    rmse, relative, max, snr, cosine : float
        As in `QuantizedTensor.error`: the error of the second, and relative to the first. NaN for texts that differ.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    size: int
    different: int
    nbytes: tuple[int, int]
    rmse: float
    relative: float
    max: float
    snr: float
    cosine: float


@dataclass(frozen=True)
class Difference:
    """The differences between two models.

    Attributes
    ----------
    tensors : tuple of TensorDifference
        Those that both have, in the order of the first.
    missing, extra : tuple of str
        Names that only the first, and only the second has.
    reshaped : tuple of (str, shape, shape)
        Names whose shapes differ.
    total : Error
        The error of all tensors of floating point and complex numbers that both have, together.
    """

    tensors: tuple[TensorDifference, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    total: Error

    def __str__(self) -> str:
        """Return a table of the tensors that fits the terminal, and the totals."""
        room = get_terminal_size().columns
        table, _ = fitted_table(_HEADS, self._rows(), room, ("largest", "shape"))
        return "\n".join([table, *(line for text in self._lines() for line in wrap(text, max(room, 40)))])

    def _repr_html_(self) -> str:
        return html_table("; ".join(self._lines()), _HEADS, self._rows())

    def _rows(self) -> list[list[str]]:
        return [
            [
                printable(t.name),
                shape_text(t.shape),
                percent_text(t.relative),
                "" if t.different == 0 else f"{t.max:.2g}",
                "exact" if t.snr == math.inf else f"{t.snr:.1f}",
            ]
            for t in self.tensors
        ]

    def _lines(self) -> list[str]:
        names = {"only in the first": self.missing, "only in the second": self.extra}
        names["of other shapes"] = tuple(name for name, *_ in self.reshaped)
        equal, error = sum(t.different == 0 for t in self.tensors), percent_text(self.total.relative)
        return [
            f"{equal} of {len(self.tensors)} tensors are equal; relative error of all {error}",
            *(f"{what}: {', '.join(map(printable, found))}" for what, found in names.items() if found),
        ]


_HEADS = ("tensor", "shape", "error", "largest", "SNR dB")


def diff(
    first: Mapping[str, Weight] | PathLike,
    second: Mapping[str, Weight] | PathLike,
    *,
    executor: Executor | None = None,
) -> Difference:
    """Return the differences between two models, tensor by tensor.

    Parameters
    ----------
    first, second : mappings from name to array, QuantizedTensor or SparseTensor, or path-like
        Tensors with the same name are compared by their decoded values, however they are stored, one pair at a time.
    executor : concurrent.futures.Executor, optional
        Compares the tensors of two paths by tasks, as `pack_file` packs them.

    Returns
    -------
    Difference

    Notes
    -----
    Values are compared in their own dtype, so large integers and the parts of complex numbers count. Two NaN, two equal
    infinities, and zeros of either sign are equal. NaN or infinity in only one of two tensors is an infinite error.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> weights = {"w": np.eye(64, dtype=np.float32), "b": np.zeros(64, dtype=np.float32)}
    >>> result = fo.diff(weights, fo.pack(weights, bits=8))
    >>> [(t.name, round(t.max, 4)) for t in result.tensors], result.missing
    ([('w', 0.0), ('b', 0.0)], ())
    """
    if executor is not None:
        return difference_by(executor, open_weights(_path(first, "first")), open_weights(_path(second, "second")))
    first, second = _opened(first), _opened(second)
    return _difference(first, second, (_compared(name, first[name], second[name]) for name in first if name in second))


# A pair of tensors: both shapes if they differ, else the difference, and the sums of the error if they are weights.
_Compared: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]] | tuple[TensorDifference, ErrorSums | None]"


def _compared(name: str, one: Weight, other: Weight) -> _Compared:
    if one.shape != other.shape:
        return one.shape, other.shape
    a, b = unpacked(one), unpacked(other)
    sums, different = _differences(a, b)
    facts = (name, a.shape, (a.dtype.name, b.dtype.name), a.size, different, (one.nbytes, other.nbytes))
    # Numbers of tokens or positions are large, and no weights.
    return TensorDifference(*facts, *sums.error()), sums if is_float(a.dtype) else None


def _difference(first: Collection[str], second: Collection[str], compared: Iterable[_Compared]) -> Difference:
    """Collect the differences of all pairs, in the order of the first model."""
    tensors, reshaped, total = [], [], ErrorSums()
    for name, (found, other) in zip((name for name in first if name in second), compared, strict=True):
        if isinstance(found, TensorDifference):
            tensors.append(found)
            if isinstance(other, ErrorSums):
                total += other
        else:
            assert isinstance(other, tuple)
            reshaped.append((name, found, other))
    missing = tuple(name for name in first if name not in second)
    extra = tuple(name for name in second if name not in first)
    return Difference(tuple(tensors), missing, extra, tuple(reshaped), total.error())


@dataclass(frozen=True, eq=False)
class _Differences:
    origins: tuple[Origin, Origin]
    sources: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]

    def __call__(self) -> list[_Compared]:
        one, other = (opened(*model, self.names) for model in zip(self.origins, self.sources, strict=True))
        found = []
        for name in self.names:
            with naming_task(name):
                found.append(_compared(name, stored_of(one, name), stored_of(other, name)))
            one.release(name)
            other.release(name)
        return found


def difference_by(executor: Executor, first: Weights, second: Weights, notify: Notify | None = None) -> Difference:
    """Return the differences between two models as `diff` does, by tasks."""
    origins = origin_of(first, "first"), origin_of(second, "second")
    nbytes, places, progress = first.sizes, (placed_in(first), placed_in(second)), Progress(first.sizes, notify)
    both = [name for name in first if name in second]
    tasks = [
        _Differences(origins, tuple(files_of(placed, run) for placed in places), tuple(run))
        for run in dealt(both, nbytes.__getitem__, run_nbytes(first.nbytes))
    ]
    compared = (one for found in results(executor, tasks, _counted(progress, nbytes)) for one in found)
    return _difference(first, second, compared)


def _differences(first: Array, second: Array) -> tuple[ErrorSums, int]:
    """Return the error of the second array, and the number of values that differ."""
    one, other = first.reshape(-1), second.reshape(-1)
    if not (is_numeric(one.dtype) and is_numeric(other.dtype)):
        different = int(np.count_nonzero(one != other)) if one.dtype.kind == other.dtype.kind else one.size
        sums = ErrorSums()
        sums.noise = math.nan if different else 0.0
        return sums, different
    sums, different = ErrorSums(unit_of(max(_largest(one), _largest(other)))), 0
    parts = 2 if "c" in (one.dtype.kind, other.dtype.kind) else 1
    sums.size = one.size
    step = min(_PIECE, 1 << 14)  # stays in cache
    for at in range(0, one.size, step):
        a, a_low = _as_doubles(one[at : at + step], parts)
        b, b_low = _as_doubles(other[at : at + step], parts)
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            delta = (b - a) + (b_low - a_low)
            odd = ~(np.isfinite(a) & np.isfinite(b))
            same = np.where(odd, (a == b) | (np.isnan(a) & np.isnan(b)), delta == 0)
            a, b = a + a_low, b + b_low
            if odd.any():
                a, delta = np.where(odd, 0, a), np.where(odd, np.where(same, 0, np.inf), delta)
                b = np.where(odd, delta, b)
            different += int(np.count_nonzero(~same.all(axis=0)))
            sums.largest = max(sums.largest, float((np.hypot(*delta) if parts == 2 else np.abs(delta)).max()))
            if sums.unit != 1:
                a, b, delta = a / sums.unit, b / sums.unit, delta / sums.unit
            sums.total += float(np.square(b).sum())
            sums.signal += float(np.square(a).sum())
            sums.dot += float((a * b).sum())
            sums.noise += float(np.square(delta).sum())
    return sums, different


def _largest(array: Array) -> float:
    """Return the largest finite magnitude of an array whose squares may not fit into float64; else 1."""
    if not is_float(array.dtype) or array.dtype.itemsize < 8 or array.dtype == np.complex64:
        return 1.0
    pieces = _finite_pieces(array)
    with np.errstate(over="ignore"):
        return min(max((float(np.abs(piece).max(initial=0)) for piece in pieces), default=0.0), sys.float_info.max)


def _as_doubles(piece: Array, parts: int) -> tuple[NDArray[np.float64], NDArray[np.float64] | float]:
    """Return numbers as sums of two float64 arrays, shape (parts, numbers), without an error.

    The differences of the first and of the second terms are exact, so their sum is 0 only for equal numbers.
    """
    values = piece[None]
    if parts == 2:
        values = np.stack([piece.real, piece.imag] if piece.dtype.kind == "c" else [piece, np.zeros_like(piece)])
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        low = np.fmod(values, values.dtype.type(1 << 32))  # of the sign of the number
        return (values - low).astype(np.float64), low.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        high = values.astype(np.float64)
        return high, (values - high).astype(np.float64) if values.dtype.itemsize > 8 else 0.0
