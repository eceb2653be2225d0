"""Structured pruning: units, channels and layers are removed from the arrays, in NumPy alone."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastopt._text import shown
from fastopt._types import Array

Activation: TypeAlias = "str | Callable[[Array], Array] | None"
Kind: TypeAlias = Literal[
    "dense", "conv", "depthwise", "embedding", "layer_norm", "lstm", "gru", "max_pool", "average_pool", "global_pool",
    "flatten", "activation",
]  # fmt: skip
Criterion: TypeAlias = Literal["l1", "l2", "activity", "taylor"]

_PASSING = ("max_pool", "average_pool", "global_pool", "flatten", "activation")  # channels stay what they are

_erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@dataclass(frozen=True)
class Layer:
    """A layer. Its weights are ``NAME.weight`` and, if it has one, ``NAME.bias``.

    Attributes
    ----------
    name : str
    kind : str
        "dense", "conv" and "depthwise" have weights [out, in], [out, in / groups, ...] and [channels, 1, ...];
        "embedding" has a table [rows, out], and reads indices; "layer_norm" normalizes the last axis. "lstm" and "gru"
        have the tensors of torch, ``NAME.weight_ih_l0``, ``.weight_hh_l0``, ``.bias_ih_l0`` and ``.bias_hh_l0``, and
        read [steps, in]. "max_pool" and "average_pool" have a window of `size`, whose mean counts the zeros of the
        padding, and "global_pool" is the mean of each channel. "flatten" makes one row of a feature map, and
        "activation" is an activation alone. `shrink` takes all but embeddings, "layer_norm" and recurrent layers.
    input : str, optional
        Name of the node that it reads; by default the one before it in the list. The first layer, and layers with "",
        read inputs that are never pruned.
    norm : str, optional
        Name of a batch normalization that follows: ``NORM.weight``, ``.bias``, ``.running_mean``, ``.running_var``.
    activation : str or callable, optional
        The activation after that: "relu", "relu6", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "softmax" over the
        channels or the last axis, or a function.
    flatten : bool
        A dense layer that reads a flattened feature map, all of a channel together.
    eps : float
        The epsilon of the normalization.
    stride, dilation : int or sequence of int
        Those of convolutions and pools, for all axes or for each. A pool has the stride `size` by default.
    padding : int, sequence of int or "same"
        Zeros, or with "max_pool" nothing, before and after each axis. With "same" the length of an axis is divided by
        the stride and rounded up.
    groups : int
        The groups of a convolution.
    size : int or sequence of int, optional
        The size of the window of a pool.
    last : bool
        A recurrent layer that returns its last step alone.
    """

    name: str
    kind: Kind = "dense"
    input: str | None = None
    norm: str | None = None
    activation: Activation = None
    flatten: bool = False
    eps: float = 1e-5
    stride: int | Sequence[int] | None = None
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    size: int | Sequence[int] | None = None
    last: bool = False


@dataclass(frozen=True)
class Add:
    """A sum of nodes, as at the end of a residual block; they lose the same channels.

    Attributes
    ----------
    name : str
    inputs : sequence of str
    activation : str or callable, optional
        The activation after the sum.
    """

    name: str
    inputs: Sequence[str]
    activation: Activation = None


@dataclass(frozen=True)
class Concat:
    """A concatenation of the channels of nodes.

    Attributes
    ----------
    name : str
    inputs : sequence of str
    """

    name: str
    inputs: Sequence[str]


Node: TypeAlias = "Layer | Add | Concat"


@dataclass(frozen=True)
class Shrunk:
    """The result of `shrink`.

    Attributes
    ----------
    weights : dict of arrays
    states : list of dicts of arrays
        Cut like the weights.
    kept : dict from name of node to int array
        The output channels that are left.
    """

    weights: dict[str, Array]
    states: list[dict[str, Array]]
    kept: dict[str, NDArray[np.int64]]


def _has_units(node: Node) -> bool:
    """Return whether a node has weights, and so units of its own."""
    return isinstance(node, Layer) and node.kind not in _PASSING


def _activate(activation: Activation, x: Array) -> Array:
    if activation is None or activation == "softmax":  # no channel below a softmax is removed
        return x
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)} or a function, got {activation!r}")
        activation = ACTIVATIONS[activation]
    with np.errstate(over="ignore"):
        return np.asarray(activation(x))


class _Plan:
    """The units that the channels of each node belong to; nodes that must lose the same channels share units."""

    def __init__(self, weights: Mapping[str, Array], graph: Sequence[Node]) -> None:
        self.weights = weights
        self.nodes: dict[str, Node] = {}
        self.units: dict[str, NDArray[np.int64]] = {}  # of a node's output; [] before anything can be pruned
        self.reads: dict[str, list[str]] = {}
        self.parent: list[int] = []
        self.cuts: dict[str, list[tuple[int, str, int]]] = defaultdict(list)  # tensor: (axis, node, repeats)
        for node in graph:
            if node.name in self.nodes:
                raise ValueError(f"graph: two nodes are named {node.name!r}")
            before = next(reversed(self.nodes), None)
            if isinstance(node, Layer):
                reads = [name for name in [before if node.input is None else node.input] if name]
            else:
                reads = list(node.inputs)
            for name in reads:
                if name not in self.nodes:
                    raise ValueError(f"graph: {node.name!r} reads {name!r}, which does not come before it")
            self.reads[node.name] = reads
            self.units[node.name] = self._layer(node, reads) if isinstance(node, Layer) else self._join(node, reads)
            self.nodes[node.name] = node

    def tensor(self, name: str, ndim: int | None = None) -> Array:
        if name not in self.weights:
            raise ValueError(f"weights: the graph needs {name!r}, which is missing")
        array = self.weights[name]
        if not isinstance(array, np.ndarray) or array.ndim == 0 or (ndim is not None and array.ndim < ndim):
            raise ValueError(f"weights: expected {name!r} to be an array of {ndim or 1} or more axes")
        return array

    def find(self, unit: int) -> int:
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def roots(self, name: str) -> NDArray[np.int64]:
        return np.array([self.find(unit) for unit in self.units[name]], np.int64)

    def _layer(self, node: Layer, reads: list[str]) -> NDArray[np.int64]:
        if node.kind in _PASSING:
            return self.units[reads[0]] if reads else np.empty(0, np.int64)
        name = f"{node.name}.weight"
        w = self.tensor(name, 2)
        if node.kind not in ("dense", "conv", "depthwise"):
            raise ValueError(f"graph: {node.name!r} is {node.kind!r}, of which no units can be removed")
        if node.kind == "depthwise" and not reads:
            raise ValueError(f"graph: {node.name!r} is depthwise and has no node before it")
        if reads:
            channels = len(self.units[reads[0]])
            wide = w.shape[1] if node.kind != "depthwise" else w.shape[0]
            before = self.nodes[reads[0]]
            flat = node.flatten or (isinstance(before, Layer) and before.kind == "flatten")
            repeats = wide // channels if flat and channels else 1
            one = node.kind == "depthwise" and w.shape[1] != 1
            if one or wide != repeats * channels or repeats == 0:
                raise ValueError(
                    f"weights: {name!r} of shape {w.shape} does not fit the {channels} channels of {reads[0]!r}"
                )
            if node.kind != "depthwise":
                self.cuts[name].append((1, reads[0], repeats))
        if node.kind == "depthwise":
            units = self.units[reads[0]]
        else:
            units = np.arange(len(self.parent), len(self.parent) + w.shape[0])
            self.parent.extend(int(unit) for unit in units)
        self.cuts[name].append((0, node.name, 1))
        extra = [f"{node.name}.bias"]
        if node.norm is not None:
            extra += [f"{node.norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
            if not any(f"{node.norm}.{part}" in self.weights for part in ("weight", "running_mean")):
                raise ValueError(f"weights: the graph needs '{node.norm}.weight', which is missing")
        for other in extra:
            if other in self.weights:
                if self.tensor(other).shape != (len(units),):
                    raise ValueError(
                        f"weights: expected {other!r} of shape {(len(units),)}, got {self.tensor(other).shape}"
                    )
                self.cuts[other].append((0, node.name, 1))
        return units

    def _join(self, node: Add | Concat, reads: list[str]) -> NDArray[np.int64]:
        if not reads:
            raise ValueError(f"graph: {node.name!r} reads nothing")
        parts = [self.units[name] for name in reads]
        if isinstance(node, Concat):
            return np.concatenate(parts)
        for name, part in zip(reads, parts, strict=True):
            if len(part) != len(parts[0]):
                raise ValueError(
                    f"graph: {node.name!r} adds {len(parts[0])} channels of {reads[0]!r} and {len(part)} of {name!r}"
                )
            for a, b in zip(parts[0], part, strict=True):
                self.parent[self.find(int(b))] = self.find(int(a))
        return parts[0]


def _scores(
    plan: _Plan,
    criterion: str,
    activations: Mapping[str, Array] | None,
    gradients: Mapping[str, Array] | None,
    removable: Set[int],
) -> dict[int, float]:
    """Return the importance of each unit that may be removed: the mean over the layers that share it."""
    found: dict[int, list[float]] = defaultdict(list)
    for name, node in plan.nodes.items():
        if not _has_units(node) or removable.isdisjoint(plan.roots(name).tolist()):
            continue
        w = plan.tensor(f"{name}.weight").astype(np.float64)
        if criterion == "activity":
            if activations is None or name not in activations:
                raise ValueError(f"activations: nothing for {name!r}")
            a = np.abs(np.asarray(activations[name], np.float64))
            if a.ndim < 2 or a.shape[1] != len(w):
                raise ValueError(f"activations: expected shape (samples, {len(w)}, ...) for {name!r}, got {a.shape}")
            values = a.mean(axis=(0, *range(2, a.ndim)))
        else:
            if criterion == "taylor":
                if gradients is None or f"{name}.weight" not in gradients:
                    raise ValueError(f"gradients: nothing for '{name}.weight'")
                gradient = np.asarray(gradients[f"{name}.weight"])
                if gradient.shape != w.shape:
                    raise ValueError(f"gradients: expected shape {w.shape} for '{name}.weight', got {gradient.shape}")
                w = w * gradient
            flat = w.reshape(len(w), -1)
            values = np.sqrt(np.square(flat).mean(axis=1)) if criterion == "l2" else np.abs(flat).mean(axis=1)
        if not np.isfinite(values).all():
            raise ValueError(f"{criterion}: the importance of a unit of {name!r} is not finite")
        for root, value in zip(plan.roots(name), values, strict=True):
            found[int(root)].append(float(value))
    return {root: sum(values) / len(values) for root, values in found.items()}


def _choose(
    groups: Iterable[list[int]],
    scores: Mapping[int, float],
    share: float | None,
    threshold: float | None,
    scope: str,
    round_to: int,
) -> set[int]:
    """Return the units to remove: of each group at least `round_to` stay, and a multiple of that if there are more."""
    groups = list(groups)
    order = [sorted(group, key=lambda unit: (scores[unit], -unit)) for group in groups]
    removed: set[int] = set()
    if threshold is not None:
        removed = {unit for group in groups for unit in group if scores[unit] <= threshold}
    elif share is not None:
        everything = sorted((unit for group in groups for unit in group), key=lambda unit: (scores[unit], -unit))
        jobs = order if scope == "local" else [everything]
        removed = {unit for job in jobs for unit in job[: round(share * len(job))]}
    for group in order:
        gone = [unit for unit in group if unit in removed]
        kept = max(len(group) - len(gone), 1)
        wanted = min(-(-kept // round_to) * round_to, len(group))
        for unit in gone[len(group) - wanted :]:  # the most important of them come back
            removed.discard(unit)
    return removed


def _fold(plan: _Plan, result: dict[str, Array], drop: Mapping[str, NDArray[np.bool_]]) -> None:
    """Add the constant outputs of removed units to the biases of the layers that read them."""
    constant: dict[str, Array] = {}
    for name, node in plan.nodes.items():
        reads = plan.reads[name]
        if isinstance(node, Concat):
            constant[name] = np.concatenate([constant[read] for read in reads])
            continue
        if isinstance(node, Add):
            constant[name] = _activate(node.activation, np.sum([constant[read] for read in reads], axis=0))
            continue
        if node.kind in _PASSING:
            constant[name] = _activate(node.activation, constant[reads[0]] if reads else np.empty(0))
            continue
        w = plan.tensor(f"{name}.weight").astype(np.float64)
        bias, norm = f"{name}.bias", node.norm
        change = np.zeros(len(w))
        if reads and node.kind == "depthwise":
            change = np.where(drop[reads[0]], constant[reads[0]] * w.reshape(len(w), -1).sum(axis=1), 0)
        elif reads:
            gone = np.where(drop[reads[0]], constant[reads[0]], 0)
            change = w.reshape(len(w), len(gone), -1).sum(axis=2) @ gone
        x = change + (result[bias].astype(np.float64) if bias in result else 0)
        # A channel that goes itself needs no bias.
        if np.any(change[~drop[name]] != 0):
            if bias in result:
                result[bias] = x.astype(result[bias].dtype)
            elif norm is not None and f"{norm}.running_mean" in result:
                mean = result[f"{norm}.running_mean"]
                result[f"{norm}.running_mean"] = (mean - change).astype(mean.dtype)
            else:
                raise ValueError(f"weights: {name!r} has no bias for what removed units add; fold=False leaves it out")
        if norm is not None:
            default = {"running_mean": 0.0, "running_var": 1.0, "weight": 1.0, "bias": 0.0}
            mean, var, gain, shift = (np.asarray(plan.weights.get(f"{norm}.{p}", d)) for p, d in default.items())
            x = (x - mean) / np.sqrt(var + node.eps) * gain + shift
        constant[name] = _activate(node.activation, x)


def shrink(
    weights: Mapping[str, Array],
    graph: Sequence[Node],
    *,
    share: float | None = None,
    threshold: float | None = None,
    scope: Literal["local", "global"] = "local",
    criterion: Criterion = "l2",
    activations: Mapping[str, Array] | None = None,
    gradients: Mapping[str, Array] | None = None,
    layers: Sequence[str] = ("*",),
    round_to: int = 1,
    fold: bool = True,
    states: Sequence[Mapping[str, Array]] = (),
    keep: Sequence[str] = (),
) -> Shrunk:
    """Remove the least important neurons and channels, and the weights that read them: the arrays become smaller.

    Parameters
    ----------
    weights : mapping from name to array
        The model, with the names and shapes of torch; it stays as it is.
    graph : sequence of Layer, Add and Concat
        In the order of computation. Nodes that nobody reads are outputs, and keep all their channels.
    share : float
        The fraction of the units of each layer to remove; the number is rounded.
    threshold : float
        Remove units whose importance is not above this, instead of a share.
    scope : "local" or "global"
        Whether `share` holds for each layer, or for all together.
    criterion : "l1", "l2", "activity" or "taylor"
        Importance of a unit: mean magnitude or root mean square of its weights, mean magnitude of its activations, or
        of weight * gradient; the mean over layers that share it.
    activations : mapping from name of layer to array, shape (samples, channels, ...)
        For "activity": the outputs of each layer that may lose units, and of each that shares units with it.
    gradients : mapping from name of tensor to array
        The gradients, for "taylor".
    layers : sequence of glob patterns
        Layers that may lose units.
    round_to : int
        The number of units that stay is a multiple of this.
    fold : bool
        Add what a removed unit would give if its weights were zero, activation of bias, to the biases that follow.
        Removing dead units then changes nothing, but at the borders of zero-padded convolutions.
    states : sequence of mappings
        States of an optimizer, by the names of the weights: cut alike.
    keep : sequence of glob patterns
        Tensors that the graph does not name and that stay as they are.

    Returns
    -------
    Shrunk

    Raises
    ------
    ValueError
        If the graph and the weights do not fit each other, or a tensor is not covered; the message names it.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> rng = np.random.default_rng(0)
    >>> shapes = {"fc1.weight": (32, 8), "fc1.bias": (32,), "fc2.weight": (4, 32), "fc2.bias": (4,)}
    >>> weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    >>> small = fo.shrink(weights, [fo.Layer("fc1", activation="relu"), fo.Layer("fc2")], share=0.5)
    >>> {name: w.shape for name, w in small.weights.items()}
    {'fc1.weight': (16, 8), 'fc1.bias': (16,), 'fc2.weight': (4, 16), 'fc2.bias': (4,)}
    """
    if (share is None) == (threshold is None):
        raise ValueError("share, threshold: expected exactly one of them")
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {shown(share)}")
    if scope not in ("local", "global"):
        raise ValueError(f"scope: expected 'local' or 'global', got {shown(scope)}")
    if criterion not in ("l1", "l2", "activity", "taylor"):
        raise ValueError(f"criterion: expected 'l1', 'l2', 'activity' or 'taylor', got {shown(criterion)}")
    if round_to < 1:
        raise ValueError(f"round_to: expected at least 1, got {shown(round_to)}")
    plan = _Plan(weights, graph)
    for name in weights:
        if name not in plan.cuts and not any(fnmatchcase(name, pattern) for pattern in keep):
            raise ValueError(f"weights: the graph does not cover {name!r}; name it in keep if it stays as it is")

    read = {name for reads in plan.reads.values() for name in reads}
    fixed: set[int] = set()
    groups: dict[int, tuple[str, list[int]]] = {}
    for name, node in plan.nodes.items():
        roots = [int(root) for root in plan.roots(name)]
        left = _has_units(node) and not any(fnmatchcase(name, pattern) for pattern in layers)
        if name not in read or left or (not isinstance(node, Concat) and node.activation == "softmax"):
            fixed.update(roots)
        for root in roots if _has_units(node) else ():
            groups.setdefault(root, (name, []))
    by_layer: dict[str, list[int]] = defaultdict(list)
    for root, (name, _) in groups.items():
        if root not in fixed:
            by_layer[name].append(root)
    removable = {root for group in by_layer.values() for root in group}
    scores = _scores(plan, criterion, activations, gradients, removable)
    removed = _choose(by_layer.values(), scores, share, threshold, scope, round_to)

    drop = {name: np.isin(plan.roots(name), list(removed)) for name in plan.nodes}
    whole = dict(weights)
    if fold:
        _fold(plan, whole, drop)

    def cut(tensors: Mapping[str, Array]) -> dict[str, Array]:
        result = dict(tensors)
        for name, places in plan.cuts.items():
            if name not in result:
                continue
            if result[name].shape != weights[name].shape:
                raise ValueError(f"states: expected shape {weights[name].shape} for {name!r}, got {result[name].shape}")
            for axis, node, repeats in places:
                result[name] = np.compress(np.repeat(~drop[node], repeats), result[name], axis=axis)
        return result

    kept = {name: np.flatnonzero(~gone) for name, gone in drop.items()}
    return Shrunk(cut(whole), [cut(state) for state in states], kept)


def drop_layers(
    weights: Mapping[str, Array],
    prefix: str,
    *,
    count: int,
    importance: Sequence[float] | None = None,
    states: Sequence[Mapping[str, Array]] = (),
) -> Shrunk:
    """Remove whole layers of a stack of residual layers, and renumber the others.

    Parameters
    ----------
    weights : mapping from name to array
    prefix : str
        The beginning of the names of the stack, with ``{}`` for the number, as ``"encoder.layers.{}."``.
    count : int
        The number of layers to remove: the least important ones, and of equal ones the later.
    importance : sequence of float, optional
        The importance of each layer. By default it is the root mean square of the layer's weights of two or more axes;
        the distance between the layer's output and its input is better.
    states : sequence of mappings
        States of an optimizer, by the names of the weights: treated alike.

    Returns
    -------
    Shrunk
        With `kept` the old numbers of the layers that are left, under `prefix`.

    Raises
    ------
    ValueError
        If there are no such layers, their numbers have gaps, or all would go.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> weights = {f"layers.{i}.weight": np.full((2, 2), i == 1, np.float32) for i in range(3)}
    >>> small = fo.drop_layers(weights, "layers.{}.", count=2)
    >>> list(small.weights), bool(small.weights["layers.0.weight"].all())
    (['layers.0.weight'], True)
    """
    if prefix.count("{}") != 1:
        raise ValueError(f"prefix: expected one '{{}}' for the number, got {shown(prefix)}")
    before, after = (re.escape(part) for part in prefix.split("{}"))
    pattern = re.compile(f"{before}(\\d+){after}(.*)", re.DOTALL)
    members: dict[int, list[Array]] = defaultdict(list)
    for name, array in weights.items():
        if match := pattern.fullmatch(name):
            members[int(match[1])].append(array)
    total = len(members)
    if sorted(members) != list(range(total)) or total == 0:
        raise ValueError(f"prefix: expected layers 0, 1, ... named {prefix!r}, got {sorted(members)}")
    if not 0 <= count < total:
        raise ValueError(f"count: expected 0 to {total - 1}, got {shown(count)}")
    if importance is None:
        importance = [_rms(members[i]) for i in range(total)]
    if len(importance) != total:
        raise ValueError(f"importance: expected {total} numbers, got {len(importance)}")
    order = sorted(range(total), key=lambda i: (importance[i], -i))
    kept = sorted(order[count:])
    number = {old: new for new, old in enumerate(kept)}

    def cut(tensors: Mapping[str, Array]) -> dict[str, Array]:
        result = {}
        for name, array in tensors.items():
            match = pattern.fullmatch(name)
            if match is None:
                result[name] = array
            elif int(match[1]) in number:
                result[prefix.replace("{}", str(number[int(match[1])])) + match[2]] = array
        return result

    return Shrunk(cut(weights), [cut(state) for state in states], {prefix: np.array(kept, np.int64)})


def _rms(arrays: list[Array]) -> float:
    matrices = [array.astype(np.float64) for array in arrays if array.ndim > 1]
    size = sum(matrix.size for matrix in matrices)
    return math.sqrt(sum(float(np.square(matrix).sum()) for matrix in matrices) / max(size, 1))
