"""An HTML page about a packed model: sizes, errors and histograms.

The page is ``page.html`` with one JSON object in it; it needs no network, and names from files stay texts.
"""

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastopt._checks import as_matrix
from fastopt._text import percent_text, printable, size_text, storage_text
from fastopt._types import Array
from fastopt.cli.tables import decibel_text, ratio_text, to_json
from fastopt.files.atomic import write_text
from fastopt.models.examine import Difference, is_numeric
from fastopt.models.recipe import Recipe
from fastopt.models.report import Report
from fastopt.tensors.error import Error
from fastopt.tensors.packed import Weight, storage_of, unpacked
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.tensors.sparse import SparseTensor


def of_packing(
    source: Path,
    target: Path,
    report: Report,
    recipe: Recipe,
    before: Mapping[str, Weight],
    after: Mapping[str, Weight] | None,
) -> dict[str, Any]:
    """Return the content of the page about a packed model.

    Parameters
    ----------
    source, target : Path
    report : Report
    recipe : Recipe
    before : mapping from name to array
    after : mapping from name to array or packed tensor, or None
        None after a dry run.

    Returns
    -------
    dict
    """
    tensors = [
        {
            **_entry(t.name, t.shape, t.nbytes_before, t.nbytes, t.error, before, after),
            "description": storage_text(t.kind, t.bits, t.group_size, t.param_bits),
            "why": printable(t.reason),
        }
        for t in report.tensors
    ]
    tiles = [
        (size_text(report.nbytes), f"of {size_text(report.nbytes_before)}"),
        (f"{ratio_text(report).split()[0]}\u00d7", ratio_text(report).split()[-1]),
        (f"{report.bits_per_weight:.2f}", "bits per weight"),
        *_error_tiles(report.error),
    ]
    packed = sum(t.kind != "dense" for t in report.tensors)
    return {
        "title": printable(f"{source.name} \u2192 {target.name}"),
        "subtitle": f"{len(tensors)} tensors, {packed} packed, {len(tensors) - packed} kept as they are"
        + ("; a plan: nothing was written" if after is None else ""),
        "tiles": tiles,
        "tensors": tensors,
        "recipe": json.dumps(recipe.to_dict(), indent=2),
    }


def of_difference(
    first: Path, second: Path, difference: Difference, before: Mapping[str, Weight], after: Mapping[str, Weight]
) -> dict[str, Any]:
    """Return the content of the page about the differences of two models.

    Parameters
    ----------
    first, second : Path
    difference : Difference
    before, after : mappings from name to array, QuantizedTensor or SparseTensor

    Returns
    -------
    dict
    """
    tensors = []
    for t in difference.tensors:
        error = Error(t.rmse, t.relative, t.max, t.snr, t.cosine)
        described = storage_text(*storage_of(after[t.name]), getattr(after[t.name], "param_bits", None))
        tensors.append({**_entry(t.name, t.shape, *t.nbytes, error, before, after), "description": described})
    one, other = (sum(t.nbytes[i] for t in difference.tensors) for i in (0, 1))
    apart = len(difference.missing) + len(difference.extra) + len(difference.reshaped)
    return {
        "title": printable(f"{first.name} and {second.name}"),
        "subtitle": f"{len(tensors)} tensors that both have, {apart} that only one has or whose shapes differ",
        "tiles": [(size_text(one), "the first"), (size_text(other), "the second"), *_error_tiles(difference.total)],
        "tensors": tensors,
        "recipe": None,
    }


def _entry(
    name: str,
    shape: tuple[int, ...],
    nbytes_before: int,
    nbytes: int,
    error: Error | None,
    before: Mapping[str, Weight],
    after: Mapping[str, Weight] | None,
) -> dict[str, Any]:
    size = math.prod(shape)
    return {
        "name": printable(name),
        "shape": shape,
        "size": size,
        "bits_per_weight": 8 * nbytes / max(size, 1),
        "bytes_before": nbytes_before,
        "bytes_after": nbytes,
        **dict.fromkeys(Error._fields),
        **(error._asdict() if error else {}),
        "histogram": histogram(unpacked(before[name]), None if after is None else after[name]),
    }


