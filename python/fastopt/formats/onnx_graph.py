"""The graphs of an ONNX model: the meaning of names, the weights, local functions and operator sets.

A name means something together with the graph that it is read in: it is looked up there, then in the graph around it.
Two branches of an If may use one name for two things.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fastopt._types import Array
from fastopt.formats.onnx_file import Payloads, subgraphs, tensors_of

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

_ONNX = ("", "ai.onnx")
_FLOAT_TYPES = (1, 10, 11, 16)  # of TensorProto: float32, float16, float64, bfloat16
_CONV_AXES = range(3, 33)
# Operators that decode weights, and that put their parts together.
DECODERS = {
    "Add", "BitwiseAnd", "Cast", "Concat", "ConstantOfShape", "DequantizeLinear", "Div", "Identity", "Mod", "Mul",
    "NonZero", "Reshape", "ScatterElements", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip


# ---- names --------------------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """A place where a value is read: an input of a node, or an output of the graph (`node` is None)."""

    scope: Scope
    node: NodeProto | None
    at: int  # which node of its graph
    place: int


@dataclass(eq=False)
class Value:
    """A named value of a graph: an input, an initializer or the output of a node; and where it is read."""

    name: str
    scope: Scope
    tensor: TensorProto | None = None  # of an initializer or a Constant
    node: NodeProto | None = None  # the node that computes it
    shape: tuple[int, ...] = ()  # known for tensors and for decoded weights
    kind: int = 0  # data type of a decoded weight
    constant: bool = False  # a tensor, or computed by `DECODERS` from tensors alone
    uses: list[Use] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.tensor is not None:
            self.shape, self.constant = tuple(self.tensor.dims), True

    def needed(self) -> list[Value | None]:
        """Return the values that its node reads, None for an unknown name; nothing for a tensor."""
        names = [] if self.tensor is not None or self.node is None else filter(None, self.node.input)
        return [self.scope.find(name) for name in names]


class Scope:
    """A graph, the values that it defines, and the scope around it.

    Parameters
    ----------
    graph : GraphProto
    outer : Scope, optional
    path : str
        Which node of the outer graphs holds it, for people to read.
    """

    def __init__(self, graph: GraphProto, outer: Scope | None = None, path: str = "") -> None:
        self.graph, self.outer, self.path = graph, outer, path
        self.nodes = list(graph.node)
        self.values = {value.name: Value(value.name, self) for value in graph.input}
        for tensor in graph.initializer:
            # A graph of a node gets its inputs from the node.
            if outer is None or tensor.name not in self.values:
                self.values[tensor.name] = Value(tensor.name, self, tensor)
        for sparse in graph.sparse_initializer:
            self.values[sparse.values.name] = Value(sparse.values.name, self)
        for node in self.nodes:
            for name in filter(None, node.output):
                self.values[name] = Value(name, self, _constant(node), node)
        self.inner = [
            Scope(inner, self, f"{node.name or node.output[0] if node.output else node.op_type}.{at}")
            for node in self.nodes
            for at, inner in _named_subgraphs(node)
        ]

    def find(self, name: str) -> Value | None:
        """Return the value that a name means in this graph."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        return None

    def walk(self) -> Iterator[Scope]:
        """Give this scope and all in it, outer ones first."""
        yield self
        for inner in self.inner:
            yield from inner.walk()

    def names(self) -> Iterator[str]:
        """Give all names that are used here, and in the scopes within."""
        for scope in self.walk():
            yield from scope.values
            for node in scope.nodes:
                yield from node.input


def scope_of(model: ModelProto) -> Scope:
    """Return the scope of a model's graph, with the uses of all values."""
    root = Scope(model.graph)
    for scope in root.walk():
        for node in scope.nodes:  # in the order of computation, so what a node reads is known before it
            if len(node.output) == 1 and node.op_type in DECODERS and node.domain in _ONNX:
                value = scope.values.get(node.output[0])
                if value is not None and value.node is node:
                    value.constant = all(one is not None and one.constant for one in value.needed())
        reads = [(name, Use(scope, node, at, place)) for at, node in enumerate(scope.nodes)
                 for place, name in enumerate(node.input) if name]  # fmt: skip
        reads += [(output.name, Use(scope, None, -1, place)) for place, output in enumerate(scope.graph.output)]
        for name, use in reads:
            value = scope.find(name)
            if value is not None:
                value.uses.append(use)
    return root


