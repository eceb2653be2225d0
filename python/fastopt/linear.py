"""Products with packed weights."""

import math
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastopt import _core
from fastopt.quant import QuantizedTensor, as_matrix
from fastopt.sparse import SparseTensor, multiply

Array: TypeAlias = NDArray[Any]
Weight: TypeAlias = "Array | QuantizedTensor | SparseTensor"


_LIMBS = {"exact": 3, "int8": 1}
# From as many rows of x on, decoding panels of the weight for BLAS pays where whole numbers are slow; a panel stays in
# the outer cache.
_PANEL_BATCH = 128
_PANEL_SIZE = 1 << 19


def linear(
    x: Array,
    w: Weight,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    precision: Literal["exact", "int8"] = "exact",
) -> Array:
    """Return ``x @ w.T + bias``, straight from packed weights.

    Parameters
    ----------
    x : float32 array, shape (..., in)
    w : QuantizedTensor, SparseTensor or float32 array, shape (out, in)
        A weight with more axes is seen as a matrix of its first axis by all others.
    bias : float32 array, shape (out,), optional
    out : float32 array, shape (..., out), optional
        Written and returned; C-contiguous.
    precision : "exact" or "int8"
        With a quantized `w`, what `x` is rounded to: whole numbers of 24 bits, or of 8, times a scale for every 32
        columns. "exact" is within 5e-7 of float64 (relative, L2), which is what float32 gives; "int8" mostly within
        1e-2, within 2e-2 where a few values of `x` dwarf all others, and up to twice as fast. Other weights are
        always multiplied exactly. Magnitudes of `x` below some 1e-36 lose accuracy, with "int8" all of it.

    Returns
    -------
    float32 array, shape (..., out)

    Raises
    ------
    TypeError
        If an array is not float32, or `w` not a weight.
    ValueError
        If shapes do not match, or `out` is read-only, not contiguous, or shares memory with another array.

    Notes
    -----
    The order of sums is fixed: the result is bit for bit the same on every instruction set and for any number of
    threads. Rows of `x` are taken sixteen at a time (twelve at least), others by themselves: the two add up in another
    order, as does a sparse weight for five rows or more. On CPUs without dot products of bytes (AVX-512 VNNI, NEON dot
    product) an exact product of 128 rows or more with a quantized weight is left to NumPy's BLAS, a decoded panel at a
    time: then its order of sums counts. NaN and infinity in a row of `x` give what NumPy gives, but for a sparse
    weight, see `SparseTensor`.
    Groups of more than one a row whose size is no multiple of 16 are multiplied in float32, which is slower. With a
    plain array the product is NumPy's.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> w = fo.quantize(15 * np.eye(3, dtype=np.float32), bits=4)
    >>> fo.linear(np.array([1, 2, 3], dtype=np.float32), w)
    array([15., 30., 45.], dtype=float32)
    """
    limbs = _LIMBS.get(precision)
    if limbs is None:
        raise ValueError(f"precision: expected 'exact' or 'int8', got {precision!r}")
    if isinstance(w, QuantizedTensor):
        if limbs == 1 or not _pays_for_panels(x, w):
            return _core.linear_quantized(x, *w.kernel_args, w.shape, bias, out, limbs, w.outliers)
        parts = {"codes": w.codes, "scale": w.scale, "minimum": w.minimum}
        x, out = _core.check_linear(x, w.shape, bias, out, parts)
        _by_panels(x, w, bias, out)
        return out
    if isinstance(w, SparseTensor):
        return multiply(x, w, bias, out)
    if not isinstance(w, np.ndarray):
        raise TypeError(f"w: expected a QuantizedTensor, a SparseTensor or a float32 array, got {type(w).__name__}")
    x, out = _core.check_linear(x, w.shape, bias, out, {"w": w})
    if w.dtype != np.float32:
        raise TypeError(f"w: expected float32, got {w.dtype}")
    (rows, cols), batch = as_matrix(w.shape), math.prod(x.shape[:-1])
    out2 = out.reshape(batch, rows)
    np.matmul(x.reshape(batch, cols), w.reshape(rows, cols).T, out=out2)
    if bias is not None:
        np.add(out2, bias, out=out2)
    return out


def matmul(w: Weight, x: Array) -> Array:
    """Return ``w @ x``, which linear has as ``x.T @ w.T``; of a stack of matrices each, as NumPy does."""
    x = np.asarray(x)
    return linear(x, w) if x.ndim < 2 else linear(x.swapaxes(-1, -2), w).swapaxes(-1, -2)


def _pays_for_panels(x: Array, w: QuantizedTensor) -> bool:
    if not isinstance(x, np.ndarray) or x.ndim < 2 or math.prod(x.shape[:-1]) < _PANEL_BATCH:
        return False
    return _core.isa() not in ("vnni", "dotprod") and len(w.shape) > 1


def _by_panels(x: Array, w: QuantizedTensor, bias: Array | None, out: Array) -> None:
    """Decode some rows of `w` at a time and leave each panel to BLAS."""
    (rows, cols), batch = as_matrix(w.shape), math.prod(x.shape[:-1])
    x, out = x.reshape(batch, cols), out.reshape(batch, rows)
    step = max(1, _PANEL_SIZE // max(cols, 1))
    memory = np.empty((min(step, rows), cols), np.float32)
    for begin in range(0, rows, step):
        part = w[begin : begin + step]
        panel = memory[: len(part)]
        part.dequantize(out=panel.reshape(part.shape))
        with np.errstate(all="ignore"):
            np.matmul(x, panel.T, out=out[:, begin : begin + step])
    if bias is not None:
        np.add(out, bias, out=out)
