"""The weights of an ONNX model as arrays: constants, and weights that nodes decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastopt._types import Array
from fastopt.files.weights import Source
from fastopt.formats.common import require_package
from fastopt.formats.onnx import AUXILIARY, TAG
from fastopt.formats.onnx_file import OnnxFile
from fastopt.formats.onnx_graph import (
    DECODERS,
    Found,
    Scope,
    Value,
    attribute,
    constants_of,
    inlined,
    named,
    scope_of,
    weights_of,
)
from fastopt.tensors.quantization import unpack_bits

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_STEPS = 4096  # a weight may be decoded from so many values; a hostile chain of nodes has more


def onnx_sources(path: Path, skipped: Callable[[str], bool] = lambda name: False) -> dict[str, Source]:
    """Return the arrays of an ONNX model by name.

    Weights have the names, and the shapes [out, in, ...], in which `pack_onnx` sees them. Those of a packed model are
    decoded when they are read, be they decoded by nodes or read by MatMulNBits.

    Parameters
    ----------
    path : Path
    skipped : callable
        Says of a name whether it is left out.

    Returns
    -------
    dict from name to Source

    Raises
    ------
    ImportError
        If onnx is not installed.
    OSError
        If the file cannot be opened.
    ValueError
        If it is not an ONNX model.
    """
    opened = OpenedOnnx(path)
    file, model, values, found = opened.file, opened.model, opened.values, opened.found
    sources = {name: _source(file, model, value, found.get(name)) for name, value in values.items()}
    for scope, node, _ in opened.products:
        name = _tag(node) or node.input[1].removesuffix(".codes")
        sources.setdefault(name, _source_of_product(file, model, scope, node))
    return {name: source for name, source in sources.items() if not skipped(name)}


class OpenedOnnx:
    """An ONNX model and its constants.

    Attributes
    ----------
    file : OnnxFile
    model : ModelProto
        With local functions inlined.
    root : Scope
    values : dict from name to Value
        The constants, and weights that nodes decode, by the names that `onnx_sources` gives them.
    found : dict from name to Found
        Those that are weights.
    products : list
        Nodes that multiply with codes.
    """

    def __init__(self, path: Path) -> None:
        require_package("onnx")
        self.file = OnnxFile(path)
        self.model = inlined(self.file.model, self.file.payloads)
        self.root = scope_of(self.model)
        self.products = list(_products(self.root))
        self.values = _values_of(self.model, self.root, self.products)
        self.found, _ = weights_of(self.values)

    def evaluated(self, value: Value) -> Array:
        """Compute a value from constants."""
        if value.tensor is not None:
            return self.file.array(value.tensor)
        return _evaluated(self.file, self.model, value)


def _values_of(
    model: ModelProto, root: Scope, products: list[tuple[Scope, NodeProto, list[Value]]]
) -> dict[str, Value]:
    parts = {step for _, _, steps in products for step in steps}
    decoded = {value: steps for value, steps in _decoded(root).items() if value not in parts}
    parts.update(step for steps in decoded.values() for step in steps)
    _infer(model, root, decoded)
    constants = [
        value
        for value in constants_of(root).values()
        if value not in parts and (value.tensor is None or value.tensor.doc_string != AUXILIARY)
    ]
    return named(root, [*constants, *decoded])


def _source(file: OnnxFile, model: ModelProto, value: Value, found: Found | None) -> Source:
    from onnx import helper

    def read() -> Array:
        array = _evaluated(file, model, value) if value.tensor is None else file.array(value.tensor)
        return array if found is None else found.seen(array)

    def release() -> None:
        if value.tensor is not None:
            file.release(value.tensor)

    kind = value.kind if value.tensor is None else value.tensor.data_type
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    except KeyError as error:
        raise ValueError(f"{file.path}: {value.name!r}: has data type {kind}, which onnx does not know") from error
    if value.tensor is None and not value.kind:  # a shape that onnx cannot tell without the values
        array = read()
        return Source(array.shape, array.dtype, read)
    return Source(value.shape if found is None else found.shape, dtype, read, release)


def _tag(node: NodeProto | None) -> str:
    entries = () if node is None else node.metadata_props
    return next((entry.value for entry in entries if entry.key == TAG), "")


# ---- weights that nodes decode ------------------------------------------------------------------------------------


def _decoded(root: Scope) -> dict[Value, list[Value]]:
    """Return the values that are decoded from constants, each with the values that it is computed from."""
    values = [value for scope in root.walk() for value in scope.values.values() if value.tensor is None]
    decoded: dict[Value, list[Value]] = {}
    inside: set[Value] = set()
    for ours in (True, False):
        for value in values:
            node = value.node
            if node is None or value in inside or bool(_tag(node)) is not ours:
                continue
            if node.op_type in DECODERS if ours else node.op_type == "DequantizeLinear":
                steps = _steps(value)
                if steps is not None:
                    decoded[value] = steps
                    inside.update(steps)
    return decoded


def _steps(value: Value) -> list[Value] | None:
    """Return the values that a value needs, in order, and itself; None if it is no constant, or needs too many."""
    steps: dict[Value, None] = {}
    todo = [value] if value.constant else []
    while todo:
        missing = [one for one in todo[-1].needed() if one is not None and one not in steps]
        if len(steps) + len(missing) > _STEPS:
            return None
        if missing:
            todo += reversed(missing)
        else:
            steps[todo.pop()] = None
    return list(steps) or None


def _infer(model: ModelProto, root: Scope, decoded: Iterable[Value]) -> None:
    """Set the shapes and types of decoded values, as far as onnx can infer them."""
    from onnx import shape_inference

    wanted = set(decoded)
    if not wanted:
        return
    for scope, inferred in zip(root.walk(), Scope(shape_inference.infer_shapes(model).graph).walk(), strict=True):
        for described in (*inferred.graph.value_info, *inferred.graph.output):
            value, kind = scope.values.get(described.name), described.type.tensor_type
            dims = [dim.dim_value for dim in kind.shape.dim] if kind.HasField("shape") else [0]
            if value in wanted and value is not None and kind.elem_type and all(dims):
                value.kind, value.shape = kind.elem_type, tuple(dims)


def _evaluated(file: OnnxFile, model: ModelProto, value: Value) -> Array:
    """Compute a value from constants."""
    from onnx import NodeProto, helper
    from onnx.reference import ReferenceEvaluator

    steps = _steps(value)
    assert steps is not None
    names: dict[Value, str] = {step: f"v{place}" for place, step in enumerate(steps)}
    nodes = []
    for step in steps:
        if step.tensor is None and step.node is not None:
            node = NodeProto()
            node.CopyFrom(step.node)
            needed = [step.scope.find(name) if name else None for name in node.input]
            del node.input[:]
            node.input.extend("" if one is None else names[one] for one in needed)
            node.output[0] = names[step]
            nodes.append(node)
    constants = [step for step in steps if step.tensor is not None]
    inputs = [helper.make_empty_tensor_value_info(names[step]) for step in constants]
    outputs = [helper.make_empty_tensor_value_info(names[value])]
    graph = helper.make_graph(nodes, "decode", inputs, outputs)
    part = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    try:
        feeds = {names[step]: file.array(step.tensor) for step in constants if step.tensor is not None}
        (array,) = ReferenceEvaluator(part).run(None, feeds)
        return np.asarray(array)
    except Exception as error:  # whatever its operators raise
        if isinstance(error, (OSError, MemoryError)):
            raise
        raise ValueError(f"{file.path}: {value.name!r} cannot be decoded: {error}") from error


# ---- weights that MatMulNBits reads -------------------------------------------------------------------------------


def _products(root: Scope) -> Iterator[tuple[Scope, NodeProto, list[Value]]]:
    """Yield the nodes that multiply with codes, each with its graph and the constants of its weight."""
    for scope in root.walk():
        for node in scope.nodes:
            parts = _parts(scope, node) if (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits") else None
            if parts is not None:
                yield scope, node, [step for value in parts.values() for step in _steps(value) or []]


def _parts(scope: Scope, node: NodeProto) -> dict[str, Value] | None:
    """Return codes, scale and zero points, and the parts that fastopt adds; None if they are not constants."""
    parts = {
        part: value
        for part, place in (("codes", 1), ("scale", 2), ("zero", 3))
        if place < len(node.input) and node.input[place] and (value := scope.find(node.input[place])) is not None
    }
    for entry in node.metadata_props:
        if entry.key.startswith(f"{TAG}.") and (value := scope.find(entry.value)) is not None:
            parts[entry.key.removeprefix(f"{TAG}.")] = value
    whole = {"codes", "scale"} <= parts.keys() and all(_steps(value) is not None for value in parts.values())
    return parts if whole and parts["codes"].tensor is not None else None


def _source_of_product(file: OnnxFile, model: ModelProto, scope: Scope, node: NodeProto) -> Source:
    rows, cols, bits = (int(attribute(node, name, 0)) for name in ("N", "K", "bits"))
    size = int(attribute(node, "block_size", 0))
    parts = _parts(scope, node)
    assert parts is not None

    def constant(part: str) -> Array:
        value = parts[part]
        return _evaluated(file, model, value) if value.tensor is None else file.array(value.tensor)

    def read() -> Array:
        try:
            groups = -(-cols // size)
            codes = unpack_bits(constant("codes").reshape(-1), bits, rows * groups * size).astype(np.float32)
            codes = codes.reshape(rows, groups, size)
            scale = constant("scale").astype(np.float32).reshape(rows, groups, 1)
            if "minimum" in parts:
                w = constant("minimum").astype(np.float32).reshape(rows, groups, 1) + scale * codes
            else:
                w = (codes - _zero_points(parts, constant, rows, groups, bits)) * scale
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{file.path}: {node.input[1]!r} cannot be decoded: {error}") from error
        array = np.ascontiguousarray(w.reshape(rows, -1)[:, :cols])
        if "outlier_index" in parts:
            array.reshape(-1)[constant("outlier_index")] += constant("outlier_value").reshape(-1)
        return array

    return Source((rows, cols), np.dtype(np.float32), read)


def _zero_points(
    parts: dict[str, Value], constant: Callable[[str], Array], rows: int, groups: int, bits: int
) -> Array | np.float32:
    if "zero" not in parts:
        return np.float32(1 << (bits - 1))
    zero = constant("zero")
    if zero.dtype != np.uint8:
        return zero.astype(np.float32).reshape(rows, groups, 1)
    per_row = zero.size // rows * 8 // bits
    return (
        unpack_bits(zero.reshape(-1), bits, rows * per_row).reshape(rows, per_row)[:, :groups, None].astype(np.float32)
    )
