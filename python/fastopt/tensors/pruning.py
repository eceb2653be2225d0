"""Pruning by magnitude or by importance: single weights, N of M, and blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastopt import _core
from fastopt._checks import as_float_array, as_matrix, require_real
from fastopt._text import shown
from fastopt._types import Array
from fastopt.tensors.packed import dense_array
from fastopt.tensors.sparse import SparseTensor
from fastopt.tensors.sparse_layout import BLOCK, parse_pattern, require_layout

Mask: TypeAlias = NDArray[np.bool_]


def check_selection(threshold: float | None, sparsity: float | None, pattern: str | None) -> tuple[int, int] | None:
    """Return N and M of a pattern N:M, or raise."""
    groups = None if pattern is None else parse_pattern(pattern)
    if groups is None and (threshold is None) == (sparsity is None):
        raise ValueError("threshold, sparsity: expected exactly one of them")
    if groups is not None and (threshold is not None or sparsity is not None):
        raise ValueError(f"threshold, sparsity: expected neither, as pattern {pattern!r} says how many weights stay")
    require_real(threshold, "threshold")
    require_real(sparsity, "sparsity")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold: expected a number, 0 or more, got {shown(threshold)}")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: expected a fraction from 0 to 1, got {shown(sparsity)}")
    return groups


def _parts(w: Any) -> tuple[list[Any], list[Any]]:
    """Return the names and values of an array, a list or a mapping."""
    if isinstance(w, Mapping):
        return list(w), list(w.values())
    return (list(range(len(w))), list(w)) if isinstance(w, list | tuple) else ([0], [w])


def _like(w: Any, names: Iterable[Any], results: list[Any]) -> Any:
    """Return results arranged like `w`: a single one, a list or a dict."""
    if isinstance(w, Mapping):
        return dict(zip(names, results, strict=True))
    return results if isinstance(w, list | tuple) else results[0]


def _importance_of(importance: Any, w: Any, names: list[Any], arrays: list[Array]) -> list[Array]:
    """Return the checked importance of each array of `w`."""
    if isinstance(w, Mapping) and isinstance(importance, Mapping):
        missing = [name for name in names if name not in importance]
        if missing:
            raise ValueError(f"importance: expected the names of w, {missing[0]!r} is missing")
        importance = {name: importance[name] for name in names}
    _, given = _parts(importance)
    if len(given) != len(arrays) or isinstance(importance, Mapping) != isinstance(w, Mapping):
        raise ValueError(f"importance: expected {len(arrays)} arrays, arranged like w, got {len(given)}")
    scores = []
    for name, array, score in zip(names, arrays, given, strict=True):
        score = as_float_array(score, "importance")
        if score.shape != array.shape:
            raise ValueError(f"importance: expected shape {array.shape} for '{name}', got {score.shape}")
        scores.append(np.require(score, score.dtype.newbyteorder("="), ["C", "A"]))
    return scores


def _bits_of(value: float, dtype: np.dtype[Any]) -> int:
    """Return the magnitude of `value` as the kernels compare it: the integer that its bits make in `dtype`."""
    with np.errstate(over="ignore"):
        rounded = np.abs(np.asarray(value).astype(dtype))
    return int(rounded.view(f"u{dtype.itemsize}"))


def _block_norms(w: Array) -> Array:
    """Return the L2 norm of each block of 16 columns in float64; squares are added from left to right."""
    rows, cols = as_matrix(w.shape)
    x = w.reshape(rows, cols)
    norms = np.zeros((rows, -(-cols // BLOCK)))
    for top in range(0, rows, 256):  # 256 rows stay in cache
        squares = np.square(x[top : top + 256].astype(np.float64))
        for j in range(BLOCK):
            part = squares[:, j::BLOCK]
            norms[top : top + 256, : part.shape[1]] += part
    return np.sqrt(norms)


def _apply(
    scores: list[Array], masks: list[Mask | None], threshold: float | None, sparsity: float | None, write: bool
) -> None:
    """Set the masks where a score is kept; with `write`, also zero the other scores."""
    if threshold is not None:
        for score, mask in zip(scores, masks, strict=True):
            _core.prune(score, write, mask, _bits_of(threshold, score.dtype), 0)
        return
    count = round((sparsity or 0) * sum(score.size for score in scores))
    if count == 0:
        for mask in masks:
            if mask is not None:
                mask.fill(True)
        return
    key, below, ties = _core.kth_magnitude(scores, count)
    keep_ties = ties - (count - below)
    for score, mask in zip(scores, masks, strict=True):
        keep_ties -= _core.prune(score, write, mask, key, keep_ties)


def prune_(
    w: Any,
    *,
    threshold: float | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    importance: Any = None,
    scope: Literal["local", "global"] = "local",
    return_mask: bool = True,
) -> Any:
    """Set the least important weights to zero, in place.

    Parameters
    ----------
    w : array, list of arrays, or dict of arrays
        float32, float64, float16 or bfloat16, C-contiguous and writable.
    threshold : float, optional
        Keep weights with ``abs(w) > threshold``; the threshold is rounded to the dtype of `w`.
    sparsity : float, optional
        Zero exactly ``round(sparsity * size)`` weights. Among equal magnitudes, those of lower index are kept.
    pattern : str, optional
        "N:M", for example "2:4": keep the N largest of each M neighbours in a row, without a threshold or a sparsity.
        "1x16": remove whole blocks of 16 neighbours in a row, ranked by their L2 norm.
    importance : arrays of a float type, arranged like `w`, optional
        Their magnitudes rank the weights, instead of those of `w`: for example ``w * grad``, or ``w`` times the norm
        of the activations.
    scope : "local" or "global"
        With "local" `sparsity` holds for each array; with "global" for all arrays together, which must have one dtype.
    return_mask : bool
        False saves the time and the memory that masks take.

    Returns
    -------
    bool array, a list or dict of them arranged like `w`, or None
        True where a weight is kept.

    Raises
    ------
    TypeError
        If `w` or `importance` holds anything but arrays of a float type, or an option that must be a number is not one.
    ValueError
        Unless exactly one of `threshold` and `sparsity` is given, or none of them with N:M; if one is out of range; or
        if an array is read-only, not contiguous, or shares memory with another one.

    Notes
    -----
    Pruned weights become +0. NaN counts as the largest magnitude.

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
    groups = check_selection(threshold, sparsity, pattern)
    if scope not in ("local", "global"):
        raise ValueError(f"scope: expected 'local' or 'global', got {shown(scope)}")
    names, arrays = _parts(w)
    _core.check_weights([str(name) for name in names], arrays)
    scores = arrays if importance is None else _importance_of(importance, w, names, arrays)
    together = scope == "global" and threshold is None and groups is None
    if together and len({score.dtype for score in scores}) > 1:
        raise TypeError("w: arrays that are pruned together must have one dtype")
    direct = pattern is None and importance is None
    masks: list[Mask | None] = [None] * len(arrays)
    if not direct or return_mask:
        masks = [np.empty(array.shape, np.bool_) for array in arrays]

    jobs = [slice(None)] if together else [slice(i, i + 1) for i in range(len(arrays))]
    for job in jobs:
        if groups is not None:
            for score, mask in zip(scores[job], masks[job], strict=True):
                matrix = as_matrix(score.shape)
                _core.keep_largest(score.reshape(matrix), *groups, mask.reshape(matrix))  # type: ignore[union-attr]
        elif pattern is not None:
            norms = [_block_norms(score) for score in scores[job]]
            blocks = [np.empty(norm.shape, np.bool_) for norm in norms]
            _apply(norms, list(blocks), threshold, sparsity, False)
            for i, score, block in zip(range(len(arrays))[job], scores[job], blocks, strict=True):
                elements = np.repeat(block, BLOCK, axis=1)[:, : as_matrix(score.shape)[1]]
                masks[i] = np.ascontiguousarray(elements).reshape(score.shape)
        else:
            _apply(scores[job], masks[job], threshold, sparsity, direct)
    if not direct:
        for array, mask in zip(arrays, masks, strict=True):
            _core.clear(array, mask)  # type: ignore[arg-type]
    return _like(w, names, masks) if return_mask else None


