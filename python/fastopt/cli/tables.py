"""Output of the commands on models: tables for the terminal, or JSON."""

import json
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastopt._text import percent_text, printable, printable_json, shape_text, size_text, storage_text, text_table
from fastopt.formats.c_net import Cost
from fastopt.formats.onnx_check import OutputReport
from fastopt.models.examine import Difference, TensorFacts
from fastopt.models.recipe import PACKED_BEFORE, Recipe
from fastopt.models.report import Report, kept_lines
from fastopt.tensors.error import Error

# ---- numbers as texts --------------------------------------------------------------------------------------------


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def decibel_text(snr: float) -> str:
    """Format a signal-to-noise ratio; "exact" if there is no noise."""
    return "exact" if snr == math.inf else f"{snr:.1f}"


# ---- JSON --------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """Return one JSON object in one line of characters that any terminal shows; NaN and infinity become null."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
    return printable_json(text if _is_utf8(sys.stdout) else json.dumps(plain(value), allow_nan=False))


def _is_utf8(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")


def plain(value: Any) -> Any:
    """Convert a part of a report to dicts, lists, texts and finite numbers; other numbers become None."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Error):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- tables ------------------------------------------------------------------------------------------------------

_UNBOUNDED = 10_000  # columns of a file or a pipe: nothing is cut, and each line has the full name
_NAME = 32  # columns that are reserved for the names of tensors, if they need them


class _Column(NamedTuple):
    head: str
    text: Callable[[Any], str]
    rank: int = 0  # a terminal that is too narrow omits the columns of the highest rank


def layer_of(name: str) -> str:
    """Return the part of a tensor's name up to a number, such as "encoder.layer.0"; "" if there is none."""
    match = re.match(r"(.*?\.\d+)\.", f".{name}")
    return match[1][1:] if match else ""


def _by_name(row: Any) -> list[tuple[int, int, str]]:
    """Return a key that sorts layer 10 after layer 9."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", row.name)]


def _tail(name: str, room: int) -> str:
    """Shorten a long name to its end, which tells more than its beginning."""
    return name if len(name) <= room else f"…{name[1 - room :]}"


def _console() -> Console:
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNBOUNDED
    return console


def _print(console: Console, columns: Sequence[_Column], rows: Sequence[Any]) -> None:
    """Print `rows` sorted by name, each under its layer, with the columns that fit."""
    lines: list[tuple[str, Any]] = []
    for layer, group in groupby(sorted(rows, key=_by_name), lambda row: layer_of(row.name)):
        members = list(group)
        layer = printable(layer)
        under = layer if len(members) > 1 and console.width < _UNBOUNDED else ""
        lines += [(under, None)] if under else []
        lines += [
            (f"  {name[len(under) + 1 :]}" if under else name, row)
            for name, row in ((printable(row.name), row) for row in members)
        ]
    widths = {column: 2 + max(len(text) for text in (column.head, *map(column.text, rows))) for column in columns}
    shown, longest = list(columns), max((len(name) for name, row in lines if row is not None), default=0)
    while sum(widths[column] for column in shown) + min(longest, _NAME) > console.width:
        last = max(shown, key=lambda column: column.rank)
        if last.rank == 0:
            break
        shown.remove(last)
    room = max(_NAME // 2, console.width - sum(widths[column] for column in shown))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("tensor", no_wrap=True)
    for column in shown:
        table.add_column(column.head, justify="right", no_wrap=True)
    for name, row in lines:
        # Names come from files, so they must not be read as markup.
        cells = [] if row is None else [Text(printable(column.text(row))) for column in shown]
        table.add_row(Text(_tail(name, room), style="bold" if row is None else ""), *cells)
    console.print(table)


def print_facts(file: Path, facts: Sequence[TensorFacts], recipe: Recipe | None = None) -> None:
    """Print statistics of the tensors of a file.

    Parameters
    ----------
    file : Path
    facts : sequence of TensorFacts
    recipe : Recipe, optional
        The recipe that packed them.
    """
    console = _console()
    columns = (
        _Column("shape", lambda t: shape_text(t.shape), 4),
        _Column("dtype", lambda t: t.dtype, 6),
        _Column("stored", lambda t: storage_text(t.kind, t.bits, t.group_size, t.param_bits), 3),
        _Column("bits/w", lambda t: _short(t.bits_per_weight), 2),
        _Column("size", lambda t: size_text(t.nbytes)),
        _Column("min", lambda t: _short(t.minimum), 1),
        _Column("max", lambda t: _short(t.maximum), 1),
        _Column("std", lambda t: _short(t.std), 5),
        _Column("zeros", lambda t: percent_text(t.zeros / max(t.size, 1)), 5),
        _Column("> 6 std", lambda t: f"{t.outliers:,}"),
        _Column("bits", lambda t: str(t.suggested_bits or "")),
    )
    if facts:
        _print(console, columns, facts)
    lines = facts_lines(file, facts)
    if recipe is not None:
        changed = {name: value for name, value in recipe.to_dict().items() if value != Recipe().to_dict()[name]}
        lines.append(f"recipe: {json.dumps(changed, ensure_ascii=False)}")
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)  # the terminal wraps it; copied text stays one line


def facts_lines(file: Path, facts: Sequence[TensorFacts]) -> list[str]:
    """Return the summary of all tensors, and the command that would pack them."""
    size, nbytes = sum(t.size for t in facts), sum(t.nbytes for t in facts)
    lines = [f"{len(facts)} tensors, {size:,} values, {size_text(nbytes)}, {8 * nbytes / max(size, 1):.2f} bits each"]
    lines += [f"{t.name}: {t.non_finite:,} values are NaN or infinite" for t in facts if t.non_finite]
    wanted = Counter[int]()
    for t in facts:
        if t.suggested_bits:
            wanted[t.suggested_bits] += t.size
    if wanted:
        bits = wanted.most_common(1)[0][0]
        others = [t for t in facts if t.suggested_bits not in (None, bits)]
        parts = ["fastopt", "pack", str(file), "-o", f"{file.stem}-packed.safetensors", "--bits", str(bits)]
        for t in others[:3]:
            parts += ["--override", f"{t.name}:bits={t.suggested_bits}"]
        lines.append(f"suggested: {shlex.join(parts)}{' ...' if len(others) > 3 else ''}")
    return lines


def print_report(report: Report) -> None:
    """Print how each tensor of a model was packed; those kept for the same reason share a row.

    Parameters
    ----------
    report : Report
    """
    console = _console()
    packed = [t for t in report.tensors if t.kind != "dense"]
    columns = [
        _Column("shape", lambda t: shape_text(t.shape), 4),
        _Column("stored", lambda t: storage_text(t.kind, t.bits, t.group_size, t.param_bits)),
        _Column("bits/w", lambda t: f"{t.bits_per_weight:.2f}", 2),
        _Column("before", lambda t: size_text(t.nbytes_before), 3),
        _Column("after", lambda t: size_text(t.nbytes)),
        _Column("error", lambda t: percent_text(t.error and t.error.relative)),
        _Column("max", lambda t: _short(t.error and t.error.max), 1),
        _Column("SNR dB", lambda t: decibel_text(t.error.snr) if t.error else "", 1),
        _Column("cosine", lambda t: f"{t.error.cosine:.5f}" if t.error else "", 6),
    ]
    if any(t.output_error is not None for t in packed):
        columns.append(_Column("output error", lambda t: percent_text(t.output_error)))
    if packed:
        _print(console, columns, packed)
    for line in report_lines(report):
        console.print(Text(printable(line)), soft_wrap=True)  # the terminal wraps it; copied text stays one line


def report_lines(report: Report) -> list[str]:
    """Return the summary: which tensors were kept and why, and the size and error of all."""
    lines = kept_lines(report)
    calibrated = [t.output_error is not None for t in report.tensors if t.kind != "dense"]
    if any(calibrated) and not all(calibrated):
        lines.append(f"packed without calibration: {calibrated.count(False)} tensors")
    if before := sum(t.reason.endswith(PACKED_BEFORE) for t in report.tensors):
        lines.append(
            f"packed before: {before} tensor{'s' * (before != 1)}; sizes and errors are relative to what they were"
        )
    total = f"{size_text(report.nbytes_before)} -> {size_text(report.nbytes)} ({ratio_text(report)})"
    lines.append(f"{total}, {report.bits_per_weight:.2f} bits per weight")
    if report.error:
        lines.append(_error_text(report.error))
    return lines


def print_outputs(outputs: Sequence[OutputReport]) -> None:
    """Print how far the outputs of two ONNX models are apart.

    Parameters
    ----------
    outputs : sequence of OutputReport
    """
    columns = (
        _Column("shape", lambda t: shape_text(t.shape), 4),
        _Column("error", lambda t: percent_text(t.error.relative)),
        _Column("max", lambda t: _short(t.error.max), 1),
        _Column("SNR dB", lambda t: decibel_text(t.error.snr), 1),
        _Column("cosine", lambda t: f"{t.error.cosine:.6f}", 3),
        _Column("same top", lambda t: "" if t.same_top is None else percent_text(t.same_top), 2),
    )
    console = _console()
    console.print(Text("outputs, of both models in ONNX Runtime:"))
    _print(console, columns, outputs)


def ratio_text(report: Report) -> str:
    """Return how much smaller or larger a model became."""
    small, large = sorted((report.nbytes_before, report.nbytes))
    return f"{large / max(small, 1):.2f} times {'larger' if report.nbytes > report.nbytes_before else 'smaller'}"


def print_difference(difference: Difference) -> None:
    """Print the differences between two models.

    Parameters
    ----------
    difference : Difference
    """
    console = _console()
    columns = (
        _Column("shape", lambda t: shape_text(t.shape), 4),
        _Column("first", lambda t: size_text(t.nbytes[0]), 2),
        _Column("second", lambda t: size_text(t.nbytes[1])),
        _Column("error", lambda t: percent_text(t.relative)),
        _Column("rmse", lambda t: _short(t.rmse), 5),
        _Column("max", lambda t: _short(t.max), 1),
        _Column("SNR dB", lambda t: decibel_text(t.snr), 1),
        _Column("cosine", lambda t: f"{t.cosine:.6f}", 6),
    )
    different = [t for t in difference.tensors if t.different]
    if different:
        _print(console, columns, different)
    for line in difference_lines(difference):
        console.print(Text(printable(line)), soft_wrap=True)  # the terminal wraps it; copied text stays one line


def difference_lines(difference: Difference) -> list[str]:
    """Return the summary of the differences between two models."""
    equal = sum(t.different == 0 for t in difference.tensors)
    lines = [f"{equal} of {len(difference.tensors)} tensors that both have are equal"]
    if equal < len(difference.tensors):
        first, second = (sum(t.nbytes[i] for t in difference.tensors) for i in (0, 1))
        lines.append(f"{size_text(first)} and {size_text(second)}; {_error_text(difference.total)}")
    pairs = Counter(t.dtypes for t in difference.tensors if t.dtypes[0] != t.dtypes[1])
    lines += [f"other dtype: {count} tensors, {one} and {other}" for (one, other), count in pairs.items()]
    lines += [f"only in the first: {name}" for name in difference.missing]
    lines += [f"only in the second: {name}" for name in difference.extra]
    lines += [
        f"other shape: {name}, {shape_text(one)} and {shape_text(other)}" for name, one, other in difference.reshaped
    ]
    return lines


def _error_text(error: Error) -> str:
    if error.rmse == 0:
        return "no error"
    return f"relative error {percent_text(error.relative)}, SNR {decibel_text(error.snr)} dB, cosine {error.cosine:.6f}"


def cost_table(cost: Cost) -> str:
    """Return the cost of each operation of a network in C, and of all."""
    rows = [
        [step.name, step.call, shape_text(step.shape[1:]), f"{step.flash:,}", f"{step.macs:,}"] for step in cost.steps
    ]
    rows.append(["all", "", "", f"{cost.flash:,}", f"{cost.macs:,}"])
    head = ["node", "function", "output", "flash bytes", "multiply-adds"]
    ram = f"scratch {cost.scratch:,} bytes, x {cost.input_bytes:,}, y {cost.output_bytes:,}"
    return f"{text_table([head, *rows], right=(3, 4))}\nRAM: {ram}; the code comes on top of flash"
