"""Parameters as people hold them: arrays, tensors, and dicts and lists of these, also nested."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Set
from typing import Any, Protocol, TypeAlias

import ml_dtypes
import numpy as np

from fastopt._types import Array


class _HasArray(Protocol):
    def __array__(self) -> Any: ...


class _HasDlpack(Protocol):
    def __dlpack__(self) -> Any: ...


Leaf: TypeAlias = Array | _HasArray | _HasDlpack
Params: TypeAlias = Leaf | Iterable[Any] | Mapping[str, Any]


def is_tensor(x: Any) -> bool:
    """Return whether `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def addresses_of(leaves: list[Any]) -> list[int]:
    """Return the address of each tensor's memory, which torch may exchange; 0 for anything but a tensor."""
    return [leaf.data_ptr() if is_tensor(leaf) else 0 for leaf in leaves]


def as_array(x: Any) -> Any:
    """Return `x` as a NumPy array over the same memory, or `x` itself if it has none to share.

    Tensors of torch and anything with ``__array__`` or ``__dlpack__`` are taken. Memory is never copied.
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


def as_parameter(x: Any, name: str) -> Any:
    """Return what `as_array` does; an error of another library names the parameter."""
    try:
        return as_array(x)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"array {name!r}: {error}") from error


def as_gradient(x: Any) -> Any:
    """Return what `as_array` does, and an array of a scalar: NumPy makes scalars of what has no axes."""
    return np.asarray(x) if isinstance(x, np.generic) else as_array(x)


def in_memory_order(array: Any) -> tuple[Any, tuple[int, ...] | None]:
    """Return a C-contiguous view of an array that is dense in another order, and the order of axes that makes it.

    Columns first (Fortran) and channels last are such orders. The order is None where no view is needed, or none helps.
    """
    if not isinstance(array, np.ndarray) or array.flags.c_contiguous:
        return array, None
    order = tuple(sorted(range(array.ndim), key=lambda axis: -array.strides[axis]))
    view = array.transpose(order)
    return (view, order) if view.flags.c_contiguous else (array, None)


def as_tree(params: Any) -> Any:
    """Return parameters as an array, a dict or a list; pairs of name and array become a dict."""
    if isinstance(params, Mapping | list) and not _is_pairs(params):
        return params
    if hasattr(params, "__array__") or hasattr(params, "__dlpack__"):
        return params
    if not isinstance(params, Iterable):
        raise TypeError(f"params: expected an array, a list, a dict or groups, got {type(params).__name__}")
    if isinstance(params, Set):
        raise TypeError(f"params: expected an order, which a {type(params).__name__} does not have")
    tree = list(params)
    if not _is_pairs(tree):
        return tree
    named = dict(tree)
    if len(named) < len(tree):
        raise ValueError(f"params: expected names that differ, got {[name for name, _ in tree]}")
    return named


def _is_pairs(params: Any) -> bool:
    """Return whether these are pairs of name and array, as of ``named_parameters()``."""
    return (
        isinstance(params, list)
        and bool(params)
        and all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in params)
    )


def leaves_of(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Return the arrays of a tree, each after the keys that lead to it."""
    if isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        return [((key, *path), leaf) for key, node in items for path, leaf in leaves_of(node)]
    return [((), tree)]


def name_of(path: tuple[Any, ...]) -> str:
    """Return the name of an array in messages and states."""
    return ".".join(map(str, path)) if path else "0"


def shape_of(tree: Any) -> Any:
    """Return the dicts and lists of a tree, with None for its arrays."""
    if isinstance(tree, Mapping):
        return {key: shape_of(node) for key, node in tree.items()}
    return [shape_of(node) for node in tree] if isinstance(tree, list | tuple) else None


def like(shape: Any, tree: Any, at: str = "") -> list[Any]:
    """Return the gradients in a tree of this shape, in the order of its parameters; None stands for all below it."""
    where = f" at {at!r}" if at else ""
    if isinstance(shape, dict):
        if tree is None:
            tree = dict.fromkeys(shape)
        if not isinstance(tree, Mapping):
            raise TypeError(f"grads: expected a dict like params{where}, got {type(tree).__name__}")
        if tree.keys() != shape.keys():
            missing, extra = (sorted(a.keys() - b.keys(), key=str) for a, b in ((shape, tree), (tree, shape)))
            raise ValueError(f"grads: expected the names of params{where}; missing {missing}, unexpected {extra}")
        return [grad for key, part in shape.items() for grad in like(part, tree[key], f"{at}.{key}".lstrip("."))]
    if isinstance(shape, list):
        if tree is None:
            tree = [None] * len(shape)
        if not isinstance(tree, list | tuple):
            raise TypeError(f"grads: expected a list like params{where}, got {type(tree).__name__}")
        if len(tree) != len(shape):
            raise ValueError(f"grads: expected {len(shape)} gradients{where}, got {len(tree)}")
        return [grad for i, part in enumerate(shape) for grad in like(part, tree[i], f"{at}.{i}".lstrip("."))]
    return [tree]
