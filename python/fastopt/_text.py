"""Texts and values of others, made safe to show."""

import difflib
import json
import re
from collections.abc import Container, Iterable, Sequence
from fnmatch import fnmatchcase
from html import escape
from typing import Any

_ASCII = re.compile(r"[ -~]*")


def printable(text: object) -> str:
    r"""Return a text without characters that a terminal or a browser acts on, or that hide or move others.

    Control characters (escape sequences, C1, new lines), marks that change the direction of text, separators of lines,
    invisible characters and halves of surrogate pairs become escapes such as ``\x1b``.
    """
    shown = str(text)
    if _ASCII.fullmatch(shown) or shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def printable_json(text: str) -> str:
    """Return a JSON text of the same value, without such characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\\u007f" if c == "\x7f" else json.dumps(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """Return the beginning of the repr of a value, for a message, whatever that repr raises."""
    try:
        return f"{value!r:.100}"
    except Exception:  # such as those of a text that is no Unicode, and of what is nested too deeply
        return f"an object of type {type(value).__name__}, which cannot be shown"


# ---- proposals ---------------------------------------------------------------------------------------------------

_LONG_NAMES = {
    "least squares": "lsq",
    "ranges": "minmax",
    "min max": "minmax",
    "llama.cpp": "gguf",
    "ggml": "gguf",
    "onnxruntime": "onnx",
    "header": "c",
    "numpy": "npz",
}


def proposal(got: object, choices: Iterable[str]) -> str:
    """Return ", did you mean 'lsq'?" for a choice that is misspelt, or given by its long name; else an empty text."""
    names = {choice: choice for choice in choices}
    names |= {long: short for long, short in _LONG_NAMES.items() if short in names}
    close = difflib.get_close_matches(re.sub("[-_ ]+", " ", str(got).lower()), names, 1)
    return f", did you mean {names[close[0]]!r}?" if close else ""


def pattern_proposal(pattern: str, names: Iterable[str]) -> str:
    """Return ", did you mean '*norm*'?" for a pattern that matches none of the names, or which names there are."""
    names = list(names)
    core = pattern.strip("*")
    words = {word for name in names for word in re.split(r"[./]", name)}
    close = difflib.get_close_matches(core, sorted(words), 1)
    for other in (f"*{core}*", *(f"*{word}*" for word in close)):
        if core and any(fnmatchcase(name, other) for name in names):
            return f", did you mean {other!r}?"
    return f"; there are {', '.join(map(repr, names[:3]))}{' ...' if len(names) > 3 else ''}"


# ---- numbers as texts --------------------------------------------------------------------------------------------


def size_text(count: float) -> str:
    """Format a number of bytes in decimal units, as file managers and ``--target-size`` do."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 1 if count >= 100 else 2}f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def percent_text(share: float | None) -> str:
    """Format a fraction in percent; None gives an empty text."""
    if share is None or share == 0:
        return "" if share is None else "0"
    percent = 100 * share
    return "<0.01 %" if percent < 0.01 else f"{percent:.{2 if percent < 10 else 1}f} %"


def shape_text(shape: Sequence[int]) -> str:
    """Format a shape, such as "768x768"."""
    return "x".join(map(str, shape)) or "scalar"


def storage_text(kind: str, bits: int | None, group_size: int | None, param_bits: int | None = None) -> str:
    """Describe how a tensor is stored, such as "4 bits, g32", "sparse, 8 bits, g128" or "4 bits, g16 p4"."""
    if bits is None:
        return kind
    group = {None: "tensor", -1: "row"}.get(group_size, f"g{group_size}")
    params = "" if param_bits is None else f" p{param_bits}"
    return f"{'sparse, ' if kind.startswith('sparse') else ''}{bits} bits, {group}{params}"


# ---- tables ------------------------------------------------------------------------------------------------------


def text_table(rows: Iterable[Sequence[str]], right: Container[int] = ()) -> str:
    """Return rows as lines whose columns begin at the same place, or, those of `right`, end there."""
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if i in right else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def fitted_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], room: int, omitted: Sequence[str]
) -> tuple[str, list[str]]:
    """Return a table that fits `room` columns, and its heads; a name in the first column loses its beginning.

    A table that is too wide loses the columns of `omitted`, the first of them first.
    """
    heads = list(heads)
    texts = [list(column) for column in zip(heads, *rows, strict=True)]
    widths = [max(map(len, column)) for column in texts]
    for head in omitted:
        if sum(widths) + 2 * (len(widths) - 1) > room and head in heads:
            i = heads.index(head)
            del heads[i], texts[i], widths[i]
    width = max(8, min(widths[0], room - sum(widths[1:]) - 2 * (len(widths) - 1)))
    texts[0] = [name if len(name) <= width else f"...{name[len(name) - width + 3 :]}" for name in texts[0]]
    return text_table(zip(*texts, strict=True)), heads


def html_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in the colours of the notebook, under its title; long ones scroll. All texts are escaped."""
    cells = ["".join(f'<td style="text-align:left">{escape(printable(cell))}</td>' for cell in row) for row in rows]
    head = "".join(f'<th style="text-align:left">{escape(text)}</th>' for text in heads)
    return (
        f'<div style="max-height:32em;overflow:auto"><b>{escape(printable(title))}</b><table>'
        + (f"<thead><tr>{head}</tr></thead>" if heads else "")
        + f"<tbody>{''.join(f'<tr>{row}</tr>' for row in cells)}</tbody></table></div>"
    )
