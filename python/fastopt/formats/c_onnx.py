"""Networks in C of an ONNX model: each node becomes operations of `Net`, or is refused by name and operator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt._types import Array
from fastopt.formats.c_net import Net, Value
from fastopt.formats.layers import batch_norm
from fastopt.formats.onnx_graph import Use, attribute, opset_version
from fastopt.formats.onnx_graph import Value as Constant
from fastopt.formats.onnx_weights import OpenedOnnx

if TYPE_CHECKING:
    from onnx import NodeProto

_PASSING = ("Transpose", "Identity", "Cast")  # between a weight and its product
_UNARY = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Softmax": "softmax", "LeakyRelu": "leaky_relu"}
# Operators that compute shapes, and constants from shapes.
_OF_SHAPES = {
    "Abs", "Add", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten", "Floor",
    "Gather", "Identity", "Max", "Min", "Mod", "Mul", "Neg", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice",
    "Split", "Squeeze", "Sqrt", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
_LARGEST = 1 << 24
_INTEGERS, _FLOATS = (6, 7), (1, 10, 11, 16)  # of TensorProto


def add_onnx(net: Net, path: Path, input_shape: Sequence[int] | None) -> Value:
    """Add the graph of an ONNX model; return its output.

    Parameters
    ----------
    net : Net
        With the weights of this model, under the names and in the order of axes in which fastopt reads them.
    path : Path
    input_shape : sequence of int, optional
        The shape of x without the batch, where the model leaves it open.

    Raises
    ------
    ValueError
        If a node cannot be computed in C; the message names it and its operator.
    """
    return _Reader(net, OpenedOnnx(path), path).read(input_shape)


class _Reader:
    """Goes through the nodes; `env` has what they have computed, networks' values and constants."""

    def __init__(self, net: Net, opened: OpenedOnnx, path: Path) -> None:
        self.net, self.opened, self.path = net, opened, path
        self.root = opened.root
        self.env: dict[str, Value | Array] = {}
        self.names = {value: name for name, value in opened.values.items()}
        self.done: set[int] = set()  # nodes that another one has taken along
        self.opset = opset_version(opened.model)
        self.warned = False

    def read(self, input_shape: Sequence[int] | None) -> Value:
        graph = self.root.graph
        inputs = [value for value in graph.input if (v := self.root.find(value.name)) is None or v.tensor is None]
        if len(inputs) != 1 or len(graph.output) != 1:
            names = [[value.name for value in values] for values in (inputs, graph.output)]
            raise ValueError(
                f"{self.path}: expected one input and one output, got {', '.join(names[0]) or 'none'} and "
                f"{', '.join(names[1]) or 'none'}"
            )
        self.env[inputs[0].name] = self._input(inputs[0], input_shape)
        for at, node in enumerate(self.root.nodes):
            if at not in self.done and not all(self._is_constant(name) for name in node.output if name):
                self._node(at, node)
        output = self.env.get(graph.output[0].name)
        if not isinstance(output, tuple):
            raise ValueError(f"{self.path}: the output {graph.output[0].name!r} does not depend on the input")
        return output

    def _input(self, described: Any, input_shape: Sequence[int] | None) -> Value:
        kind = described.type.tensor_type
        dims = [dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim]
        name, shown = described.name, f"({', '.join(map(str, dims))})"
        if kind.elem_type not in (*_FLOATS, *_INTEGERS):
            raise ValueError(f"{self.path}: the input {name!r} is neither of floats nor of indices")
        if input_shape is None:
            input_shape = [n for n in dims[1:] if isinstance(n, int)]
            if len(dims) < 2 or len(input_shape) != len(dims) - 1:
                raise ValueError(
                    f"input_shape: {name!r} has the shape {shown} in {self.path}; expected numbers for all axes "
                    "but the first, the batch"
                )
            if isinstance(dims[0], int) and dims[0] != 1:
                raise ValueError(f"{self.path}: the input {name!r} has the shape {shown}; expected a batch of 1")
        elif len(dims) != len(input_shape) + 1 or any(
            isinstance(n, int) and n != m for n, m in zip(dims[1:], input_shape, strict=True)
        ):
            raise ValueError(f"input_shape: {name!r} has the shape {shown} in {self.path}, got {tuple(input_shape)}")
        return self.net.input((1, *input_shape), ids=kind.elem_type in _INTEGERS)

    # ---- constants ----

    def _is_constant(self, name: str) -> bool:
        value = self.root.find(name)
        return name not in self.env and value is not None and value.constant

    def _array(self, name: str) -> Array | None:
        """Return the content of a constant, None for a value of the network."""
        known = self.env.get(name)
        if known is not None:
            return None if isinstance(known, tuple) else known
        value = self.root.find(name)
        if value is None or not value.constant:
            raise ValueError(f"{self.path}: {name!r} is read, but nothing computes it")
        own = self.names.get(value)
        if own is not None and own not in self.opened.found and self.net.has(own):
            tensor = self.net.tensor(name, own)
            return tensor if isinstance(tensor, np.ndarray) else tensor.to_dense()
        return self.opened.evaluated(value)

    def _given(self, node: NodeProto, at: int) -> Array | None:
        """Return an input of a node that must be a constant; None if it is left out."""
        if at >= len(node.input) or not node.input[at]:
            return None
        array = self._array(node.input[at])
        if array is None:
            raise _RefusedError(f"expected a constant as input {at}")
        return array

    def _weight(self, node: NodeProto, at: int, turn: Callable[[Array], Array] = lambda w: w) -> str:
        """Return the name of a tensor of the network that a node reads as a weight, [out, in, ...].

        `turn` brings the array of the model into this order.
        """
        name = node.input[at]
        if isinstance(self.env.get(name), tuple):
            raise _RefusedError(f"expected a constant as input {at}")
        base: Constant | None = self.root.find(name)
        while base is not None and base not in self.names and base.node is not None and base.node.op_type in _PASSING:
            base = self.root.find(base.node.input[0])
        own = None if base is None else self.names.get(base)
        found = None if own is None else self.opened.found.get(own)
        if own is not None and found is not None and self.net.has(own):
            orders = [order for use, order in found.uses if use.node is node and use.place == at]
            tensor = self.net.tensor(name, own)
            if orders and orders[0] == found.order and tuple(tensor.shape) == found.shape:
                if isinstance(tensor, np.ndarray):
                    self._warn(base)
                return own
        array = self._array(name)
        assert array is not None
        self._warn(base)
        return self.net.added(name, np.ascontiguousarray(turn(array)))

    def _warn(self, weight: Constant | None) -> None:
        """Tell once that codes of an ONNX model become floats."""
        if weight is not None and weight.node is not None and weight.tensor is None and not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.path}: nodes decode weights, as {weight.name!r}, and C gets the decoded floats. To keep codes, "
                "pack the plain model into a .safetensors file, and export that with onnx (--onnx) of the plain model",
                stacklevel=8,
            )

    def _vector(self, name: str | None, size: int) -> str | None:
        """Return the name of a tensor for a bias of one axis; None if there is none."""
        if not name:
            return None
        array = self._array(name)
        if array is None:
            raise _RefusedError("expected a constant as bias")
        value = self.root.find(name)
        own = None if value is None else self.names.get(value)
        if own is not None and self.net.has(own) and self.net.tensor(name, own).shape == (size,):
            return own
        if array.size not in (1, size):
            raise _RefusedError(f"expected a bias of {size} values, got shape {array.shape}")
        flat = np.broadcast_to(array.reshape(-1).astype(np.float32), (size,))
        return self.net.added(name, np.ascontiguousarray(flat))

    # ---- nodes ----

    def _node(self, at: int, node: NodeProto) -> None:
        name = node.name or node.output[0]
        handler = getattr(self, f"_do_{node.op_type.lower()}", None)
        try:
            reads = [self.env.get(name) for name in node.input if name]
            if not any(isinstance(value, tuple) for value in reads):
                self._compute(node)
                return
            if node.domain not in ("", "ai.onnx", "com.microsoft") or handler is None:
                raise _RefusedError("no function of fastopt_nn.h computes it")
            result = handler(name, node)
            if result is not None:
                self.env[node.output[0]] = result
            for output in node.output[1:]:
                if output and output not in self.env and self.root.values[output].uses:
                    raise _RefusedError(f"its output {output!r} is not computed")
        except _RefusedError as error:
            raise ValueError(
                f"{self.path}: the node {name!r}, a {node.op_type}, cannot be computed in C: {error}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{self.path}: {node.op_type} {error}") from error
        except MemoryError:
            raise ValueError(
                f"{self.path}: the node {name!r}, a {node.op_type}, needs more memory than there is"
            ) from None
        except (ArithmeticError, AssertionError, IndexError, KeyError, StopIteration, TypeError) as error:
            raise ValueError(f"{self.path}: the node {name!r}, a {node.op_type}, is not valid: {error}") from error

    def _compute(self, node: NodeProto) -> None:
        """Compute a node of constants, as of shapes."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise _RefusedError("it has graphs of its own")
        feeds = {name: self._array(name) for name in node.input if name}
        if node.op_type not in _OF_SHAPES:
            raise _RefusedError("no function of fastopt_nn.h computes it")
        if node.op_type in ("ConstantOfShape", "Expand", "Range"):  # the content of an input is the size of the output
            wanted = feeds[node.input[-1 if node.op_type == "Expand" else 0]]
            size = feeds[node.input[1]] if node.op_type == "Range" else wanted
            if size is None or math.prod(max(int(n), 1) for n in size.reshape(-1)) > _LARGEST:
                raise _RefusedError("its output is too large for a constant")
        inputs, outputs = ([helper.make_empty_tensor_value_info(n) for n in names if n]
                           for names in (list(dict.fromkeys(node.input)), node.output))  # fmt: skip
        part = helper.make_model(
            helper.make_graph([node], "constant", inputs, outputs), opset_imports=list(self.opened.model.opset_import)
        )
        try:
            results = ReferenceEvaluator(part).run(None, feeds)
        except Exception as error:  # whatever its operators raise
            raise _RefusedError(str(error)) from error
        for output, array in zip((n for n in node.output if n), results, strict=True):
            self.env[output] = np.asarray(array)

    def _x(self, node: NodeProto, at: int = 0) -> Value:
        value = self.env.get(node.input[at])
        if not isinstance(value, tuple):
            raise _RefusedError(f"expected input {at} to be computed from the input of the model")
        return value

    def _only_use(self, name: str, kind: str) -> Use | None:
        """Return the node that reads a value, if it is the only one and of this operator."""
        uses = self.root.values[name].uses
        fits = len(uses) == 1 and uses[0].node is not None and uses[0].node.op_type == kind
        return uses[0] if fits else None

    def _bias_behind(self, node: NodeProto, rows: int) -> tuple[str | None, str]:
        """Return the bias that an Add adds to a product, and the name of the sum, or of the product without one."""
        use = self._only_use(node.output[0], "Add")
        if use is not None and use.node is not None:
            other = use.node.input[1 - use.place]
            if self._is_constant(other):
                array = self._array(other)
                if array is not None and array.shape[-1:] == (rows,) and array.size == rows:
                    self.done.add(use.at)
                    return self._vector(other, rows), use.node.output[0]
        return None, node.output[0]

    def _do_gemm(self, name: str, node: NodeProto) -> Value:
        if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0):
            raise _RefusedError("expected alpha and beta of 1, and no transA")
        turned = attribute(node, "transB", 0)
        weight = self._weight(node, 1, lambda w: w if turned else w.T)
        rows = self.net.tensor(name, weight).shape[0]
        return self.net.linear(name, self._x(node), weight, self._vector((*node.input, "")[2], rows))

    def _do_matmul(self, name: str, node: NodeProto) -> None:
        x = self._x(node)
        if isinstance(self.env.get(node.input[1]), tuple):
            raise _RefusedError("expected a product with a weight, got one of two values")
        weight = self._weight(node, 1, lambda w: w.T)
        w = self.net.tensor(name, weight)
        if len(w.shape) != 2:
            raise _RefusedError(f"expected a weight of two axes, got shape {w.shape}")
        bias, output = self._bias_behind(node, w.shape[0])
        self.env[output] = self.net.linear(name, x, weight, bias)

    def _do_conv(self, name: str, node: NodeProto) -> Value:
        x, weight = self._x(node), self._weight(node, 1)
        w = self.net.tensor(name, weight)
        bias = self._vector((*node.input, "")[2], w.shape[0])
        return self.net.conv(name, x, weight, bias, groups=attribute(node, "group", 1), **self._window(node, x))

    def _window(self, node: NodeProto, x: Value) -> dict[str, Any]:
        axes = len(x.shape) - 2
        if axes not in (1, 2):
            raise _RefusedError(f"expected a signal or an image, got a value of shape {x.shape[1:]}")
        pads = attribute(node, "pads", [0] * (2 * axes))
        padding: Any = list(zip(pads[:axes], pads[axes:], strict=True))
        auto = attribute(node, "auto_pad", b"NOTSET").decode()
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            padding = "same" if auto == "SAME_UPPER" else "same_lower"
        elif auto == "VALID":
            padding = [(0, 0)] * axes
        return {
            "padding": padding, "stride": attribute(node, "strides", [1] * axes),
            "dilation": attribute(node, "dilations", [1] * axes),
        }  # fmt: skip

    def _pool(self, name: str, node: NodeProto, kind: str) -> Value:
        x, ceil = self._x(node), bool(attribute(node, "ceil_mode", 0))
        counted = bool(attribute(node, "count_include_pad", 0))
        if ceil and counted:
            raise _RefusedError("ceil_mode with count_include_pad")
        size = attribute(node, "kernel_shape", [])
        return self.net.pool(name, x, kind, size, ceil=ceil, count_padding=counted, **self._window(node, x))

    def _do_maxpool(self, name: str, node: NodeProto) -> Value:
        return self._pool(name, node, "max")

    def _do_averagepool(self, name: str, node: NodeProto) -> Value:
        return self._pool(name, node, "average")

    def _do_globalaveragepool(self, name: str, node: NodeProto) -> Value:
        return self.net.global_pool(name, self._x(node), "average")

    def _do_globalmaxpool(self, name: str, node: NodeProto) -> Value:
        return self.net.global_pool(name, self._x(node), "max")

    def _do_reducemean(self, name: str, node: NodeProto) -> Value:
        x, axes = self._x(node), self._axes(node, 1)
        wanted = sorted(axis % len(x.shape) for axis in axes or range(len(x.shape)))
        if wanted != list(range(2, len(x.shape))):
            raise _RefusedError(f"expected the mean over all axes behind the channels, got axes {wanted}")
        y = self.net.global_pool(name, x, "average")
        return y if attribute(node, "keepdims", 1) else self.net.reshape(name, y, y.shape[:2])

    def _axes(self, node: NodeProto, at: int) -> list[int]:
        """Return the axes that an attribute or an input names."""
        given = self._given(node, at)
        return attribute(node, "axes", []) if given is None else [int(axis) for axis in given.reshape(-1)]

    def _do_batchnormalization(self, name: str, node: NodeProto) -> Value:
        x = self._x(node)
        if attribute(node, "training_mode", 0):
            raise _RefusedError("it is in training mode")
        parts = dict(zip(("weight", "bias", "running_mean", "running_var"), range(1, 5), strict=True))

        def part(kind: str) -> Array | None:
            values = self._given(node, parts[kind])
            return None if values is None else values.astype(np.float64)

        factor, summand = batch_norm(part, x.shape[1], attribute(node, "epsilon", 1e-5))
        return self.net.affine(name, x, factor, summand, 1)

    def _activation(self, name: str, node: NodeProto, kind: str, **options: Any) -> Value:
        return self.net.activation(name, self._x(node), kind, **options)

    def _do_relu(self, name: str, node: NodeProto) -> Value:
        return self._activation(name, node, "relu")

    def _do_tanh(self, name: str, node: NodeProto) -> Value:
        return self._activation(name, node, "tanh")

    def _do_leakyrelu(self, name: str, node: NodeProto) -> Value:
        return self._activation(name, node, "leaky_relu", slope=attribute(node, "alpha", 0.01))

    def _do_gelu(self, name: str, node: NodeProto) -> Value:
        kind = attribute(node, "approximate", b"none")
        return self._activation(name, node, "gelu_tanh" if kind == b"tanh" else "gelu")

    def _do_sigmoid(self, name: str, node: NodeProto) -> Value | None:
        use = self._only_use(node.output[0], "Mul")
        if use is not None and use.node is not None and use.node.input[1 - use.place] == node.input[0]:
            self.done.add(use.at)
            self.env[use.node.output[0]] = self._activation(name, node, "silu")
            return None
        return self._activation(name, node, "sigmoid")

    def _do_softmax(self, name: str, node: NodeProto) -> Value:
        x = self._x(node)
        axis = attribute(node, "axis", -1 if self.opset >= 13 else 1)
        if self.opset < 13 and axis % len(x.shape) != len(x.shape) - 1:
            raise _RefusedError(f"expected the last axis, got {axis}")
        return self._activation(name, node, "softmax", axis=axis)

    def _do_clip(self, name: str, node: NodeProto) -> Value:
        least, most = self._given(node, 1), self._given(node, 2)
        low = attribute(node, "min", -math.inf) if least is None else float(least)
        high = attribute(node, "max", math.inf) if most is None else float(most)
        if low != 0 or (high != 6 and high < 3e38):
            raise _RefusedError(f"expected limits of 0 and 6, or of 0 alone, got {low:g} and {high:g}")
        return self._activation(name, node, "relu6" if high == 6 else "relu")

    def _do_div(self, name: str, node: NodeProto) -> Value | None:
        return None if self._gelu(name, node) else self._with_constant(name, node, "Div")

    def _gelu(self, name: str, node: NodeProto) -> bool:
        """Recognize x / sqrt(2), Erf, + 1, * x, * 0.5, in either order of the products."""
        if not math.isclose(self._scalar(node.input[1]) or 0, 2**0.5, rel_tol=1e-6):
            return False
        taken: list[Use] = []
        multiplied = halved = False
        output = node.output[0]
        for kind in ("Erf", "Add", "Mul", "Mul"):
            use = self._only_use(output, kind)
            if use is None or use.node is None:
                return False
            other = use.node.input[1 - use.place] if kind != "Erf" else ""
            if kind == "Add" and self._scalar(other) != 1:
                return False
            halved = halved or self._scalar(other) == 0.5
            multiplied = multiplied or other == node.input[0]
            output = use.node.output[0]
            taken.append(use)
        if not (halved and multiplied):
            return False
        self.done.update(use.at for use in taken)
        self.env[output] = self._activation(name, node, "gelu")
        return True

    def _scalar(self, name: str) -> float | None:
        array = self._array(name) if name and self._is_constant(name) else self.env.get(name)
        return float(array.reshape(-1)[0]) if isinstance(array, np.ndarray) and array.size == 1 else None

    def _with_constant(self, name: str, node: NodeProto, kind: str) -> Value:
        """Add, subtract, multiply or divide, with a constant or with another value."""
        values = [self.env.get(source) for source in node.input]
        both = [value for value in values if isinstance(value, tuple)]
        if len(both) == 2:
            if kind not in ("Add", "Mul") or both[0].shape != both[1].shape:
                raise _RefusedError(f"expected a sum or product of one shape, got {both[0].shape} and {both[1].shape}")
            return self.net.join(name, both[0], both[1], {"Add": "add", "Mul": "multiply"}[kind])
        at = 0 if isinstance(values[0], tuple) else 1
        (x,), array = both, self._given(node, 1 - at)
        assert array is not None
        constant = array.astype(np.float64)
        if at == 1 and kind == "Div":
            raise _RefusedError("it divides a constant by a value")
        if constant.ndim > len(x.shape):
            raise _RefusedError(f"its constant has the shape {constant.shape}, more axes than {x.shape}")
        long = [axis for axis, n in enumerate(constant.shape) if n > 1]
        axis = long[0] - constant.ndim if long else -1 if len(x.shape) == 2 or not x.channels_last else 1
        if len(long) > 1 or (long and x.shape[axis] != constant.shape[axis]):
            raise _RefusedError(f"expected a constant along one axis of {x.shape}, got shape {constant.shape}")
        flat = np.broadcast_to(constant.reshape(-1), (x.shape[axis],))
        if kind == "Add":
            return self.net.affine(name, x, None, flat, axis)
        if kind == "Sub":
            return self.net.affine(name, x, np.full_like(flat, -1) if at else None, flat if at else -flat, axis)
        return self.net.affine(name, x, flat if kind == "Mul" else 1 / flat, None, axis)

    def _do_add(self, name: str, node: NodeProto) -> Value:
        return self._with_constant(name, node, "Add")

    def _do_sub(self, name: str, node: NodeProto) -> Value:
        return self._with_constant(name, node, "Sub")

    def _do_mul(self, name: str, node: NodeProto) -> Value:
        return self._with_constant(name, node, "Mul")

    def _do_sum(self, name: str, node: NodeProto) -> Value:
        value = self._x(node)
        for at in range(1, len(node.input)):
            value = self.net.join(name, value, self._x(node, at))
        return value

    def _do_concat(self, name: str, node: NodeProto) -> Value:
        return self.net.concat(name, [self._x(node, at) for at in range(len(node.input))], attribute(node, "axis", 0))

    def _do_identity(self, name: str, node: NodeProto) -> Value:
        return self._x(node)

    _do_dropout = _do_identity

    def _do_cast(self, name: str, node: NodeProto) -> Value:
        x, kind = self._x(node), attribute(node, "to", 0)
        if kind not in (_INTEGERS if self.net.ids and self.net.is_input(x) else _FLOATS):
            raise _RefusedError("it makes indices of floats, or floats of indices")
        return x

    def _do_shape(self, name: str, node: NodeProto) -> None:
        shape = np.array(self._x(node).shape, np.int64)
        end = attribute(node, "end", len(shape))
        self.env[node.output[0]] = shape[attribute(node, "start", 0) : end]

    def _do_flatten(self, name: str, node: NodeProto) -> Value:
        x, axis = self._x(node), attribute(node, "axis", 1)
        axis = axis % len(x.shape) if axis < 0 else axis
        return self.net.reshape(name, x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))

    def _do_reshape(self, name: str, node: NodeProto) -> Value:
        x, wanted = self._x(node), self._given(node, 1)
        assert wanted is not None
        keep = not attribute(node, "allowzero", 0)
        shape = [int(n) for n in wanted.reshape(-1)]
        if keep:
            shape = [x.shape[i] if n == 0 and i < len(x.shape) else n for i, n in enumerate(shape)]
        return self.net.reshape(name, x, shape)

    def _do_squeeze(self, name: str, node: NodeProto) -> Value:
        x, axes = self._x(node), self._axes(node, 1)
        gone = {axis % len(x.shape) for axis in axes} or {axis for axis, n in enumerate(x.shape) if n == 1}
        if any(x.shape[axis] != 1 for axis in gone):
            raise _RefusedError(f"it drops axes {sorted(gone)} of {x.shape}")
        return self.net.reshape(name, x, [n for axis, n in enumerate(x.shape) if axis not in gone])

    def _do_unsqueeze(self, name: str, node: NodeProto) -> Value:
        x, axes = self._x(node), self._axes(node, 1)
        count = len(x.shape) + len(axes)
        new, rest = {axis % count for axis in axes}, iter(x.shape)
        return self.net.reshape(name, x, [1 if axis in new else next(rest) for axis in range(count)])

    def _do_transpose(self, name: str, node: NodeProto) -> Value:
        x = self._x(node)
        return self.net.transpose(name, x, attribute(node, "perm", list(range(len(x.shape)))[::-1]))

    def _do_slice(self, name: str, node: NodeProto) -> Value:
        x = self._x(node)
        if len(node.input) > 1:
            given = [self._given(node, at) for at in range(1, 5)]
            begins, ends, axes, steps = (None if g is None else [int(n) for n in g.reshape(-1)] for g in given)
        else:
            begins, ends = attribute(node, "starts", []), attribute(node, "ends", [])
            axes, steps = attribute(node, "axes", []) or None, None
        for i, (begin, end) in enumerate(zip(begins or (), ends or (), strict=True)):
            axis = axes[i] if axes else i
            if steps and steps[i] != 1:
                raise _RefusedError(f"expected steps of 1, got {steps[i]}")
            begin, end, _ = slice(begin, end).indices(x.shape[axis])
            x = self.net.part(name, x, axis, begin, end)
        return x

    def _do_gather(self, name: str, node: NodeProto) -> Value:
        axis = attribute(node, "axis", 0)
        if isinstance(self.env.get(node.input[1]), tuple):
            if axis:
                raise _RefusedError("expected rows of a table")
            return self.net.embedding(name, self._x(node, 1), self._weight(node, 0))
        x, places = self._x(node), self._given(node, 1)
        assert places is not None
        if places.size != 1:
            raise _RefusedError(f"expected one place, got {places.size}")
        axis, place = axis % len(x.shape), int(places.reshape(-1)[0])
        y = self.net.part(name, x, axis, place % x.shape[axis], place % x.shape[axis] + 1)
        if places.ndim:
            return y
        return self.net.reshape(name, y, [n for i, n in enumerate(y.shape) if i != axis])

    def _do_layernormalization(self, name: str, node: NodeProto) -> Value:
        x, axis = self._x(node), attribute(node, "axis", -1)
        count = -axis if axis < 0 else len(x.shape) - axis
        return self.net.layer_norm(
            name, x, self._given(node, 1), self._given(node, 2), attribute(node, "epsilon", 1e-5), count
        )

    def _do_lstm(self, name: str, node: NodeProto) -> None:
        self._recurrent(name, node, "lstm", (0, 2, 3, 1), [b"Sigmoid", b"Tanh", b"Tanh"])

    def _do_gru(self, name: str, node: NodeProto) -> None:
        self._recurrent(name, node, "gru", (1, 0, 2), [b"Sigmoid", b"Tanh"])

    def _recurrent(self, name: str, node: NodeProto, kind: str, gates: tuple[int, ...], usual: list[bytes]) -> None:
        net, x = self.net, self._x(node)
        inputs = [*node.input, *[""] * 8][:8]
        direction = attribute(node, "direction", b"forward")
        ways = [direction == b"reverse"] if direction != b"bidirectional" else [False, True]
        if (
            inputs[4] or inputs[7] or attribute(node, "activations", usual * len(ways)) != usual * len(ways)
            or attribute(node, "clip", 0.0) or attribute(node, "input_forget", 0)
        ):  # fmt: skip
            raise _RefusedError("expected no lengths of sequences, no peepholes, no clip and the usual activations")
        for state in (inputs[5], inputs[6]):
            start = self._array(state) if state else None
            if state and (start is None or np.any(start)):
                raise _RefusedError("expected initial states of 0")
        after = [output if output and self.root.values[output].uses else "" for output in (*node.output, "", "")[:3]]
        if after[2]:
            raise _RefusedError(f"its output {after[2]!r}, the state of the cells, is not computed")
        shape = x.shape if attribute(node, "layout", 0) else (x.shape[1], x.shape[0], *x.shape[2:])
        if attribute(node, "layout", 0) or len(shape) != 3 or shape[0] != 1:
            raise _RefusedError(f"expected layout 0 and a batch of 1, got a value of shape {x.shape}")
        steps = shape[1]
        count = {"lstm": 4, "gru": 3}[kind]
        x = net.reshape(name, net.plain(name, x), (1, steps, shape[2]))
        weights = [self._weight(node, at, lambda w: w.reshape(-1, w.shape[-1])) for at in (1, 2)]
        units = net.tensor(name, weights[1]).shape[1]
        bias = self._given(node, 3)
        options: dict[str, Any] = {"gates": gates}
        if kind == "gru":
            options["reset_before"] = not attribute(node, "linear_before_reset", 0)
        last = not after[0]
        results = []
        for way, backward in enumerate(ways):
            own = weights
            if len(ways) > 1:
                rows = slice(way * count * units, (way + 1) * count * units)
                own = [net.added(f"{weight}.{way}", net.tensor(name, weight)[rows]) for weight in weights]
            biases: list[str | None] = [None, None]
            if bias is not None:
                parts = bias[way].reshape(2, -1).astype(np.float32)
                biases = [net.added(f"{inputs[3]}.{way}.{part}", parts[part]) for part in (0, 1)]
            results.append(
                net.recurrent(name, kind, x, (own[0], own[1]), (biases[0], biases[1]), last=last, backward=backward,
                              **options)
            )  # fmt: skip
        if last:
            y = net.concat(name, results, 1) if len(results) > 1 else results[0]
            self.env[after[1]] = net.reshape(name, y, (len(ways), 1, units))
            return
        y = net.concat(name, results, 2) if len(results) > 1 else results[0]
        self.env[after[0]] = net.reshape(name, y, (steps, len(ways), 1, units))
        if after[1]:
            ends = [net.part(name, result, 1, 0 if backward else steps - 1, 1 if backward else steps)
                    for result, backward in zip(results, ways, strict=True)]  # fmt: skip
            y = net.concat(name, ends, 2) if len(ends) > 1 else ends[0]
            self.env[after[1]] = net.reshape(name, y, (len(ways), 1, units))


class _RefusedError(Exception):
    """The reason why a node cannot be computed."""
