"""The application that all commands share, its exit codes and its progress bars.

Exit codes: 0 success, 1 failure with one line on stderr, 2 usage error, 130 interrupted.
"""

import contextlib
import dataclasses
import functools
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from typer.core import TyperCommand, TyperGroup

from fastopt import __version__, _core
from fastopt._text import printable, proposal
from fastopt.models.recipe import Recipe


class _PlainFlags:
    """A command whose help shows flags as flags, without the type bool."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for option in params:
            if getattr(option, "is_flag", False):
                option.metavar = ""
        return params


class _Command(_PlainFlags, TyperCommand):
    pass


class _Commands(_PlainFlags, TyperGroup):
    """A group that prints one line instead of a traceback for errors that the user can fix."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:  # the lines of a docstring do not fit the terminal
            command.help = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
        return command

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _printable_usage_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.params["debug"]
        if not debug:
            warnings.showwarning = _warning_teller()
        for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no reason to fail
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            with _printable_usage_errors():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            if debug:
                raise
            say("fastopt: interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            handled = hasattr(error, "exit_code") or isinstance(error, BrokenPipeError | typer.Abort)
            if debug or handled:  # by the caller, which prints usage errors and is quiet about closed pipes
                raise
            say(f"fastopt: {_one_line(error)}", err=True)
            raise typer.Exit(1) from None


@contextlib.contextmanager
def _printable_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "message"):  # click's UsageError, which typer does not export
            error.message = printable(_with_proposal(error.message))
        raise


def _with_proposal(message: str) -> str:
    """Let a message about a choice that does not exist propose the closest one."""
    match = re.fullmatch(r"(?:Value error, )?'(.*)' is not one of (.*)\.", message, re.DOTALL)
    if match is None:
        return message
    choices = re.findall(r"'([^']*)'", match[2])
    return f"expected one of {', '.join(choices)}, got {match[1]!r}{proposal(match[1], choices)}"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    text = as_options(" ".join(str(error).split()))
    if not text or not isinstance(error, OSError | TypeError | ValueError | ImportError | MemoryError):
        text = f"{type(error).__name__}: {text} (--debug shows where)" if text else type(error).__name__
    return text


def as_options(message: str) -> str:
    """Let a message of a Python function that begins with the name of an argument name the option."""
    name, colon, rest = message.partition(": ")
    if not colon or name not in (
        *_ARGUMENTS,
        "target_bits",
        "target_size",
        "eval",
        "budget",
        "state",
        "accuracy_level",
    ):
        return message
    return f"--{name.replace('_', '-').removesuffix('s') if name == 'overrides' else name.replace('_', '-')}: {rest}"


def _warning_teller() -> Callable[..., None]:
    """Return a function that prints a warning in one line, and each only once: a search packs the same model often."""
    told: set[str] = set()

    def show(message: Warning | str, *args: Any, **options: Any) -> None:
        text = as_options(" ".join(str(message).split()))
        if text not in told:
            told.add(text)
            say(f"fastopt: warning: {text}", err=True)

    return show


def say(text: str, *, err: bool = False) -> None:
    """Print one line, whatever names are in it."""
    typer.echo(printable(text), err=err)


_ARGUMENTS = [field.name for field in dataclasses.fields(Recipe)]

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

command = functools.partial(app.command, cls=_Command)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastopt {__version__} ({_core.isa()})")
        raise typer.Exit


@app.callback(
    epilog="Examples:\n\n"
    "fastopt inspect model.safetensors\n\n"
    "fastopt pack model.safetensors -o small.safetensors --bits 4 --exclude '*norm*'\n\n"
    "fastopt diff model.safetensors small.safetensors\n\n"
    "fastopt demo\n\n"
    "Exit codes: 0 success, 1 failure (with a one-line reason on stderr), 2 usage error, 130 interrupted."
)
def fastopt(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Optimizer steps, low-bit quantization and pruning for NumPy, at the speed of the memory bus."""


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield a function that shows a bar for each phase on stderr, if that is a terminal."""
    if not Console(stderr=True).is_terminal:
        yield lambda phase, done, total, note: None
        return
    tasks: dict[str, TaskID] = {}
    with _bars(TextColumn("{task.description:<9}"), TimeElapsedColumn(), TextColumn("{task.fields[note]}")) as bars:

        def notify(phase: str, done: int, total: int, note: str) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, note=note)
            bars.update(tasks[phase], completed=done, note=note)

        yield notify


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function that takes bytes done, bytes in all and a name, and shows them with rate and remaining time."""
    if not Console(stderr=True).is_terminal:
        yield lambda done, total, name: None
        return
    name = TextColumn("[dim]{task.fields[name]}")
    with _bars(TextColumn("{task.description}"), TransferSpeedColumn(), TimeRemainingColumn(), name) as bars:
        task, room = bars.add_task(what, total=None, name=""), max(0, bars.console.width - 70)

        def notify(done: int, total: int, name: str) -> None:
            name = printable(name)
            end = name if len(name) <= room else f"…{name[len(name) - room + 1 :]}" if room > 10 else ""
            bars.update(task, completed=done, total=total, name=escape(end))

        yield notify


def _bars(first: ProgressColumn, *columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    return Progress(first, BarColumn(), TaskProgressColumn(), *columns, console=console, transient=True)