def prune(
    w: Any,
    *,
    threshold: float | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    importance: Any = None,
    scope: Literal["local", "global"] = "local",
    layout: str | None = None,
) -> Any:
    """Return `w` without its least important weights, in sparse storage. `w` itself does not change.

    Parameters
    ----------
    w : array_like, or a list or dict of arrays, of float32, float64, float16 or bfloat16
        A list of numbers is one array.
    threshold, sparsity, pattern, importance, scope
        As in `prune_`.
    layout : str, optional
        As in `SparseTensor.from_dense`. The default is the layout of the pattern, or "auto" without one.

    Returns
    -------
    SparseTensor, or a list or dict of them arranged like `w`

    Raises
    ------
    TypeError
        If `w` or `importance` is not of a float type, or an option that must be a number is not one.
    ValueError
        As in `prune_`, or if `threshold` is infinite.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.prune(np.array([0.1, -2.0, 0.3, 1.0], dtype=np.float32), threshold=0.2).to_dense()
    array([ 0. , -2. ,  0.3,  1. ], dtype=float32)
    >>> fo.prune(np.array([[0.1, -2.0, 0.3, 1.0]], dtype=np.float32), pattern="2:4").layout
    '2:4'
    """
    groups = check_selection(threshold, sparsity, pattern)
    if threshold is not None and math.isinf(threshold):
        raise ValueError(f"threshold: expected a finite number, got {shown(threshold)}")
    if layout is None:
        layout = pattern if pattern is not None and (groups is None or groups[1] in (2, 4, 8)) else "auto"
    elif layout != "auto":
        require_layout(layout)
    several = isinstance(w, Mapping) or (isinstance(w, list | tuple) and any(isinstance(v, np.ndarray) for v in w))
    names, arrays = _parts(w) if several else ([0], [w])
    copies = [_copy(array) for array in arrays]
    target: Any = _like(w, names, copies) if several else copies[0]
    prune_(
        target,
        threshold=threshold,
        sparsity=sparsity,
        pattern=pattern,
        importance=importance,
        scope=scope,
        return_mask=False,
    )
    packed = [SparseTensor.from_dense(copy, layout=layout) for copy in copies]
    return _like(w, names, packed) if several else packed[0]


def _copy(w: ArrayLike) -> Array:
    array = dense_array(w, "w")
    return array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
