"""b-bit min-max quantization: 8, 4 and 2 bits, bit-packed."""

import math
import numbers
import operator
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastopt import _core

Array: TypeAlias = NDArray[Any]
Bits: TypeAlias = Literal[8, 4, 2]
GroupSize: TypeAlias = "int | Literal['auto'] | None"

# What real weights need: 8 bits a pair of parameters a row, 4 and 2 bits one a group.
DEFAULT_GROUP_SIZE = {8: -1, 4: 32, 2: 16}

# Dtypes of weights.
FLOATS = ("float32", "float64", "float16", "bfloat16")


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that an array of any shape is seen as: the first axis, and all others."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def require_bits(bits: int) -> int:
    """Return `bits`, or raise."""
    if isinstance(bits, bool) or not hasattr(bits, "__index__"):
        raise TypeError(f"bits: expected 8, 4 or 2, got {bits!r}")
    if bits not in DEFAULT_GROUP_SIZE:
        raise ValueError(f"bits: expected 8, 4 or 2, got {bits!r}")
    return operator.index(bits)


def require_group_size(group_size: GroupSize, bits: int) -> int | None:
    """Return `group_size` with its default filled in, or raise."""
    if isinstance(group_size, str) and group_size == "auto":
        return DEFAULT_GROUP_SIZE[bits]
    if group_size is None:
        return None
    if isinstance(group_size, bool | str) or not hasattr(group_size, "__index__"):
        raise TypeError(f"group_size: expected an integer, None or 'auto', got {group_size!r}")
    size = operator.index(group_size)
    if (size < 1 and size != -1) or size >= 1 << 62:
        raise ValueError(f"group_size: expected a positive number, -1 (a row) or None (the whole tensor), got {size}")
    return size


def as_float_array(w: ArrayLike, name: str) -> Array:
    """Return `w` as an array of a float type, or raise."""
    array = np.asarray(w)
    if array.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {array.dtype}")
    return array


def _kernel_group_size(group_size: int | None, cols: int) -> int:
    """Return the group size as the kernels take it: a number of columns, or 0 for the whole tensor."""
    if group_size is None:
        return 0
    return max(cols, 1) if group_size == -1 else group_size


