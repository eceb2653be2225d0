"""Reports of packing: sizes and errors of each tensor and of the whole model."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, Literal

import numpy as np

from fastopt._text import fitted_table, html_table, percent_text, printable, shape_text, size_text, storage_text
from fastopt._types import FLOATS, Array
from fastopt.models.recipe import Recipe
from fastopt.tensors.calibration import InputSums
from fastopt.tensors.error import Error, ErrorSums
from fastopt.tensors.packed import PackedTensor, Weight, storage_of, unpacked

_OUTPUTS = 256  # the most outputs of a tensor whose error is measured


@dataclass(frozen=True)
class TensorReport:
    """The result of packing one tensor.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : str
        The dtype before it was packed.
    kind : "dense", "quantized", "sparse" or "sparse+quantized"
    bits, group_size : int or None
        Those of the codes, as in `QuantizedTensor`.
    density : float
        Fraction of the weights that is stored.
    bits_per_weight : float
        Bits stored for each weight, all parts included.
    nbytes_before, nbytes : int
        A tensor that was packed before counts the bytes that it was stored in.
    error : Error or None
        The error against the original, if that is known and of a float type.
    reason : str
        The part of the recipe that chose this, or the reason why the tensor was not packed.
    output_error : float or None
        If the tensor was calibrated: the root mean square error of its outputs on these inputs, divided by the root
        mean square of the outputs. If `Calibration` summed no products, inputs count as uncorrelated.
    param_bits : int or None
        The bits of the codes of scale and minimum, as in `QuantizedTensor`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Literal["dense", "quantized", "sparse", "sparse+quantized"]
    bits: int | None
    group_size: int | None
    density: float
    bits_per_weight: float
    nbytes_before: int
    nbytes: int
    error: Error | None
    reason: str
    output_error: float | None = None
    param_bits: int | None = None


