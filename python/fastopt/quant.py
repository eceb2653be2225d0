"""b-bit min-max quantization: 8, 4 and 2 bits, bit-packed."""

import math
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastopt import _core

Array: TypeAlias = NDArray[Any]
Bits: TypeAlias = Literal[8, 4, 2]
GroupSize: TypeAlias = "int | Literal['auto'] | None"

# What real weights need: 8 bits a pair of parameters a row, 4 and 2 bits one a group.
DEFAULT_GROUP_SIZE = {8: -1, 4: 32, 2: 16}


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that an array of any shape is seen as: the first axis, and all others."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def require_bits(bits: int) -> int:
    """Return `bits`, or raise."""
    if bits not in DEFAULT_GROUP_SIZE:
        raise ValueError(f"bits: expected 8, 4 or 2, got {bits!r}")
    return operator.index(bits)


def require_group_size(group_size: GroupSize, bits: int) -> int | None:
    """Return `group_size` with its default filled in, or raise."""
    if group_size == "auto":
        return DEFAULT_GROUP_SIZE[bits]
    if group_size is None:
        return None
    size = operator.index(group_size)
    if size < 1 and size != -1:
        raise ValueError(f"group_size: expected a positive number, -1 (a row) or None (the whole tensor), got {size}")
    return size


def as_float_array(w: ArrayLike, name: str) -> Array:
    """Return `w` as an array of a float type, or raise."""
    array = np.asarray(w)
    if array.dtype.name not in ("float32", "float64", "float16", "bfloat16"):
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

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit bits, group size and shape.
    """

    codes: NDArray[np.uint8]
    scale: Array
    minimum: Array
    bits: int
    group_size: int | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __post_init__(self) -> None:
        require_bits(self.bits)
        require_group_size(self.group_size, self.bits)
        rows, cols = as_matrix(self.shape)
        row_bytes, params = -(-cols * self.bits // 8), _param_shape(self.group_size, rows, cols)
        for name, array, shape in (
            ("codes", self.codes, (rows, row_bytes)),
            ("scale", self.scale, params),
            ("minimum", self.minimum, params),
        ):
            if array.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
        if self.codes.dtype != np.uint8:
            raise TypeError(f"codes: expected uint8, got {self.codes.dtype}")
        if self.scale.dtype not in (np.float16, np.float32) or self.minimum.dtype != self.scale.dtype:
            raise TypeError(
                "scale, minimum: expected float16 or float32, the same for both, "
                f"got {self.scale.dtype} and {self.minimum.dtype}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and minimum."""
        return self.codes.nbytes + self.scale.nbytes + self.minimum.nbytes

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

    def dequantize(self, out: Array | None = None) -> Array:
        """Return ``minimum + scale * code``, computed in float32.

        Parameters
        ----------
        out : float32 array of the weight's shape, optional
            Written and returned; C-contiguous. Saves allocating, which costs more than the work itself.

        Returns
        -------
        array
            `out`, or a new array of `dtype`.

        Raises
        ------
        TypeError, ValueError
            If `out` is not writable, contiguous float32 of the right shape.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> fo.quantize(np.array([0, 1, 2, 3], dtype=np.float32), bits=2).dequantize()
        array([0., 1., 2., 3.], dtype=float32)
        """
        if out is None:
            result = np.empty(self.shape, np.float32)
            _core.dequantize(*self.kernel_args, result.reshape(as_matrix(self.shape)))
            return result.astype(self.dtype, copy=False)
        _core.dequantize(*self.kernel_args, matrix_of_out(out, self.shape))
        return out

    def __matmul__(self, x: Array) -> Array:
        """Return the product with a vector [in] or a matrix [in, batch]."""
        from fastopt.linear import linear

        return linear(np.asarray(x).T, self).T

    def __repr__(self) -> str:
        group = {None: "whole tensor", -1: "a row"}.get(self.group_size, self.group_size)
        return (
            f"QuantizedTensor(shape={self.shape}, bits={self.bits}, group_size={group}, "
            f"{self.scale.dtype} parameters, {self.bits_per_weight:.2f} bits per weight)"
        )


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

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    TypeError
        If `w` is not of a float type.
    ValueError
        If `w` has NaN or infinity, or an option is out of range.

    Notes
    -----
    A constant group has scale 0 and codes 0, and so comes back as its minimum. Every other value comes back
    within half a step (with float16 parameters within .63 step at 8 bits, at the top of a group).

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
    params = np.dtype(param_dtype)
    if params not in (np.float16, np.float32):
        raise ValueError(f"param_dtype: expected float16 or float32, got {params}")
    array = as_float_array(w, "w")
    rows, cols = as_matrix(array.shape)
    with np.errstate(over="ignore"):
        x = np.require(array, np.float32, ["C", "A"]).reshape(rows, cols)

    codes = np.empty((rows, -(-cols * bits // 8)), np.uint8)
    param_shape = _param_shape(group, rows, cols)
    kernel_group = _kernel_group_size(group, cols)

    def fill(dtype: np.dtype[Any]) -> tuple[int, Array, Array]:
        scale, minimum = np.empty(param_shape, dtype), np.empty(param_shape, dtype)
        return _core.quantize(x, codes, scale, minimum, bits, kernel_group), scale, minimum

    flags, scale, minimum = fill(params)
    if flags & _core.NON_FINITE:
        at = np.unravel_index(int(np.argmin(np.isfinite(x))), array.shape)
        value = array[at]
        raise ValueError(f"w: expected finite float32 values, got {value} at {tuple(map(int, at))}")
    if params == np.float16 and flags & _core.HALF_MISFIT:
        _, scale, minimum = fill(np.dtype(np.float32))
    return QuantizedTensor(codes, scale, minimum, bits, group, array.shape, array.dtype)


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
        If `packed` is not uint8.
    ValueError
        If `packed` does not have ``ceil(count * bits / 8)`` bytes, or `bits` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.unpack_bits(np.array([33, 3], dtype=np.uint8), bits=4, count=3)
    array([1, 2, 3], dtype=uint8)
    """
    bits, count = require_bits(bits), operator.index(count)
    array = np.asarray(packed)
    if array.dtype != np.uint8:
        raise TypeError(f"packed: expected uint8, got {array.dtype}")
    if count < 0 or array.size != -(-count * bits // 8):
        raise ValueError(f"count: {array.size} bytes do not hold {count} codes of {bits} bits")
    codes = np.empty(count, np.uint8)
    _core.unpack(np.ascontiguousarray(array).reshape(-1), bits, codes)
    return codes
