"""A parameter group: its arrays, their states, and the gradients that fit them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np

from fastopt import _core
from fastopt._checks import require
from fastopt._types import Array
from fastopt.train.param_tree import (
    addresses_of,
    as_gradient,
    as_parameter,
    in_memory_order,
    leaves_of,
    like,
    name_of,
    shape_of,
)

# Elements of an 8-bit state that share an exponent; kStateBlock in cpp/kernels/contract.hpp.
STATE_BLOCK = 256

_ARRAYS = {np.ndarray}
# The largest exponent of a block, with and without a sign in its codes.
_MOST_EXPONENT = {False: 240, True: 224}
STATE_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "uint8": np.uint8}


class ParamGroup:
    """The tensors of one parameter group: what a step needs, in parallel lists."""

    def __init__(self, options: dict[str, Any], prefix: str, keys: tuple[str, ...]) -> None:
        self.tree = tree = options["params"]
        found = leaves_of(tree)
        self.paths = [path for path, _ in found]
        self.leaves = [leaf for _, leaf in found]
        self.names = [prefix + name_of(path) for path in self.paths]
        # Gradients come in the shape of the parameters. Flat dicts and lists are matched without a walk.
        self.single = not isinstance(tree, Mapping | list)
        self.shape = shape_of(tree) if any(len(path) > 1 for path in self.paths) else None
        self.tree_keys = dict.fromkeys(tree) if isinstance(tree, Mapping) else None
        self._find_memory()
        self.flat = isinstance(tree, list) and self.shape is None and not self.orders
        self.in_float32 = any(param.dtype != np.float64 for param in self.params if isinstance(param, np.ndarray))
        self.size = len(found)
        self.counts = [0] * len(found)  # steps that each has taken
        self.rule_states = keys
        self.keys = keys
        self.states: list[tuple[Array, ...]] = []

    def allocate(self, options: Mapping[str, Any]) -> None:
        """Make the states, all zero."""
        keys, dtype, masters = self.rule_states, STATE_DTYPES[options["state_dtype"]], options["master_weights"]
        if dtype is np.uint8:
            self.keys += tuple(f"{key}.exponent" for key in keys)
        if masters:
            self.keys += ("master",)  # which only 16-bit parameters have
        for param in self.params:
            wide = np.dtype(np.float64) if param.dtype == np.float64 else np.dtype(np.float32)
            state = [np.zeros(param.shape, wide if dtype is np.float32 else dtype) for _ in keys]
            if dtype is np.uint8:
                state += [np.zeros(-(-param.size // STATE_BLOCK), np.uint8) for _ in keys]
            if masters and param.dtype.itemsize == 2:
                state.append(param.astype(np.float32))
            self.states.append(tuple(state))

    def accept(self, options: Mapping[str, Any], rule: str, hyper: Callable[..., tuple[float, ...]]) -> None:
        """Keep a copy of options that were checked, and what a step needs of them."""
        self.checked = dict(options)
        self.rule = _core.rule(rule)
        self.stochastic = options["stochastic_rounding"]
        self.chance = self.stochastic or options["state_dtype"] != "float32"
        self.kept = self._kept(hyper)

    def _kept(self, hyper: Callable[..., tuple[float, ...]]) -> tuple[Any, ...] | None:
        """Return what `_core.step_unchanged` needs; None if steps differ in more than hyper and gradients."""
        options, lr = self.checked, self.checked["lr"]
        arrays = bool(self.leaves) and self.shape is None and all(map(operator.is_, self.leaves, self.params))
        if not arrays or self.chance or callable(lr):
            return None
        job = _core.job(
            rule=self.rule,
            hyper=(),
            grad_scale=-1.0 if options["maximize"] else 1.0,
            shrink=lr * options["l1"],
            keep_zeros=options["keep_zeros"],
            stochastic=False,
            noise=0,
            names=self.names,
            params=self.params,
            grads=[],
            states=self.states,
            counts=self.counts,
            indices=None,
        )
        return job, tuple(itertools.chain(*options.items())), hyper, lr, self.tree, self.leaves

    def _find_memory(self) -> None:
        """Set the arrays of the parameters, with their axes in the order of memory, and the addresses."""
        found = [in_memory_order(as_parameter(leaf, name)) for leaf, name in zip(self.leaves, self.names, strict=True)]
        self.params = [array for array, _ in found]
        self.orders = {i: order for i, (_, order) in enumerate(found) if order is not None}
        self.addresses = addresses_of(self.leaves)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find_memory()  # a copied tensor has memory of its own

    def replaced(self) -> bool:
        """Return whether the dict or list of parameters no longer has the arrays that are stepped."""
        if self.shape is not None:
            try:
                return any(
                    reduce(operator.getitem, path, self.tree) is not leaf
                    for path, leaf in zip(self.paths, self.leaves, strict=True)
                )
            except (LookupError, TypeError):
                return True
        here = self.tree if self.tree_keys is None else self.tree.values()
        if len(here) >= len(self.leaves) and not any(map(operator.is_not, here, self.leaves)):  # it may have more
            return False
        return self.tree_keys is None or any(map(operator.is_not, map(self.tree.get, self.tree_keys), self.leaves))

    def gradients(self, tree: Any) -> list[Any]:
        """Return the gradients in the order of the parameters, with the axes in the order of memory.

        They come in the tree of the parameters, which may stand in a list of one entry, as with several groups.
        """
        if (
            type(tree) is list
            and self.flat
            and len(tree) == self.size
            and (type(tree[0]) is np.ndarray if self.size == 1 else {*map(type, tree)} == _ARRAYS)
        ):
            return tree  # nearly always
        if self.single:
            if type(tree) is np.ndarray and not self.orders:
                return [tree]
            if isinstance(tree, list | tuple) and len(tree) == 1:
                tree = tree[0]
            grads = self.arrays([tree])
        elif self.shape is not None:
            if tree is None:
                raise TypeError("grads: expected a tree like params, got NoneType")
            grads = self.arrays(like(self.shape, tree))
        elif self.tree_keys is not None:
            if type(tree) is list and len(tree) == 1:
                tree = tree[0]
            if type(tree) is not dict and not isinstance(tree, Mapping):
                raise TypeError(f"grads: expected a dict like params, got {type(tree).__name__}")
            if tree.keys() != self.tree_keys.keys():
                like(self.tree_keys, tree)  # raises
            grads = self.arrays([tree[name] for name in self.tree_keys])
        else:
            if not isinstance(tree, list | tuple):
                raise TypeError(f"grads: expected a list like params, got {type(tree).__name__}")
            if len(tree) == 1 and isinstance(tree[0], list | tuple):
                tree = tree[0]
            require(len(tree) == len(self.params), "grads", f"{len(self.params)} gradients", len(tree))
            grads = self.arrays(tree)
        return self.in_memory_order(grads) if self.orders else grads

    def arrays(self, grads: Iterable[Any]) -> list[Any]:
        """Return the gradients as arrays; an error of another library names the parameter."""
        found: list[Any] = []
        try:
            for grad in grads:
                found.append(grad if type(grad) is np.ndarray else as_gradient(grad))
        except (TypeError, ValueError, RuntimeError, BufferError) as error:
            raise TypeError(f"gradient of {self.names[len(found)]!r}: {error}") from error
        return found

    def in_memory_order(self, grads: list[Any]) -> list[Any]:
        """Return the gradients with the axes of their parameters in memory."""
        for i, order in self.orders.items():
            if isinstance(grads[i], np.ndarray):
                shape = self.shape_at(i)
                require(grads[i].shape == shape, f"gradient of {self.names[i]!r}", f"shape {shape}", grads[i].shape)
                grads[i] = grads[i].transpose(order)
        return grads

    def shape_at(self, i: int) -> tuple[int, ...]:
        """Return the shape of a parameter as its owner sees it."""
        return self.as_given(i, self.params[i]).shape

    def as_given(self, i: int, array: Array) -> Array:
        """Return an array in the order of memory of parameter `i` with its axes as the owner has them."""
        order = self.orders.get(i)
        return array if order is None or array.ndim != len(order) else array.transpose(np.argsort(order))

    def jobs(self, grads: list[Any]) -> Iterable[tuple[int, list[int] | None]]:
        """Return the step counts of the tensors to step, each with the indices of those that have it (None: all)."""
        counts = self.counts
        for grad in grads:
            if grad is None:
                break
        else:
            if counts and counts.count(counts[0]) == len(counts):
                return ((counts[0], None),)
        by_count: dict[int, list[int]] = {}
        for i, (count, grad) in enumerate(zip(counts, grads, strict=True)):
            if grad is not None:
                by_count.setdefault(count, []).append(i)
        return by_count.items()

    def saved_arrays(self, i: int, name: str, saved: Mapping[str, Any]) -> list[tuple[Array, Array]]:
        """Return the states of parameter `i`, each with what was saved of it, or raise if that does not fit."""
        param = self.params[i]
        dtype, shape = saved.get("dtype"), saved.get("shape")
        require(dtype == param.dtype.name, f"dtype of {name!r}", repr(param.dtype.name), dtype)
        shape = tuple(shape) if isinstance(shape, list | tuple) else shape
        require(shape == self.shape_at(i), f"shape of {name!r}", str(self.shape_at(i)), shape)
        bits = _core.positive_states(self.rule)
        positive = {key for j, key in enumerate(self.rule_states) if bits >> j & 1}
        found = []
        for key, state in zip(self.keys, self.states[i], strict=False):
            what, mine = f"{key} of {name!r}", self.as_given(i, state)
            theirs: Any = saved.get(key)
            require(isinstance(theirs, np.ndarray), what, "an array", theirs)
            require(theirs.dtype == mine.dtype, what, str(mine.dtype), str(theirs.dtype))
            require(theirs.shape == mine.shape, what, str(mine.shape), theirs.shape)
            base, _, exponent = key.partition(".")
            if exponent:
                most = _MOST_EXPONENT[base in positive]
                require(int(theirs.max(initial=0)) <= most, what, f"at most {most}", int(theirs.max(initial=0)))
                order = self.orders.get(i)
                saved_order = saved.get("order")
                saved_order = tuple(saved_order) if isinstance(saved_order, list | tuple) else saved_order
                require(saved_order == order, f"order of {name!r}", f"{order}, as blocks are in memory", saved_order)
            elif base in positive and theirs.dtype != np.uint8:
                require(not (theirs < 0).any(), what, "no negative numbers", "some")
            found.append((mine, theirs))
        return found