@dataclass(frozen=True, repr=False)
class Report:
    """The result of packing a model: each tensor, and the totals.

    Attributes
    ----------
    tensors : tuple of TensorReport
    error : Error or None
        The error of all tensors together whose error is known.
    recipe : Recipe or None
        The recipe that packed them, with the bits that were chosen for a target.
    """

    tensors: tuple[TensorReport, ...]
    error: Error | None
    recipe: Recipe | None = None

    @property
    def nbytes_before(self) -> int:
        """Bytes of all tensors before they were packed."""
        return sum(tensor.nbytes_before for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; a file has some more for its header."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight of all tensors."""
        return 8 * self.nbytes / max(sum(math.prod(tensor.shape) for tensor in self.tensors), 1)

    def __repr__(self) -> str:
        packed = sum(tensor.kind != "dense" for tensor in self.tensors)
        error = "" if self.error is None else f", relative error {self.error.relative:.3g}"
        return (
            f"Report({len(self.tensors)} tensors, {packed} packed, {self.nbytes_before:,} -> {self.nbytes:,} bytes, "
            f"{self.bits_per_weight:.2f} bits per weight{error})"
        )

    def __str__(self) -> str:
        """Return a table of the tensors that fits the terminal, and the totals in its last line.

        Where the table has no room for the reasons, a line for each reason follows it.
        """
        room = get_terminal_size().columns
        table, columns = fitted_table(self._columns(), self._rows(), room, ("why", "shape", "output error"))
        kept = [] if "why" in columns else kept_lines(self)
        return "\n".join([table, *(line for text in [*kept, repr(self)] for line in wrap(text, max(room, 40)))])

    def _repr_html_(self) -> str:
        return html_table(repr(self), self._columns(), self._rows())

    def _columns(self) -> list[str]:
        outputs = any(t.output_error is not None for t in self.tensors)
        return ["tensor", "shape", "stored", "bits/w", "size", "error", *["output error"] * outputs, "why"]

    def _rows(self) -> list[list[str]]:
        outputs = any(t.output_error is not None for t in self.tensors)
        return [
            [
                printable(t.name),
                shape_text(t.shape),
                storage_text(t.kind, t.bits, t.group_size, t.param_bits),
                f"{t.bits_per_weight:.2f}",
                size_text(t.nbytes),
                percent_text(t.error and t.error.relative),
                *[percent_text(t.output_error)] * outputs,
                printable(t.reason),
            ]
            for t in self.tensors
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a plain dict; numbers that are not finite become None, for JSON.

        Returns
        -------
        dict
        """
        return {
            "nbytes_before": self.nbytes_before,
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "error": _plain_error(self.error),
            "tensors": [
                {**asdict(tensor), "shape": list(tensor.shape), "error": _plain_error(tensor.error)}
                for tensor in self.tensors
            ],
        }


def kept_lines(report: Report) -> list[str]:
    """Return a line for each reason why tensors were not packed."""
    kept: dict[str, list[int]] = {}
    for t in report.tensors:
        if t.kind == "dense" and t.reason:
            kept.setdefault(re.sub(r"^\d+ weights, ", "", t.reason), []).append(t.nbytes)
    return [
        f"kept as they are: {len(n)} tensor{'s' * (len(n) != 1)}, {size_text(sum(n))} ({printable(reason)})"
        for reason, n in kept.items()
    ]


def _plain_error(error: Error | None) -> dict[str, float | None] | None:
    if error is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in error._asdict().items()}


class Reporter:
    """Collects a `Report`, tensor by tensor."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self._recipe = recipe
        self._tensors: list[TensorReport] = []
        self._by_name: dict[str, TensorReport] = {}
        self._sums = ErrorSums()
        self._measured = False

    def add(
        self,
        name: str,
        tensor: Weight,
        original: Array | None,
        reason: str,
        nbytes: int | None = None,
        *,
        nbytes_before: int | None = None,
    ) -> None:
        """Add a tensor as it is stored; with the original its error is measured.

        `nbytes` are those in the file, and `nbytes_before` those in the source, if they are not those of the arrays.
        """
        inputs = None
        if self._recipe is not None and isinstance(tensor, PackedTensor):
            inputs = self._recipe.inputs_of(name)
        self.add_measured(*measured(name, tensor, original, reason, nbytes, nbytes_before=nbytes_before, inputs=inputs))

    def add_measured(self, report: TensorReport, sums: ErrorSums | None) -> None:
        """Add the report of a tensor, with the sums of its error if that was measured."""
        if sums is not None:
            self._sums += sums
            self._measured = True
        self._add(report)

    def add_planned(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        kind: Literal["dense", "quantized", "sparse", "sparse+quantized"],
        nbytes: int,
        reason: str,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        density: float = 1.0,
        error: Error | None = None,
        nbytes_before: int | None = None,
        param_bits: int | None = None,
    ) -> None:
        """Add a tensor that was not packed, from its planned storage."""
        before = math.prod(shape) * dtype.itemsize if nbytes_before is None else nbytes_before
        per_weight = bits_per_weight(nbytes, shape)
        self._add(
            TensorReport(
                name,
                shape,
                dtype.name,
                kind,
                bits,
                group_size,
                density,
                per_weight,
                before,
                nbytes,
                error,
                reason,
                param_bits=param_bits,
            )
        )

    def _add(self, report: TensorReport) -> None:
        self._tensors.append(report)
        self._by_name[report.name] = report

    def add_tied(self, name: str, to: str) -> None:
        """Add a name of a tensor that is stored under another one; it takes no bytes."""
        first = self._by_name[to]
        reason = f"tied to {to}"
        self._tensors.append(replace(first, name=name, nbytes_before=0, nbytes=0, bits_per_weight=0.0, reason=reason))

    def report(self) -> Report:
        """Return the report of all tensors that were added."""
        return Report(tuple(self._tensors), self._sums.error() if self._measured else None, self._recipe)


def measured(
    name: str,
    tensor: Weight,
    original: Array | None,
    reason: str,
    nbytes: int | None = None,
    *,
    nbytes_before: int | None = None,
    inputs: InputSums | None = None,
) -> tuple[TensorReport, ErrorSums | None]:
    """Return the report of a tensor as `Reporter.add` adds it, and the sums of its error.

    With sums over its inputs, the error of its outputs is measured too.
    """
    sums = None if original is None else _error_sums(tensor, original)
    kind, bits, group_size = storage_of(tensor)
    stored = tensor.nbytes if nbytes is None else nbytes
    before = math.prod(tensor.shape) * tensor.dtype.itemsize if nbytes_before is None else nbytes_before
    density = tensor.density if isinstance(tensor, PackedTensor) else 1.0
    report = TensorReport(
        name,
        tensor.shape,
        tensor.dtype.name,
        kind,
        bits,
        group_size,
        density,
        bits_per_weight(stored, tensor.shape),
        before,
        stored,
        None if sums is None else sums.error(),
        reason,
        None if original is None or inputs is None else _output_error(tensor, original, inputs),
        getattr(tensor, "param_bits", None),
    )
    return report, sums


def _output_error(tensor: Weight, original: Array, inputs: InputSums) -> float:
    """Return the relative error of the outputs of a tensor, measured on at most `_OUTPUTS` of its rows."""
    step = max(1, -(-len(original) // _OUTPUTS)) if original.ndim > 1 else 1
    noise, signal = inputs.output_error(original[::step], unpacked(tensor)[::step])
    return math.sqrt(noise / signal) if signal > 0 else (0.0 if noise == 0 else math.inf)


def bits_per_weight(nbytes: int, shape: tuple[int, ...]) -> float:
    """Return the bits stored for each weight of a tensor of this shape."""
    return 8 * nbytes / max(math.prod(shape), 1)


def _error_sums(tensor: Weight, original: Array) -> ErrorSums | None:
    """Return the sums of the error of a tensor, None if it is not of a float type."""
    if tensor.dtype.name not in FLOATS:
        return None
    if tensor.shape != original.shape:
        raise ValueError(f"weights: expected shape {tensor.shape}, got {original.shape}")
    if isinstance(tensor, PackedTensor):
        return tensor.error_sums(original)
    sums = ErrorSums()
    sums.add(tensor, original)
    return sums
