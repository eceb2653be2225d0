"""Products with packed weights."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fastopt import _core
from fastopt._checks import as_any_array, as_float32, as_matrix, matrix_of_out
from fastopt._text import shown
from fastopt._types import Array
from fastopt.tensors.packed import PackedTensor, Precision, Weight
from fastopt.tensors.quantized import QuantizedTensor


def linear(
    x: ArrayLike,
    w: Weight,
    bias: ArrayLike | PackedTensor | None = None,
    *,
    out: Array | None = None,
    precision: Precision = "exact",
) -> Array:
    """Return ``x @ w.T + bias``, straight from packed weights.

    Parameters
    ----------
    x : array_like of a float type, shape (..., in)
    w : QuantizedTensor, SparseTensor or array of a float type, shape (out, in)
        A weight with more axes is seen as a matrix of its first axis by all others. Keras, scikit-learn and GPT-2's
        Conv1D hold weights as (in, out): pack their transpose. Nothing can tell a square weight that was not
        transposed from one that was.
    bias : array_like of a float type, or packed tensor, shape (out,), optional
    out : float32 array, shape (..., out), optional
        Written and returned; C-contiguous.
    precision : "exact", "int8" or "blas"
        How to multiply by a quantized `w`; other weights are always multiplied in float32.

        - "exact" rounds `x` to whole numbers of 24 bits times a scale for every 32 columns. The result is within
          5e-7 of float64 (relative, L2), as a product in float32 is.
        - "int8" rounds `x` to whole numbers of 8 bits. It is up to twice as fast, and mostly within 1e-2 of float64;
          within 2e-2 where a few values of `x` dwarf all others.
        - "blas" decodes `w` to float32, some rows at a time, and leaves the products to NumPy's BLAS. It is as
          close as "exact", but the bits depend on the BLAS and the machine. It is faster for many rows of `x` on
          CPUs without dot products of bytes (AVX-512 VNNI, AMX, NEON dot product).

        Magnitudes of `x` below some 1e-36 lose accuracy with "exact" and all of it with "int8".

    Returns
    -------
    float32 array, shape (..., out)

    Raises
    ------
    TypeError
        If `x`, `w` or `bias` is not of a float type, or `out` is not float32.
    ValueError
        If shapes do not match, a float64 value is beyond float32, or `out` is read-only, not contiguous, or shares
        memory with another array.

    Notes
    -----
    The product is computed in float32. float64 `x`, `w` and `bias` are rounded to float32 first, an error of 6e-8 or
    less, and float16 and bfloat16 are converted exactly. Each call converts again: convert once what is used often.

    The order of sums is fixed: but for "blas" and plain arrays, the result is bit for bit the same on every
    instruction set and for any number of threads. Rows of `x` are multiplied sixteen at a time, and the remainder one
    at a time if there are fewer than twelve: the two add up in a different order, as does a sparse weight for five
    rows or more. NaN and infinity in a row of `x` give what NumPy gives, but for a sparse weight, see `SparseTensor`.
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
    if precision not in ("exact", "int8", "blas"):
        raise ValueError(f"precision: expected 'exact', 'int8' or 'blas', got {shown(precision)}")
    if bias is not None and isinstance(bias, PackedTensor):
        bias = bias.to_dense()
    if type(w) is QuantizedTensor or isinstance(w, PackedTensor):  # an abstract class takes as long as a small product
        return w._linear(x, bias, out, precision)
    if not isinstance(w, np.ndarray):
        raise TypeError(f"w: expected a QuantizedTensor, a SparseTensor or an array, got {type(w).__name__}")
    x, bias, out = _core.check_linear(x, w.shape, bias, out, {"w": w})
    w = as_float32(w, "w")
    (rows, cols), batch = as_matrix(w.shape), math.prod(x.shape[:-1])
    out2 = out.reshape(batch, rows)
    np.matmul(x.reshape(batch, cols), w.reshape(rows, cols).T, out=out2)
    if bias is not None:
        np.add(out2, bias, out=out2)
    return out


def embedding(q: QuantizedTensor, ids: ArrayLike, out: Array | None = None) -> Array:
    """Return rows of a quantized matrix, decoded: ``q.dequantize()[ids]`` without the rest of it.

    Parameters
    ----------
    q : QuantizedTensor of at least two axes
    ids : array_like of integers, any shape
        Each at least 0 and below the number of rows.
    out : float32 array, shape ``(*ids.shape, *q.shape[1:])``, optional
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
    rows = as_any_array(ids, "ids")
    if rows.size == 0 and not isinstance(ids, np.ndarray):
        rows = rows.astype(np.int64)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"ids: expected integers, got {rows.dtype}")
    if rows.size and not (rows.min() >= 0 and rows.max() < q.shape[0]):
        wrong = int(rows.min() if rows.min() < 0 else rows.max())
        raise IndexError(f"ids: expected 0 to {q.shape[0] - 1}, got {wrong}")
    shape = (*rows.shape, *q.shape[1:])
    flat = rows.reshape(-1).astype(np.int64)
    part = q._take(flat, flat, (flat.size, *q.shape[1:]))  # q[flat], whose checks are those above
    if out is None:
        return part.dequantize().reshape(shape)
    matrix = matrix_of_out(out, shape)
    part.dequantize(out=matrix.reshape(part.shape))
    return out
