"""The options that commands on models share, and what their texts mean."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastopt.models.recipe import Options
from fastopt.models.shrinking import Layer


class Fit(str, Enum):
    """How scale and minimum are found."""

    minmax = "minmax"
    lsq = "lsq"


Source = Annotated[
    Path,
    typer.Argument(
        help="A .safetensors file, the .index.json of one in shards, a folder with either, .npz, .npy or a folder of "
        ".npy files, or a state dict of torch (.pt, .pth, .bin; needs torch).",
        show_default=False,
    ),
]
Target = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="The safetensors file to write; it appears when it is complete. It may be the input itself. "
        "With a name that ends in .index.json, a file for each shard of the input.",
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Only tensors whose names match; may be repeated.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Keep tensors whose names match; may be repeated.")
]
MinSize = Annotated[int | None, typer.Option(help="Keep tensors of fewer weights; 4096 if not given.")]
Sparsity = Annotated[float | None, typer.Option(help="Share of weights to prune, of each tensor.")]
Threshold = Annotated[float | None, typer.Option(help="Prune weights of at most this magnitude.")]
Pattern = Annotated[
    str | None, typer.Option(metavar="N:M|1x16", help="Keep N of each M weights, as 2:4, or whole blocks of 16.")
]
Fast = Annotated[
    bool,
    typer.Option("--fast", help="onnx: multiply by MatMulNBits, which is ONNX Runtime's own."),
]
AccuracyLevel = Annotated[
    int | None, typer.Option(help="onnx, with --fast: 0 multiplies in float32, 4 rounds activations to int8.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and the sizes, and write nothing.")]
Html = Annotated[
    Path | None,
    typer.Option(help="Write a page for the browser: sizes, errors, histograms with their grids.", show_default=False),
]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that the command line gives."""
    return {name: value for name, value in options.items() if value is not None}


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Let an option out of range end as wrong usage does."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


_GROUPS = {"row": -1, "tensor": None, "auto": "auto"}
_OVERRIDE = re.compile(rf"(.+?):((?:{'|'.join(f.name for f in fields(Options))})=.*)")


def group_size_of(text: str) -> Any:
    """Return the group size that a number, row or tensor means."""
    if text in _GROUPS:
        return _GROUPS[text]
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"group_size: expected a number, row or tensor, got {text!r}") from None


def layer_of(text: str) -> Layer:
    """Return the layer of ``NAME`` or ``NAME:ACTIVATION``."""
    name, _, activation = text.partition(":")
    return Layer(name, activation=activation or None)


def override_of(text: str) -> tuple[str, dict[str, Any]]:
    """Return the pattern and the options of ``GLOB:OPTION=VALUE,...``."""
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"--override: expected GLOB:OPTION=VALUE,... as '*embed*:bits=8', got {text!r}")
    options: dict[str, Any] = {}
    for part in match[2].split(","):
        name, _, value = part.partition("=")
        options[name] = group_size_of(value) if name == "group_size" else _value(value)
    return match[1], options


def _value(text: str) -> Any:
    """Return what a value means: none, a number, or a text."""
    if text == "none":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
