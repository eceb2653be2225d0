"""ONNX: a model that runs a chain of layers, or one whose outputs are decoded tensors.

Codes are tensors of uint8, uint4 or uint2 with the same bytes as ours; those of other widths are stored in the next
wider of these types. DequantizeLinear and Add decode them. For ONNX Runtime alone, its operator MatMulNBits can
multiply with the codes. It has no minimum of a block, so the minima are multiplied with the sum of x over each block.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastopt._checks import as_matrix, require_group_size
from fastopt._text import shown
from fastopt._types import Array, GroupSize
from fastopt.formats.common import Option, codes_matrix, regroup, require_package
from fastopt.formats.layers import (
    INPUT_SHAPE,
    LAYER,
    batch_norm,
    is_map,
    nodes_of,
    numbers_of,
    outputs_of,
    reads_map,
    reads_of,
)
from fastopt.formats.onnx_file import Payload, Payloads, save
from fastopt.models.recipe import naming_tensor
from fastopt.models.shrinking import Concat, Kind, Layer, Node
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight, unpacked
from fastopt.tensors.quantization import TWO_LEVEL_GROUP, pack_bits
from fastopt.tensors.quantized import QuantizedTensor, unpacked_rows
from fastopt.tensors.sparse import SparseTensor

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_OPSET = 21  # the first with uint4
TAG = "fastopt.weight"
AUXILIARY = "fastopt.auxiliary"
_UINT8 = 2  # of TensorProto
_CODES = {8: ("UINT8", _OPSET), 4: ("UINT4", _OPSET), 2: ("UINT2", 25)}  # by bits: type, first operator set with it
_BLOCKS = (256, 128, 64, 32, 16)  # of MatMulNBits
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
    "gelu": ("Gelu", {}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
}


SUFFIX = ".onnx"
SUMMARY = "a model for ONNX Runtime and others, of layers or of decoded tensors"
OPTIONS = {
    "graph": LAYER._replace(
        help="a dense layer, NAME.weight and NAME.bias, that reads the previous one; may be repeated. Without layers, "
        "the model has no input, and each decoded tensor is an output."
    ),
    "input_shape": INPUT_SHAPE,
    "fast": Option("multiply with MatMulNBits, an operator of ONNX Runtime alone.", bool),
    "accuracy_level": Option("with --fast: 0 multiplies in float32, 4 rounds activations to int8.", int),
}


def write(
    model: Mapping[str, Weight],
    path: Path,
    progress: Progress,
    *,
    graph: Sequence[Node] | None = None,
    input_shape: Sequence[int] | None = None,
    fast: bool = False,
    accuracy_level: int = 0,
) -> None:
    """Write an ONNX model.

    Parameters
    ----------
    model : mapping from name to array, QuantizedTensor or SparseTensor
    path : Path
    progress : Progress
    graph : sequence of Layer, Add and Concat, optional
        The layers. The model has the input ``x`` [batch, in] or [batch, channels, ...]; its outputs are the nodes that
        no other node reads. Tensors that the graph does not name are left out. Without a graph the model has no input,
        and each decoded tensor is an output.
    input_shape : sequence of int, optional
        The shape of x without the batch. Without it the lengths behind the channels stay open.
    fast : bool
        Multiply with MatMulNBits, an operator of ONNX Runtime. It is fast with 4 bits, and with 8 and 2 bits if
        `accuracy_level` is 4.
    accuracy_level : int
        Option of MatMulNBits: 0 multiplies in float32, 4 rounds x to int8 in blocks.

    Raises
    ------
    ImportError
        If onnx is not installed.
    OSError
        If the file cannot be written.
    ValueError
        If the graph does not fit the model, or ONNX cannot hold a tensor; the message names it.
    """
    require_package("onnx")
    names = list(model) if graph is None else ["x", *(node.name for node in graph)]
    builder = Builder(fast, accuracy_level, set(names))
    if graph is None:
        inputs: list[_Described] = []
        outputs: list[_Described] = []
        for name, tensor in model.items():
            progress.next(name)
            builder.value(name, tensor, output=name)
            outputs.append(_Described(name, tensor.dtype, tensor.shape))
    else:
        inputs, outputs = _chain(builder, model, graph, progress, input_shape)
    onnx_model, payloads = builder.model(inputs, outputs), Payloads()
    builder.add_constants(onnx_model.graph, payloads)
    save(onnx_model, payloads, path)


class Constant(NamedTuple):
    """A constant of a graph; `content` makes its bytes. An auxiliary one is no part of a weight, as a shape."""

    name: str
    kind: int
    shape: Sequence[int]
    nbytes: int
    content: Callable[[], NDArray[np.uint8]]
    auxiliary: bool = False

    def add_to(self, graph: "GraphProto", payloads: Payloads) -> None:
        """Add the constant to a graph."""
        tensor = graph.initializer.add(name=self.name, data_type=self.kind, dims=self.shape)
        if self.auxiliary:
            tensor.doc_string = AUXILIARY
        payloads.set(tensor, Payload(self.nbytes, self.content))


def opset_of_bits(bits: int | None) -> int:
    """Return the operator set that decodes codes of this bit width; None stands for a tensor without codes."""
    return _OPSET if bits is None else _CODES[_stored_bits(bits)][1]


def _stored_bits(bits: int) -> int:
    return min(width for width in _CODES if width >= bits)


def _has_two_levels(q: QuantizedTensor) -> bool:
    """Return whether scale and minimum stay codes in ONNX: where several groups share the floats of a row."""
    cols = as_matrix(q.shape)[1]
    return q.param_bits is not None and q.param_group == -1 and q.group_size is not None and -1 < q.group_size < cols


def _zero_codes(groups: int, bits: int) -> int:
    """Return how many zero points a row has: one for each group, and those that fill the last byte."""
    return -(-groups * bits // 8) * 8 // bits


def quantized_nbytes(
    shape: tuple[int, ...],
    bits: int,
    group_size: GroupSize,
    param_dtype: DTypeLike,
    outliers: float | None,
    fast: bool,
    param_bits: int | None = None,
    param_group: int = -1,
) -> int:
    """Return the bytes of a quantized tensor in ONNX, where rows are padded to whole groups or blocks."""
    rows, cols = as_matrix(shape)
    if param_bits is not None and group_size == "auto":
        group_size = TWO_LEVEL_GROUP
    size = require_group_size(group_size, bits)
    if param_bits is not None and param_group != -1:
        param_bits, param_dtype = None, np.float32  # pairs
    own = cols if size in (None, -1) else min(size, cols)
    groups = 1 if size is None else -(-cols // max(own, 1))
    if fast:
        fitting = [block for block in _BLOCKS if own % block == 0 or own >= cols]
        own = min(fitting, key=lambda block: (-cols % block, -block), default=own)
        groups = -(-cols // max(own, 1))
    params = groups * (1 if size is None and not fast else rows)
    entry = 4 + _index_type(rows * cols).itemsize
    stored = _stored_bits(bits)
    codes = rows * -(-groups * own * stored // 8) if fast else -(-rows * groups * own * stored // 8)
    if fast and stored != bits:
        codes += rows * _zero_codes(groups, stored) * stored // 8
    param_nbytes = 2 * params * np.dtype(param_dtype).itemsize
    if param_bits is not None:
        if own == size and groups > 1:
            param_nbytes = 2 * -(-params * _stored_bits(param_bits) // 8) + 3 * rows * np.dtype(param_dtype).itemsize
        else:
            param_nbytes = 2 * params * 4
    return codes + param_nbytes + round((outliers or 0) * rows * cols) * entry


def tag(node: "NodeProto", weight: str, parts: Mapping[str, str] | None = None) -> None:
    """Mark a node that decodes this weight or multiplies with it; `onnx_weights` reads the mark.

    `parts` are the names of constants of the weight that the node does not read itself.
    """
    node.metadata_props.add(key=TAG, value=weight)
    for part, name in (parts or {}).items():
        node.metadata_props.add(key=f"{TAG}.{part}", value=name)


class _Described(NamedTuple):
    """An input or output of a model."""

    name: str
    dtype: DTypeLike
    shape: Sequence[int | str]


class _Blocks(NamedTuple):
    """The names of the inputs of MatMulNBits, and of the offset that the sums of x are multiplied with."""

    size: int
    inputs: list[str]
    offset: str
    outliers: tuple[()] | tuple[str, str, str]
    parts: dict[str, str]  # constants of the weight that MatMulNBits does not read


class Builder:
    """Collects the nodes and constants of a graph."""

    def __init__(self, fast: bool, accuracy_level: int, taken: set[str]) -> None:
        if accuracy_level not in range(5):
            raise ValueError(f"accuracy_level: expected 0 to 4, got {shown(accuracy_level)}")
        self.fast = fast
        self.accuracy_level = accuracy_level
        self.nodes: list[NodeProto] = []
        self.constants: list[Constant] = []
        self.opset = _OPSET
        self._names = taken
        self._stems: dict[str, str] = {}  # how the name of an output begins
        self._shared: dict[Any, str] = {}
        self._blocks: dict[str, _Blocks] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all constants except shapes."""
        shapes = set(self._shared.values())
        return sum(constant.nbytes for constant in self.constants if constant.name not in shapes)

    def add_constants(self, graph: "GraphProto", payloads: Payloads) -> None:
        """Add the constants to a graph."""
        for constant in self.constants:
            constant.add_to(graph, payloads)

    def fresh(self, name: str) -> str:
        """Return a name that is not taken, and take it."""
        unique, number = name, 2
        while unique in self._names:
            unique, number = f"{name}.{number}", number + 1
        self._names.add(unique)
        return unique

    def node(self, kind: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        from onnx import helper

        stem = self._stems.get(inputs[0], inputs[0])
        output = output or self.fresh(f"{stem}.{kind}")
        self._stems[output] = stem
        self.nodes.append(helper.make_node(kind, list(inputs), [output], output, domain=domain, **attributes))
        return output

    def made(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> "NodeProto":
        """Return a node of several outputs, named after the first."""
        from onnx import helper

        return helper.make_node(kind, inputs, outputs, outputs[0], **attributes)

    def constant(self, name: str, array: Array, *, auxiliary: bool = False) -> str:
        """Add a constant and return its name."""
        from onnx import helper

        name = self.fresh(name)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype.newbyteorder("="))
        little = array if array.dtype.name == "bfloat16" else array.astype(array.dtype.newbyteorder("<"), copy=False)
        self.constants.append(Constant(name, kind, array.shape, array.nbytes, partial(_bytes, little), auxiliary))
        return name

    def numbers(self, *values: int) -> str:
        """Return the name of a constant with these int64 values; equal ones are shared."""
        if values not in self._shared:
            name = f"numbers.{'.'.join(map(str, values))}"
            self._shared[values] = self.constant(name, np.array(values, np.int64), auxiliary=True)
        return self._shared[values]

    def value(self, name: str, tensor: Weight, output: str | None = None, dtype: Any = None) -> str:
        """Add nodes that decode a tensor, to its own dtype by default, and return the name of the result."""
        from onnx import helper

        dtype = np.dtype(tensor.dtype if dtype is None else dtype)
        parts = output or name  # the names of constants begin with this one
        if isinstance(tensor, QuantizedTensor):
            value, present = self._decoded(parts, tensor), np.dtype(np.float32)
        elif isinstance(tensor, SparseTensor):
            value, present = self._scattered(parts, tensor), np.dtype(tensor.dtype)
        else:
            own = parts if output is None else f"{parts}.value"
            value, present = self.constant(own, unpacked(tensor)), tensor.dtype
        if present.newbyteorder("=") != dtype.newbyteorder("="):
            return self.node("Cast", value, output=output, to=helper.np_dtype_to_tensor_dtype(dtype))
        return value if output is None else self.node("Identity", value, output=output)

    def _float32(self, name: str, array: Array) -> str:
        """Add a constant in its own dtype, and return the name of its value in float32."""
        from onnx import TensorProto

        constant = self.constant(name, array)
        return constant if array.dtype == np.float32 else self.node("Cast", constant, to=TensorProto.FLOAT)

    def _decoded(self, name: str, q: QuantizedTensor) -> str:
        """Add minimum + scale * code, in float32 and in the shape of the weight."""
        from onnx import TensorProto

        if q.size == 0:
            return self.constant(f"{name}.value", q.dequantize(dtype=np.float32))
        with naming_tensor(name):
            self.opset = max(self.opset, opset_of_bits(q.bits))
        rows, cols = as_matrix(q.shape)
        two_levels = _has_two_levels(q)
        q = q if two_levels else q.one_level()
        groups = -(-cols // q.group_size) if two_levels and q.group_size else q.scale.shape[1]
        size = q.group_size if groups > 1 and q.group_size is not None else cols
        wide = groups * size  # the last group of a row is padded with codes of 0
        codes = self.fresh(f"{name}.codes")
        bits = _stored_bits(q.bits)
        kind, nbytes = TensorProto.DataType.Value(_CODES[bits][0]), -(-rows * wide * bits // 8)
        self.constants.append(Constant(codes, kind, (rows, wide), nbytes, partial(_codes, q, wide)))
        if groups == 1:
            scale = self._float32(f"{name}.scale", q.scale.reshape(() if q.group_size is None else rows))
            scaled = self.node("DequantizeLinear", codes, scale, axis=0)
            value = self.node("Add", scaled, self._float32(f"{name}.minimum", q.minimum))
        else:
            if two_levels:
                scale, minimum = self._two_levels(name, q)
                minimum = self.node("Reshape", minimum, self.numbers(rows, groups, 1))
            else:
                scale = self._float32(f"{name}.scale", q.scale)
                minimum = self._float32(f"{name}.minimum", q.minimum[..., None])
            scaled = self.node("DequantizeLinear", codes, scale, axis=1, block_size=size)
            parted = self.node("Reshape", scaled, self.numbers(rows, groups, size))
            value = self.node("Add", parted, minimum)
        if wide != cols:
            value = self.node("Reshape", value, self.numbers(rows, wide))
            value = self.node("Slice", value, self.numbers(0), self.numbers(cols), self.numbers(1))
        if q.outliers is not None:
            flat = self.node("Reshape", value, self.numbers(-1))
            index = self.constant(f"{name}.outlier_index", q.outliers.indices.astype(_index_type(q.size)))
            added = self.constant(f"{name}.outlier_value", q.outliers.values)
            value = self.node("ScatterElements", flat, index, added, axis=0, reduction="add")
        return self.node("Reshape", value, self.numbers(*q.shape))

    def _two_levels(self, name: str, q: QuantizedTensor) -> tuple[str, str]:
        """Add scale and minimum of each group, in float32, as codes and the floats of a row."""
        assert q.param_floats is not None
        floats = [q.param_floats[:, 0, i] for i in range(3)]
        d, dm, m0 = (self._float32(f"{name}.{part}", f) for part, f in zip(("d", "dm", "m0"), floats, strict=True))
        scale, below = (
            self.node("DequantizeLinear", self._param_codes(f"{name}.{part}", packed, q), unit, axis=0)
            for part, packed, unit in (("scale", q.scale, d), ("minimum", q.minimum, dm))
        )
        return scale, self.node("Sub", self.node("Reshape", m0, self.numbers(-1, 1)), below)

    def _param_codes(self, name: str, packed: NDArray[np.uint8], q: QuantizedTensor) -> str:
        """Add the codes of scale or minimum, in a width that ONNX has."""
        from onnx import TensorProto

        assert q.param_bits is not None
        assert q.group_size is not None
        rows, cols = as_matrix(q.shape)
        groups, bits = -(-cols // q.group_size), _stored_bits(q.param_bits)
        name, nbytes = self.fresh(name), -(-rows * groups * bits // 8)

        kind = TensorProto.DataType.Value(_CODES[bits][0])
        content = partial(_repacked, packed, q.param_bits, groups, bits)
        self.constants.append(Constant(name, kind, (rows, groups), nbytes, content))
        return name

    def _scattered(self, name: str, tensor: SparseTensor) -> str:
        """Add nodes that scatter the stored values over zeros.

        The file has a position for each value, or a bit for each weight, or the dense weight: whichever is smallest.
        """
        from onnx import TensorProto, helper

        index_type = _index_type(tensor.size)
        by_places, by_bits = tensor.nnz * index_type.itemsize, -(-tensor.size // 8)
        if tensor.values.nbytes + min(by_places, by_bits) >= tensor.size * tensor.dtype.itemsize:
            return self.constant(f"{name}.value", tensor.to_dense())
        # The position of each value, whatever the layout: decode the numbers 1, 2, 3 ... instead of the values.
        numbers = np.arange(1, tensor.nnz + 1, dtype=np.float64)
        numbered = SparseTensor(tensor.layout, tensor.positions, tensor.row_offsets, numbers, tensor.shape)
        found = numbered.to_dense().reshape(-1)
        places = np.flatnonzero(found)
        order = found[places]
        if by_bits < by_places and np.all(order[1:] > order[:-1]):
            bits = self.constant(f"{name}.mask", np.packbits(found != 0, bitorder="little")[:, None])
            each = self.constant(f"{name}.bits", np.array([[1 << bit for bit in range(8)]], np.uint8))
            flags = self.node("Cast", self.node("BitwiseAnd", bits, each), to=TensorProto.BOOL)
            flags = self.node("NonZero", self.node("Reshape", flags, self.numbers(-1)))
            index = self.node("Reshape", flags, self.numbers(-1))
        else:
            places = places[np.argsort(order, kind="stable")]
            index = self.constant(f"{name}.positions", places.astype(index_type))
        zero = helper.make_tensor("zero", helper.np_dtype_to_tensor_dtype(tensor.dtype), [1], [0])
        zeros = self.node("ConstantOfShape", self.numbers(tensor.size), output=self.fresh(f"{name}.zeros"), value=zero)
        values = self.value(f"{name}.values", tensor.values)
        flat = self.node("ScatterElements", zeros, index, values, axis=0)
        return self.node("Reshape", flat, self.numbers(*tensor.shape))

    def product(self, x: str, name: str, w: Weight, output: str | None = None, owner: "Builder | None" = None) -> str:
        """Add ``x @ w.T`` for x of float32 and any number of axes.

        The constants of a fast product are added to `owner`, the builder of a graph around this one.
        """
        rows, cols = as_matrix(w.shape)
        if self.fast and isinstance(w, QuantizedTensor):
            return self._fast_product(x, name, w, output, owner or self)
        if isinstance(w, np.ndarray):
            return self.node("MatMul", x, self.value(name, w.reshape(rows, cols).T, dtype=np.float32), output=output)
        value = self.value(name, w, dtype=np.float32)
        if len(w.shape) != 2:
            value = self.node("Reshape", value, self.numbers(rows, cols))
        return self.node("MatMul", x, self.node("Transpose", value, perm=[1, 0]), output=output)

    def _fast_product(self, x: str, name: str, q: QuantizedTensor, output: str | None, owner: "Builder") -> str:
        rows, cols = as_matrix(q.shape)
        blocks = owner.block_constants(name, q)
        options: dict[str, Any] = {"K": cols, "N": rows, "bits": _stored_bits(q.bits), "block_size": blocks.size}
        options["accuracy_level"] = self.accuracy_level
        y = self.node("MatMulNBits", x, *blocks.inputs, domain="com.microsoft", **options)
        tag(self.nodes[-1], name, blocks.parts)
        added = self.node("MatMul", self._block_sums(x, cols, blocks.size), blocks.offset)
        if not blocks.outliers:
            return self.node("Add", y, added, output=output)
        return self._add_outliers(x, self.node("Add", y, added), (rows, cols), blocks.outliers, output)

    def block_constants(self, name: str, q: QuantizedTensor) -> "_Blocks":
        """Add the inputs of MatMulNBits for a weight, once."""
        if name not in self._blocks:
            size, scale, minimum = _blocks(name, q)
            bits, (rows, groups) = _stored_bits(q.bits), scale.shape
            if _has_two_levels(q) and q.group_size == size:
                scale_name, minimum_name = self._two_levels(name, q)
            else:
                scale_name, minimum_name = (
                    self._float32(f"{name}.scale", scale),
                    self._float32(f"{name}.minimum", minimum),
                )
            # Codes count from their middle; so smaller numbers cancel. Without zero points, MatMulNBits counts from the
            # middle of its own codes.
            middle = self.constant(f"{name}.middle", np.array(1 << (q.bits - 1), np.float32), auxiliary=True)
            offset = self.node("Mul", scale_name, middle)
            parts = {"minimum": minimum_name}
            offset = self.node("Add", parts["minimum"], offset)
            codes, nbytes = self.fresh(f"{name}.codes"), groups * size * bits // 8
            content = partial(_codes, q, groups * size)
            shape = (rows, groups, nbytes // groups)
            self.constants.append(Constant(codes, _UINT8, shape, rows * nbytes, content))
            inputs = [codes, self.node("Reshape", scale_name, self.numbers(-1))]
            if bits != q.bits:
                zeros = pack_bits(np.full(_zero_codes(groups, bits), 1 << (q.bits - 1), np.uint8), bits)
                inputs.append(self.constant(f"{name}.zero_point", np.tile(zeros, (rows, 1)), auxiliary=True))
            turned = self.node("Transpose", offset, perm=[1, 0])
            outliers = () if q.outliers is None else self._outlier_constants(name, q, parts)
            self._blocks[name] = _Blocks(size, inputs, turned, outliers, parts)
        return self._blocks[name]

    def _outlier_constants(self, name: str, q: QuantizedTensor, parts: dict[str, str]) -> tuple[str, str, str]:
        """Add the rows, columns and values of the outliers."""
        from onnx import TensorProto

        assert q.outliers is not None
        kind = _index_type(q.size)
        index = self.constant(f"{name}.outlier_index", q.outliers.indices.astype(kind))
        cols = self.constant(f"{name}.cols", np.array(as_matrix(q.shape)[1], kind), auxiliary=True)
        row = self.node("Cast", self.node("Div", index, cols), to=TensorProto.INT64)
        rows = self.node("Reshape", row, self.numbers(-1, 1))
        values = self.constant(f"{name}.outlier_value", q.outliers.values[:, None])
        parts |= {"outlier_index": index, "outlier_value": values}
        return rows, self.node("Mod", index, cols), values

    def _block_sums(self, x: str, cols: int, size: int) -> str:
        """Add the sums of x over blocks of columns, once."""
        if (x, size) not in self._shared:
            padded, groups = x, -(-cols // size)
            if cols % size:
                padded = self.node("Pad", x, self.numbers(0, groups * size - cols), "", self.numbers(-1))
            batch = self.node("Shape", x, end=-1)
            shape = self.node("Concat", batch, self.numbers(groups, size), axis=0)
            blocks = self.node("Reshape", padded, shape)
            self._shared[x, size] = self.node("ReduceSum", blocks, self.numbers(-1), keepdims=0)
        return self._shared[x, size]

    def _add_outliers(
        self, x: str, y: str, shape: tuple[int, int], outliers: tuple[str, str, str], output: str | None
    ) -> str:
        """Add the products of the outliers with their columns of x to the rows of y.T."""
        rows, cols, values = outliers
        shape_of_y = self.node("Shape", y)
        columns = self.node("Transpose", self.node("Reshape", x, self.numbers(-1, shape[1])), perm=[1, 0])
        taken = self.node("Gather", columns, cols, axis=0)
        sums = self.node("Transpose", self.node("Reshape", y, self.numbers(-1, shape[0])), perm=[1, 0])
        sums = self.node("ScatterND", sums, rows, self.node("Mul", taken, values), reduction="add")
        return self.node("Reshape", self.node("Transpose", sums, perm=[1, 0]), shape_of_y, output=output)

    def model(self, inputs: Sequence["_Described"], outputs: Sequence["_Described"]) -> "ModelProto":
        """Return the model, without its constants."""
        from onnx import helper

        def described(what: _Described) -> Any:
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(what.dtype).newbyteorder("="))
            return helper.make_tensor_value_info(what.name, kind, what.shape)

        opsets = [helper.make_opsetid("", self.opset)]
        version = helper.find_min_ir_version_for(opsets)
        if any(node.domain == "com.microsoft" for node in self.nodes):
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        graph = helper.make_graph(self.nodes, "fastopt", [*map(described, inputs)], [*map(described, outputs)])
        return helper.make_model(graph, producer_name="fastopt", opset_imports=opsets, ir_version=version)


def _index_type(size: int) -> np.dtype[Any]:
    return np.dtype(np.int32 if size < 1 << 31 else np.int64)


def _bytes(array: Array) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _padded(codes: NDArray[np.uint8], nbytes: int) -> NDArray[np.uint8]:
    """Return the codes with each row padded to this number of bytes."""
    return _bytes(np.pad(codes, ((0, 0), (0, nbytes - codes.shape[1]))) if nbytes > codes.shape[1] else codes)


def _codes(q: QuantizedTensor, wide: int) -> NDArray[np.uint8]:
    """Return the bytes of the codes, in a width that ONNX has, with each row padded to this number of codes."""
    cols, bits = as_matrix(q.shape)[1], _stored_bits(q.bits)
    if bits == q.bits and wide * bits % 8 == 0:
        return _padded(q.codes, wide * bits // 8)
    return pack_bits(np.pad(codes_matrix(q), ((0, 0), (0, wide - cols))), bits)


def _repacked(packed: NDArray[np.uint8], bits: int, cols: int, stored: int) -> NDArray[np.uint8]:
    """Return rows of codes in another width, as one stream."""
    return pack_bits(unpacked_rows(packed, bits, cols), stored)


def _blocks(name: str, q: QuantizedTensor) -> tuple[int, Array, Array]:
    """Return a block size of MatMulNBits that fits, with scale and minimum of each block."""
    cols = as_matrix(q.shape)[1]
    for size in sorted(_BLOCKS, key=lambda size: (-cols % size, -size)):  # with the least padding
        params = regroup(q, size)
        if params is not None:
            return size, *params
    raise ValueError(
        f"{name!r}: MatMulNBits has blocks of 16, 32, 64, 128 or 256, got groups of {q.group_size}; "
        "pack it in groups of one of these, or leave out `fast`"
    )


# A shape without the batch; None for a length that is not known.
Shape: TypeAlias = "tuple[int | None, ...]"


def _chain(
    builder: Builder, model: Mapping[str, Weight], graph: Sequence[Node], progress: Progress,
    input_shape: Sequence[int] | None,
) -> tuple[list[_Described], list[_Described]]:  # fmt: skip
    """Add the nodes of a graph; return its inputs and outputs."""
    if not graph:
        raise ValueError("graph: expected one or more layers, got none")
    given = _shape_of_x(model, graph, input_shape)
    shapes: dict[str, Shape] = {"x": given}
    x_is_map = len(given) == 3 or reads_map(graph)
    nodes = nodes_of(graph, x_is_map)
    for node, reads, reads_maps, gives_map in nodes:
        if isinstance(node, Layer):
            progress.next(name) if (name := f"{node.name}.weight") in model else None
            shapes[node.name] = _Layer(builder, model, node, reads[0], shapes[reads[0]], reads_maps[0]).add()
        else:
            shapes[node.name] = _join(builder, node, [(name, shapes[name]) for name in reads], gives_map)
    maps = {given.node.name: given.gives_map for given in nodes}
    outputs = outputs_of(nodes)
    kind = np.int64 if isinstance(graph[0], Layer) and graph[0].kind == "embedding" else np.float32
    return [_described("x", given, x_is_map, kind)], [_described(name, shapes[name], maps[name]) for name in outputs]


def _described(name: str, shape: Shape, is_map: bool, dtype: DTypeLike = np.float32) -> _Described:
    """Return a name with its shape, where lengths that are not known have names."""
    texts = {1: ["length"], 2: ["height", "width"]}.get(len(shape) - 1, []) if is_map else ["steps"]
    unknown = iter(texts if name == "x" else [f"{name}.{text}" for text in texts])
    return _Described(name, dtype, ("batch", *(next(unknown, "any") if n is None else n for n in shape)))


def _shape_of_x(model: Mapping[str, Weight], graph: Sequence[Node], input_shape: Sequence[int] | None) -> Shape:
    if input_shape is not None:
        return tuple(input_shape)
    first = graph[0]
    reads_of(first, None)
    if isinstance(first, Layer):
        for kind in ("weight", "weight_ih_l0"):
            name = f"{first.name}.{kind}"
            shape = model[name].shape if name in model else None
            if first.kind == "dense" and kind == "weight":
                return (None,) if shape is None else (as_matrix(shape)[1],)
            if shape is not None and first.kind in ("conv", "depthwise"):
                groups = shape[0] if first.kind == "depthwise" else first.groups
                return (shape[1] * groups, *[None] * (len(shape) - 2))
            if shape is not None and first.kind in ("lstm", "gru") and kind == "weight_ih_l0":
                return (None, shape[1])
            if first.kind == "embedding":
                return (None,)
        if first.kind in ("conv", "depthwise", "lstm", "gru"):
            part = "weight_ih_l0" if first.kind in ("lstm", "gru") else "weight"
            raise ValueError(f"model: the graph needs '{first.name}.{part}', which is missing")
    raise ValueError(
        f"input_shape: {first.name!r} does not tell it; expected the shape of x without the batch, such as (1, 28, 28)"
    )


@dataclass
class _Layer:
    """A layer that is added to a graph.

    Attributes
    ----------
    x : str
        The name of what it reads.
    shape : Shape
        The shape of that.
    of_map : bool
        True if that is a signal or a feature map.
    """

    builder: Builder
    model: Mapping[str, Weight]
    layer: Layer
    x: str
    shape: Shape
    of_map: bool

    def add(self) -> Shape:
        """Add the nodes; return the shape of the output."""
        layer, add = self.layer, getattr(self, f"_{self.layer.kind}", None)
        if layer.kind not in get_args(Kind) or add is None:
            raise ValueError(
                f"graph: {layer.name!r}: expected a kind of {', '.join(get_args(Kind))}, got {shown(layer.kind)}"
            )
        y, shape = cast("tuple[str, Shape]", add())
        result = is_map(layer, [self.of_map])
        if layer.norm is not None:
            channels = shape[0 if result else -1]
            assert channels is not None
            y = _norm(self.builder, self.model, layer, channels, y, len(shape) - 1 if result else 0)
        _activate(self.builder, layer.name, layer.activation, y, 1 if result else -1)
        return shape

    def _weight(self, part: str, ndims: Sequence[int]) -> tuple[str, Weight]:
        name = f"{self.layer.name}.{part}"
        if name not in self.model:
            raise ValueError(f"model: the graph needs {name!r}, which is missing")
        w = self.model[name]
        if len(w.shape) not in ndims or np.dtype(w.dtype).name not in ("float64", "float32", "float16", "bfloat16"):
            axes = "two or more" if len(ndims) > 2 else " or ".join(map(str, ndims))
            raise ValueError(f"model: expected {name!r} to be of floats and {axes} axes, got {w.dtype} {w.shape}")
        return name, w

    def _bias(self, rows: int) -> str | None:
        name = f"{self.layer.name}.bias"
        return _vector(self.builder, self.model, name, rows) if name in self.model else None

    def _fits(self, name: str, known: int | None, wanted: int, what: str) -> None:
        if known not in (None, wanted):
            raise ValueError(f"model: expected {name!r} of {known} {what}, got {wanted}")

    def _dense(self) -> tuple[str, Shape]:
        name, w = self._weight("weight", range(2, 9))
        rows, cols = as_matrix(w.shape)
        x, shape = self.x, self.shape
        if self.layer.flatten:
            x, shape = self._flatten()
        elif self.of_map:
            raise ValueError(f"graph: {self.layer.name!r} reads a feature map; flatten=True makes it a row")
        self._fits(name, shape[-1], cols, "columns")
        y = self.builder.product(x, name, w)
        bias = self._bias(rows)
        return (y if bias is None else self.builder.node("Add", y, bias)), (*shape[:-1], rows)

    def _conv(self) -> tuple[str, Shape]:
        name, w = self._weight("weight", (3, 4))
        axes, groups = len(w.shape) - 2, self.layer.groups
        if self.layer.kind == "depthwise":
            groups = w.shape[0] if self.shape[0] is None else self.shape[0]
        if len(self.shape) != axes + 1 or w.shape[0] % groups:
            raise ValueError(
                f"graph: {self.layer.name!r}: {name!r} of shape {w.shape} with {groups} groups does not fit a value of "
                f"shape {self.shape}"
            )
        self._fits(name, self.shape[0], w.shape[1] * groups, "channels")
        bias = self._bias(w.shape[0])
        weight = self.builder.value(name, w, dtype=np.float32)
        inputs = [self.x, weight, *([] if bias is None else [bias])]
        options = self._window(w.shape[2:], 1)
        return self.builder.node("Conv", *inputs, group=groups, **options), (w.shape[0], *self._lengths(options))

    _depthwise = _conv

    def _window(self, size: Sequence[int], stride: int | Sequence[int]) -> dict[str, Any]:
        layer, axes = self.layer, len(size)
        options: dict[str, Any] = {"kernel_shape": list(size)}
        for option, key, given, default in (
            ("stride", "strides", layer.stride, stride), ("dilation", "dilations", layer.dilation, 1)
        ):  # fmt: skip
            options[key] = _of_axes(layer.name, option, numbers_of(layer.name, option, given, default), axes)
        if isinstance(layer.padding, str):
            if layer.padding != "same":
                raise ValueError(f"{layer.name!r}: padding: expected numbers or 'same', got {shown(layer.padding)}")
            options["auto_pad"] = "SAME_UPPER"
        else:
            pads = _of_axes(layer.name, "padding", numbers_of(layer.name, "padding", layer.padding, 0), axes)
            options["pads"] = pads + pads
        return options

    def _lengths(self, options: dict[str, Any]) -> list[int | None]:
        """Return the lengths of the axes behind the channels after a window."""
        result: list[int | None] = []
        for axis, length in enumerate(self.shape[1:]):
            step = options["strides"][axis]
            if length is None:
                result.append(None)
            elif "auto_pad" in options:
                result.append(-(-length // step))
            else:
                covered = (options["kernel_shape"][axis] - 1) * options["dilations"][axis] + 1
                padded = length + 2 * options["pads"][axis]
                if padded < covered:
                    raise ValueError(f"{self.layer.name!r}: the window covers {covered} of an axis of {padded}")
                result.append((padded - covered) // step + 1)
        return result

    def _pool(self, kind: str, **options: Any) -> tuple[str, Shape]:
        name = self.layer.name
        if not self.of_map:
            raise ValueError(f"graph: {name!r}: expected to read a feature map, got a value of shape {self.shape}")
        size = _of_axes(name, "size", numbers_of(name, "size", self.layer.size, 0), len(self.shape) - 1)
        window = self._window(size, size)
        return self.builder.node(kind, self.x, **window, **options), (self.shape[0], *self._lengths(window))

    def _max_pool(self) -> tuple[str, Shape]:
        return self._pool("MaxPool")

    def _average_pool(self) -> tuple[str, Shape]:
        return self._pool("AveragePool", count_include_pad=1)

    def _global_pool(self) -> tuple[str, Shape]:
        y = self.builder.node("GlobalAveragePool", self.x)
        return self.builder.node("Flatten", y, axis=1), self.shape[:1]

    def _flatten(self) -> tuple[str, Shape]:
        size = None if None in self.shape else math.prod(n for n in self.shape if n is not None)
        return self.builder.node("Flatten", self.x, axis=1), (size,)

    def _activation(self) -> tuple[str, Shape]:
        return self.x, self.shape

    def _embedding(self) -> tuple[str, Shape]:
        name, w = self._weight("weight", (2,))
        if self.x != "x":
            raise ValueError(f"{self.layer.name!r}: an embedding must read the input, which are its indices")
        table = self.builder.value(name, w, dtype=np.float32)
        return self.builder.node("Gather", table, self.x, axis=0), (*self.shape, w.shape[1])

    def _layer_norm(self) -> tuple[str, Shape]:
        name, cols = f"{self.layer.name}.weight", self.shape[-1]
        if name in self.model:
            cols = self.model[name].shape[0]
            self._fits(name, self.shape[-1], cols, "values")
            gain = _vector(self.builder, self.model, name, cols)
        elif cols is None:
            raise ValueError(f"input_shape: {self.layer.name!r} does not tell it; expected the shape of x")
        else:
            gain = self.builder.constant(name, np.ones(cols, np.float32))
        bias = self._bias(cols)
        inputs = [self.x, gain, *([] if bias is None else [bias])]
        return self.builder.node("LayerNormalization", *inputs, axis=-1, epsilon=self.layer.eps), self.shape

    def _recurrent(self, kind: str, gates: Sequence[int], **options: Any) -> tuple[str, Shape]:
        builder, count = self.builder, len(gates)
        parts = []
        units = self._weight("weight_hh_l0", (2,))[1].shape[1]
        for part, known in (("weight_ih_l0", self.shape[-1]), ("weight_hh_l0", units)):
            name, w = self._weight(part, (2,))
            self._fits(name, known, w.shape[1], "columns")
            self._fits(name, count * units, w.shape[0], "rows")
            value = builder.node("Reshape", builder.value(name, w, dtype=np.float32), builder.numbers(count, units, -1))
            value = builder.node("Gather", value, builder.numbers(*gates), axis=0)
            parts.append(builder.node("Reshape", value, builder.numbers(1, count * units, -1)))
        biases = []
        for part in ("bias_ih_l0", "bias_hh_l0"):
            name = f"{self.layer.name}.{part}"
            if name in self.model:
                if self.model[name].shape != (count * units,):
                    raise ValueError(
                        f"model: expected {name!r} of shape {(count * units,)}, got {self.model[name].shape}"
                    )
                dense = unpacked(self.model[name]).astype(np.float32)
                biases.append(dense.reshape(count, units)[list(gates)].reshape(-1))
            else:
                biases.append(np.zeros(count * units, np.float32))
        parts.append(builder.constant(f"{self.layer.name}.bias", np.concatenate(biases)[None]))
        x = builder.node("Transpose", self.x, perm=[1, 0, 2])
        y, state = builder.fresh(f"{self.layer.name}.Y"), builder.fresh(f"{self.layer.name}.Y_h")
        builder.nodes.append(builder.made(kind, [x, *parts], [y, state], hidden_size=units, **options))
        if self.layer.last:
            return builder.node("Squeeze", state, builder.numbers(0)), (units,)
        y = builder.node("Squeeze", y, builder.numbers(1))
        return builder.node("Transpose", y, perm=[1, 0, 2]), (self.shape[0], units)

    def _lstm(self) -> tuple[str, Shape]:
        return self._recurrent("LSTM", (0, 3, 1, 2))

    def _gru(self) -> tuple[str, Shape]:
        return self._recurrent("GRU", (1, 0, 2), linear_before_reset=1)


def _of_axes(name: str, option: str, numbers: list[int], axes: int) -> list[int]:
    if len(numbers) not in (1, axes):
        raise ValueError(f"{name!r}: {option}: expected 1 or {axes} numbers, got {tuple(numbers)}")
    return numbers * axes if len(numbers) == 1 else numbers


def _vector(builder: Builder, model: Mapping[str, Weight], name: str, rows: int) -> str:
    if model[name].shape != (rows,):
        raise ValueError(f"model: expected {name!r} of shape {(rows,)}, got {model[name].shape}")
    return builder.value(name, model[name], dtype=np.float32)


def _norm(builder: Builder, model: Mapping[str, Weight], layer: Layer, rows: int, y: str, behind: int) -> str:
    """Add a batch normalization as one multiplication and one addition; `behind` axes come after the channels."""
    if not any(f"{layer.norm}.{part}" in model for part in ("weight", "running_mean")):
        raise ValueError(f"model: the graph needs '{layer.norm}.weight', which is missing")

    def part(name: str) -> Array | None:
        full = f"{layer.norm}.{name}"
        if full not in model:
            return None
        values = unpacked(model[full]).astype(np.float64)
        if values.shape != (rows,):
            raise ValueError(f"model: expected {full!r} of shape {(rows,)}, got {values.shape}")
        return values

    shape = (rows, *[1] * behind)
    factor, summand = (values.astype(np.float32).reshape(shape) for values in batch_norm(part, rows, layer.eps))
    scaled = builder.node("Mul", y, builder.constant(f"{layer.norm}.factor", factor))
    return builder.node("Add", scaled, builder.constant(f"{layer.norm}.summand", summand))


def _join(builder: Builder, node: Any, reads: list[tuple[str, Shape]], of_maps: bool) -> Shape:
    """Add a sum or a concatenation; return its shape."""
    names, shapes = [name for name, _ in reads], [shape for _, shape in reads]
    axis = 0 if of_maps else len(shapes[0]) - 1
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"graph: {node.name!r} joins nodes of shapes {' and '.join(map(str, shapes))}")
    if isinstance(node, Concat):
        builder.node("Concat", *names, output=node.name, axis=1 if of_maps else -1)
        known = [n for shape in shapes if (n := shape[axis]) is not None]
        total = sum(known) if len(known) == len(shapes) else None
        return (*shapes[0][:axis], total, *shapes[0][axis + 1 :])
    widths = {shape[axis] for shape in shapes} - {None}
    if len(widths) > 1:
        of = "channels" if of_maps else "columns"
        raise ValueError(f"graph: {node.name!r} adds nodes of {' and '.join(str(s[axis]) for s in shapes)} {of}")
    _activate(builder, node.name, node.activation, builder.node("Sum", *names), 1 if of_maps else -1)
    return shapes[0]


def _activate(builder: Builder, name: str, activation: Any, y: str, axis: int) -> None:
    """Add an activation whose output has the name of the node."""
    if activation is None:
        builder.node("Identity", y, output=name)
    elif activation == "softmax":
        builder.node("Softmax", y, output=name, axis=axis)
    elif activation == "silu":
        builder.node("Mul", y, builder.node("Sigmoid", y), output=name)
    elif activation == "relu6":
        limits = [builder.constant(f"{name}.{limit}", np.array(limit, np.float32)) for limit in (0, 6)]
        builder.node("Clip", y, *limits, output=name)
    elif activation in _ACTIVATIONS:
        kind, attributes = _ACTIVATIONS[activation]
        builder.node(kind, y, output=name, **attributes)
    else:
        expected = sorted([*_ACTIVATIONS, "relu6", "silu", "softmax"])
        raise ValueError(f"activation: expected one of {', '.join(expected)} for {name!r}, got {shown(activation)}")
