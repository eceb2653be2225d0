"""Networks in C of a graph of layers."""

from collections.abc import Sequence
from typing import get_args

from fastopt._checks import as_matrix
from fastopt._text import shown
from fastopt._types import Array
from fastopt.formats.c_net import Net, Value
from fastopt.formats.layers import batch_norm, nodes_of, numbers_of, outputs_of, reads_map
from fastopt.models.shrinking import Add, Concat, Kind, Layer, Node


def add_layers(net: Net, graph: Sequence[Node], input_shape: Sequence[int] | None) -> Value:
    """Add a graph of layers; return its output.

    Parameters
    ----------
    net : Net
    graph : sequence of Layer, Add and Concat
    input_shape : sequence of int, optional
        The shape of x without the batch. By default that of a row for the first layer, if it is dense.
    """
    if not graph:
        raise ValueError("graph: expected one or more layers, got none")
    values: dict[str, Value] = {"x": _input_of(net, graph, input_shape)}
    nodes = nodes_of(graph, len(values["x"].shape) == 4 or reads_map(graph))
    for node, reads, reads_maps, gives_map in nodes:
        inputs = [values[name] for name in reads]
        axis = 1 if gives_map else -1
        if isinstance(node, Layer):
            if node.kind == "dense" and reads_maps[0] and not node.flatten:
                raise ValueError(
                    f"graph: {node.name!r} reads a feature map of shape {inputs[0].shape[1:]}; flatten=True makes it "
                    "a row"
                )
            value = _normed(net, node, _layer(net, node, inputs[0]), axis)
            value = _activated(net, node, value, axis)
        elif isinstance(node, Concat):
            value = net.concat(node.name, inputs, axis)
        else:
            value = inputs[0]
            for other in inputs[1:]:
                value = net.join(node.name, value, other)
            value = _activated(net, node, value, axis)
        values[node.name] = value
    outputs = outputs_of(nodes)
    if len(outputs) > 1:
        raise ValueError(f"graph: expected one output, got {', '.join(outputs)}, which no node reads")
    return values[outputs[0]]


def _input_of(net: Net, graph: Sequence[Node], input_shape: Sequence[int] | None) -> Value:
    first = graph[0]
    ids = isinstance(first, Layer) and first.kind == "embedding"
    if input_shape is None:
        if not isinstance(first, Layer) or first.kind != "dense":
            raise ValueError(
                f"input_shape: {first.name!r} is no dense layer; expected the shape of x without the batch, such as "
                "(1, 28, 28)"
            )
        shape: tuple[int, ...] = (as_matrix(net.tensor(first.name, f"{first.name}.weight").shape)[1],)
    else:
        shape = tuple(input_shape)
        if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"input_shape: expected numbers of 1 or more, got {input_shape}")
    return net.input((1, *shape), ids=ids)


def _layer(net: Net, layer: Layer, x: Value) -> Value:
    name, weight = layer.name, f"{layer.name}.weight"
    bias = f"{name}.bias" if net.has(f"{name}.bias") else None
    padding: Sequence[tuple[int, int]] | str
    stride = numbers_of(name, "stride", layer.stride, 1)
    if isinstance(layer.padding, str):
        padding = layer.padding
    else:
        padding = [(n, n) for n in numbers_of(name, "padding", layer.padding, 0)]
    dilation = numbers_of(name, "dilation", layer.dilation, 1)
    if layer.kind == "dense":
        if layer.flatten:
            x = net.flatten(name, x)
        y = net.linear(name, x, weight, bias)
    elif layer.kind in ("conv", "depthwise"):
        groups = x.shape[1] if layer.kind == "depthwise" else layer.groups
        y = net.conv(name, x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    elif layer.kind in ("max_pool", "average_pool"):
        size = numbers_of(name, "size", layer.size, 0)
        size = size * max(len(x.shape) - 2, 1) if len(size) == 1 else size
        stride = numbers_of(name, "stride", layer.stride, size)
        y = net.pool(name, x, layer.kind.removesuffix("_pool"), size, stride=stride, padding=padding,
                     dilation=dilation, count_padding=True)  # fmt: skip
    elif layer.kind == "global_pool":
        y = net.global_pool(name, x, "average")
        y = net.reshape(name, y, y.shape[:2])
    elif layer.kind == "flatten":
        y = net.flatten(name, x)
    elif layer.kind == "activation":
        y = x
    elif layer.kind == "embedding":
        y = net.embedding(name, x, weight)
    elif layer.kind == "layer_norm":
        gain = net.vector(name, weight, x.shape[-1]) if net.has(weight) else None
        y = net.layer_norm(name, x, gain, net.vector(name, bias, x.shape[-1]) if bias else None, layer.eps)
    elif layer.kind in ("lstm", "gru"):
        biases = [part if net.has(part) else None for part in (f"{name}.bias_ih_l0", f"{name}.bias_hh_l0")]
        gates = (0, 1, 2, 3) if layer.kind == "lstm" else (0, 1, 2)
        y = net.recurrent(name, layer.kind, x, (f"{name}.weight_ih_l0", f"{name}.weight_hh_l0"),
                          (biases[0], biases[1]), gates=gates, last=layer.last)  # fmt: skip
    else:
        kinds = ", ".join(get_args(Kind))
        raise ValueError(f"graph: {name!r}: expected a kind of {kinds}, got {shown(layer.kind)}")
    return y


def _normed(net: Net, layer: Layer, y: Value, axis: int) -> Value:
    norm = layer.norm
    if norm is None:
        return y
    if not any(net.has(f"{norm}.{part}") for part in ("weight", "running_mean")):
        raise ValueError(f"model: the graph needs '{norm}.weight', which is missing")

    def part(name: str) -> Array | None:
        full = f"{norm}.{name}"
        return net.vector(layer.name, full, y.shape[axis]) if net.has(full) else None

    try:
        factor, summand = batch_norm(part, y.shape[axis], layer.eps)
    except ValueError as error:
        raise ValueError(f"model: {norm}: {error}") from error
    return net.affine(norm, y, factor, summand, axis)


def _activated(net: Net, node: Layer | Add, y: Value, axis: int) -> Value:
    if node.activation is None:
        return y
    if not isinstance(node.activation, str):
        raise ValueError(f"graph: the activation of {node.name!r} is a function; C needs the name of one")
    return net.activation(node.name, y, node.activation, axis=axis)