def constants_of(root: Scope) -> dict[str, Value]:
    """Return all constants of a model by names that differ."""
    return named(root, [value for scope in root.walk() for value in scope.values.values() if value.tensor is not None])


def named(root: Scope, found: Sequence[Value]) -> dict[str, Value]:
    """Return values by names that differ: where several share one, the inner ones get a path."""
    counts = Counter(value.name for value in found)
    by_name: dict[str, Value] = {}
    for value in found:
        inner = counts[value.name] > 1 and value.scope is not root
        unique = name = f"{value.scope.path}/{value.name}" if inner else value.name
        number = 2
        while unique in by_name:
            unique, number = f"{name}.{number}", number + 1
        by_name[unique] = value
    return by_name


def _constant(node: NodeProto) -> TensorProto | None:
    if node.op_type != "Constant" or node.domain not in _ONNX:
        return None
    return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return an attribute of a node, or raise ValueError if it is not of the type of the default."""
    from onnx import helper

    for a in node.attribute:
        if a.name == name:
            value = helper.get_attribute_value(a)
            if type(value) is not type(default):
                raise ValueError(f"{node.op_type} {node.name!r}: attribute {name!r}: got {value!r:.80}")
            return value
    return default


def _named_subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    for a in node.attribute:
        if a.HasField("g"):
            yield a.name, a.g
        for at, graph in enumerate(a.graphs):
            yield f"{a.name}.{at}", graph


# ---- weights ------------------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """How a tensor is read as a matrix with a row for each output: the order of its axes, the number of row axes."""

    axes: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Found:
    """A constant that is only used as a weight."""

    value: Value
    order: Order
    uses: tuple[tuple[Use, Order], ...]  # nodes that read it as a weight
    between: tuple[Use, ...]  # nodes between, such as Identity
    fixed: bool  # its value must stay in the graph, since a node reads its shape or a part of it

    @property
    def dims(self) -> tuple[int, ...]:
        """Return the shape that the model has."""
        return self.value.shape

    @property
    def ordered(self) -> tuple[int, ...]:
        """Return the shape with the axes in order."""
        return tuple(self.dims[axis] for axis in self.order.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape [out, in, ...] in which the weight is packed."""
        rows = self.order.rows
        return (math.prod(self.ordered[:rows]), *self.ordered[rows:])

    def seen(self, array: Array) -> Array:
        """Return the tensor as [out, in, ...]."""
        natural = self.order.axes == tuple(range(array.ndim))
        ordered = array if natural else array.transpose(self.order.axes).copy()
        return ordered.reshape(self.shape)


def weights_of(constants: dict[str, Value]) -> tuple[dict[str, Found], dict[str, str]]:
    """Return the constants that are weights, and for each other constant the reason why it is not."""
    found, others = {}, {}
    for name, value in constants.items():
        search = _Search(len(value.shape))
        try:
            search.follow(value, tuple(range(len(value.shape))))
        except RecursionError:
            search.trouble = "read through too many nodes"
        if search.trouble or not search.uses:
            others[name] = search.trouble or "no node reads it"
        else:
            products = [order for use, order in search.uses if use.node is not None and use.node.op_type != "Gather"]
            order = products[0] if products else search.uses[0][1]
            found[name] = Found(value, order, tuple(search.uses), tuple(search.between), search.fixed)
    return found, others


