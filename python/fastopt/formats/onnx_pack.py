"""Pack the weights of an ONNX model and leave the rest of the graph unchanged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from fastopt._types import GroupSize, Notify, PathLike
from fastopt.files.weights import Source, Weights
from fastopt.formats.common import require_package
from fastopt.formats.onnx import Builder, opset_of_bits, quantized_nbytes, tag
from fastopt.formats.onnx_file import OnnxFile, save, size_of
from fastopt.formats.onnx_graph import (
    Found,
    Scope,
    Use,
    at_opset,
    attribute,
    constants_of,
    inlined,
    scope_of,
    weights_of,
)
from fastopt.models.choose import Check, Sizes, make_to_fit
from fastopt.models.recipe import (
    Options,
    Recipe,
    RecipeOptions,
    naming_tensor,
    pack_tensor,
    recipe_of,
    require_no_correction,
    warn_if_nothing_is_packed,
    warn_of_overrides,
)
from fastopt.models.report import Report, Reporter
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight
from fastopt.tensors.quantized import QuantizedTensor

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
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
    """Pack the weights of an ONNX model, and write one that runs.

    A weight is a constant that is only read by MatMul, Gemm, Conv, ConvTranspose, Gather, LSTM, GRU, RNN and Einsum
    nodes, directly or through Identity, Transpose, Cast, and nodes that take or join parts, also in the branches of an
    If and in the bodies of loops. Local functions are inlined. Only one tensor is in memory at a time, beside those
    that are packed.

    Parameters
    ----------
    source : path-like
        An ONNX file. Tensors that it keeps in other files of its folder are read too.
    target : path-like
        It appears when it is complete; it may be the source, whose other files are then not needed any more. If the
        model lists a weight among its inputs too, as old ones do, it does not after the weight was packed.
    recipe, **options
        As in `pack`, by the names of the weights in the model. If several graphs use one name, those in inner graphs
        are preceded by the node, as in "If_0.then_branch/W". A weight is packed as [out, in, ...], whichever way the
        model stores it: groups lie along the input axis. ONNX stores codes in 2, 4 or 8 bits; so the preset "balanced"
        is 4 bits in groups of 16, with `param_bits` 8. Parameters in two levels stay codes, those of `param_group` 256
        become pairs of float32.
    target_bits, target_size
        As in `pack`: bits for each of these weights, bytes of the whole file.
    fast : bool
        Multiply with MatMulNBits, an operator of ONNX Runtime, if a quantized float32 weight is only read by MatMul and
        by Gemm nodes that at most add a bias. Other weights are decoded by standard operators.
    accuracy_level : int
        Option of MatMulNBits: 0 multiplies in float32, 4 rounds x to int8 in blocks.
    dry_run : bool
        Write nothing.
    notify : callable, optional
        Called with the bytes done, the bytes in total, and the name of the next weight, "" at the end.

    Returns
    -------
    Report
        The weights, with the bytes that they take in the file, and other constants of at least `min_size` elements.

    Raises
    ------
    ImportError
        If onnx is not installed.
    OSError
        If a file cannot be opened or written.
    TypeError, ValueError
        If the source is not an ONNX model, or cannot be brought to an operator set with low-bit types (21, or 25 for
        2 bits), or as in `pack`.

    Warns
    -----
    UserWarning
        If no weight is packed, as in `pack`.

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
    recipe = recipe_of(recipe, options, onnx=True)
    require_no_correction(recipe, "for an ONNX model")
    require_package("onnx")
    file = OnnxFile(Path(source))
    model = inlined(file.model, file.payloads)
    found, _ = weights_of(constants_of(scope_of(model)))
    weights = _weights(file, found)
    warn_of_overrides(recipe, weights)
    sizes = _Sizes(fast, size_of(model, file.payloads) - sum(weights.sizes.values()))

    def make(chosen: Recipe, check: Check) -> tuple[ModelProto, Report]:
        packed, report = _packed(file, model, weights, chosen, fast, accuracy_level, notify)
        tensors = [t for t in report.tensors if t.name in weights]
        check(sum(t.nbytes for t in tensors), size_of(packed, file.payloads))
        warn_if_nothing_is_packed(chosen, [(t.kind != "dense", t.reason) for t in tensors])
        return packed, report

    packed, report = make_to_fit(weights, recipe, make, target_bits=target_bits, target_size=target_size, sizes=sizes)
    if not dry_run:
        save(packed, file.payloads, Path(target))
    return report


