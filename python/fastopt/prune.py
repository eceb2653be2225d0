"""Magnitude pruning."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastopt import _core
from fastopt.quant import as_float_array
from fastopt.sparse import SparseTensor

Array: TypeAlias = NDArray[Any]
Mask: TypeAlias = NDArray[np.bool_]


def _check(threshold: float | None, sparsity: float | None) -> None:
    if (threshold is None) == (sparsity is None):
        raise ValueError("threshold, sparsity: expected exactly one of them")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold: expected a number, 0 or more, got {threshold!r}")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: expected a share from 0 to 1, got {sparsity!r}")


def _bits_of(value: float, dtype: np.dtype[Any]) -> int:
    """Return the magnitude of `value` as the kernels compare it: the integer that its bits make in `dtype`."""
    with np.errstate(over="ignore"):
        rounded = np.abs(np.asarray(value).astype(dtype))
    return int(rounded.view(f"u{dtype.itemsize}"))


def _prune_smallest(arrays: list[Array], masks: list[Mask], sparsity: float) -> None:
    """Zero exactly ``round(sparsity * size)`` elements of all arrays together; of equal ones the later."""
    count = round(sparsity * sum(array.size for array in arrays))
    if count == 0:
        for mask in masks:
            mask.fill(True)
        return
    key, below, ties = _core.kth_magnitude(arrays, count)
    keep_ties = ties - (count - below)
    for array, mask in zip(arrays, masks, strict=True):
        keep_ties -= min(keep_ties, _core.prune(array, mask, key, keep_ties))


def prune_(
    w: Any,
    *,
    threshold: float | None = None,
    sparsity: float | None = None,
    scope: Literal["local", "global"] = "local",
) -> Any:
    """Set the weights of smallest magnitude to zero, in place.

    Parameters
    ----------
    w : array, list of arrays, or dict of arrays
        float32, float64, float16 or bfloat16, C-contiguous and writable.
    threshold : float
        Keep where ``abs(w) > threshold``, with the threshold rounded to the dtype of `w`.
    sparsity : float
        Zero exactly ``round(sparsity * size)`` elements. Of equal magnitudes those of lower index are kept.
    scope : "local" or "global"
        Whether `sparsity` holds for each array, or for all together, which then must have one dtype.

    Returns
    -------
    bool array, or a list or dict of them like `w`
        True where a weight was kept.

    Raises
    ------
    TypeError
        If `w` holds something else than arrays of a float type.
    ValueError
        If both or neither of `threshold` and `sparsity` are given, one is out of range, or an array is
        read-only, not contiguous, or shares memory with another one.

    Notes
    -----
    Zeros are written as +0. NaN counts as larger than everything, and so is the last to go.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> w = np.array([0.1, -2.0, 0.3, 1.0], dtype=np.float32)
    >>> fo.prune_(w, sparsity=0.5)
    array([False,  True, False,  True])
    >>> w
    array([ 0., -2.,  0.,  1.], dtype=float32)
    """
    _check(threshold, sparsity)
    if scope not in ("local", "global"):
        raise ValueError(f"scope: expected 'local' or 'global', got {scope!r}")
    names: list[Any]
    if isinstance(w, Mapping):
        names, arrays = list(w), list(w.values())
    elif isinstance(w, list | tuple):
        names, arrays = list(range(len(w))), list(w)
    else:
        names, arrays = [0], [w]
    _core.check_weights([str(name) for name in names], arrays)
    masks: list[Mask] = [np.empty(array.shape, np.bool_) for array in arrays]
    if threshold is not None:
        for array, mask in zip(arrays, masks, strict=True):
            _core.prune(array, mask, _bits_of(threshold, array.dtype), 0)
    elif sparsity is not None:
        if scope == "global":
            _prune_smallest(arrays, masks, sparsity)
        else:
            for array, mask in zip(arrays, masks, strict=True):
                _prune_smallest([array], [mask], sparsity)
    if isinstance(w, Mapping):
        return dict(zip(names, masks, strict=True))
    return masks if isinstance(w, list | tuple) else masks[0]


def prune(w: ArrayLike, *, threshold: float | None = None, sparsity: float | None = None) -> SparseTensor:
    """Return `w` without its weights of smallest magnitude, in sparse storage; `w` stays as it is.

    Parameters
    ----------
    w : array_like of float32, float64, float16 or bfloat16
    threshold, sparsity : float
        As in `prune_`.

    Returns
    -------
    SparseTensor

    Raises
    ------
    TypeError
        If `w` is not of a float type.
    ValueError
        If both or neither of `threshold` and `sparsity` are given, or one is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.prune(np.array([0.1, -2.0, 0.3, 1.0], dtype=np.float32), threshold=0.2).to_dense()
    array([ 0. , -2. ,  0.3,  1. ], dtype=float32)
    """
    _check(threshold, sparsity)
    if threshold is not None and math.isinf(threshold):
        raise ValueError("threshold: expected a finite number")
    copy = as_float_array(w, "w").copy(order="C")
    prune_(copy, threshold=threshold, sparsity=sparsity)
    return SparseTensor.from_dense(copy)