class _Search:
    """Finds the nodes that read a constant, directly or through nodes such as Transpose."""

    def __init__(self, ndim: int) -> None:
        self._ndim = ndim
        self.uses: list[tuple[Use, Order]] = []
        self.between: list[Use] = []
        self.fixed = False
        self.trouble = ""
        self._followed: set[Value] = set()

    def follow(self, value: Value, axes: Sequence[int]) -> None:
        """Collect the uses of a value whose axes are these axes of the constant, -1 for an axis of length 1."""
        if value in self._followed:
            return
        self._followed.add(value)
        for use in value.uses:
            node = use.node
            if node is None:
                self.trouble = "an output of the model, or of a branch"
            elif node.op_type in ("Shape", "Size") and node.domain in _ONNX:
                self.fixed = True
            elif (passed := _passed(use, axes)) is not None:
                self.between.append(use)
                self.fixed = self.fixed or node.op_type not in ("Identity", "Cast", "Transpose")
                for name in filter(None, node.output):
                    self.follow(use.scope.values[name], passed)
            else:
                order = _order(node, use.place, len(axes))
                if order is None:
                    self.trouble = f"read by {node.op_type}, not as a weight"
                    return
                rows = [axes[axis] for axis in order.axes[: order.rows] if axes[axis] >= 0]
                cols = [axes[axis] for axis in order.axes[order.rows :] if axes[axis] >= 0]
                squeezed = [axis for axis in range(self._ndim) if axis not in (*rows, *cols)]
                self.uses.append((use, Order((*squeezed, *rows, *cols), len(squeezed) + len(rows))))


def _passed(use: Use, axes: Sequence[int]) -> Sequence[int] | None:
    """Return the axes after a node that only passes a tensor, or parts of it, on; None if it does more."""
    node, place = use.node, use.place
    if node is None or node.domain not in _ONNX or not any(node.output):
        return None
    if node.op_type == "Identity" or (node.op_type == "Cast" and attribute(node, "to", 0) in _FLOAT_TYPES):
        return axes
    if node.op_type == "Transpose":
        perm = attribute(node, "perm", list(range(len(axes)))[::-1])
        return [axes[axis] for axis in perm] if sorted(perm) == list(range(len(axes))) else None
    if node.op_type in ("Slice", "Split") and place == 0:
        return axes
    if node.op_type == "Concat":  # of parts, as exporters reorder the gates of an LSTM
        inputs = [use.scope.find(name) for name in node.input]
        return axes if all(value is not None and value.constant for value in inputs) else None
    if node.op_type in ("Unsqueeze", "Squeeze") and place == 0:
        return _resized(use.scope, node, axes)
    return None


def _resized(scope: Scope, node: NodeProto, axes: Sequence[int]) -> Sequence[int] | None:
    """Return the axes after Unsqueeze or Squeeze, None if it does not say by a constant which ones change."""
    from onnx import numpy_helper

    which = attribute(node, "axes", [])
    if len(node.input) > 1:
        value = scope.find(node.input[1])
        if value is None or value.tensor is None:
            return None
        which = [int(axis) for axis in numpy_helper.to_array(value.tensor).reshape(-1)]
    length = len(axes) + (len(which) if node.op_type == "Unsqueeze" else 0)
    if not which or not all(-length <= axis < length for axis in which):
        return None
    places = {axis % length for axis in which}
    if node.op_type == "Squeeze":
        return [axis for place, axis in enumerate(axes) if place not in places]
    rest = iter(axes)
    return [-1 if place in places else next(rest, -1) for place in range(length)]


def _order(node: NodeProto, place: int, ndim: int) -> Order | None:
    """Return how an operator reads this input as a weight; None if it does not."""
    kind = node.op_type.removeprefix("Fused") if node.domain == "com.microsoft" else node.op_type
    if node.domain not in (*_ONNX, "com.microsoft") or (node.domain == "com.microsoft" and kind == node.op_type):
        return None
    natural = tuple(range(ndim))
    if kind in ("MatMul", "Gemm") and place < 2 and ndim >= 2 and (kind == "MatMul" or ndim == 2):
        if any(attribute(node, name, 0) for name in ("transBatchA", "transBatchB")):
            return None
        turned = bool(attribute(node, "transB" if place else "transA", 0)) != bool(place)
        return Order((*natural[:-2], ndim - 1, ndim - 2) if turned else natural, ndim - 1)
    if kind == "Conv" and place == 1 and ndim in _CONV_AXES:
        return Order(natural, 1)
    if kind == "ConvTranspose" and place == 1 and ndim in _CONV_AXES:
        return Order((1, 0, *natural[2:]) if attribute(node, "group", 1) == 1 else natural, 1)
    if kind == "Gather" and place == 0 and ndim >= 2:
        axis = attribute(node, "axis", 0) % ndim
        return Order((axis, *(other for other in natural if other != axis)), 1)
    if kind in ("LSTM", "GRU", "RNN") and place in (1, 2) and ndim == 3:
        return Order(natural, 2)
    return _order_of_einsum(node, place, ndim) if kind == "Einsum" else None


