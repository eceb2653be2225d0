"""The commands ``demo`` and ``bench``; the import adds those on models, which --help lists first."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastopt.cli import model_commands as model_commands
from fastopt.cli import tables, timing
from fastopt.cli.app import Json, command, progress, say
from fastopt.cli.app import app as app


@command(
    epilog="Examples:\n\nfastopt demo\n\n"
    "fastopt demo --data /usr/share/datasets/fashion-mnist --out results\n\n"
    "fastopt demo --json | jq .variants"
)
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with MNIST-style idx or idx.gz files, instead of scikit-learn's digits."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the model and the page.")] = Path(),
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    as_json: Json = False,
) -> None:
    """Train, prune, fine-tune and pack a classifier of handwritten digits, and compare it with plain NumPy.

    Writes fastopt-demo.safetensors (the packed model) and fastopt-demo.html (the comparison, for a browser).
    """
    from fastopt.demo import run, show

    dataset = run.load_digits() if data is None else run.load_idx_folder(data)
    out.mkdir(parents=True, exist_ok=True)
    with timing.calm() as busy, progress() as notify:
        others = timing.Disturbance()
        result = run.run(dataset, out / "fastopt-demo.safetensors", epochs=epochs, notify=notify)
        doubt = timing.doubts([], others.cores(), result.summary.threads)
    if busy:
        doubt = "other programs keep this machine busy: NumPy and fastopt had one thread. Trust no ratio below 2."
    page = out / "fastopt-demo.html"
    show.draw(result, page)
    if as_json:
        typer.echo(tables.to_json({**dataclasses.asdict(result.summary), "page": str(page), "warning": doubt}))
    else:
        show.print_table(result.summary)
        say("")
        say(f"model    {result.summary.file}")
        say(f"page     {page}")
        if doubt:
            say(f"warning: {doubt}", err=True)


@command(epilog="Examples:\n\nfastopt bench\n\nfastopt bench --only linear --threads 1 --svg linear.svg")
def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Measure only cases with this in their names; may be repeated."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of fastopt and of NumPy; one on a busy machine.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time to spend on each case.")] = 0.35,
    svg: Annotated[Path | None, typer.Option(help="Also draw a chart into this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure optimizer steps, quantization, products and pruning beside NumPy and the memory limit.

    A row shows the time of a call in fastopt and in NumPy, how many times faster fastopt is, and how close it comes to
    the memory limit: loops that only move the same bytes, measured in turns with it. A warning says when other
    programs disturb the measurement. JSON: machine, results, warning.
    """
    from fastopt.cli import bench

    bench.run(json=as_json, only=only or (), seconds=seconds, threads=threads, svg=svg)
