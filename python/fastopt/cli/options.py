"""The options that the commands on models share, and how their texts are parsed."""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from enum import Enum
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fastopt.cli.app import as_options, say
from fastopt.formats import FORMATS
from fastopt.formats.common import Option
from fastopt.models.recipe import Options

_Command = TypeVar("_Command", bound=Callable[..., Any])


# Panels of --help: options in a narrow terminal have room for their texts where long names stand apart.
QUANTIZING, PRUNING, CHOOSING = "Quantizing", "Pruning", "Which tensors"
BUDGETS, SCORING, ONNX = "Bits for a budget", "Bits by your own score", "ONNX models"


class Fit(str, Enum):
    """Ways to find scale and minimum."""

    auto = "auto"
    minmax = "minmax"
    lsq = "lsq"
    gptq = "gptq"


class Preset(str, Enum):
    """Sets of options."""

    small = "small"
    balanced = "balanced"
    safe = "safe"


Source = Annotated[
    Path,
    typer.Argument(
        help="A .safetensors file, the .index.json of one in shards, a folder with either, .npz, .npy or a folder of "
        ".npy files, an .onnx model (needs onnx), a .gguf file, a .keras or .h5 file of Keras (needs h5py), or a state "
        "dict or checkpoint of torch (.pt, .pth, .bin, .ckpt, also in shards; needs torch).",
        show_default=False,
    ),
]
Target = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="The safetensors file to write; for an .onnx model, pack and prune also write one that ends in "
        ".onnx. It appears when it is complete, and may be the input itself. "
        "A name that ends in .index.json writes one file for each shard of the input. "
        "If the input is a folder, as Hugging Face's models are, a folder, which gets its config and tokenizer too.",
        show_default=False,
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="The part of a checkpoint of torch that is the model, such as generator/state_dict, if none stands out.",
        show_default=False,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Leave out tensors whose names match, even unreadable ones; may be repeated."),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", rich_help_panel=CHOOSING, help="Pack only tensors whose names match; may be repeated."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", rich_help_panel=CHOOSING, help="Keep tensors whose names match unchanged; may be repeated."
    ),
]
MinSize = Annotated[
    int | None,
    typer.Option(rich_help_panel=CHOOSING, help="Keep tensors with fewer weights unchanged; 4096 by default."),
]
Sparsity = Annotated[
    float | None, typer.Option(rich_help_panel=PRUNING, help="Fraction of the weights of each tensor to prune.")
]
Threshold = Annotated[
    float | None, typer.Option(rich_help_panel=PRUNING, help="Prune weights of at most this magnitude.")
]
Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="N:M|1x16",
        rich_help_panel=PRUNING,
        help="Keep N of every M weights, such as 2:4, or whole blocks of 16.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and the sizes without writing anything.")]
Html = Annotated[
    Path | None,
    typer.Option(help="Write an HTML page with sizes, errors, and histograms with their grids.", show_default=False),
]


def of_format(*names: str, panel: str | None = None) -> list[Parameter]:
    """Return the options that formats declare, as parameters of a command; one that several share is one."""
    told: dict[str, list[str]] = {}
    declared: dict[str, Option] = {}
    for name in names:
        for keyword, option in FORMATS[name].OPTIONS.items():
            told.setdefault(keyword, []).append(f"{name}: {option.help}")
            declared.setdefault(keyword, option)
    return [_parameter(keyword, option, " ".join(told[keyword]), panel) for keyword, option in declared.items()]


def _parameter(keyword: str, option: Option, text: str, panel: str | None) -> Parameter:
    flag = option.flag or f"--{keyword.replace('_', '-')}"
    kind: Any = {bool: bool, list: list[str] | None}.get(option.kind, option.kind | None)
    annotation = Annotated[
        kind, typer.Option(flag, metavar=option.metavar, help=text, show_default=False, rich_help_panel=panel)
    ]
    default = False if option.kind is bool else None
    return Parameter(keyword, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def given_to_format(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of formats that were given on the command line, lists parsed."""
    parsers = {keyword: option.parse for module in FORMATS.values() for keyword, option in module.OPTIONS.items()}
    return {
        keyword: [parsers[keyword](text) for text in value]
        if isinstance(value, list)
        else parsers[keyword](value)
        if isinstance(value, str)
        else value
        for keyword, value in options.items()
        if not (value is None or value is False or value == [])
    }


def with_options(*parameters: Parameter) -> Callable[[_Command], _Command]:
    """Let a command that takes ``**options`` have these parameters, which typer reads from its signature."""

    def extend(command: _Command) -> _Command:
        own = signature(command)
        fixed = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        fixed = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in fixed]
        command.__signature__ = own.replace(parameters=[*fixed, *parameters])  # type: ignore[attr-defined]
        return command

    return extend


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Report an option that is out of range as a usage error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(as_options(str(error))) from error


_GROUPS = {"row": -1, "tensor": None, "auto": "auto"}
_OPTIONS = tuple(f.name for f in fields(Options) if f.name != "inputs")
# A pattern may have colons: the options begin behind the last one that a word and "=" follow.
_OVERRIDE = re.compile(r"(.+):(\w+=.*)", re.DOTALL)


def group_size_of(text: str) -> Any:
    """Parse a group size: a number, ``row`` or ``tensor``."""
    if text in _GROUPS:
        return _GROUPS[text]
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"group_size: expected a number, row or tensor, got {text!r}") from None


def overrides_of(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse the values of --override, ``GLOB:OPTION=VALUE,...``: the first of a pattern counts."""
    overrides: dict[str, dict[str, Any]] = {}
    for text in texts:
        pattern, options = _override(text)
        if pattern in overrides:
            say(f"fastopt: --override {pattern!r} is given twice; the first one counts", err=True)
        overrides.setdefault(pattern, options)
    return overrides


def _override(text: str) -> tuple[str, dict[str, Any]]:
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"--override: expected GLOB:OPTION=VALUE,... as '*embed*:bits=8', got {text!r}")
    options: dict[str, Any] = {}
    for part in match[2].split(","):
        name, equals, value = part.partition("=")
        if name not in _OPTIONS:
            close = difflib.get_close_matches(name, _OPTIONS, 1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise typer.BadParameter(
                f"--override: expected GLOB:OPTION=VALUE,..., got {text!r}: unknown option {name!r}{hint} "
                f"(options: {', '.join(_OPTIONS)})"
            )
        if not equals:
            raise typer.BadParameter(f"--override {text!r}: expected {name}=VALUE")
        if name in options:
            raise typer.BadParameter(f"--override {text!r}: {name} is given twice")
        options[name] = group_size_of(value) if name == "group_size" else _value(value)
    return match[1], options


def _value(text: str) -> Any:
    """Parse a value: ``none``, a number, or a text."""
    if text == "none":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