def _error_tiles(error: Error | None) -> list[tuple[str, str]]:
    if error is None:
        return []
    return [
        (percent_text(error.relative), "relative error"),
        (decibel_text(error.snr), "SNR, dB"),
        (f"{error.cosine:.5f}", "cosine"),
    ]


_BINS = 120
_SHOWN = 8  # standard deviations from the mean
_SAMPLE = 1 << 17  # approximate number of values that a histogram counts


def histogram(before: Array, after: "Weight | None") -> dict[str, Any] | None:
    """Return the plot of a tensor: histograms of its values before and after, and the levels of its codes.

    Parameters
    ----------
    before : array
    after : array, QuantizedTensor or SparseTensor, or None
        The tensor after packing, of the same shape.

    Returns
    -------
    dict or None
        What JSON can hold; None if there is no finite value, or values have no order, as complex numbers.
    """
    if before.dtype.kind == "c" or not is_numeric(before.dtype):
        return None
    step = max(1, before.size // _SAMPLE)
    one = _sample(before, step)
    if not one.size:
        return None
    other = one[:0] if after is None else _sample(unpacked(after), step)
    mean, std = float(one.mean()), float(one.std())
    low, high = max(_least(one, other), mean - _SHOWN * std), min(-_least(-one, -other), mean + _SHOWN * std)
    if not low < high:
        low, high = low - 0.5, high + 0.5
    notes = [] if step == 1 else [f"{one.size:,} of {before.size:,} values are counted"]
    beyond = int(np.count_nonzero((one < low) | (one > high)))
    if beyond:
        notes.append(f"{beyond:,} further than {_SHOWN} standard deviations from the mean, to {np.abs(one).max():.3g}")
    if isinstance(after, SparseTensor) and other.size:
        notes.append(f"{np.count_nonzero(other == 0) / other.size:.1%} of the values are zero after, and not drawn")
        other = other[other != 0]
    q = after.values if isinstance(after, SparseTensor) else after
    return {
        "low": low,
        "high": high,
        "notes": notes,
        "before": np.histogram(one, _BINS, (low, high))[0].tolist(),
        "after": None if after is None else np.histogram(other, _BINS, (low, high))[0].tolist(),
        "grids": _grids(q) if isinstance(q, QuantizedTensor) else [],
    }


def _least(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(min(one.min(), other.min(initial=np.inf)))


def _sample(array: Array, step: int) -> NDArray[np.float64]:
    """Return the finite values of every n-th row, or every n-th value if there are too few rows, in float64."""
    rows, cols = as_matrix(array.shape)
    sample = array.reshape(rows, cols)[::step] if rows >= step else array.reshape(-1)[::step]
    values = sample.reshape(-1).astype(np.float64)
    return values[np.isfinite(values)]


def _grids(q: QuantizedTensor) -> list[dict[str, Any]]:
    """Return the levels of the groups with the smallest, the median and the largest range."""
    one_level = q.one_level()
    scale, minimum = (part.astype(np.float64).reshape(-1) for part in (one_level.scale, one_level.minimum))
    if not scale.size:
        return []
    by_range = np.argsort(scale, kind="stable")
    named = {"narrowest group": 0, "median group": scale.size // 2, "widest group": scale.size - 1}
    codes = np.arange(1 << q.bits)
    return [
        {
            "label": f"{label if scale.size > 1 else 'the grid'}: {1 << q.bits} levels, {scale[i]:.3g} apart",
            "levels": [float(f"{level:.6g}") for level in minimum[i] + scale[i] * codes],
        }
        for label, i in {label: by_range[place] for label, place in named.items()}.items()
        if scale.size > 1 or label == "median group"
    ]


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a page that needs no other file.

    Parameters
    ----------
    path : Path
        Replaced when the page is complete.
    content : mapping
        ``title``, ``subtitle``, ``tiles`` (pairs of a value and what it is), ``recipe`` (a text or None), and
        ``tensors``: for each a mapping with what the table shows, and ``histogram``.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    template = files("fastopt.cli").joinpath("page.html").read_text(encoding="utf-8")
    data = to_json(content).replace("<", "\\u003c")  # no name may close the script element that holds it
    write_text(path, template.replace("{{data}}", data))
