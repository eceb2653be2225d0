"""Pack the weights of an ONNX model and leave the rest of the graph unchanged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt._types import Array, Notify, PathLike
from fastopt.formats import require_package
from fastopt.formats.onnx import Builder, Constant, opset_of, save
from fastopt.models.choose import choose_bits
from fastopt.models.recipe import Recipe, RecipeOptions, pack_tensor, recipe_of
from fastopt.models.report import Report, Reporter
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight
from fastopt.tensors.quantized import QuantizedTensor

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
    from typing_extensions import Unpack


def pack_onnx(
    source: PathLike,
    target: PathLike,
    recipe: Recipe | None = None,
    *,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    fast: bool = False,
    accuracy_level: int = 0,
    dry_run: bool = False,
    notify: Notify | None = None,
    **options: Unpack[RecipeOptions],
) -> Report:
    """Pack the weights of the MatMul, Gemm and Conv nodes of an ONNX model, and write one that runs.

    Parameters
    ----------
    source : path-like
        An ONNX file. Tensors that it keeps in other files are read too.
    target : path-like
        It appears when it is complete; it may be the source.
    recipe, **options
        As in `pack`, by the names of the weights in the model. A weight is taken as [out, in, ...],
        whichever way the model stores it: groups lie along the input axis.
    target_bits, target_size
        As in `pack`, over the weights of these nodes.
    fast : bool
        Multiply by MatMulNBits, which is ONNX Runtime's own, where a MatMul, or a Gemm that only adds a bias, has a
        quantized float32 weight. Other weights are decoded by standard operators.
    accuracy_level : int
        Of MatMulNBits: 0 multiplies in float32, 4 rounds x to int8 in blocks.
    dry_run : bool
        Write nothing.
    notify : callable, optional
        Called with the bytes of the weights that are done, those of all, and the name of the weight that is next, "" at
        the end.

    Returns
    -------
    Report
        Of the weights of these nodes, and of other constants that are no smaller than the recipe's `min_size`.

    Raises
    ------
    ImportError
        If onnx is not installed.
    OSError
        If a file cannot be opened or written.
    TypeError, ValueError
        If the source is not an ONNX model, or cannot be brought to an operator set with low-bit types (21, or 25 for
        2 bits), or as in `pack`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> weights = {"fc.weight": np.random.default_rng(0).standard_normal((64, 64)).astype("f4")}
    >>> fo.export(weights, "model.onnx", to="onnx", graph=[fo.Layer("fc")])
    >>> report = fo.pack_onnx("model.onnx", "small.onnx", bits=4)
    >>> report.nbytes_before, report.nbytes
    (16384, 2560)
    """
    recipe = recipe_of(recipe, options)
    require_package("onnx")
    model = _load(Path(source))
    weights = {name: found.array() for name, found in _weights(model).items()}
    recipe = choose_bits(weights, recipe, target_bits=target_bits, target_size=target_size)
    packed: dict[str, Weight] = {}
    reporter = Reporter()
    progress = Progress({name: weights[name].nbytes for name in weights}, notify)
    for name, array in weights.items():
        progress.next(name)
        tensor, reason = pack_tensor(name, array, recipe)
        reporter.add(name, tensor, array, reason)
        if tensor is not array:
            packed[name] = tensor
    progress.next("")
    for name, array in _others(model, weights, recipe.min_size):
        reporter.add(name, array, array, "not the weight of a MatMul, Gemm or Conv alone")
    if not dry_run:
        opset = max(map(opset_of, packed.values()), default=0)
        model = _at_opset(model, opset)
        constants = _replace(model, packed, opset, fast, accuracy_level)
        save(model, constants, Path(target))
    return reporter.report()


def _load(path: Path) -> ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
    except DecodeError as error:
        raise ValueError(f"{path}: not an ONNX file: {error}") from error
    if not model.graph.node:
        raise ValueError(f"{path}: not an ONNX file, or one without nodes")
    _drop_aliases(model)
    return model


def _drop_aliases(model: ModelProto) -> None:
    """Let nodes read constants by their own names: exporters put an Identity behind one that several layers share."""
    constants: dict[str, str] = {}  # and their aliases, by name: the name of the constant
    for graph in _graphs(model.graph):
        constants |= {name: name for name in _constants(graph)}
        results = {value.name for value in graph.output}
        for node in graph.node:
            if node.op_type == "Identity" and node.input[0] in constants and node.output[0] not in results:
                constants[node.output[0]] = constants[node.input[0]]
    for graph in reversed(list(_graphs(model.graph))):
        kept = [node for node in graph.node if not (node.op_type == "Identity" and node.output[0] in constants)]
        for node in kept:
            for place, name in enumerate(node.input):
                node.input[place] = constants.get(name, name)
        del graph.node[:]
        graph.node.extend(kept)


def _at_opset(model: ModelProto, opset: int) -> ModelProto:
    """Return the model at an operator set that has the types of the codes."""
    from onnx import helper, version_converter

    now = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    if now < opset:
        try:
            model = version_converter.convert_version(model, opset)
        except Exception as error:  # whatever the converter's C++ throws
            raise ValueError(
                f"the model is of operator set {now}, which has no codes of these bits, and cannot be brought to "
                f"{opset}; export it anew at {opset} or later: {error}"
            ) from error
    needed = helper.find_min_ir_version_for([helper.make_opsetid("", max(now, opset))])
    model.ir_version = max(model.ir_version, needed)
    return model


# ---- what a model holds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A constant of a model that is the weight of nodes, and of nothing else."""

    tensor: TensorProto
    transposed: bool  # the model holds [in, out]

    def array(self) -> Array:
        """Return it as [out, in, ...]."""
        from onnx import numpy_helper

        try:
            array: Array = numpy_helper.to_array(self.tensor)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.tensor.name!r}: not a sound tensor: {error}") from error
        return np.ascontiguousarray(array.T) if self.transposed else array


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    attribute: AttributeProto
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Give a graph and all that its nodes hold, as the branches of an If."""
    yield graph
    for node in graph.node:
        for inner in _subgraphs(node):
            yield from _graphs(inner)


def _reads(node: NodeProto) -> Iterator[str]:
    """Give what a node reads, and all that its graphs do."""
    yield from node.input
    for inner in _subgraphs(node):
        for within in inner.node:
            yield from _reads(within)


def _constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Return the initializers, and the outputs of Constant nodes, of one graph."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and _attribute(node, "value", None) is not None:
            found[node.output[0]] = _attribute(node, "value", None)
    return found


_WEIGHTS = {"MatMul": (2, 2), "Gemm": (2, 2), "Conv": (3, 32)}  # operators, and how many axes their weights may have


def _weights(model: ModelProto) -> dict[str, _Found]:
    """Return the constants that are only ever the second input of a MatMul, Gemm or Conv, and always the same way."""
    uses: dict[str, set[Any]] = defaultdict(set)
    constants: dict[str, TensorProto] = {}
    for graph in _graphs(model.graph):
        constants |= _constants(graph)
        for node in graph.node:
            for place, name in enumerate(node.input):
                fits = place == 1 and node.op_type in _WEIGHTS and node.domain in ("", "ai.onnx")
                turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attribute(node, "transB", 0))
                uses[name].add((_WEIGHTS[node.op_type], turned) if fits else None)
        for output in graph.output:
            uses[output.name].add(None)
    found = {}
    for name, tensor in constants.items():
        use = next(iter(uses[name]), None)
        if len(uses[name]) == 1 and use is not None and use[0][0] <= len(tensor.dims) <= use[0][1]:
            found[name] = _Found(tensor, use[1])
    return found


def _others(model: ModelProto, weights: Mapping[str, Array], min_size: int) -> Iterator[tuple[str, Array]]:
    from onnx import numpy_helper

    for graph in _graphs(model.graph):
        for name, tensor in _constants(graph).items():
            if name not in weights and np.prod(tensor.dims, dtype=object) >= max(min_size, 1):
                yield name, numpy_helper.to_array(tensor)


# ---- what becomes of it ------------------------------------------------------------------------------------------


def _replace(
    model: ModelProto, packed: Mapping[str, Weight], opset: int, fast: bool, accuracy_level: int
) -> list[Constant]:
    """Put nodes that decode, or that multiply by codes, in the place of constants.

    The constants that these read are returned; they are to be written with the model.
    """
    from onnx import helper

    transposed = {name: found.transposed for name, found in _weights(model).items()}
    if lost := sorted(packed.keys() - transposed.keys()):  # by bringing the model to another operator set
        raise ValueError(f"{lost[0]!r}: is no constant any more at operator set {opset}; exclude it")
    taken = {name for graph in _graphs(model.graph) for node in graph.node for name in (*node.input, *node.output)}
    taken |= {value.name for graph in _graphs(model.graph) for value in (*graph.initializer, *graph.input)}
    products = 0
    graphs = list(_graphs(model.graph))
    for graph in reversed(graphs):  # those inside others first
        own = {name: packed[name] for name in _constants(graph) if name in packed}
        builder = Builder(fast, accuracy_level, taken)
        nodes: list[NodeProto] = []
        decoded: set[str] = set()
        for node in graph.node:
            name = node.input[1] if len(node.input) > 1 else ""
            if node.op_type == "Constant" and node.output[0] in own:
                continue
            if fast and name in packed and _multiplies(node, packed[name]):
                _multiply(builder, node, packed[name])
                nodes += builder.nodes
                builder.nodes.clear()
                products += 1
            else:
                nodes.append(node)
                decoded.update(node.input)
                decoded.update(
                    name for inner in _subgraphs(node) for g in _graphs(inner) for n in g.node for name in n.input
                )
        for name in own:
            if name in decoded:
                _decode(builder, name, own[name], transposed[name])
        del graph.node[:]
        graph.node.extend([*builder.nodes, *nodes])
        for place in reversed(range(len(graph.initializer))):
            if graph.initializer[place].name in own:
                del graph.initializer[place]
        if graph is not graphs[0]:  # the constants of the outermost are written from where they are
            for constant in builder.constants:
                tensor = graph.initializer.add()
                tensor.CopyFrom(constant.head())
                tensor.raw_data = constant.content().tobytes()
        inputs = [value for value in graph.input if value.name not in own]  # old models list initializers there too
        del graph.input[:]
        graph.input.extend(inputs)
    if products and all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return builder.constants


def _multiplies(node: NodeProto, tensor: Weight) -> bool:
    """Return whether MatMulNBits can compute this node."""
    if not isinstance(tensor, QuantizedTensor) or tensor.dtype != np.float32:
        return False
    if node.op_type == "Gemm":
        return all(_attribute(node, name, value) == value for name, value in (("alpha", 1), ("beta", 1), ("transA", 0)))
    return node.op_type == "MatMul"


def _multiply(builder: Builder, node: NodeProto, tensor: Weight) -> None:
    x, name, (output,) = node.input[0], node.input[1], node.output
    if len(node.input) > 2 and node.input[2]:
        builder.node("Add", builder.product(x, name, tensor), node.input[2], output=output)
    else:
        builder.product(x, name, tensor, output)


def _decode(builder: Builder, name: str, tensor: Weight, transposed: bool) -> None:
    """Add nodes whose output has the name that the constant had."""
    if transposed:
        builder.node("Transpose", builder.value(name, tensor), output=name, perm=[1, 0])
    else:
        builder.value(name, tensor, output=name)
