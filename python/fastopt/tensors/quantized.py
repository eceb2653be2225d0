"""Quantized weights: bit-packed codes, with a scale and minimum for each group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastopt import _core
from fastopt._checks import (
    as_matrix,
    matrix_of_out,
    require_array,
    require_bits,
    require_float_dtype,
    require_group_size,
    require_shape,
)
from fastopt._text import shown
from fastopt._types import Array
from fastopt.tensors.error import ErrorSums
from fastopt.tensors.packed import PackedTensor, Precision, Storage

_LIMBS = {"exact": 3, "int8": 1}
PARAM_BITS = (8, 6, 4)  # of the codes of scale and minimum, in two levels
PARAM_COLUMNS = 256  # that share their floats, if not a row does
_DECODED_SIZE = 1 << 19  # number of weights that are decoded at a time for BLAS; they stay in the outer cache


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


def require_two_levels(param_bits: Any, param_group: Any, group_size: int | None) -> None:
    """Raise unless these are options of parameters in two levels."""
    if isinstance(param_bits, bool) or not isinstance(param_bits, int) or param_bits not in PARAM_BITS:
        raise ValueError(f"param_bits: expected 4, 6, 8 or None, got {shown(param_bits)}")
    if isinstance(param_group, bool) or not isinstance(param_group, int) or param_group not in (-1, PARAM_COLUMNS):
        raise ValueError(f"param_group: expected -1, a row, or {PARAM_COLUMNS}, got {shown(param_group)}")
    if group_size is None or group_size == -1:
        raise ValueError(f"group_size: expected a number of columns with param_bits, got {group_size}")
    if param_group != -1 and param_group % group_size:
        raise ValueError(f"group_size: expected a divisor of param_group, {param_group}, got {group_size}")


def two_level_parts(param_group: int, cols: int) -> int:
    """Return how many times a row has floats."""
    return -(-cols // param_group) if param_group != -1 else min(cols, 1)


def unpacked_rows(packed: Array, bits: int, count: int) -> Array:
    """Return packed rows of `count` codes, each of which starts on a byte, as a matrix with one code a byte."""
    if not packed.size:
        return np.zeros((len(packed), count), np.uint8)
    if packed.shape[1] * 8 % bits:  # the last byte of a row ends within a code
        packed = np.pad(packed, ((0, 0), (0, -(-count // 8) * bits - packed.shape[1])))
    codes = np.empty(packed.size * 8 // bits, np.uint8)
    _core.unpack(np.ascontiguousarray(packed).reshape(-1), bits, codes)
    return codes.reshape(len(packed), -1)[:, :count]


class Outliers(NamedTuple):
    """Corrections for the weights that the codes alone would miss by far.

    Attributes
    ----------
    indices : uint32 or int64 array, rising
        Places in the flattened weight.
    values : float32 array
        The correction that is added there after decoding.
    """

    indices: Array
    values: Array

    def copy(self) -> Outliers:
        """Return a copy whose arrays are its own."""
        return Outliers(np.array(self.indices), np.array(self.values))

    def __eq__(self, other: object) -> bool:
        """Return whether the corrections are the same, bit for bit, whatever the type of the indices."""
        if not isinstance(other, Outliers):
            return NotImplemented
        same_values = self.values.dtype == other.values.dtype and self.values.tobytes() == other.values.tobytes()
        return same_values and np.array_equal(self.indices, other.indices)

    def __ne__(self, other: object) -> bool:
        return not self == other


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor(PackedTensor):
    """A weight in 8, 6, 5, 4, 3 or 2 bits: ``w ~ minimum + scale * code``, with a pair of parameters a group.

    `quantize` makes one. The arrays are used as they are; they may be read-only and memory-mapped.

    Attributes
    ----------
    codes : uint8 array, shape (rows, bytes per row)
        Bit-packed, lowest bits first; each row starts on a byte.
    scale, minimum : float16 or float32 arrays, shape (rows, groups), or (1, 1) for the whole tensor
        With `param_bits` uint8 arrays, shape (rows, bytes per row): packed codes, like `codes`.
    bits : 8, 6, 5, 4, 3 or 2
    group_size : int or None
        The number of columns that share a pair; -1: a row; None: the whole tensor.
    shape : tuple of int
        The shape of the weight, which is seen as a matrix: the first axis by all others, or one row if there is only
        one axis.
    dtype : numpy.dtype
        The dtype of the weight before it was quantized, and of `dequantize` without ``out``.
    outliers : Outliers or None
        Corrections that are added to some weights after decoding.
    param_bits : 8, 6, 4 or None
        The bits of the codes of scale and minimum. None: they are floats.
    param_group : int
        The number of columns whose codes of scale and minimum count in the same floats: 256; -1: a row.
    param_floats : float16 or float32 array, shape (rows, parts, 3), or None
        d, dm and m0: the scale of a group is ``d * code`` and its minimum ``m0 - dm * code``. With a last axis of 2,
        m0 is 0.

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit bits, group size and shape.

    Notes
    -----
    Products, rows, iteration and ``==`` are those of `PackedTensor`.
    """

    codes: NDArray[np.uint8]
    scale: Array
    minimum: Array
    bits: int
    group_size: int | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    outliers: Outliers | None = None
    param_bits: int | None = None
    param_group: int = -1
    param_floats: Array | None = None

    def __post_init__(self) -> None:
        bits, shape = require_bits(self.bits), require_shape(self.shape)
        if self.param_bits is not None or self.param_floats is not None:
            self._check_two_levels()
        if isinstance(self.group_size, str):
            raise TypeError(f"group_size: expected an integer or None, got {shown(self.group_size)}")
        group_size = require_group_size(self.group_size, bits)
        rows, cols = as_matrix(shape)
        params = _param_shape(group_size, rows, cols)
        if self.param_bits is not None:
            params = rows, -(-params[1] * self.param_bits // 8)
        for name, array, needed in (
            ("codes", self.codes, (rows, -(-cols * bits // 8))),
            ("scale", self.scale, params),
            ("minimum", self.minimum, params),
        ):
            if require_array(array, name).shape != needed:
                raise ValueError(f"{name}: expected shape {needed}, got {array.shape}")
        if self.codes.dtype != np.uint8:
            raise TypeError(f"codes: expected uint8, got {self.codes.dtype}")
        if self.param_bits is not None:
            if self.scale.dtype != np.uint8 or self.minimum.dtype != np.uint8:
                raise TypeError(
                    f"scale, minimum: expected uint8 with param_bits, got {self.scale.dtype} and {self.minimum.dtype}"
                )
        elif self.scale.dtype not in (np.float16, np.float32) or self.minimum.dtype != self.scale.dtype:
            raise TypeError(
                "scale, minimum: expected float16 or float32, the same for both, "
                f"got {self.scale.dtype} and {self.minimum.dtype}"
            )
        outliers = None if self.outliers is None else _require_outliers(self.outliers, math.prod(shape))
        for field, value in (
            ("bits", bits),
            ("group_size", group_size),
            ("shape", shape),
            ("dtype", require_float_dtype(self.dtype, "dtype")),
            ("outliers", outliers),
        ):
            object.__setattr__(self, field, value)

    def _check_two_levels(self) -> None:
        require_two_levels(self.param_bits, self.param_group, self.group_size)
        rows, cols = as_matrix(require_shape(self.shape))
        floats = require_array(self.param_floats, "param_floats")
        parts = two_level_parts(self.param_group, cols)
        if floats.ndim != 3 or floats.shape[:2] != (rows, parts) or floats.shape[2] not in (2, 3):
            raise ValueError(f"param_floats: expected shape {(rows, parts, 2)} or 3, got {floats.shape}")
        if floats.dtype not in (np.float16, np.float32):
            raise TypeError(f"param_floats: expected float16 or float32, got {floats.dtype}")

    @property
    def storage(self) -> Storage:
        """The kind of storage: "quantized"."""
        return "quantized"

    @property
    def param_dtype(self) -> np.dtype[Any]:
        """The dtype of scale and minimum or, in two levels, of the floats above their codes."""
        return self.scale.dtype if self.param_floats is None else self.param_floats.dtype

    def _arrays(self) -> tuple[Array, ...]:
        floats = () if self.param_floats is None else (self.param_floats,)
        return (self.codes, self.scale, self.minimum, *floats, *(self.outliers or ()))

    @cached_property
    def kernel_args(self) -> tuple[Array, Any, Array, int, int]:
        """The arguments of the kernels, in their order; in two levels, a tuple stands for the scale."""
        rows, cols = as_matrix(self.shape)
        scale: Any = self.scale
        if self.param_floats is not None:
            _, parts, count = self.param_floats.shape
            floats = np.require(self.param_floats.reshape(rows, parts * count), None, ["C", "A"])
            scale = self.scale, floats, self.param_bits, max(self.param_group, 0)
        return self.codes, scale, self.minimum, self.bits, _kernel_group_size(self.group_size, cols)

    def one_level(self) -> QuantizedTensor:
        """Return the same weight with a float32 scale and minimum for each group; itself if that is what it has.

        Its values are the same, bit for bit: they are for programs that know no parameters in two levels.
        """
        if self.param_floats is None or self.param_bits is None:
            return self
        rows, cols = as_matrix(self.shape)
        groups = _param_shape(self.group_size, rows, cols)[1]
        scale, minimum = (
            unpacked_rows(p, self.param_bits, groups).astype(np.float32) for p in (self.scale, self.minimum)
        )
        per_part = groups if self.param_group == -1 else self.param_group // _kernel_group_size(self.group_size, cols)
        floats = np.repeat(self.param_floats.astype(np.float32), max(per_part, 1), axis=1)[:, :groups]
        with np.errstate(all="ignore"):  # any bytes of a file are floats
            scale = floats[..., 0] * scale
            minimum = (floats[..., 2] if floats.shape[2] == 3 else np.float32(0)) - floats[..., 1] * minimum
        return QuantizedTensor(
            self.codes, scale, minimum, self.bits, self.group_size, self.shape, self.dtype, self.outliers
        )

    def dequantize(
        self, out: Array | None = None, *, dtype: DTypeLike | None = None, rows: slice | None = None
    ) -> Array:
        """Return ``minimum + scale * code`` (plus outliers), computed in float32.

        Parameters
        ----------
        out : array of the weight's shape, of float32 or of `dtype`, optional
            The array to write and return; C-contiguous. With float32 it saves an allocation, which costs more than the
            decoding.
        dtype : dtype, optional
            The dtype of a new array. The default is the dtype of the weight before it was quantized.
        rows : slice, optional
            The rows to decode: a slice of step 1 along the first axis.

        Returns
        -------
        array
            `out`, or a new array.

        Raises
        ------
        TypeError, ValueError
            If `out` does not fit, as in `to_dense`, or `rows` has a step.
        IndexError
            If `rows` is given for a weight of one axis.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> fo.quantize(np.array([0, 1, 2, 3], dtype=np.float32), bits=2).dequantize()
        array([0., 1., 2., 3.], dtype=float32)
        """
        part = self if rows is None else self[_require_slice(rows)]
        if out is not None and (part.outliers is not None or getattr(out, "dtype", None) != np.float32):
            part._check_out(out)
        result = np.empty(part.shape, np.float32) if out is None or out.dtype != np.float32 else out
        _core.dequantize(*part.kernel_args, matrix_of_out(result, part.shape))
        if part.outliers is not None:
            result.reshape(-1)[part.outliers.indices] += part.outliers.values
        with np.errstate(over="ignore"):
            if out is None:
                return result.astype(self.dtype if dtype is None else dtype, copy=False)
            if out is not result:
                out[...] = result
        return out

    def to_dense(self, out: Array | None = None) -> Array:
        """Return the weight as an array, as `dequantize` does; see `PackedTensor.to_dense`."""
        return self.dequantize(out)

    def error_sums(self, w: ArrayLike) -> ErrorSums:
        """Return the sums that `error` is computed from; sums of several weights can be added."""
        array = self._original(w)
        if self.ndim < 2:
            return super().error_sums(array)
        rows, cols = as_matrix(self.shape)
        sums, step = ErrorSums(), max(1, (1 << 20) // max(cols, 1))  # decodes some rows at a time
        for at in range(0, rows, step):
            sums.add(self.dequantize(rows=slice(at, at + step)), array[at : at + step])
        return sums

    def _take(self, key: slice | NDArray[np.int64], rows: NDArray[np.int64], shape: tuple[int, ...]) -> QuantizedTensor:
        codes = self.codes[key]
        scale, minimum = (p if self.group_size is None else p[key] for p in (self.scale, self.minimum))
        outliers = self.outliers and _outliers_of_rows(self.outliers, rows, as_matrix(self.shape)[1])
        floats = None if self.param_floats is None else self.param_floats[key]
        own = self.bits, self.group_size, shape, self.dtype, outliers, self.param_bits, self.param_group, floats
        return QuantizedTensor(codes, scale, minimum, *own)

    def _linear(self, x: ArrayLike, bias: ArrayLike | None, out: Array | None, precision: Precision) -> Array:
        if precision == "blas":
            return self._by_blas(x, bias, out)
        return _core.linear_quantized(x, *self.kernel_args, self.shape, bias, out, _LIMBS[precision], self.outliers)

    def _by_blas(self, x: ArrayLike, bias: ArrayLike | None, out: Array | None) -> Array:
        """Decode some rows at a time, and leave their products to BLAS."""
        stored = {"codes": self.codes, "scale": self.scale, "minimum": self.minimum}
        if self.param_floats is not None:
            stored["param_floats"] = self.param_floats
        x, bias, out = _core.check_linear(x, self.shape, bias, out, stored)
        (rows, cols), batch = as_matrix(self.shape), math.prod(x.shape[:-1])
        x2, out2 = x.reshape(batch, cols), out.reshape(batch, rows)
        step = max(1, _DECODED_SIZE // max(cols, 1))
        memory = np.empty((min(step, rows), cols), np.float32)
        for begin in range(0, rows, step):
            part = self[begin : begin + step] if self.ndim > 1 else self
            decoded = memory[: min(step, rows - begin)]
            part.dequantize(out=decoded.reshape(part.shape))
            with np.errstate(all="ignore"):
                np.matmul(x2, decoded.T, out=out2[:, begin : begin + step])
        if bias is not None:
            np.add(out2, bias, out=out2)
        return out

    def __repr__(self) -> str:
        group = {None: "whole tensor", -1: "a row"}.get(self.group_size, self.group_size)
        return (
            f"QuantizedTensor(shape={self.shape}, bits={self.bits}, group_size={group}, "
            f"{self._param_text} parameters, {self._outlier_text}{self.bits_per_weight:.2f} bits per weight)"
        )

    @property
    def _param_text(self) -> str:
        if self.param_bits is None:
            return str(self.scale.dtype)
        part = "a row" if self.param_group == -1 else f"{self.param_group} columns"
        return f"{self.param_bits}-bit ({self.param_dtype} for {part})"

    @property
    def _outlier_text(self) -> str:
        return "" if self.outliers is None else f"{len(self.outliers.indices)} outliers, "


def _require_slice(rows: slice) -> slice:
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise ValueError(f"rows: expected a slice of step 1, got {shown(rows)}")
    return rows


def _require_outliers(outliers: Any, size: int) -> Outliers:
    """Return the outliers of a weight of `size` elements, checked."""
    if not isinstance(outliers, tuple) or len(outliers) != 2:
        raise TypeError(f"outliers: expected Outliers or None, got {type(outliers).__name__}")
    index, value = require_array(outliers[0], "outlier_index"), require_array(outliers[1], "outlier_value")
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
    return Outliers(index, value)


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