def weights_to_pack(source: PathLike, *, fast: bool = False, accuracy_level: int = 0) -> tuple[Weights, Sizes]:
    """Return the weights of an ONNX model, [out, in, ...], and their bytes, as `pack_onnx` packs them."""
    require_package("onnx")
    file = OnnxFile(Path(source))
    model = inlined(file.model, file.payloads)
    found, _ = weights_of(constants_of(scope_of(model)))
    weights = _weights(file, found)
    return weights, _Sizes(fast, size_of(model, file.payloads) - sum(weights.sizes.values()))


class _Sizes(Sizes):
    """The bytes that a weight takes in an ONNX file, with the nodes that decode it."""

    def __init__(self, fast: bool, others: int) -> None:
        self.fast, self.others = fast, others

    def quantized(
        self,
        shape: tuple[int, ...],
        bits: int,
        group_size: GroupSize,
        param_dtype: DTypeLike,
        outliers: float | None,
        param_bits: int | None = None,
        param_group: int = -1,
    ) -> int:
        return quantized_nbytes(shape, bits, group_size, param_dtype, outliers, self.fast, param_bits, param_group)

    def stored(self, tensor: Weight) -> int:
        builder = Builder(False, 0, set())
        builder.value("w", tensor)
        return builder.nbytes

    def header(self, name: str, options: Options | None) -> int:
        if options is None:
            return 0
        parts = (
            6
            + 2 * (options.outliers is not None)
            + 8 * (options.param_bits is not None)
            + 5 * (options.prunes or self.fast)
        )
        return parts * (100 + 4 * len(name))

    def rest(self, recipe: Recipe) -> int:
        return self.others


def _packed(
    file: OnnxFile,
    model: ModelProto,
    weights: Weights,
    recipe: Recipe,
    fast: bool,
    accuracy_level: int,
    notify: Notify | None,
) -> tuple[ModelProto, Report]:
    """Return the packed model, and the report."""
    opsets = [_opset(recipe, name, weights) for name in weights]
    changed = type(model)()
    changed.CopyFrom(model)
    changed = at_opset(changed, max(opsets, default=0), file.payloads)
    edit = _Edit(changed, fast, accuracy_level)
    reporter = Reporter(recipe)
    progress = Progress(weights.sizes, notify)
    for name, opset in zip(weights, opsets, strict=True):
        progress.next(name)
        array = weights[name]
        tensor, reason = pack_tensor(name, array, recipe)
        nbytes = edit.put(name, tensor) if opset else tensor.nbytes
        reporter.add(name, tensor, array, reason, nbytes=nbytes)
        weights.release(name)
    progress.next("")
    for name, reason in edit.others.items():
        constant = edit.constants[name].tensor
        assert constant is not None
        if math.prod(constant.dims) >= max(recipe.min_size, 1):
            array = file.array(constant)
            reporter.add(name, array, array, reason)
            file.release(constant)
    edit.finish(file)
    return changed, reporter.report()


def _weights(file: OnnxFile, found: Mapping[str, Found]) -> Weights:
    """Return the weights of a model as [out, in, ...], each read when it is asked for."""
    return Weights({name: _source(file, one) for name, one in found.items()})


def _source(file: OnnxFile, found: Found) -> Source:
    from onnx import helper

    tensor = found.value.tensor
    assert tensor is not None
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except KeyError as error:
        raise ValueError(f"{file.path}: {tensor.name!r}: has data type {error}, which onnx does not know") from error
    return Source(found.shape, dtype, lambda: found.seen(file.array(tensor)), lambda: file.release(tensor))


def _opset(recipe: Recipe, name: str, weights: Weights) -> int:
    """Return the operator set that the packed weight needs, 0 if it is kept as it is."""
    options, _ = recipe.of(name, *weights.spec(name))
    with naming_tensor(name):
        if options is None:
            return 0
        return max(opset_of_bits(bits) for bits in (options.bits, options.param_bits))