def _order_of_einsum(node: NodeProto, place: int, ndim: int) -> Order | None:
    """Return the axes that stay, followed by those that are summed over."""
    terms, arrow, result = attribute(node, "equation", b"").decode(errors="replace").replace(" ", "").partition("->")
    letters = terms.split(",")[place] if arrow and place < len(terms.split(",")) else ""
    stay = [axis for axis, letter in enumerate(letters) if letter in result]
    summed = [axis for axis, letter in enumerate(letters) if letter not in result]
    if not letters.isalpha() or len(set(letters)) != ndim or len(letters) != ndim or not stay or not summed:
        return None
    return Order((*stay, *summed), len(stay))


# ---- local functions and operator sets ----------------------------------------------------------------------------


def opset_version(model: ModelProto | FunctionProto) -> int:
    """Return the version of ONNX's own operator set that a model or a function is of."""
    return next((entry.version for entry in model.opset_import if entry.domain in _ONNX), 1)


def inlined(model: ModelProto, payloads: Payloads) -> ModelProto:
    """Return a model with the bodies of local functions in the place of their calls.

    Functions may be of operator sets of their own; all are brought to the newest first.
    """
    from onnx import ModelProto, inliner

    if not model.functions:
        return model
    calls = {(f.domain, f.name) for f in model.functions}
    newest = max(opset_version(model), *(opset_version(function) for function in model.functions))
    whole = ModelProto()
    whole.CopyFrom(model)
    del whole.functions[:]
    whole = at_opset(whole, newest, payloads)
    for function in model.functions:
        whole.functions.add().CopyFrom(_function_at_opset(function, newest, payloads))
    try:
        result = inliner.inline_local_functions(whole)
    except Exception as error:  # whatever its C++ throws
        raise ValueError(f"the local functions of the model cannot be inlined: {error}") from error
    left = [node for node in _all_nodes(result.graph.node) if (node.domain, node.op_type) in calls]
    if left:
        raise ValueError(f"the local function {left[0].op_type!r} cannot be inlined; inline it first")
    del result.functions[:]
    _restore(whole, result)
    return result


def _function_at_opset(function: FunctionProto, opset: int, payloads: Payloads) -> FunctionProto:
    """Return a local function at an operator set."""
    from onnx import FunctionProto, helper

    if opset_version(function) == opset or not any(entry.domain in _ONNX for entry in function.opset_import):
        return function
    what = f"the local function {function.name!r}"
    if any(a.ref_attr_name for node in _all_nodes(function.node) for a in node.attribute):
        raise ValueError(f"{what} has attributes, and is of another operator set than the model; inline it first")
    inputs = [helper.make_empty_tensor_value_info(name) for name in function.input]
    outputs = [helper.make_empty_tensor_value_info(name) for name in function.output]
    body = helper.make_model(helper.make_graph(list(function.node), function.name, inputs, outputs))
    del body.opset_import[:]
    body.opset_import.extend(function.opset_import)
    try:
        body = at_opset(body, opset, payloads)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    result = FunctionProto()
    result.CopyFrom(function)
    for name, kept in (("node", body.graph.node), ("opset_import", body.opset_import)):
        del getattr(result, name)[:]
        getattr(result, name).extend(kept)
    if body.graph.initializer:
        raise ValueError(f"{what} cannot be brought to operator set {opset}; inline it first")
    return result


def _all_nodes(nodes: Any) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _all_nodes(graph.node)


