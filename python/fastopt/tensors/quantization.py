"""Quantize arrays, and pack codes into bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastopt import _core
from fastopt._checks import (
    as_any_array,
    as_float32,
    as_float_array,
    as_index,
    as_matrix,
    largest_of,
    require_bits,
    require_group_size,
    require_param_dtype,
    require_real,
)
from fastopt._text import proposal, shown
from fastopt._types import FITS, LSQ_BELOW, Array, Fit, GroupSize
from fastopt.tensors.calibration import InputSums
from fastopt.tensors.gptq import SWEEPS, GptqPlan, plan_gptq
from fastopt.tensors.packed import dense_array
from fastopt.tensors.quantized import (
    Outliers,
    QuantizedTensor,
    _kernel_group_size,
    _param_shape,
    require_two_levels,
    two_level_parts,
)

TWO_LEVEL_GROUP = 16  # the group size of "auto" with parameters in two levels


def quantized_nbytes(
    shape: tuple[int, ...],
    bits: int,
    group_size: GroupSize,
    param_dtype: DTypeLike,
    outliers: float | None,
    param_bits: int | None = None,
    param_group: int = -1,
) -> int:
    """Return the bytes that `quantize` makes of a weight, if its parameters fit `param_dtype` and all outliers miss."""
    rows, cols = as_matrix(shape)
    if param_bits is not None and group_size == "auto":
        group_size = TWO_LEVEL_GROUP
    params = _param_shape(require_group_size(group_size, bits), rows, cols)
    entry = 4 + (4 if rows * cols < 1 << 32 else 8)
    nbytes = 2 * math.prod(params) * np.dtype(param_dtype).itemsize
    if param_bits is not None:
        floats = two_level_parts(param_group, cols) * (3 if param_group == -1 else 2)
        nbytes = rows * (2 * -(-params[1] * param_bits // 8) + floats * np.dtype(param_dtype).itemsize)
    return rows * -(-cols * bits // 8) + nbytes + round((outliers or 0) * rows * cols) * entry


def quantize(
    w: ArrayLike,
    bits: int = 4,
    *,
    group_size: GroupSize = "auto",
    param_dtype: DTypeLike = "float16",
    param_bits: int | None = None,
    param_group: int = -1,
    fit: Fit = "auto",
    importance: ArrayLike | Literal["magnitude"] | None = None,
    calibration: InputSums | None = None,
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
        Any shape; seen as a matrix of its first axis by all others. float64 is rounded to float32 first. `linear`
        takes [out, in]: quantize the transpose of a weight that is [in, out], as in Keras and scikit-learn.
    bits : 8, 6, 5, 4, 3 or 2
    group_size : int, -1, None or "auto"
        How many neighbours in a row share scale and minimum; the last group of a row may be shorter. -1: a row.
        None: the whole tensor, which suits few real weights. "auto": a row for 8 bits, 64 for 6 and 2, 32 for 5, 4 and
        3.
    param_dtype : "float16" or "float32"
        The dtype of scale and minimum. Where float16 would overflow, be subnormal, or move a value by more than half a
        step, float32 is taken for the tensor.
    param_bits : 8, 6, 4 or None
        Store scale and minimum of each group as codes of so many bits under a few floats of `param_dtype` for each
        row: ``scale = d * code`` and ``minimum = m0 - dm * code``. Groups then cost little and may be small. They are
        fitted by least squares, or by "gptq" under floats that least squares found; "auto" is a `group_size` of 16.
    param_group : -1 or 256
        The columns that share these floats: a row, or 256 with m0 = 0, the form of ggml's K-quants, which suits
        groups whose minimum is not above 0.
    fit : "auto", "minmax", "lsq" or "gptq"
        "lsq" moves scale and minimum to where the squared error is least, without calibration data and in the same
        format. The fewer the bits, the more it gains. Values at the ends of their group may then be off by more than
        half a step: see `outliers`. "auto" is "lsq" below 4 bits and with `importance` or `calibration`, and
        otherwise "minmax".
        "gptq" takes the products of columns that `Calibration(products=True)` collects, and has each code make good
        for the errors of those before it: much smaller errors of the outputs in the same format (GPTQ, Frantar et
        al., 2022, with a fit of the parameters in each group, and a sweep of coordinate descent over all codes).
    importance : array_like of a float type, or "magnitude", optional
        How much the squared error of each weight counts, for "lsq" and `outliers`: 0 or more, as one number for each
        column of the matrix or of the shape of `w`. The mean of the squares of a layer's inputs makes the error of
        its outputs small. "magnitude" needs no data: ``|w|`` plus the root mean square of `w`.
    calibration : InputSums, optional
        Sums over the inputs of this weight, as `Calibration` collects them. They give the importance.
    outliers : float, optional
        Fraction of the weights whose error is stored and added again (8 bytes each). Scale and minimum are fitted
        without as many of the largest magnitudes, and the weights with the largest errors are chosen, so that a
        handful of large weights does not cost all others their accuracy.
    max_error : float, optional
        The same for all weights whose error is larger than this. What float32 rounds when the correction is added
        stays.
    out : QuantizedTensor, optional
        Written and returned; of the same shape and options, without `outliers`. It is overwritten even if `w` is
        then refused.

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
    A constant group has scale 0 and codes 0, and so comes back as its minimum. With "minmax" every other value comes
    back within half a step (with float16 parameters within .63 step at 8 bits, at the top of a group). Finite weights
    come back finite in their own dtype: next to its largest number the scale is rounded down instead of to nearest, and
    "lsq" leaves groups that it would carry beyond it as "minmax" has them.

    The table shows how values that other quantizers lose come back:

    ======================= =========================== ===================================================
    values                  here                        elsewhere
    ======================= =========================== ===================================================
    constant                exact (to the parameters)   0 / 0 in the plain formula; torch per channel: NaN
    one NaN                 ValueError, with its place  FBGEMM, ggml, ONNX Runtime, MLX: some finite code
    infinite                ValueError, with its place  the whole group lost, or NaN
    -3e38 to 3e38           half a step                 NaN; only bitsandbytes NF4 survives
    beyond 65504            half a step (float32        FBGEMM 4 bits: NaN; ggml Q4_1: infinity
                            parameters)
    around 1e-7             half a step                 FBGEMM, ggml, MLX: several steps
    around 1e-9             half a step                 FBGEMM, ggml, MLX: a constant
    subnormal               half a step                 zero, or wrong
    1000 +- 1e-3            half a step                 FBGEMM, torchao, ONNX Runtime, ggml: a constant
    5 to 6                  half a step                 integer zero points, NF4: several steps
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
    if param_bits is not None and group_size == "auto":
        group_size = TWO_LEVEL_GROUP
    group = require_group_size(group_size, bits)
    params = require_param_dtype(param_dtype)
    require_fit(fit)
    if param_bits is not None:
        require_two_levels(param_bits, param_group, group)
        if fit == "minmax":
            raise ValueError("fit: expected 'auto', 'lsq' or 'gptq' with param_bits, got 'minmax'")
        fit = "lsq" if fit == "auto" else fit
    elif param_group != -1:
        raise ValueError(f"param_group: expected -1 without param_bits, got {shown(param_group)}")
    if fit == "auto" and bits < LSQ_BELOW:
        fit = "lsq"
    require_real(outliers, "outliers")
    require_real(max_error, "max_error")
    if outliers is not None and not 0 <= outliers <= 1:
        raise ValueError(f"outliers: expected a share between 0 and 1, got {shown(outliers)}")
    if max_error is not None and not max_error >= 0:
        raise ValueError(f"max_error: expected at least 0, got {shown(max_error)}")
    array = dense_array(w, "w")
    if out is not None:
        own = array.shape, bits, group, param_bits, param_group
        _check_out(out, own, outliers is not None or max_error is not None)
        params = out.param_dtype
    dtype = array.dtype.newbyteorder("=") if out is None else out.dtype
    limit = largest_of(dtype)
    if limit < largest_of(array.dtype) and (np.abs(array) > limit).any():
        raise ValueError(f"w: expected values that {dtype}, the dtype of out, can hold")
    rows, cols = as_matrix(array.shape)
    codes = np.empty((rows, -(-cols * bits // 8)), np.uint8) if out is None else out.codes
    fitted = _without_largest(array, outliers) if outliers else array
    fit, weight = _importance(array, fit, importance, calibration)

    def fill(dtype: np.dtype[Any]) -> tuple[int, Array, Array, Array | None]:
        shape = _param_shape(group, rows, cols)
        scale, minimum = (np.empty(shape, dtype), np.empty(shape, dtype)) if out is None else (out.scale, out.minimum)
        flags, kernel_group = 0, _kernel_group_size(group, cols)
        for begin, end in _panels(fitted, group):
            part = slice(begin, end)
            x = _float_rows(fitted, begin, end)
            s, m = (scale, minimum) if group is None else (scale[part], minimum[part])
            v = weight if weight is None or len(weight) == 1 else weight[part]
            if v is not None and group is None:
                v = np.ascontiguousarray(np.broadcast_to(v, x.shape))
            flags |= _core.quantize(x, codes[part], s, m, bits, kernel_group, fit == "lsq", limit, v)
        return flags, scale, minimum, None

    inputs = calibration if fit == "gptq" else None
    if fit == "gptq" and inputs is None:
        raise ValueError("fit: 'gptq' needs calibration")
    if param_bits is not None and group is not None:
        fill = partial(
            _fill_two_levels, fitted, weight, inputs, codes, bits, group, param_bits, param_group, limit, out
        )
    elif inputs is not None:
        fill = partial(_fill_by_gptq, fitted, inputs, codes, bits, group, limit, out)
    flags, scale, minimum, floats = fill(params)
    if flags & _core.NON_FINITE:
        with np.errstate(over="ignore"):
            at = np.unravel_index(int(np.argmin(np.isfinite(array.astype(np.float32)))), array.shape)
        raise ValueError(f"w: expected finite float32 values, got {array[at]} at {tuple(map(int, at))}")
    if params == np.float16 and flags & _core.HALF_MISFIT:
        if out is not None:
            raise ValueError("out: has float16 parameters, which cannot hold those of w; expected float32")
        flags, scale, minimum, floats = fill(np.dtype(np.float32))
    if flags & _core.BEYOND:
        raise ValueError(f"w: has values too near the largest of {dtype} for param_bits; leave it None")
    if out is not None:
        return out
    q = QuantizedTensor(codes, scale, minimum, bits, group, array.shape, dtype, None, param_bits, param_group, floats)
    if outliers is None and max_error is None:
        return q
    return replace(q, outliers=_find_outliers(q, array, outliers, max_error, weight))


def _fill_two_levels(
    w: Array,
    importance: Array | None,
    inputs: InputSums | None,
    codes: Array,
    bits: int,
    group: int,
    param_bits: int,
    param_group: int,
    limit: float,
    out: QuantizedTensor | None,
    dtype: np.dtype[Any],
) -> tuple[int, Array, Array, Array | None]:
    """Write codes; return flags, the codes of scale and minimum, and their floats. If `inputs` are given, by GPTQ."""
    rows, cols = as_matrix(w.shape)
    row_bytes = -(-_param_shape(group, rows, cols)[1] * param_bits // 8)
    parts, count = two_level_parts(param_group, cols), 3 if param_group == -1 else 2
    if out is not None and out.param_floats is not None:
        scale, minimum, floats = out.scale, out.minimum, out.param_floats
        if floats.shape[2] != count:
            raise ValueError(f"out: expected {count} floats for each part of a row, got {floats.shape[2]}")
    else:
        scale, minimum = np.zeros((rows, row_bytes), np.uint8), np.zeros((rows, row_bytes), np.uint8)
        floats = np.zeros((rows, parts, count), dtype)
    flags = 0
    for begin, end in _panels(w, group):
        part = slice(begin, end)
        v = importance if importance is None or len(importance) == 1 else importance[part]
        found = floats[part].reshape(end - begin, parts * count)  # a view
        flags |= _core.quantize_two_level(
            _float_rows(w, begin, end), codes[part], scale[part], minimum[part], found,
            bits, group, param_bits, max(param_group, 0), limit, v,
        )  # fmt: skip
    if inputs is None or flags & (_core.NON_FINITE | _core.HALF_MISFIT):
        return flags, scale, minimum, floats
    plan = plan_gptq(inputs, _kernel_group_size(group, cols))
    if plan is not None:
        params = scale, floats.reshape(rows, parts * count), param_bits, max(param_group, 0)
        flags = _by_gptq(_float_rows(w, 0, rows), plan, codes, params, minimum, bits, group, limit)
    return flags, scale, minimum, floats


def _fill_by_gptq(
    w: Array,
    inputs: InputSums,
    codes: Array,
    bits: int,
    group: int | None,
    limit: float,
    out: QuantizedTensor | None,
    dtype: np.dtype[Any],
) -> tuple[int, Array, Array, None]:
    """Write codes, and return flags, scale and minimum."""
    if group is None:
        raise ValueError("group_size: expected a number of columns or -1 with fit='gptq', got None")
    rows, cols = as_matrix(w.shape)
    group = _kernel_group_size(group, cols)
    shape = _param_shape(group, rows, cols)
    scale, minimum = (np.empty(shape, dtype), np.empty(shape, dtype)) if out is None else (out.scale, out.minimum)
    x = _float_rows(w, 0, rows)
    if not np.isfinite(x).all():
        return _core.NON_FINITE, scale, minimum, None
    plan = plan_gptq(inputs, group)
    if plan is None:
        flags = _core.quantize(x, codes, scale, minimum, bits, group, True, limit)
    else:
        flags = _by_gptq(x, plan, codes, scale, minimum, bits, group, limit)
    return flags, scale, minimum, None


def _by_gptq(
    x: Array, plan: GptqPlan, codes: Array, scale: Any, minimum: Array, bits: int, group: int, limit: float
) -> int:
    """Write codes and parameters, and return flags; `scale` is an array or a tuple of two levels."""
    flags = _core.gptq(x, *plan, codes, scale, minimum, bits, group, SWEEPS, limit)
    if flags & _core.NON_FINITE:
        raise ValueError("w: has values that are too large for fit='gptq'")
    return flags


def require_fit(fit: str) -> None:
    """Raise unless `fit` is one of those that `quantize` knows."""
    if fit not in FITS:
        raise ValueError(
            f"fit: expected {', '.join(map(repr, FITS[:-1]))} or {FITS[-1]!r}, got {shown(fit)}{proposal(fit, FITS)}"
        )


def _importance(
    w: Array, fit: Fit, importance: ArrayLike | Literal["magnitude"] | None, calibration: InputSums | None
) -> tuple[Fit, Array | None]:
    """Return the fit that "auto" stands for, and the importance: a float32 matrix of one row or of all."""
    if importance is not None and calibration is not None:
        raise ValueError("importance, calibration: expected one of them, got both")
    rows, cols = as_matrix(w.shape)
    if calibration is not None:
        require_calibration(calibration, cols)
        weight = calibration.importance()[None]
    elif importance is None:
        return "minmax" if fit == "auto" else fit, None
    elif isinstance(importance, str):
        if importance != "magnitude":
            raise ValueError(f"importance: expected an array or 'magnitude', got {shown(importance)}")
        with np.errstate(over="ignore", invalid="ignore"):
            weight = np.abs(w.astype(np.float32).reshape(rows, cols))
            weight /= np.float32(weight.max(initial=0)) or np.float32(1)
            weight += np.float32(math.sqrt(_core.sum_squares(["w"], [weight]) / max(w.size, 1)))
        if not np.isfinite(weight).all():  # which is an error of w, found later
            weight = np.ones((1, cols), np.float32)
    else:
        given = as_float32(as_float_array(importance, "importance"), "importance")
        if given.shape not in ((cols,), w.shape):
            raise ValueError(f"importance: expected shape {(cols,)} or {w.shape}, got {given.shape}")
        if not (np.isfinite(given) & (given >= 0)).all():
            raise ValueError("importance: expected finite numbers, 0 or more")
        weight = given.reshape(-1, cols) if cols else given.reshape(1, 0)
    if fit == "minmax" and importance is not None:
        raise ValueError("importance: expected None with fit='minmax', which does not weigh errors")
    weight = np.ldexp(weight, -np.frexp(weight.max(initial=0))[1])
    return "lsq" if fit == "auto" else fit, np.ascontiguousarray(weight)


def require_calibration(calibration: InputSums, cols: int) -> None:
    """Raise unless these are sums over the inputs of a weight of so many columns."""
    if not isinstance(calibration, InputSums):
        raise TypeError(f"calibration: expected InputSums, got {type(calibration).__name__}")
    if calibration.columns != cols:
        raise ValueError(f"calibration: expected sums of {cols} columns, got {calibration.columns}")


def _check_out(out: QuantizedTensor, wanted: tuple[Any, ...], outliers: bool) -> None:
    """Raise unless `out` has this shape, bits, group size, parameter bits and parameter group."""
    if not isinstance(out, QuantizedTensor):
        raise TypeError(f"out: expected a QuantizedTensor, got {type(out).__name__}")
    if (out.shape, out.bits, out.group_size) != wanted[:3]:
        shape, bits, group_size = wanted[:3]
        raise ValueError(
            f"out: expected shape {shape}, {bits} bits and group_size {group_size}, "
            f"got {out.shape}, {out.bits} and {out.group_size}"
        )
    if (out.param_bits, out.param_group) != wanted[3:]:
        raise ValueError(
            f"out: expected param_bits {wanted[3]} and param_group {wanted[4]}, "
            f"got {out.param_bits} and {out.param_group}"
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
    """Return a weight whose largest magnitudes, a `share` of all, are clipped to the next smaller one."""
    magnitude = np.abs(w).reshape(-1)
    rest = magnitude.size - round(share * magnitude.size)
    if not 0 < rest < magnitude.size or not np.isfinite(magnitude).all():  # what is not finite is refused later
        return w
    limit = np.partition(magnitude, rest - 1)[rest - 1]
    return np.clip(w, -limit, limit)


def _find_outliers(
    q: QuantizedTensor, w: Array, share: float | None, max_error: float | None, importance: Array | None
) -> Outliers | None:
    """Return the largest errors, as corrections; among equal ones, those of lower index."""
    with np.errstate(over="ignore"):
        missing = np.subtract(w, q.dequantize(dtype=np.float32), dtype=np.float32, casting="same_kind").reshape(-1)
    distance = np.abs(missing)
    if importance is not None:
        distance = (distance.reshape(-1, importance.shape[1]) * np.sqrt(importance)).reshape(-1)
    index = np.empty(0, np.int64)
    if share is not None and (count := round(share * missing.size)):
        limit = np.partition(distance, missing.size - count)[missing.size - count]
        above = np.flatnonzero(distance > limit)
        ties = np.flatnonzero(distance == limit)[: count - above.size]
        index = np.union1d(above, ties)
    if max_error is not None:
        distance = np.abs(missing)
        if w.dtype.itemsize == 2:  # as a reader sees it: rounded to the dtype
            distance = np.abs(np.subtract(w, q.dequantize(), dtype=np.float32)).reshape(-1)
        index = np.union1d(index, np.flatnonzero(distance > max_error))
    index = index[missing[index] != 0]
    if index.size == 0:
        return None
    return Outliers(index.astype(np.uint32 if missing.size < 1 << 32 else np.int64), missing[index])


def pack_bits(codes: ArrayLike, bits: int) -> NDArray[np.uint8]:
    """Pack codes of `bits` bits into bytes, lowest bits first.

    Parameters
    ----------
    codes : array_like of uint8, any shape
        Each below ``2**bits``; taken in C order.
    bits : 8, 6, 5, 4, 3 or 2

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
    array = as_any_array(codes, "codes")
    if array.dtype != np.uint8:
        raise TypeError(f"codes: expected uint8, got {array.dtype}")
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.size and int(flat.max()) >= 1 << bits:
        raise ValueError(f"codes: expected values below {1 << bits}, got {int(flat.max())}")
    packed = np.empty(-(-flat.size * bits // 8), np.uint8)
    _core.pack(flat, bits, packed)
    return packed


def unpack_bits(packed: ArrayLike, bits: int, count: int) -> NDArray[np.uint8]:
    """Unpack codes that `pack_bits` packed.

    Parameters
    ----------
    packed : array_like of uint8
    bits : 8, 6, 5, 4, 3 or 2
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
    count = as_index(count, "count")
    array = as_any_array(packed, "packed")
    if array.dtype != np.uint8:
        raise TypeError(f"packed: expected uint8, got {array.dtype}")
    if count < 0 or array.size != -(-count * bits // 8):
        raise ValueError(f"count: {array.size} bytes do not hold {count} codes of {bits} bits")
    codes = np.empty(count, np.uint8)
    _core.unpack(np.ascontiguousarray(array).reshape(-1), bits, codes)
    return codes
