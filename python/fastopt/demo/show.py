"""The output of the demo: a table for the terminal, and a page with charts."""

import base64
import struct
import zlib
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastopt._svg import Bar, Panel, chart
from fastopt._text import printable, size_text
from fastopt.demo.run import Result, Summary, Variant
from fastopt.files.atomic import write_text


def time_text(us: float) -> str:
    """Format microseconds with about three digits."""
    value, unit = (us, "us") if us < 1000 else (us / 1000, "ms")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def ratio_text(plain: float, value: float) -> str:
    """Say how many times faster than plain NumPy something is, or slower."""
    return f"{plain / value:.1f}x faster" if value <= plain else f"{value / plain:.1f}x slower"


def rows_explained(summary: Summary) -> list[str]:
    """Return a line for each row of the table that says what it is."""
    same = "the same weights, bit for bit" if summary.same_weights else "other weights"
    packed = f"fastopt {summary.bits}-bit"
    return [
        "NumPy fp32: training, prediction and file in plain NumPy, with BLAS and an Adam without temporaries.",
        f"fastopt fp32: the same training with fo.Adam gives {same}.",
        f"{packed}: these weights in {summary.bits} bits; fo.linear multiplies by the packed bytes.",
        f"{packed}, pruned: {summary.sparsity:.0%} of the weights made zero, {summary.fine_tune_epochs} epochs of "
        "fine-tuning that keep the zeros, then packed.",
    ]


def network_text(summary: Summary) -> str:
    """Return the network and its training in a line."""
    layers = "-".join(map(str, summary.layers))
    threads = f"{summary.threads} thread{'s' * (summary.threads != 1)}"
    return (
        f"network {layers}, {summary.parameters:,} weights; {summary.train_images:,} images to train, "
        f"{summary.test_images:,} to test; {summary.epochs} epochs, {threads}"
    )


_Times = Callable[[Variant], float | None]
TIMES: dict[str, _Times] = {
    "Adam, a step": lambda v: v.step_us,
    "one image": lambda v: v.predict_us,
    "an image of 64": lambda v: v.predict_batch_us,
}


def print_table(summary: Summary) -> None:
    """Print the comparison to standard output.

    Parameters
    ----------
    summary : Summary
    """
    console = Console()
    console.print(Text(printable(summary.dataset), "bold"))
    console.print(Text(f"{network_text(summary)}\n"))
    plain = summary.variants[0]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("right", "file", *(name.replace(", ", "\n").replace("image ", "image\n") for name in TIMES)):
        table.add_column(column, justify="right", vertical="top")
    for v in summary.variants:
        cells = [Text(f"{v.accuracy:.1%}", "red" if v.accuracy < plain.accuracy - 0.01 else "")]
        smaller = f"\n{plain.file_bytes / v.file_bytes:.1f}x smaller" if 1.05 * v.file_bytes < plain.file_bytes else ""
        cells.append(Text(size_text(v.file_bytes) + smaller))
        for get in TIMES.values():
            cells.append(_time_cell(get(v), get(plain), v is plain))
        table.add_row(Text(v.name.replace(", ", ",\n  ")), *cells)
    console.print(table)
    console.print()
    for line in rows_explained(summary):
        console.print(Text(line, "dim"))
    console.print(
        Text("Times are medians of calls in turns. Batches and small layers are where NumPy's BLAS is strong.", "dim")
    )


def _time_cell(value: float | None, plain: float | None, is_plain: bool) -> Text:
    if value is None or plain is None:
        return Text("")
    if is_plain:
        return Text(time_text(value))
    return Text(f"{time_text(value)}\n{ratio_text(plain, value)}", "red" if value > plain else "")


