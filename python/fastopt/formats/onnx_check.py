"""Run two ONNX models on the same inputs, and measure how far their outputs are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastopt._types import Array, PathLike
from fastopt.files.sources import open_weights
from fastopt.formats.common import require_package
from fastopt.formats.onnx_file import OnnxFile
from fastopt.formats.onnx_graph import Scope, Value, attribute, scope_of
from fastopt.tensors.error import Error, ErrorSums

if TYPE_CHECKING:
    from onnx import ValueInfoProto

_RUNS = 4
_LENGTH = 32  # of an axis whose length the model leaves open, but for the first


@dataclass(frozen=True)
class OutputReport:
    """The difference between an output of one model and that of another.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Its shape in the last run.
    error : Error
        The error over all runs, as in `QuantizedTensor.error`.
    same_top : float or None
        Fraction of the rows whose largest element is the same one; None for outputs of one column.
    """

    name: str
    shape: tuple[int, ...]
    error: Error
    same_top: float | None


def check_onnx(
    first: PathLike,
    second: PathLike,
    inputs: Mapping[str, Array] | Sequence[Mapping[str, Array]] | PathLike | None = None,
    *,
    runs: int = _RUNS,
    seed: int = 0,
) -> tuple[OutputReport, ...]:
    """Run two ONNX models in ONNX Runtime and compare their outputs.

    Parameters
    ----------
    first, second : path-like
        A model, and what it was packed to. Both have the same inputs and outputs.
    inputs : mapping from name to array, a sequence of these, or path-like, optional
        Real inputs say most. A path is that of a .npz file with an array for each input. Without any, floats are
        drawn from a normal distribution, indices of a table from its rows, and other integers are 1; axes of open
        length are 1, if they come first, or 32.
    runs : int
        How many random inputs are drawn.
    seed : int
        The seed of the random inputs.

    Returns
    -------
    tuple of OutputReport
        One for each output that is a tensor of numbers.

    Raises
    ------
    ImportError
        If onnx or onnxruntime is not installed.
    OSError
        If a file cannot be opened.
    ValueError
        If a model cannot be run, or the two do not have the same inputs and outputs.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> from fastopt.formats.onnx_check import check_onnx
    >>> weights = {"fc.weight": np.random.default_rng(0).standard_normal((64, 64)).astype("f4")}
    >>> fo.export(weights, "model.onnx", to="onnx", graph=[fo.Layer("fc")])
    >>> _ = fo.pack_onnx("model.onnx", "small.onnx", bits=8)
    >>> (output,) = check_onnx("model.onnx", "small.onnx")
    >>> output.name, output.error.relative < 0.01
    ('fc', True)
    """
    require_package("onnx")
    require_package("onnxruntime")
    first, second = Path(first), Path(second)
    feeds = _given(inputs) if inputs is not None else list(_drawn(OnnxFile(first), runs, seed))
    expected, found = _outputs(first, feeds), _outputs(second, feeds)
    if expected.keys() != found.keys():
        raise ValueError(f"{second}: expected the outputs {sorted(expected)}, got {sorted(found)}")
    return tuple(_compared(second, name, expected[name], found[name]) for name in expected)


def _given(inputs: Mapping[str, Array] | Sequence[Mapping[str, Array]] | PathLike) -> list[dict[str, Array]]:
    if isinstance(inputs, Mapping):
        return [dict(inputs)]
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        if not inputs or not all(isinstance(one, Mapping) for one in inputs):
            raise ValueError("inputs: expected one or more mappings from name to array")
        return [dict(one) for one in inputs]
    return [dict(open_weights(inputs))]


def _outputs(path: Path, feeds: list[dict[str, Array]]) -> dict[str, list[Array]]:
    """Return the outputs of a model by name, an array for each run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        results = [session.run(names, feed) for feed in feeds]
    except Exception as error:  # its own kinds, by what failed
        if isinstance(error, (OSError, MemoryError)):
            raise
        text = str(error).strip().splitlines()
        raise ValueError(
            f"{path}: ONNX Runtime cannot run it on these inputs: {text[0] if text else error!r}"
        ) from error
    found: dict[str, list[Array]] = {}
    for place, name in enumerate(names):
        arrays = [result[place] for result in results]
        if all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for array in arrays):
            found[name] = arrays
    return found


def _compared(path: Path, name: str, expected: list[Array], found: list[Array]) -> OutputReport:
    sums, same, rows = ErrorSums(), 0, 0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"{path}: output {name!r}: expected shape {theirs.shape}, got {ours.shape}")
        if theirs.size:
            sums.add(ours, theirs)
        if theirs.ndim and theirs.shape[-1] > 1 and theirs.size:
            equal = ours.argmax(axis=-1) == theirs.argmax(axis=-1)
            same, rows = same + int(equal.sum()), rows + equal.size
    return OutputReport(name, expected[-1].shape, sums.error(), same / rows if rows else None)


# ---- random inputs ------------------------------------------------------------------------------------------------


def _drawn(file: OnnxFile, runs: int, seed: int) -> Iterator[dict[str, Array]]:
    """Give inputs that fit the types and shapes that a model declares."""
    rng = np.random.default_rng(seed)
    scope = scope_of(file.model)
    constants = {tensor.name for tensor in file.model.graph.initializer}
    inputs = [value for value in file.model.graph.input if value.name not in constants]
    for _ in range(runs):
        yield {value.name: _draw(file, scope, value, rng) for value in inputs}


def _draw(file: OnnxFile, scope: Scope, value: ValueInfoProto, rng: np.random.Generator) -> Array:
    from onnx import helper

    what = f"{file.path}: input {value.name!r}"
    kind = value.type.tensor_type
    if not kind.elem_type:
        raise ValueError(f"{what} is no tensor; give inputs")
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if not kind.HasField("shape"):
        raise ValueError(f"{what} has no shape; give inputs")
    shape = [dim.dim_value or (_LENGTH if axis else 1) for axis, dim in enumerate(kind.shape.dim)]
    if dtype.kind in "iu":
        rows = _rows_of_table(scope.values[value.name])
        drawn = np.ones(shape, dtype) if rows is None else rng.integers(0, rows, shape)
        return np.asarray(drawn, dtype)
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    if dtype.kind not in "fV":
        raise ValueError(f"{what} is of {dtype}; give inputs")
    return rng.standard_normal(shape).astype(dtype)


def _rows_of_table(value: Value) -> int | None:
    """Return how many rows a table has that a value is an index of, or None if it is none."""
    for use in value.uses:
        node = use.node
        if node is None:
            continue
        if node.op_type == "Gather" and use.place == 1:
            table = use.scope.find(node.input[0])
            while table is not None and table.tensor is None and (passed := _passed_on(table)) is not None:
                table = passed
            if table is not None and table.tensor is not None and table.tensor.dims:
                return int(table.tensor.dims[attribute(node, "axis", 0)])
        elif node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten") and use.place == 0:
            rows = _rows_of_table(use.scope.values[node.output[0]])
            if rows is not None:
                return rows
    return None


def _passed_on(value: Value) -> Value | None:
    """Return what a node passes on to a value, None if it computes more."""
    node = next((node for node in value.scope.nodes if value.name in node.output), None)
    same = node is not None and node.op_type in ("Identity", "Cast")
    return value.scope.find(node.input[0]) if node is not None and same and node.input else None