def at_opset(model: ModelProto, opset: int, payloads: Payloads) -> ModelProto:
    """Return the model at an operator set, or a later one, that has the types of the codes; 0 means any.

    Raises
    ------
    ValueError
        If it cannot be brought there, or something of it would be lost.
    """
    from onnx import helper, version_converter

    now = opset_version(model)
    if now < opset:
        try:
            converted = version_converter.convert_version(model, opset)
        except Exception as error:  # whatever the converter's C++ throws
            raise ValueError(
                f"the model is of operator set {now}, which has no codes of these bits, and cannot be brought to "
                f"{opset}; export it anew at {opset} or later: {error}"
            ) from error
        if trouble := _lost(model, converted, payloads):
            raise ValueError(
                f"the model is of operator set {now}, and bringing it to {opset} loses {trouble}; export it anew at "
                f"{opset} or later"
            )
        _restore(model, converted)
        model = converted
    if opset:
        needed = helper.find_min_ir_version_for([helper.make_opsetid("", max(now, opset))])
        model.ir_version = max(model.ir_version, needed)
    return model


def _lost(before: ModelProto, after: ModelProto, payloads: Payloads) -> str:
    """Return what a model has lost in a conversion, "" if nothing."""
    if before.functions:
        return f"its local functions, as {before.functions[0].name!r}"
    for kind in ("input", "output"):
        names = [[value.name for value in getattr(model.graph, kind)] for model in (before, after)]
        if names[0] != names[1]:
            return f"its {kind}s {names[0]}, which become {names[1]}"
    imports = [
        {(e.domain, e.version) for e in model.opset_import if e.domain not in _ONNX} for model in (before, after)
    ]
    if imports[0] - imports[1]:
        return f"the operator set {min(imports[0] - imports[1])}"
    held = [
        Counter(tensor.raw_data for tensor in tensors_of(model) if payloads.of(tensor.raw_data))
        for model in (before, after)
    ]
    if held[0] - held[1]:
        return "weights"
    foreign = [
        Counter(
            (
                node.op_type,
                *node.output,
                *sorted(a.SerializeToString(deterministic=True) for a in node.attribute if not a.HasField("g")),
            )
            for node in _all_nodes(model.graph.node)
            if node.domain not in _ONNX
        )
        for model in (before, after)
    ]
    if foreign[0] - foreign[1]:
        return f"the node {next(iter(foreign[0] - foreign[1]))[0]!r}, or attributes of it"
    return _invalid(after)


def _invalid(model: ModelProto) -> str:
    """Return an attribute that its operator does not have at the model's operator set."""
    from onnx import defs

    version = opset_version(model)
    for node in _all_nodes(model.graph.node):
        if node.domain in _ONNX:
            known = defs.get_schema(node.op_type, version, "").attributes
            for a in node.attribute:
                if a.name not in known:
                    return f"the attribute {a.name!r} of {node.op_type}"
    return ""


def _restore(before: ModelProto, after: ModelProto) -> None:
    """Copy to a model what the tools of onnx drop and what does not depend on the operator set."""
    for name in ("metadata_props", "training_info", "configuration"):
        _copy_field(before, after, name)
    for name in ("input", "output", "doc_string", "metadata_props", "quantization_annotation", "name"):
        _copy_field(before.graph, after.graph, name)
    old = {output: node for node in _all_nodes(before.graph.node) for output in node.output if output}
    for node in _all_nodes(after.graph.node):
        same = old.get(node.output[0]) if node.output else None
        if same is not None and same.op_type == node.op_type:
            for name in ("metadata_props", "doc_string", "device_configurations"):
                _copy_field(same, node, name)


def _copy_field(source: Any, target: Any, name: str) -> None:
    if name not in source.DESCRIPTOR.fields_by_name:  # of a later version of onnx
        return
    value = getattr(source, name)
    if isinstance(value, (str, bytes)):  # bytes: no sound UTF-8
        if isinstance(value, str):
            setattr(target, name, value)
    else:
        del getattr(target, name)[:]
        getattr(target, name).extend(value)