# ---- the page ----------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>fastopt demo</title>
<style>
:root {{ color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2027; --dim: #5c6672; --alert: #c2410c; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #0d1013; --card: #14171b; --ink: #e6e9ed; --dim: #9aa4af; --alert: #f59e5b; }}
}}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 24px 16px 48px; }}
h1 {{ font-size: 22px; margin: 0; }} h2 {{ font-size: 17px; margin: 24px 0 8px; }}
p, li {{ color: var(--dim); overflow-wrap: anywhere; }} ul {{ padding-left: 20px; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }}
.charts svg {{ width: 100%; height: auto; }}
.images {{ display: flex; flex-wrap: wrap; gap: 12px; }}
figure {{ margin: 0; text-align: center; font-size: 13px; width: 76px; }}
figure img {{ width: 64px; height: 64px; image-rendering: pixelated; border-radius: 6px; }}
.wrong {{ color: var(--alert); }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{network}</p>
<div class="charts">{charts}</div>
<h2>The rows</h2>
<ul>{rows}</ul>
<h2>Test images, and what the pruned model in {bits} bits takes them for</h2>
<div class="images">{images}</div>
</main>
</body>
</html>
"""


def draw(result: Result, path: Path) -> None:
    """Write a page that needs no other file: charts, and images with the packed model's predictions.

    Parameters
    ----------
    result : Result
    path : Path
        Replaced when the page is complete.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    summary = result.summary
    figures = []
    for image, label, predicted in zip(result.images, result.labels, result.predictions, strict=True):
        data = base64.b64encode(_png(image)).decode()
        right, text = predicted == label, escape(printable(predicted))
        caption = text if right else f'<span class="wrong">{text}, is {escape(printable(label))}</span>'
        caption = f"<figcaption>{caption}</figcaption>"
        figures.append(f'<figure><img src="data:image/png;base64,{data}" alt="">{caption}</figure>')
    page = _PAGE.format(
        title=escape(printable(f"{summary.dataset}: the same network in plain NumPy and with fastopt")),
        network=escape(network_text(summary)),
        charts=_charts(summary),
        rows="".join(f"<li>{escape(line)}</li>" for line in rows_explained(summary)),
        bits=summary.bits,
        images="".join(figures),
    )
    write_text(path, page)


def _charts(summary: Summary) -> str:
    variants, plain = summary.variants, summary.variants[0]
    accuracy, sizes = [], []
    for v in variants:
        worse = v.accuracy < plain.accuracy - 0.01
        kind = "theirs" if v is plain else "ours"
        accuracy.append(Bar(v.name, v.accuracy, f"{v.accuracy:.1%}{', worse' * worse}", "loss" if worse else kind))
        smaller = f", {plain.file_bytes / v.file_bytes:.1f}x smaller" if 1.05 * v.file_bytes < plain.file_bytes else ""
        sizes.append(Bar(v.name, v.file_bytes, size_text(v.file_bytes) + smaller, kind))
    times = []
    titles = ("A step of Adam, all weights", "One image by itself", f"An image in a batch of {summary.predict_batch}")
    for title, get in zip(titles, TIMES.values(), strict=True):
        bars, base = [], get(plain)
        for v in variants:
            value = get(v)
            if value is None or base is None:
                continue
            ratio = "" if v is plain else f", {ratio_text(base, value)}"
            kind = "theirs" if v is plain else "loss" if value > base else "ours"
            bars.append(Bar(v.name, value, time_text(value) + ratio, kind))
        times.append(Panel(title, bars))
    return chart(
        "Accuracy and size", [Panel("Test images that are recognized", accuracy), Panel("File", sizes)]
    ) + chart("Time", times, ["Medians of calls in turns; shorter is faster."])


def _png(image: NDArray[np.float32]) -> bytes:
    """Return an image of values from 0 to 1, the largest black, as a PNG file of 8-bit greys."""
    grey = np.rint(255 * (1 - np.clip(image, 0, 1))).astype(np.uint8)
    rows, cols = grey.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), grey], axis=1)  # each starts with its filter, none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", cols, rows, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)
