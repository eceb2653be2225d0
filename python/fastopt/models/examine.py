"""Statistics of the tensors of a model, and differences between two models."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastopt._checks import DEFAULT_GROUP_SIZE, as_matrix
from fastopt._types import FLOATS, Array, PathLike
from fastopt.models.model import open_model
from fastopt.tensors.error import Error, ErrorSums
from fastopt.tensors.packed import Weight, storage_of, unpacked
from fastopt.tensors.quantization import quantize

# Further than so many standard deviations from the mean is an outlier: one in 500 million normal values is.
_OUTLIER = 6
# The fewest bits whose error, relative to the weight, stays below this are suggested.
_TOLERABLE = 0.12
_SMALL = 4096  # weights; fewer are not worth packing
_PIECE = 1 << 20  # elements looked at together


@dataclass(frozen=True)
class TensorFacts:
    """Statistics of one tensor.

    Attributes
    ----------
    name : str
    kind : "dense", "quantized", "sparse" or "sparse+quantized"
        How it is stored.
    bits : int or None
        Of a code; None if values are not quantized.
    group_size : int or None
    shape : tuple of int
    dtype : str
        Of the decoded values.
    size : int
        Number of values.
    nbytes : int
        Bytes stored.
    bits_per_weight : float
        Bits stored for each value, parameters and positions included.
    minimum, maximum, mean, std : float or None
        Of the finite values; None if there is none.
    zeros : int
        Values that are exactly 0.
    outliers : int
        Values further than 6 standard deviations from the mean.
    non_finite : int
        NaN and infinities.
    suggested_bits : int or None
        The fewest of 8, 4 and 2 bits, in groups of the default size, whose root mean square error is below 12 % of
        the weight's root mean square, measured on up to a million weights; None if none is, if the tensor is packed
        already, has fewer than 4096 values, or values that cannot be quantized.
    """

    name: str
    kind: str
    bits: int | None
    group_size: int | None
    shape: tuple[int, ...]
    dtype: str
    size: int
    nbytes: int
    bits_per_weight: float
    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    zeros: int
    outliers: int
    non_finite: int
    suggested_bits: int | None


def inspect(weights: Mapping[str, Weight] | PathLike) -> list[TensorFacts]:
    """Return what the tensors of a model are like: sizes, ranges, outliers, zeros, and the bits that would do.

    Parameters
    ----------
    weights : mapping from name to array, QuantizedTensor or SparseTensor, or path-like
        One tensor is looked at, and decoded, at a time.

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
    if not isinstance(weights, Mapping):
        weights = open_model(weights)
    return [facts_of(name, weights[name]) for name in weights]


def facts_of(name: str, tensor: Weight) -> TensorFacts:
    """Return what one tensor is like."""
    array = unpacked(tensor)
    kind, bits, group_size = storage_of(tensor)
    count = zeros = outliers = 0
    low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
    for piece in _finite_pieces(array):
        count += piece.size
        zeros += piece.size - int(np.count_nonzero(piece))
        low, high = min(low, float(piece.min(initial=math.inf))), max(high, float(piece.max(initial=-math.inf)))
        total += float(piece.sum())
    mean = total / max(count, 1)
    for piece in _finite_pieces(array):
        squares += float(np.square(piece - mean).sum())
    std = math.sqrt(squares / max(count, 1))
    for piece in _finite_pieces(array):
        outliers += int(np.count_nonzero(np.abs(piece - mean) > _OUTLIER * std))
    known = count > 0
    return TensorFacts(
        name=name,
        kind=kind,
        bits=bits,
        group_size=group_size,
        shape=array.shape,
        dtype=array.dtype.name,
        size=array.size,
        nbytes=tensor.nbytes,
        bits_per_weight=8 * tensor.nbytes / max(array.size, 1),
        minimum=low if known else None,
        maximum=high if known else None,
        mean=mean if known else None,
        std=std if known else None,
        zeros=zeros,
        outliers=outliers,
        non_finite=array.size - count,
        suggested_bits=_suggested_bits(array) if kind == "dense" and count == array.size else None,
    )


def _finite_pieces(array: Array) -> Iterator[NDArray[np.float64]]:
    """Give the finite values of an array in float64, some at a time."""
    flat = array.reshape(-1)
    for at in range(0, flat.size, _PIECE):
        piece = flat[at : at + _PIECE].astype(np.float64)
        finite = np.isfinite(piece)
        yield piece if finite.all() else piece[finite]


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
    size : int
    nbytes : (int, int)
        Bytes stored in the first and in the second model.
    rmse, relative, max, snr, cosine : float
        As in `QuantizedTensor.error`: the error of the second, and relative to the first.
    """

    name: str
    shape: tuple[int, ...]
    size: int
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
        Of all tensors that both have, together.
    """

    tensors: tuple[TensorDifference, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    total: Error


def diff(first: Mapping[str, Weight] | PathLike, second: Mapping[str, Weight] | PathLike) -> Difference:
    """Return how far two models are apart, tensor by tensor: what packing cost, or what training changed.

    Parameters
    ----------
    first, second : mappings from name to array, QuantizedTensor or SparseTensor, or path-like
        Tensors of one name are compared by their decoded values, whatever they are stored as; a pair at a time.

    Returns
    -------
    Difference

    Notes
    -----
    NaN or infinity in both at one place counts as equal, in one of them as an infinite error. The error of all
    together is that of the tensors of a float type.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> weights = {"w": np.eye(64, dtype=np.float32), "b": np.zeros(64, dtype=np.float32)}
    >>> result = fo.diff(weights, fo.pack(weights, bits=8))
    >>> [(t.name, round(t.max, 4)) for t in result.tensors], result.missing
    ([('w', 0.0), ('b', 0.0)], ())
    """
    first = first if isinstance(first, Mapping) else open_model(first)
    second = second if isinstance(second, Mapping) else open_model(second)
    tensors, reshaped, total = [], [], ErrorSums()
    for name in first:
        if name not in second:
            continue
        one, other = first[name], second[name]
        if one.shape != other.shape:
            reshaped.append((name, one.shape, other.shape))
        else:
            sums = _differences(unpacked(one), unpacked(other))
            if one.dtype.name in FLOATS:  # numbers of tokens or positions are large, and no weights
                total += sums
            stored = (one.nbytes, other.nbytes)
            tensors.append(TensorDifference(name, one.shape, sums.size, stored, **sums.error()._asdict()))
    missing = tuple(name for name in first if name not in second)
    extra = tuple(name for name in second if name not in first)
    return Difference(tuple(tensors), missing, extra, tuple(reshaped), total.error())


def _differences(first: Array, second: Array) -> ErrorSums:
    sums, one, other = ErrorSums(), first.reshape(-1), second.reshape(-1)
    for at in range(0, one.size, _PIECE):
        a, b = (flat[at : at + _PIECE].astype(np.float64) for flat in (one, other))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        odd = ~(np.isfinite(a) & np.isfinite(b))
        a[odd], b[odd] = 0, np.where(same[odd], 0, np.inf)
        with np.errstate(invalid="ignore", over="ignore"):  # an infinite error makes the cosine NaN
            sums.add(b, a)
    return sums
