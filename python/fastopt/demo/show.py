"""The output of the demo: a table for the terminal, and a picture."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastopt._text import printable
from fastopt.demo.run import Result, Summary
from fastopt.files.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too: grey for NumPy, the others for fastopt.
_COLOURS = ("#767676", "#56B4E9", "#0072B2", "#009E73")
_INK = ("white", "black", "white", "white")
_WRONG = "#D55E00"


def print_table(summary: Summary) -> None:
    """Print the comparison to standard output.

    Parameters
    ----------
    summary : Summary
    """
    name = printable(summary.dataset)
    layers = "-".join(map(str, summary.layers))
    caption = [
        f"Network {layers}, {summary.parameters:,} parameters, Adam, {summary.epochs} epochs.",
        f"Pruned: {summary.sparsity:.0%} zeros, kept while fine-tuning, epochs: {summary.fine_tune_epochs}.",
        f"Medians in µs: an optimizer step; one prediction, alone and in a batch of {summary.predict_batch}.",
    ]
    if summary.same_weights:
        caption.append("The two fp32 trainings end in the same weights, bit for bit.")
    table = Table(
        title=Text(f"{name}: {summary.train_images:,} training and {summary.test_images:,} test images"),
        caption="\n".join(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for column in (
        "test\naccuracy",
        "file\nKiB",
        "\nratio",
        "step\nµs",
        "1 image\nµs",
        "batched\nµs",
    ):
        table.add_column(column, justify="right")
    full = summary.variants[0].file_bytes
    for v in summary.variants:
        table.add_row(
            v.name,
            f"{v.accuracy:.2%}",
            _short(v.file_bytes / 1024),
            f"{full / v.file_bytes:.1f}x",
            "" if v.step_us is None else _short(v.step_us),
            _short(v.predict_us),
            _short(v.predict_batch_us),
        )
    Console().print(table)


def _short(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def require_matplotlib() -> None:
    """Raise unless the picture can be drawn.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("the demo needs its extra: pip install 'fastopt[demo]'")


def draw(result: Result, path: Path) -> None:
    """Draw the comparison, and images with the packed model's predictions, to a PNG file.

    Parameters
    ----------
    result : Result
    path : Path
        Replaced when the picture is complete.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary = result.summary
    variants = summary.variants
    figure = Figure(figsize=(12, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever backend is configured
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.6, 1))[:, 0]
    above.suptitle(
        f"{summary.dataset}: the same network in plain NumPy and with fastopt", fontsize=14, fontweight="bold"
    )
    panels = above.subplots(1, 4, sharey=True)
    full = variants[0]
    _bars(panels[0], "test accuracy", [100 * v.accuracy for v in variants], [f"{v.accuracy:.1%}" for v in variants])
    _bars(
        panels[1],
        "file size",
        [v.file_bytes / 1024 for v in variants],
        [f"{v.file_bytes / 1024:,.0f} KiB ({_ratio(full.file_bytes, v.file_bytes)})" for v in variants],
    )
    _bars(
        panels[2],
        "optimizer step (Adam)",
        [v.step_us or 0 for v in variants],
        ["as fastopt fp32" if v.step_us is None else f"{v.step_us:,.0f} µs" for v in variants],
    )
    _bars(
        panels[3],
        "prediction of one image",
        [v.predict_us for v in variants],
        [f"{v.predict_us:,.0f} µs" for v in variants],
    )
    panels[0].set_yticks(range(len(variants)), [v.name for v in variants], fontsize=11)
    panels[0].invert_yaxis()

    below.suptitle(f"Test images, and the predictions of the {summary.bits}-bit pruned model", fontsize=11)
    for axes, image, label, predicted in zip(
        below.subplots(1, len(result.images), squeeze=False)[0],
        result.images,
        result.labels,
        result.predictions,
        strict=True,
    ):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        right = predicted == label
        text = predicted if right else f"{predicted}\n(is {label})"
        axes.set_xlabel(text, fontsize=10, color="black" if right else _WRONG)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _ratio(full: int, size: int) -> str:
    return f"{full / size:.0f}x smaller" if full > 1.5 * size else "1x"


def _bars(axes: "Axes", title: str, values: list[float], texts: list[str]) -> None:
    """Draw horizontal bars with their values at the end."""
    axes.barh(range(len(values)), values, color=_COLOURS, height=0.62)
    top = max(values)
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        inside = value > 0.5 * top
        axes.annotate(
            text,
            (value, i),
            xytext=(-5 if inside else 5, 0),
            textcoords="offset points",
            va="center",
            ha="right" if inside else "left",
            fontsize=10,
            color=_INK[i] if inside else "black",
        )
    axes.set_title(title, fontsize=12)
    axes.set_xlim(0, 1.02 * top)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
