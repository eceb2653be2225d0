"""Texts and values of others, made safe to show."""

import json
import re
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