def _param_shape(group_size: int | None, rows: int, cols: int) -> tuple[int, int]:
    """Return the shape of scale and minimum."""
    if group_size is None:
        return 1, 1
    return rows, -(-cols // _kernel_group_size(group_size, cols))


def quantized_nbytes(
    shape: tuple[int, ...], bits: int, group_size: GroupSize, param_dtype: DTypeLike, outliers: float | None
) -> int:
    """Return the bytes that `quantize` makes of a weight, if its parameters fit `param_dtype` and all outliers miss."""
    rows, cols = as_matrix(shape)
    params = math.prod(_param_shape(require_group_size(group_size, bits), rows, cols))
    entry = 4 + (4 if rows * cols < 1 << 32 else 8)
    return (
        rows * -(-cols * bits // 8)
        + 2 * params * np.dtype(param_dtype).itemsize
        + round((outliers or 0) * rows * cols) * entry
    )


class Outliers(NamedTuple):
    """Weights that codes alone would miss by far: what is added to some of them after decoding.

    Attributes
    ----------
    indices : uint32 or int64 array, rising
        Places in the flattened weight.
    values : float32 array
        What is added there.
    """

    indices: Array
    values: Array


class Error(NamedTuple):
    """How far a quantized weight is from the original.

    Attributes
    ----------
    rmse : float
        Root of the mean squared error.
    relative : float
        `rmse` over the root of the mean square of the weight.
    max : float
        Largest absolute error.
    snr : float
        Signal to noise ratio in decibels; infinite if there is no error.
    cosine : float
        Cosine of the angle between the two, seen as vectors; 1 if both are zero.

    Notes
    -----
    All are NaN if a weight is.
    """

    rmse: float
    relative: float
    max: float
    snr: float
    cosine: float


class ErrorSums:
    """What `Error` follows from, added up in float64 over pieces of one weight or of many."""

    def __init__(self) -> None:
        self.size = 0
        self.total = self.noise = self.signal = self.dot = self.largest = 0.0

    def add(self, ours: Array, theirs: Array) -> None:
        """Add a piece of a weight, as it is now and as it was."""
        ours, theirs = ours.reshape(-1), theirs.reshape(-1)
        self.size += theirs.size
        for at in range(0, theirs.size, 1 << 14):  # stays in cache; and no BLAS, whose sums depend on the machine
            a, b = (x[at : at + (1 << 14)].astype(np.float64) for x in (ours, theirs))
            with np.errstate(over="ignore", invalid="ignore"):
                self.total += float(np.square(a).sum())
                self.signal += float(np.square(b).sum())
                self.dot += float((a * b).sum())
                a -= b
                self.noise += float(np.square(a).sum())
            self.largest = float(np.maximum(self.largest, np.abs(a, out=a).max()))  # NaN if one is

    def __iadd__(self, other: "ErrorSums") -> "ErrorSums":
        for name in ("size", "noise", "signal", "total", "dot"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = float(np.maximum(self.largest, other.largest))
        return self

    def error(self) -> Error:
        """Return the error of all that was added."""
        if math.isnan(self.noise):
            return Error(*(math.nan,) * 5)
        rmse = math.sqrt(self.noise / max(self.size, 1))
        relative = math.sqrt(self.noise / self.signal) if self.signal > 0 else (0.0 if self.noise == 0 else math.inf)
        snr = -20 * math.log10(relative) if 0 < relative < math.inf else (math.inf if relative == 0 else -math.inf)
        lengths = math.sqrt(self.total) * math.sqrt(self.signal)
        cosine = max(min(self.dot / lengths, 1.0), -1.0) if lengths > 0 else float(self.total == self.signal)
        return Error(rmse, relative, self.largest, snr, cosine)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A weight in 8, 4 or 2 bits: ``w ~ minimum + scale * code``, with a pair of parameters a group.

    Made by `quantize`; arrays may also be read-only ones from a memory-mapped file, which are used as they are.

    Attributes
    ----------
    codes : uint8 array, shape (rows, bytes per row)
        Bit-packed, lowest bits first; each row starts on a byte.
    scale, minimum : float16 or float32 arrays, shape (rows, groups), or (1, 1) for the whole tensor
    bits : 8, 4 or 2
    group_size : int or None
        Columns that share a pair; -1: a row does; None: the whole tensor does.
    shape : tuple of int
        Of the weight; seen as a matrix of its first axis by all others, and as one row if it has one axis.
    dtype : numpy.dtype
        Of the weight before it was quantized, and of `dequantize` without ``out``.
    outliers : Outliers or None
        What is added to some weights after decoding.

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit bits, group size and shape.

    Notes
    -----
    ``q @ x`` and ``x @ q.T`` multiply, as `linear` does; ``q[rows]`` with a number, a slice or an array of numbers
    takes rows, which stay quantized; ``==`` compares all that is stored, to the bit.
    """

    codes: NDArray[np.uint8]
    scale: Array
    minimum: Array
    bits: int
    group_size: int | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    outliers: Outliers | None = None

    __array_ufunc__ = None  # arrays leave operators to this class

    def __post_init__(self) -> None:
        require_bits(self.bits)
        if require_group_size(self.group_size, self.bits) != self.group_size:
            raise TypeError(f"group_size: expected an integer or None, got {self.group_size!r}")
        if not isinstance(self.shape, tuple):
            raise TypeError(f"shape: expected a tuple of integers, got {self.shape!r:.80}")
        rows, cols = as_matrix(self.shape)
        row_bytes, params = -(-cols * self.bits // 8), _param_shape(self.group_size, rows, cols)
        for name, array, shape in (
            ("codes", self.codes, (rows, row_bytes)),
            ("scale", self.scale, params),
            ("minimum", self.minimum, params),
        ):
            if not isinstance(array, np.ndarray):
                raise TypeError(f"{name}: expected a NumPy array, got {type(array).__name__}")
            if array.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
        if self.codes.dtype != np.uint8:
            raise TypeError(f"codes: expected uint8, got {self.codes.dtype}")
        if self.scale.dtype not in (np.float16, np.float32) or self.minimum.dtype != self.scale.dtype:
            raise TypeError(
                "scale, minimum: expected float16 or float32, the same for both, "
                f"got {self.scale.dtype} and {self.minimum.dtype}"
            )
        if self.outliers is not None:
            _check_outliers(*self.outliers, self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale, minimum and outliers."""
        return sum(array.nbytes for array in (self.codes, self.scale, self.minimum, *(self.outliers or ())))

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, parameters included."""
        return 8 * self.nbytes / max(self.size, 1)

    @cached_property
    def kernel_args(self) -> tuple[Array, Array, Array, int, int]:
        """What the kernels take, in their order."""
        cols = as_matrix(self.shape)[1]
        return self.codes, self.scale, self.minimum, self.bits, _kernel_group_size(self.group_size, cols)

    def dequantize(
        self, out: Array | None = None, *, dtype: DTypeLike | None = None, rows: slice | None = None
    ) -> Array:
        """Return ``minimum + scale * code`` (plus outliers), computed in float32.

        Parameters
        ----------
        out : float32 array of the weight's shape, optional
            Written and returned; C-contiguous. Saves allocating, which costs more than the work itself.
        dtype : dtype, optional
            Of a new array; without it, that of the weight before it was quantized.
        rows : slice, optional
            Along the first axis, of step 1; the others are not decoded.

        Returns
        -------
        array
            `out`, or a new array.

        Raises
        ------
        TypeError, ValueError
            If `out` is not writable, contiguous float32 of the right shape, or `rows` has a step.
        IndexError
            If `rows` are asked of a weight of one axis.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> fo.quantize(np.array([0, 1, 2, 3], dtype=np.float32), bits=2).dequantize()
        array([0., 1., 2., 3.], dtype=float32)
        """
        part = self if rows is None else self[_require_slice(rows)]
        result = np.empty(part.shape, np.float32) if out is None else out
        _core.dequantize(*part.kernel_args, matrix_of_out(result, part.shape))
        if part.outliers is not None:
            result.reshape(-1)[part.outliers.indices] += part.outliers.values
        if out is not None:
            return out
        with np.errstate(over="ignore"):
            return result.astype(self.dtype if dtype is None else dtype, copy=False)

    def error(self, w: ArrayLike) -> Error:
        """Return how far this is from `w`.

        Parameters
        ----------
        w : array_like of a float type
            What was quantized.

        Returns
        -------
        Error
            Root mean square, the same relative to `w`, largest, signal to noise ratio and cosine.

        Raises
        ------
        TypeError, ValueError
            If `w` is not of a float type or of this shape.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> w = np.linspace(-1, 1, 64, dtype=np.float32)
        >>> round(fo.quantize(w, bits=4).error(w).max, 3)
        0.032
        """
        return self.error_sums(w).error()

    def error_sums(self, w: ArrayLike) -> ErrorSums:
        """Return what `error` follows from, so that it can be added up over weights."""
        array = as_float_array(w, "w")
        if array.shape != self.shape:
            raise ValueError(f"w: expected shape {self.shape}, got {array.shape}")
        sums = ErrorSums()
        rows = as_matrix(self.shape)[0]
        step = max(1, (1 << 20) // max(as_matrix(self.shape)[1], 1))
        for at in range(0, rows, step):
            many = len(self.shape) > 1
            ours = self.dequantize(dtype=np.float32, rows=slice(at, at + step) if many else None)
            sums.add(ours, array[at : at + step] if many else array)
        return sums

    def copy(self) -> "QuantizedTensor":
        """Return the same with arrays of its own, in memory.

        Returns
        -------
        QuantizedTensor

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> q = fo.quantize(np.eye(3, dtype=np.float32))
        >>> q.copy() == q
        True
        """
        outliers = self.outliers and Outliers(np.array(self.outliers.indices), np.array(self.outliers.values))
        codes, scale, minimum = np.array(self.codes), np.array(self.scale), np.array(self.minimum)
        return QuantizedTensor(codes, scale, minimum, self.bits, self.group_size, self.shape, self.dtype, outliers)

    @property
    def T(self) -> "_Transposed":  # noqa: N802 - as NumPy calls it
        """The transpose, for ``x @ q.T``."""
        return _Transposed(self)

    def __array__(self, *args: Any, **options: Any) -> Array:
        raise TypeError("a QuantizedTensor is no array: dequantize() makes one")

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator["QuantizedTensor"]:
        return (self[row] for row in range(len(self)))  # without it, an IndexError would end an iteration in silence

    def __getitem__(self, rows: int | slice | Array) -> "QuantizedTensor":
        if len(self.shape) < 2:
            raise IndexError(f"rows: a weight of shape {self.shape} has only one")
        numbers = np.arange(self.shape[0])[rows]
        if numbers.ndim > 1 or (numbers.ndim == 0 and len(self.shape) > 2):
            raise IndexError(f"rows: expected a slice or numbers along one axis, got {rows!r:.80}")
        shape = (*numbers.shape, *self.shape[1:])
        # A stretch of rows is a view; others are copied.
        key = rows if isinstance(rows, slice) and rows.step in (None, 1) else numbers.reshape(-1)
        codes = self.codes[key]
        scale, minimum = (p if self.group_size is None else p[key] for p in (self.scale, self.minimum))
        outliers = self.outliers and _outliers_of_rows(self.outliers, numbers.reshape(-1), as_matrix(self.shape)[1])
        return QuantizedTensor(codes, scale, minimum, self.bits, self.group_size, shape, self.dtype, outliers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        ours, theirs = ([getattr(q, field.name) for field in fields(q)] for q in (self, other))
        return all(_same(a, b) for a, b in zip(ours, theirs, strict=True))

    __hash__ = None  # type: ignore[assignment]  # its arrays may change

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __matmul__(self, x: Array) -> Array:
        """Return the product with a vector [in], a matrix [in, batch] or a stack of these."""
        from fastopt.linear import matmul

        return matmul(self, x)

    def __repr__(self) -> str:
        group = {None: "whole tensor", -1: "a row"}.get(self.group_size, self.group_size)
        return (
            f"QuantizedTensor(shape={self.shape}, bits={self.bits}, group_size={group}, "
            f"{self.scale.dtype} parameters, {self._outlier_text}{self.bits_per_weight:.2f} bits per weight)"
        )

    @property
    def _outlier_text(self) -> str:
        return "" if self.outliers is None else f"{len(self.outliers.indices)} outliers, "


class _Transposed:
    """What ``q.T`` is: the right-hand side of a product."""

    __array_ufunc__ = None

    def __init__(self, q: QuantizedTensor) -> None:
        self.T = q

    def __rmatmul__(self, x: Array) -> Array:
        from fastopt.linear import linear

        return linear(x, self.T)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Outliers) and isinstance(b, Outliers):
        return _same(a.indices.astype(np.int64), b.indices.astype(np.int64)) and _same(a.values, b.values)
    return bool(a == b)


def _require_slice(rows: slice) -> slice:
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise ValueError(f"rows: expected a slice of step 1, got {rows!r}")
    return rows


def _check_outliers(index: Array, value: Array, size: int) -> None:
    if index.dtype not in (np.uint32, np.int64):
        raise TypeError(f"outlier_index: expected uint32 or int64, got {index.dtype}")
    if value.dtype != np.float32:
        raise TypeError(f"outlier_value: expected float32, got {value.dtype}")
    if index.ndim != 1 or index.shape != value.shape:
        raise ValueError(
            f"outlier_index, outlier_value: expected one dimension of equal length, got {index.shape} and {value.shape}"
        )
    if index.size and not (index[0] >= 0 and index[-1] < size and (index[1:] > index[:-1]).all()):
        raise ValueError(f"outlier_index: expected rising places below {size}")


def _outliers_of_rows(outliers: Outliers, rows: NDArray[np.int64], cols: int) -> Outliers | None:
    """Return the outliers of some rows, which become rows 0, 1 ..."""
    index = outliers.indices.astype(np.int64)
    first, last = np.searchsorted(index, rows * cols), np.searchsorted(index, (rows + 1) * cols)
    counts = last - first
    taken = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    if taken.size == 0:
        return None
    moved = index[taken] + np.repeat((np.arange(rows.size) - rows) * cols, counts)
    return Outliers(moved, outliers.values[taken])


def matrix_of_out(out: Array, shape: tuple[int, ...]) -> Array:
    """Return `out` seen as the matrix that the kernels fill, without a copy, or raise."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a NumPy array, got {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if not out.flags.c_contiguous:
        raise ValueError(f"out: must be C-contiguous; got strides {out.strides}")
    return out.reshape(as_matrix(shape))


def quantize(
    w: ArrayLike,
    bits: int = 4,
    *,
    group_size: GroupSize = "auto",
    param_dtype: DTypeLike = "float16",
    fit: Literal["minmax", "lsq"] = "minmax",
    outliers: float | None = None,
    max_error: float | None = None,
    out: QuantizedTensor | None = None,
) -> QuantizedTensor:
    r"""Quantize to `bits` bits between the smallest and the largest value of each group.

    With float32 parameters the codes are

    .. math:: \mathrm{round}\left(\frac{x - \min}{\max - \min} (2^b - 1)\right)

    in float32, half to even, with ``minimum`` :math:`= \min` and ``scale`` :math:`= (\max - \min) / (2^b - 1)`.
    With float16 parameters the minimum is rounded to float16 first, the scale follows from the rounded minimum, and
    codes are made against the rounded pair, so that whoever decodes the file gets what was measured here.

    Parameters
    ----------
    w : array_like of float32, float64, float16 or bfloat16
        Any shape; seen as a matrix of its first axis by all others. float64 is rounded to float32 first.
    bits : 8, 4 or 2
    group_size : int, -1, None or "auto"
        How many neighbours in a row share scale and minimum; the last group of a row may be shorter. -1: a row.
        None: the whole tensor, which suits few real weights. "auto": a row for 8 bits, 32 for 4, 16 for 2.
    param_dtype : "float16" or "float32"
        Of scale and minimum. Where float16 would overflow, be subnormal, or move a value by more than half a
        step, float32 is taken for the tensor.
    fit : "minmax" or "lsq"
        "lsq" moves scale and minimum to where the squared error is least, without calibration data and in the same
        format: with 4 bits the error falls by a fifteenth, with 2 bits by a fifth to a half. Values at the ends of
        their group may then be off by more than half a step: see `outliers`.
    outliers : float, optional
        Share of the weights that keep what they are off by (8 bytes each): those that are off furthest, once scale
        and minimum have been fitted without as many of the largest magnitudes. A handful of large weights then no
        longer costs all others their accuracy.
    max_error : float, optional
        The same for all weights that are off by more than this.
    out : QuantizedTensor, optional
        Its arrays are overwritten, also where values are then found to be refused; it is of the same shape and
        options, and is returned. Not with `outliers`.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    TypeError
        If `w` is not of a float type, or an option is of the wrong kind.
    ValueError
        If `w` has NaN or infinity, or an option is out of range.

    Notes
    -----
    A constant group has scale 0 and codes 0, and so comes back as its minimum. Every other value comes back
    within half a step (with float16 parameters within .63 step at 8 bits, at the top of a group).

    What becomes of values that other quantizers lose (measured; a step is one of 4 bits):

    ======================= =========================== ===================================================
    values                  here                        elsewhere
    ======================= =========================== ===================================================
    constant                exact (to the parameters)   0 / 0 in the plain formula; torch per channel: NaN
    one NaN                 ValueError, with its place  FBGEMM, ggml, ONNX Runtime, MLX: some finite code
    infinite                ValueError, with its place  the whole group lost, or NaN
    -3e38 to 3e38           half a step                 NaN; only bitsandbytes NF4 survives
    beyond 65504            half a step (float32        FBGEMM 4 bits: NaN; ggml Q4_1: infinity
                            parameters)
    around 1e-7             half a step                 FBGEMM 16 steps, Q4_1 9, MLX 4
    around 1e-9             half a step                 FBGEMM, ggml, MLX: a constant
    subnormal               half a step                 zero, or wrong
    1000 +- 1e-3            half a step                 FBGEMM, torchao, ONNX Runtime, ggml: a constant
    5 to 6                  half a step                 integer zero points: 3 steps; NF4 12
    ======================= =========================== ===================================================

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> q = fo.quantize(np.linspace(-1, 1, 64, dtype=np.float32), bits=4)
    >>> q
    QuantizedTensor(shape=(64,), bits=4, group_size=32, float16 parameters, 5.00 bits per weight)
    >>> float(abs(q.dequantize() - np.linspace(-1, 1, 64)).max()) < 0.035
    True
    """
    bits = require_bits(bits)
    group = require_group_size(group_size, bits)
    try:
        params = np.dtype(param_dtype)
    except TypeError:
        raise TypeError(f"param_dtype: expected float16 or float32, got {param_dtype!r}") from None
    if params not in (np.float16, np.float32):
        raise ValueError(f"param_dtype: expected float16 or float32, got {params}")
    if fit not in ("minmax", "lsq"):
        raise ValueError(f"fit: expected 'minmax' or 'lsq', got {fit!r}")
    for name, number in (("outliers", outliers), ("max_error", max_error)):
        if number is not None and not isinstance(number, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if outliers is not None and not 0 <= outliers <= 1:
        raise ValueError(f"outliers: expected a share between 0 and 1, got {outliers}")
    if max_error is not None and not max_error >= 0:
        raise ValueError(f"max_error: expected at least 0, got {max_error}")
    array = as_float_array(w, "w")
    if out is not None:
        _check_out(out, array.shape, bits, group, outliers is not None or max_error is not None)
        params = out.scale.dtype
    rows, cols = as_matrix(array.shape)
    codes = np.empty((rows, -(-cols * bits // 8)), np.uint8) if out is None else out.codes
    fitted = _without_largest(array, outliers) if outliers else array

    def fill(dtype: np.dtype[Any]) -> tuple[int, Array, Array]:
        shape = _param_shape(group, rows, cols)
        scale, minimum = (np.empty(shape, dtype), np.empty(shape, dtype)) if out is None else (out.scale, out.minimum)
        flags, kernel_group = 0, _kernel_group_size(group, cols)
        for begin, end in _panels(fitted, group):
            part = slice(begin, end)
            x = _float_rows(fitted, begin, end)
            s, m = (scale, minimum) if group is None else (scale[part], minimum[part])
            flags |= _core.quantize(x, codes[part], s, m, bits, kernel_group, fit == "lsq")
        return flags, scale, minimum

    flags, scale, minimum = fill(params)
    if flags & _core.NON_FINITE:
        with np.errstate(over="ignore"):
            at = np.unravel_index(int(np.argmin(np.isfinite(array.astype(np.float32)))), array.shape)
        raise ValueError(f"w: expected finite float32 values, got {array[at]} at {tuple(map(int, at))}")
    if params == np.float16 and flags & _core.HALF_MISFIT:
        if out is not None:
            raise ValueError("out: has float16 parameters, which cannot hold those of w; expected float32")
        _, scale, minimum = fill(np.dtype(np.float32))
    if out is not None:
        return out
    q = QuantizedTensor(codes, scale, minimum, bits, group, array.shape, array.dtype)
    if outliers is None and max_error is None:
        return q
    kept = _find_outliers(q, array, outliers, max_error)
    return QuantizedTensor(codes, scale, minimum, bits, group, array.shape, array.dtype, kept)


def _check_out(out: QuantizedTensor, shape: tuple[int, ...], bits: int, group_size: int | None, outliers: bool) -> None:
    if not isinstance(out, QuantizedTensor):
        raise TypeError(f"out: expected a QuantizedTensor, got {type(out).__name__}")
    if (out.shape, out.bits, out.group_size) != (shape, bits, group_size):
        raise ValueError(
            f"out: expected shape {shape}, {bits} bits and group_size {group_size}, "
            f"got {out.shape}, {out.bits} and {out.group_size}"
        )
    if outliers or out.outliers is not None:
        raise ValueError("out: cannot be given together with outliers")


def _panels(array: Array, group_size: int | None) -> list[tuple[int, int]]:
    """Return ranges of rows to quantize one after the other: few at a time where they must be converted first."""
    rows, cols = as_matrix(array.shape)
    as_it_is = array.dtype == np.float32 and array.flags.c_contiguous and array.flags.aligned
    step = max(rows, 1) if as_it_is or group_size is None else max(1, (1 << 20) // max(cols, 1))
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)] or [(0, 0)]


def _float_rows(array: Array, begin: int, end: int) -> Array:
    """Return some rows of the matrix that `array` is seen as, in float32."""
    cols = as_matrix(array.shape)[1]
    part = array[begin:end] if array.ndim > 1 else array
    with np.errstate(over="ignore"):
        return np.require(part, np.float32, ["C", "A"]).reshape(end - begin, cols)


def _without_largest(w: Array, share: float) -> Array:
    """Return a weight whose largest magnitudes, this share of it, are cut to the next smaller one."""
    magnitude = np.abs(w).reshape(-1)
    rest = magnitude.size - round(share * magnitude.size)
    if not 0 < rest < magnitude.size or not np.isfinite(magnitude).all():  # what is not finite is refused later
        return w
    limit = np.partition(magnitude, rest - 1)[rest - 1]
    return np.clip(w, -limit, limit)


def _find_outliers(q: QuantizedTensor, w: Array, share: float | None, max_error: float | None) -> Outliers | None:
    """Return what the weights that are off furthest are off by; of equal errors the lower index is kept."""
    with np.errstate(over="ignore"):
        missing = np.subtract(w, q.dequantize(dtype=np.float32), dtype=np.float32, casting="same_kind").reshape(-1)
    distance = np.abs(missing)
    index = np.empty(0, np.int64)
    if share is not None and (count := round(share * missing.size)):
        limit = np.partition(distance, missing.size - count)[missing.size - count]
        above = np.flatnonzero(distance > limit)
        ties = np.flatnonzero(distance == limit)[: count - above.size]
        index = np.union1d(above, ties)
    if max_error is not None:
        index = np.union1d(index, np.flatnonzero(distance > max_error))
    index = index[missing[index] != 0]
    if index.size == 0:
        return None
    return Outliers(index.astype(np.uint32 if missing.size < 1 << 32 else np.int64), missing[index])


def embedding(q: QuantizedTensor, ids: ArrayLike, out: Array | None = None) -> Array:
    """Return rows of a quantized matrix, decoded: ``q.dequantize()[ids]`` without the rest of it.

    Parameters
    ----------
    q : QuantizedTensor of at least two axes
    ids : array_like of integers, any shape
        Each at least 0 and below the number of rows.
    out : float32 array, shape (*ids.shape, *q.shape[1:]), optional
        Written and returned; C-contiguous.

    Returns
    -------
    array
        `out`, or a new array of the dtype that the weight had.

    Raises
    ------
    TypeError
        If `q` is not a QuantizedTensor, `ids` are not integers, or `out` is not float32.
    IndexError
        If one of `ids` is out of range.
    ValueError
        If `q` has one axis, or `out` does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> table = fo.quantize(15 * np.eye(4, dtype=np.float32), bits=4)
    >>> fo.embedding(table, [2, 0])
    array([[ 0.,  0., 15.,  0.],
           [15.,  0.,  0.,  0.]], dtype=float32)
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"q: expected a QuantizedTensor, got {type(q).__name__}")
    if len(q.shape) < 2:
        raise ValueError(f"q: expected at least two axes, got shape {q.shape}")
    rows = np.asarray(ids)
    if rows.size == 0 and not isinstance(ids, np.ndarray):
        rows = rows.astype(np.int64)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"ids: expected integers, got {rows.dtype}")
    if rows.size and not (rows.min() >= 0 and rows.max() < q.shape[0]):
        wrong = int(rows.min() if rows.min() < 0 else rows.max())
        raise IndexError(f"ids: expected 0 to {q.shape[0] - 1}, got {wrong}")
    shape = (*rows.shape, *q.shape[1:])
    part = q[rows.reshape(-1).astype(np.int64)]
    if out is None:
        return part.dequantize().reshape(shape)
    matrix = matrix_of_out(out, shape)
    part.dequantize(out=matrix.reshape(part.shape))
    return out


def pack_bits(codes: ArrayLike, bits: int) -> NDArray[np.uint8]:
    """Pack codes of `bits` bits into bytes, lowest bits first.

    Parameters
    ----------
    codes : array_like of uint8, any shape
        Each below ``2**bits``; taken in C order.
    bits : 8, 4 or 2

    Returns
    -------
    uint8 array, shape (ceil(size * bits / 8),)
        Bits left over in the last byte are 0.

    Raises
    ------
    TypeError
        If `codes` is not uint8.
    ValueError
        If a code does not fit, or `bits` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.pack_bits(np.array([1, 2, 3], dtype=np.uint8), bits=4)
    array([33,  3], dtype=uint8)
    """
    bits = require_bits(bits)
    array = np.asarray(codes)
    if array.dtype != np.uint8:
        raise TypeError(f"codes: expected uint8, got {array.dtype}")
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.size and int(flat.max()) >= 1 << bits:
        raise ValueError(f"codes: expected values below {1 << bits}, got {int(flat.max())}")
    packed = np.empty(-(-flat.size * bits // 8), np.uint8)
    _core.pack(flat, bits, packed)
    return packed


def unpack_bits(packed: ArrayLike, bits: int, count: int) -> NDArray[np.uint8]:
    """Unpack what `pack_bits` packed.

    Parameters
    ----------
    packed : array_like of uint8
    bits : 8, 4 or 2
    count : int
        Number of codes.

    Returns
    -------
    uint8 array, shape (count,)

    Raises
    ------
    TypeError
        If `packed` is not uint8, or `count` not an integer.
    ValueError
        If `packed` does not have ``ceil(count * bits / 8)`` bytes, or `bits` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.unpack_bits(np.array([33, 3], dtype=np.uint8), bits=4, count=3)
    array([1, 2, 3], dtype=uint8)
    """
    bits = require_bits(bits)
    if not hasattr(count, "__index__"):
        raise TypeError(f"count: expected an integer, got {count!r:.80}")
    count = operator.index(count)
    array = np.asarray(packed)
    if array.dtype != np.uint8:
        raise TypeError(f"packed: expected uint8, got {array.dtype}")
    if count < 0 or array.size != -(-count * bits // 8):
        raise ValueError(f"count: {array.size} bytes do not hold {count} codes of {bits} bits")
    codes = np.empty(count, np.uint8)
    _core.unpack(np.ascontiguousarray(array).reshape(-1), bits, codes)
    return codes
