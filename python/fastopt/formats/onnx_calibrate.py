"""Calibration of ONNX models: the inputs of their weights, as ONNX Runtime computes them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from fastopt._checks import as_matrix
from fastopt._text import shown
from fastopt._types import Array, PathLike
from fastopt.files.sources import open_weights
from fastopt.formats.common import require_package
from fastopt.formats.onnx_file import OnnxFile, save
from fastopt.formats.onnx_graph import Use, attribute, constants_of, inlined, scope_of, weights_of
from fastopt.models.calibration import Calibration

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
    from onnxruntime import InferenceSession

_BATCH = 32  # the most rows of a file that are run at once
_PATCHES = 4096  # the most patches of a convolution that are summed for each run


def calibrate_onnx(
    source: PathLike,
    batches: Iterable[Mapping[str, Array]] | Mapping[str, Array] | PathLike,
    *,
    products: bool = False,
) -> Calibration:
    """Run an ONNX model in ONNX Runtime, and sum over the inputs of its weights.

    Weights of MatMul, Gemm and Conv nodes are calibrated, and those of LSTM, GRU and RNN nodes that multiply their
    inputs; not those in branches and loops. A convolution takes its patches, of which at most 4096 a run are summed.

    Parameters
    ----------
    source : path-like
        An ONNX file with float weights, as `pack_onnx` takes it.
    batches : iterable of mappings from name to array, one mapping, or path-like
        The inputs of each run. A path is that of a .npz file with an array for each input, which is run 32 rows at a
        time, or as many as the model says.
    products : bool
        As in `Calibration`.

    Returns
    -------
    Calibration
        By the names of the weights in `pack_onnx`, and in `open_weights`.

    Raises
    ------
    ImportError
        If onnx or onnxruntime is not installed.
    OSError
        If a file cannot be opened.
    ValueError
        If the model cannot be run on these inputs, has no weights of such nodes, or an input of a weight has NaN or
        infinity.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> rng = np.random.default_rng(0)
    >>> weights = {"fc.weight": rng.standard_normal((64, 64)).astype("f4")}
    >>> fo.export(weights, "model.onnx", to="onnx", graph=[fo.Layer("fc")])
    >>> calib = fo.calibrate_onnx("model.onnx", [{"x": rng.standard_normal((8, 64)).astype("f4")}])
    >>> calib
    Calibration(1 weights, 8 rows)
    >>> report = fo.pack_onnx("model.onnx", "small.onnx", bits=4, calibration=calib)
    >>> report.tensors[0].output_error < 0.1
    True
    """
    require_package("onnx")
    require_package("onnxruntime")
    from onnx import helper

    file = OnnxFile(Path(source))
    model = inlined(file.model, file.payloads)
    root = scope_of(model)
    found, _ = weights_of(constants_of(root))
    fed = {value.name for value in model.graph.input}
    reads: list[tuple[str, int, Use, str]] = []  # a weight, its columns, its node, the name of the node's input
    for name, one in found.items():
        for use, _ in one.uses:
            value = _input_of(use)
            if use.scope is root and value and (value in fed or not root.values[value].constant):
                reads.append((name, as_matrix(one.shape)[1], use, value))
    if not reads:
        raise ValueError(f"{file.path}: has no weights whose inputs can be seen")
    watched = type(model)()
    watched.CopyFrom(model)
    outputs = sorted({value for *_, value in reads} - fed)
    present = {output.name for output in watched.graph.output}
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs if name not in present)
    calib = Calibration(products=products)
    runs = 0
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(watched, file.payloads, path)
        session = _session(path, file.path)
        for feeds in _feeds(batches, model):
            with _naming(file.path):
                values = {**feeds, **dict(zip(outputs, session.run(outputs or None, feeds), strict=bool(outputs)))}
            for name, columns, use, value in reads:
                x = _rows(use, values[value])
                if x is not None and x.shape[-1] == columns:
                    calib.update(name, x)
            runs += 1
    if runs == 0:
        raise ValueError("batches: expected one or more, got none")
    return calib


def _input_of(use: Use) -> str:
    """Return the name of what a node multiplies the weight with, "" if that is not known."""
    node = use.node
    if node is None:
        return ""
    kind = node.op_type.removeprefix("Fused")
    if kind in ("MatMul", "Gemm"):
        return str(node.input[1 - use.place])
    return str(node.input[0]) if kind in ("Conv", "LSTM", "GRU", "RNN") and use.place == 1 else ""


def _rows(use: Use, x: Array) -> Array | None:
    """Return the rows that a node multiplies with the weight [out, in]; None if they do not have this form."""
    node = use.node
    assert node is not None
    kind = node.op_type.removeprefix("Fused")
    if kind == "Conv":
        return _patches(node, use, x)
    if kind in ("MatMul", "Gemm"):
        if x.ndim < 2:
            return x
        turned = bool(attribute(node, "transA" if use.place == 1 else "transB", 0))
        return np.swapaxes(x, -1, -2) if turned != (use.place == 0) else x
    return x


def _patches(node: NodeProto, use: Use, x: Array) -> Array | None:
    """Return the patches that a convolution multiplies with its kernels, some if there are many."""
    weight = use.scope.find(node.input[1])
    dims = x.ndim - 2
    size = attribute(node, "kernel_shape", []) or list(weight.shape[2:] if weight is not None else ())
    if dims < 1 or len(size) != dims:
        return None
    strides, dilations = (attribute(node, name, []) or [1] * dims for name in ("strides", "dilations"))
    group, pads = attribute(node, "group", 1), attribute(node, "pads", []) or [0] * (2 * dims)
    automatic = attribute(node, "auto_pad", b"NOTSET")
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilations, strict=True)]
    if automatic.startswith(b"SAME"):
        missing = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(x.shape[2:], strides, reach, strict=True)]
        upper = [(m // 2, m - m // 2) for m in missing]
        around = upper if automatic == b"SAME_UPPER" else [(b, a) for a, b in upper]
    else:
        around = list(zip(pads[:dims], pads[dims:], strict=True)) if automatic != b"VALID" else [(0, 0)] * dims
    padded = np.pad(x, [(0, 0), (0, 0), *around])
    axes = tuple(range(2, 2 + dims))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axes)  # [N, C, positions..., reach...]
    every = tuple(slice(None, None, s) for s in strides)
    inside = tuple(slice(None, None, d) for d in dilations)
    windows = windows[(slice(None), slice(None), *every, *inside)]
    positions = windows.shape[2 : 2 + dims]
    most = max(1, _PATCHES // max(1, x.shape[0] * group))
    step = max(1, math.ceil((math.prod(positions) / most) ** (1 / dims)))
    some = tuple(slice(step // 2 if n > step else 0, None, step) for n in positions)
    windows = windows[(slice(None), slice(None), *some)]
    channels = x.shape[1] // group
    split = windows.reshape(x.shape[0], group, channels, *windows.shape[2:])
    last = tuple(range(3 + dims, 3 + 2 * dims))
    ordered = split.transpose(0, 1, *range(3, 3 + dims), 2, *last)
    return ordered.reshape(-1, channels * math.prod(size))


def _feeds(
    batches: Iterable[Mapping[str, Array]] | Mapping[str, Array] | PathLike, model: ModelProto
) -> Iterator[dict[str, Array]]:
    """Give the inputs of each run."""
    if isinstance(batches, Mapping):
        batches = [batches]
    elif isinstance(batches, str | os.PathLike):
        yield from _parts(dict(open_weights(batches)), model)
        return
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected mappings from name to array, or a path, got {type(batches).__name__}")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(f"batches: expected mappings from name to array, got {shown(batch)}")
        yield {name: np.asarray(array) for name, array in batch.items()}


def _parts(arrays: dict[str, Array], model: ModelProto) -> Iterator[dict[str, Array]]:
    """Give some rows of all arrays at a time, if they have as many."""
    counts = {len(array) if array.ndim else -1 for array in arrays.values()}
    if len(counts) != 1 or min(counts) < 1:
        yield arrays
        return
    (rows,) = counts
    fixed = [
        value.type.tensor_type.shape.dim[0].dim_value
        for value in model.graph.input
        if value.name in arrays and value.type.tensor_type.shape.dim
    ]
    step = max(fixed, default=0) or _BATCH
    for begin, end in pairwise([*range(0, rows, step), rows]):
        yield {name: array[begin:end] for name, array in arrays.items()}


def _session(path: Path, source: Path) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with _naming(source):
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """Turn the errors of ONNX Runtime into a ValueError that names the model."""
    try:
        yield
    except Exception as error:  # its own kinds, by what failed
        if isinstance(error, (OSError, MemoryError)):
            raise
        text = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ValueError(f"{source}: ONNX Runtime cannot run it on these inputs: {text}") from error
