"""The commands, their options, and how they end.

Status 0: done. 1: failed, with one line on stderr. 2: called wrongly. 130: interrupted.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from fastopt import __version__


class _Commands(TyperGroup):
    """A group whose commands end with one line, not a traceback, where the user can do something about it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # a closed pipe is ended quietly by the caller
            raise
        except (OSError, ValueError, ImportError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"fastopt: {_one_line(error)}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if ctx.params["debug"]:
                raise
            typer.echo("fastopt: interrupted", err=True)
            raise typer.Exit(130) from None


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastopt {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Examples:\n\nfastopt demo\n\nfastopt demo --data /usr/share/datasets/fashion-mnist\n\nfastopt bench --json"
)
def fastopt(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Optimizer steps, low-bit quantization and pruning for NumPy, at the speed of the memory bus."""


@app.command(
    epilog="Examples:\n\nfastopt demo\n\n"
    "fastopt demo --data /usr/share/datasets/fashion-mnist --out results\n\n"
    "fastopt demo --json | jq .variants"
)
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with MNIST-style idx or idx.gz files, instead of scikit-learn's digits."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the model and the picture.")] = Path(),
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    as_json: Json = False,
) -> None:
    """Train, prune, fine-tune and pack a classifier of handwritten digits, and compare it with plain NumPy.

    Writes fastopt-demo.safetensors (the packed model) and fastopt-demo.png (the comparison).
    """
    from fastopt import demo, demo_report

    demo_report.require_matplotlib()  # before the work, not after it
    dataset = demo.load_digits() if data is None else demo.load_idx_folder(data)
    out.mkdir(parents=True, exist_ok=True)
    with _progress() as notify:
        result = demo.run(dataset, out / "fastopt-demo.safetensors", epochs=epochs, notify=notify)
    picture = out / "fastopt-demo.png"
    demo_report.draw(result, picture)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(result.summary), "picture": str(picture)}))
    else:
        demo_report.print_table(result.summary)
        typer.echo(f"\nmodel    {result.summary.file}\npicture  {picture}")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """Give a function that shows a bar for each phase, on stderr if that is a terminal."""
    stderr = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bars:

        def notify(phase: str, done: int, total: int, note: str) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, note=note)
            bars.update(tasks[phase], completed=done, note=note)

        yield notify


@app.command()
def bench(as_json: Json = False) -> None:
    """Measure optimizer steps, quantization and products against NumPy and the limit of the memory."""
    from fastopt import bench

    bench.run(json=as_json)
