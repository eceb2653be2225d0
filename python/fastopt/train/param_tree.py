"""Parameters as people hold them: arrays, tensors, dicts and lists of these."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import ml_dtypes
import numpy as np

from fastopt._types import Array


class _HasArray(Protocol):
    def __array__(self) -> Any: ...


class _HasDlpack(Protocol):
    def __dlpack__(self) -> Any: ...


Leaf: TypeAlias = Array | _HasArray | _HasDlpack
Params: TypeAlias = Leaf | Iterable[Leaf] | Mapping[str, Leaf] | Iterable[Mapping[str, Any]]


def is_tensor(x: Any) -> bool:
    """Return whether `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def addresses_of(leaves: list[Any]) -> list[int]:
    """Return where the memory of each tensor is, which torch may exchange; 0 for what is none."""
    return [leaf.data_ptr() if is_tensor(leaf) else 0 for leaf in leaves]


def as_array(x: Any) -> Any:
    """Return `x` as a NumPy array over the same memory, if it can say where that is; else `x` itself.

    Tensors of torch and whatever has ``__array__`` or ``__dlpack__`` are taken; memory is never copied.
    """
    if isinstance(x, np.ndarray):
        return x
    if is_tensor(x):
        torch, x = sys.modules["torch"], x.detach()
        if x.dtype == torch.bfloat16:  # which NumPy's protocols do not know
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    if hasattr(x, "__array__"):
        array = np.asarray(x)
        return array if np.may_share_memory(array, np.asarray(x)) else x
    return np.from_dlpack(x) if hasattr(x, "__dlpack__") else x


def as_gradient(x: Any) -> Any:
    """Return what `as_array` does, and an array of a scalar: NumPy makes scalars of what has no axes."""
    return np.asarray(x) if isinstance(x, np.generic) else as_array(x)


def leaves_of(tree: Any) -> tuple[list[str], list[Any]]:
    """Return the arrays of a dict, a list or a single array, after the names that messages and states use."""
    if isinstance(tree, Mapping):
        return [str(name) for name in tree], list(tree.values())
    if isinstance(tree, list | tuple):
        return [str(i) for i in range(len(tree))], list(tree)
    return ["0"], [tree]


def l1_penalty(params: Params, l1: float) -> float:
    """Return ``l1 * sum(abs(w))``, what the option `l1` adds to the loss.

    Parameters
    ----------
    params : array, list or dict of arrays
    l1 : float

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.l1_penalty([np.array([1.0, -2.0]), np.array([3.0])], l1=0.5)
    3.0
    """
    return l1 * sum(float(np.abs(as_array(w)).sum(dtype=np.float64)) for w in leaves_of(params)[1])


def l2_penalty(params: Params, weight_decay: float) -> float:
    """Return ``weight_decay / 2 * sum(w**2)``, what the option `weight_decay` (not `AdamW`'s) adds to the loss.

    Parameters
    ----------
    params : array, list or dict of arrays
    weight_decay : float

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.l2_penalty([np.array([1.0, -2.0]), np.array([3.0])], weight_decay=0.5)
    3.5
    """
    return weight_decay / 2 * sum(float(np.square(as_array(w), dtype=np.float64).sum()) for w in leaves_of(params)[1])
