"""Graphs of layers: what the formats that can write them share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fastopt._text import shown
from fastopt._types import Array
from fastopt.formats.common import Option, parse_shape
from fastopt.models.shrinking import Layer, Node

_ON_MAPS = ("conv", "depthwise", "max_pool", "average_pool")


def parse_layer(text: str) -> Layer:
    """Parse ``NAME`` or ``NAME:ACTIVATION``."""
    name, _, activation = text.partition(":")
    return Layer(name, activation=activation or None)


LAYER = Option("", list, "NAME[:ACTIVATION]", "--layer", parse_layer)
INPUT_SHAPE = Option("the shape of x without the batch, such as 1,28,28.", metavar="N,...", parse=parse_shape)


def reads_of(node: Node, before: str | None) -> list[str]:
    """Return the names of the nodes that a node reads; "x" is the input."""
    if isinstance(node, Layer):
        return [(before if node.input is None else node.input) or "x"]
    if not node.inputs:
        raise ValueError(f"graph: {node.name!r} reads nothing")
    return list(node.inputs)


def is_map(node: Node, inputs: Sequence[bool]) -> bool:
    """Return whether a node returns a signal or a feature map, with the channels first, given whether it reads one."""
    if not isinstance(node, Layer) or node.kind in ("activation", "layer_norm"):
        return any(inputs)
    return node.kind in _ON_MAPS


def reads_map(graph: Sequence[Node]) -> bool:
    """Return whether the input of a graph is a signal or a feature map."""
    first = graph[0]
    return isinstance(first, Layer) and (first.kind in _ON_MAPS or first.kind == "global_pool" or first.flatten)


class GraphNode(NamedTuple):
    """A node of a graph, with what it reads.

    Attributes
    ----------
    node : Layer, Add or Concat
    reads : list of str
        The names of the nodes that it reads; "x" is the input.
    reads_maps : list of bool
        True for each of these that is a signal or a feature map.
    gives_map : bool
        True if its output is one.
    """

    node: Node
    reads: list[str]
    reads_maps: list[bool]
    gives_map: bool


def nodes_of(graph: Sequence[Node], x_is_map: bool) -> list[GraphNode]:
    """Return the nodes of a graph in order; raise ValueError if one reads what does not come before it."""
    maps = {"x": x_is_map}
    before: str | None = None
    nodes = []
    for node in graph:
        if node.name in maps:
            raise ValueError(f"graph: {node.name!r} names two nodes, or the input")
        reads = reads_of(node, before)
        for name in reads:
            if name not in maps:
                raise ValueError(f"graph: {node.name!r} reads {name!r}, which does not come before it")
        of_maps = [maps[name] for name in reads]
        maps[node.name] = is_map(node, of_maps)
        nodes.append(GraphNode(node, reads, of_maps, maps[node.name]))
        before = node.name
    return nodes


def outputs_of(nodes: Sequence[GraphNode]) -> list[str]:
    """Return the names of the nodes that no node reads."""
    read = {name for reader in nodes for name in reader.reads}
    return [given.node.name for given in nodes if given.node.name not in read]


def batch_norm(tensor: Callable[[str], Array | None], size: int, eps: float) -> tuple[Array, Array]:
    """Return a batch normalization as a factor and a summand of each channel, in float64.

    `tensor` returns the weight, bias, running_mean or running_var, or None.
    """
    default = {"running_mean": 0.0, "running_var": 1.0, "weight": 1.0, "bias": 0.0}
    found = {part: tensor(part) for part in default}
    mean, var, gain, shift = (
        np.full(size, default[part]) if values is None else values for part, values in found.items()
    )
    if not (var + eps > 0).all():
        raise ValueError(f"running_var: expected more than {-eps}, got {var.min()}")
    factor = gain / np.sqrt(var + eps)
    return factor, shift - mean * factor


def numbers_of(name: str, option: str, given: int | Sequence[int] | None, default: int | Sequence[int]) -> list[int]:
    """Return the numbers of an option of a layer: one for all axes, or one for each."""
    value = default if given is None else given
    numbers = [value] if isinstance(value, (int, np.integer)) else list(value)
    least = 0 if option == "padding" else 1
    if not numbers or not all(isinstance(n, (int, np.integer)) and n >= least for n in numbers):
        raise ValueError(f"graph: {name!r}: {option}: expected numbers of {least} or more, got {shown(given)}")
    return [int(n) for n in numbers]
