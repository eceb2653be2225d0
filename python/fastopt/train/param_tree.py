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