class _Edit:
    """Replaces constants of a model by packed weights.

    Nodes that decode, and their constants, are added to the graph that had the constant. Nodes that multiply with codes
    are added to the graph of the node that they replace.
    """

    def __init__(self, model: ModelProto, fast: bool, accuracy_level: int) -> None:
        self._model, self._root = model, scope_of(model)
        self.constants = constants_of(self._root)
        self._found, self.others = weights_of(self.constants)
        taken = set(self._root.names())
        scopes = list(self._root.walk())
        # For each graph: nodes that decode, which come first, and nodes that take the place of products.
        self._heads = {scope: Builder(fast, accuracy_level, taken) for scope in scopes}
        self._products = {scope: Builder(fast, accuracy_level, taken) for scope in scopes}
        self._replaced: dict[tuple[Scope, int], list[NodeProto]] = {}
        self._gone: set[tuple[Scope, str]] = set()
        self._fast = fast

    def put(self, name: str, tensor: Weight) -> int:
        """Replace a constant; return how many bytes the new ones take."""
        if name not in self._found:  # by bringing the model to another operator set
            raise ValueError(f"{name!r}: is no constant any more at a newer operator set; exclude it")
        found = self._found[name]
        value, head = found.value, self._heads[found.value.scope]
        before = head.nbytes
        alike = found.order.rows == 1 and not found.fixed and all(order == found.order for _, order in found.uses)
        if self._fast and alike and all(_multiplies(use, tensor) for use, _ in found.uses):
            for use, _ in found.uses:
                self._multiply(use, value.name, tensor, head)
            for use in found.between:
                self._replaced[use.scope, use.at] = []
        else:
            _decode(head, found, tensor)
        self._gone.add((value.scope, value.name))
        return head.nbytes - before

    def _multiply(self, use: Use, name: str, tensor: Weight, head: Builder) -> None:
        node, builder = use.node, self._products[use.scope]
        assert node is not None
        (output,) = node.output
        if len(node.input) > 2 and node.input[2]:
            product = builder.product(node.input[0], name, tensor, owner=head)
            builder.node("Add", product, node.input[2], output=output)
        else:
            builder.product(node.input[0], name, tensor, output, owner=head)
        self._replaced[use.scope, use.at] = list(builder.nodes)
        builder.nodes.clear()

    def finish(self, file: OnnxFile) -> None:
        """Change the graphs."""
        from onnx import helper

        scopes = list(self._root.walk())
        for scope in reversed(scopes):  # those inside others first
            graph, head, products = scope.graph, self._heads[scope], self._products[scope]
            gone = {name for owner, name in self._gone if owner is scope}
            nodes = list(head.nodes)
            for at, node in enumerate(scope.nodes):
                if node.op_type != "Constant" or gone.isdisjoint(node.output):
                    nodes += self._replaced.get((scope, at), [node])
            if len(nodes) != len(scope.nodes) or gone:
                del graph.node[:]
                graph.node.extend(nodes)
            for field in (graph.initializer, graph.input):  # old models list initializers there too
                kept = [item for item in field if item.name not in gone]
                del field[:]
                field.extend(kept)
            head.add_constants(graph, file.payloads)
            products.add_constants(graph, file.payloads)
        domains = {entry.domain for entry in self._model.opset_import}
        if self._replaced and "com.microsoft" not in domains:
            self._model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _multiplies(use: Use, tensor: Weight) -> bool:
    """Return whether MatMulNBits can compute this node."""
    node = use.node
    if node is None or not isinstance(tensor, QuantizedTensor) or tensor.dtype != np.float32:
        return False
    if use.place != 1 or len(tensor.shape) != 2 or node.domain == "com.microsoft":
        return False
    if node.op_type == "Gemm":
        return all(
            attribute(node, name, value) == value for name, value in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
        )
    return node.op_type == "MatMul"


def _decode(builder: Builder, found: Found, tensor: Weight) -> None:
    """Add nodes whose output has the name that the constant had."""
    name, axes = found.value.name, found.order.axes
    natural = axes == tuple(range(len(axes)))
    if natural and found.shape == found.dims:
        builder.value(name, tensor, output=name)
        tag(builder.nodes[-1], name)
        return
    decoded = builder.value(name, tensor)
    if found.ordered != found.shape:
        decoded = builder.node("Reshape", decoded, builder.numbers(*found.ordered), output=name if natural else None)
    if not natural:
        builder.node("Transpose", decoded, output=name, perm=[axes.index(axis) for axis in range(len(axes))])
    tag(builder.nodes[-1], name)
