"""Sparse storage of pruned weights."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastopt import _core
from fastopt.quant import (
    GroupSize,
    QuantizedTensor,
    as_float_array,
    as_matrix,
    matrix_of_out,
    quantize,
    require_bits,
)

Array: TypeAlias = NDArray[Any]

# Groups of non-zeros that share a scale and minimum, by bits: they run through the rows, so "a row" is no choice.
_VALUE_GROUP_SIZE = {8: 128, 4: 32, 2: 16}


@dataclass(frozen=True, eq=False, repr=False)
class SparseTensor:
    """A pruned weight: one bit for each element, and the non-zeros.

    Attributes
    ----------
    mask : uint8 array, shape (rows, ceil(cols / 8))
        A bit for each element, lowest first; each row starts on a byte; bits behind the last column are 0.
    row_offsets : int64 array, shape (rows + 1,)
        The non-zeros of row r are ``values[row_offsets[r]:row_offsets[r + 1]]``.
    values : array, shape (nnz,), or QuantizedTensor of that shape
        The non-zeros in order, in a float type or in 8, 4 or 2 bits.
    shape : tuple of int
        Of the weight; seen as a matrix of its first axis by all others, and as one row if it has one axis.

    Raises
    ------
    TypeError, ValueError
        If mask, offsets and values do not fit each other and the shape.

    Notes
    -----
    An element is stored unless it is zero; -0 counts as zero and comes back as +0, NaN and infinity are kept.
    In a product, what is not stored does not count, even against NaN or infinity.
    """

    mask: NDArray[np.uint8]
    row_offsets: NDArray[np.int64]
    values: Array | QuantizedTensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.values.shape) != 1:
            raise ValueError(f"values: expected one dimension, got shape {self.values.shape}")
        rows, cols = as_matrix(self.shape)
        if self.mask.shape != (rows, -(-cols // 8)):
            raise ValueError(f"mask: expected shape {(rows, -(-cols // 8))}, got {self.mask.shape}")
        if isinstance(self.values, np.ndarray):
            as_float_array(self.values, "values")
        _core.check_masked(self.mask, self.row_offsets, cols, self.nnz)
        # The kernels trust what was checked here.
        for array in (self.mask, self.row_offsets):
            array.flags.writeable = False

    @classmethod
    def from_dense(cls, w: ArrayLike) -> "SparseTensor":
        """Return the non-zeros of `w` in sparse storage.

        Parameters
        ----------
        w : array_like of float32, float64, float16 or bfloat16, any shape

        Returns
        -------
        SparseTensor

        Raises
        ------
        TypeError
            If `w` is not of a float type.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> fo.SparseTensor.from_dense(np.eye(4, dtype=np.float32))
        SparseTensor(shape=(4, 4), density=0.250, float32 values, 30.00 bits per weight)
        """
        array = as_float_array(w, "w")
        rows, cols = as_matrix(array.shape)
        x = np.require(array, array.dtype.newbyteorder("="), ["C", "A"]).reshape(rows, cols)
        row_offsets = np.zeros(rows + 1, np.int64)
        _core.count_nonzero(x, row_offsets[1:])
        np.cumsum(row_offsets, out=row_offsets)
        mask = np.empty((rows, -(-cols // 8)), np.uint8)
        values = np.empty(int(row_offsets[-1]), x.dtype)
        _core.compress(x, row_offsets, mask, values)
        return cls(mask, row_offsets, values, array.shape)

    def quantize(self, bits: int = 8, *, group_size: GroupSize = "auto") -> "SparseTensor":
        """Return the same with the non-zeros in 8, 4 or 2 bits.

        Parameters
        ----------
        bits : 8, 4 or 2
        group_size : int, -1, None or "auto"
            How many neighbouring non-zeros share scale and minimum; groups run through the rows. "auto": 128
            for 8 bits, 32 for 4, 16 for 2. -1 and None: all.

        Returns
        -------
        SparseTensor

        Raises
        ------
        ValueError
            If the non-zeros have NaN or infinity, or an option is out of range.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> fo.SparseTensor.from_dense(np.eye(64, dtype=np.float32)).quantize(bits=4)
        SparseTensor(shape=(64, 64), density=0.016, 4-bit values, 2.09 bits per weight)
        """
        bits = require_bits(bits)
        if group_size == "auto":
            group_size = _VALUE_GROUP_SIZE[bits]
        values = quantize(self._dense_values(), bits, group_size=group_size)
        return SparseTensor(self.mask, self.row_offsets, values, self.shape)

    def _dense_values(self) -> Array:
        return self.values.dequantize() if isinstance(self.values, QuantizedTensor) else self.values

    def to_dense(self, out: Array | None = None) -> Array:
        """Return the weight with its zeros.

        Parameters
        ----------
        out : array of the weight's shape, optional
            Written and returned; C-contiguous and of `dtype`.

        Returns
        -------
        array

        Raises
        ------
        TypeError, ValueError
            If `out` is not writable, contiguous, and of the right shape and dtype.
        """
        result = np.empty(self.shape, self.dtype) if out is None else out
        target = matrix_of_out(result, self.shape)
        if result.dtype != self.dtype:
            raise TypeError(f"out: expected {self.dtype}, got {result.dtype}")
        _core.expand(self.mask, self.row_offsets, self._dense_values(), target)
        return result

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return int(self.values.shape[0])

    @property
    def size(self) -> int:
        """Number of weights, zeros included."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Share of non-zeros."""
        return self.nnz / max(self.size, 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `to_dense`."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of mask, offsets and values."""
        return self.mask.nbytes + self.row_offsets.nbytes + self.values.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, zeros included."""
        return 8 * self.nbytes / max(self.size, 1)

    def __matmul__(self, x: Array) -> Array:
        """Return the product with a vector [in] or a matrix [in, batch]."""
        from fastopt.linear import linear

        return linear(np.asarray(x).T, self).T

    def __repr__(self) -> str:
        quantized = isinstance(self.values, QuantizedTensor)
        values = f"{self.values.bits}-bit" if quantized else str(self.dtype)  # type: ignore[union-attr]
        return (
            f"SparseTensor(shape={self.shape}, density={self.density:.3f}, {values} values, "
            f"{self.bits_per_weight:.2f} bits per weight)"
        )
