"""The options of ``fastopt pack --eval``: the user's own score decides about bits."""

import importlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fastopt.cli.app import progress, say
from fastopt.cli.options import SCORING
from fastopt.files.sources import open_weights
from fastopt.files.weights import Weights
from fastopt.formats.onnx_pack import pack_onnx, weights_to_pack
from fastopt.models.choose import Sizes
from fastopt.models.model import PackedModel, pack
from fastopt.models.recipe import Recipe
from fastopt.models.search import require_matplotlib, search_sized

Eval = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="CODE",
        rich_help_panel=SCORING,
        help="Search the bits of each tensor for the smallest model whose score stays within --budget. "
        "MODULE:FUNCTION is called with a PackedModel, or with the path of an .onnx model; a command with {}, such as "
        "'python score.py {}', is run with the path of a packed file. The score is the number that the function "
        "returns, or that the command prints in its last line. Larger is better.",
        show_default=False,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="LOSS", rich_help_panel=SCORING, help="With --eval: how much of the score may be lost, as 0.01 or 1%."
    ),
]
Minimize = Annotated[
    bool, typer.Option("--minimize", rich_help_panel=SCORING, help="With --eval: a smaller score is better.")
]
Evaluations = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=SCORING,
        help="With --eval: the most whole models to score, after one for each tensor; 8 by default.",
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=SCORING,
        help="With --eval: keep the scores in this JSON file; an interrupted search goes on where it was.",
        show_default=False,
    ),
]
Chart = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=SCORING,
        help="With --eval: draw the scores to a .svg or .png file (needs matplotlib).",
        show_default=False,
    ),
]

_FUNCTION = re.compile(r"[\w.]+:\w+")


def searched(
    model: Path, output: Path, recipe: Recipe, code: str, chart: Path | None, onnx: dict[str, Any], **options: Any
) -> Recipe:
    """Return the recipe that the search finds, and print its table to stderr. `onnx` has options of `pack_onnx`."""
    is_onnx = output.suffix == ".onnx"
    if chart is not None:
        require_matplotlib()  # fail before the work, not after it
    with _candidates(is_onnx) as path, progress() as notify:

        def told(done: int, total: int, note: str) -> None:
            notify("search", done, total, note)

        def pack_for_path(chosen: Recipe) -> Path:
            if is_onnx:
                pack_onnx(model, path, chosen, **onnx)
            else:
                pack(weights, chosen).save(path)
            return path

        weights: Weights
        weights, sizes = weights_to_pack(model, **onnx) if is_onnx else (open_weights(model), Sizes())
        evaluate, takes_path = _evaluate_of(code)
        make: Callable[[Recipe], PackedModel | Path] = partial(pack, weights)
        if takes_path or is_onnx:
            make = pack_for_path
        found = search_sized(weights, evaluate, recipe, make, sizes, notify=told, packing=onnx, **options)
    for line in str(found).splitlines():
        say(line, err=True)  # stdout belongs to the report
    if chart is not None:
        found.chart(chart)
    return found.recipe


@contextmanager
def _candidates(is_onnx: bool) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fastopt-") as folder:
        yield Path(folder) / ("model.onnx" if is_onnx else "model.safetensors")


def _evaluate_of(code: str) -> tuple[Callable[[Any], float], bool]:
    """Return the function that scores a model, and whether it wants the path of a file."""
    if _FUNCTION.fullmatch(code):
        return _function(code), False
    if "{}" not in code:
        raise typer.BadParameter(f"--eval: expected MODULE:FUNCTION, or a command with {{}}, got {code!r}")
    words = shlex.split(code)

    def run(path: Path) -> float:
        command = [word.replace("{}", str(path)) for word in words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ValueError(f"eval: the command ended with exit code {done.returncode}")
        last = (done.stdout.strip().splitlines() or [""])[-1]
        try:
            return float(last)
        except ValueError:
            raise ValueError(f"eval: expected a number in the last line of output, got {last!r}") from None

    return run, True


def _function(code: str) -> Callable[[Any], float]:
    module, _, name = code.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` would
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"--eval: {error}") from error
    if not callable(found):
        raise typer.BadParameter(f"--eval: {code} is not a function")
    function: Callable[[Any], float] = found
    return function
