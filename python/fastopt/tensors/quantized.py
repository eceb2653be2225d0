"""b-bit min-max quantization: 8, 4 and 2 bits, bit-packed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastopt import _core
from fastopt._checks import as_float_array, as_matrix, matrix_of_out, require_bits, require_group_size
from fastopt._types import Array
from fastopt.tensors.error import Error, ErrorSums


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
        from fastopt.tensors.products import matmul

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
        from fastopt.tensors.products import linear

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
