"""Bar charts as SVG: text stays text, and colours follow the light or dark scheme of the reader.

A chart is 560 units wide, so that its text can be read on a telephone, where it is shown at some 400 pixels.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _MARGIN, _GAP = 560, 16, 8
_LINE, _BAR = 26, 17  # the height of a row and of its bar
_LETTER = 8  # the width of a letter of 14 units, on the safe side

_STYLE = """
svg { color-scheme: light dark; }
.page { fill: #fff; } text { stroke: #fff; } .ink { fill: #1b2027; } .dim { fill: #5c6672; } .mark { stroke: #1b2027; }
.ours { fill: #0072b2; } .theirs { fill: #b4bcc6; } .loss { fill: #c2410c; }
text { font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; paint-order: stroke; stroke-width: 4px; }
.title { font-size: 17px; font-weight: 600; } .head { font-weight: 600; } .small { font-size: 12.5px; }
.mark { stroke-width: 1.5; stroke-dasharray: 3 3; }
@media (prefers-color-scheme: dark) {
  .page { fill: #14171b; } text { stroke: #14171b; }
  .ink { fill: #e6e9ed; } .dim { fill: #9aa4af; } .mark { stroke: #e6e9ed; }
  .ours { fill: #56b4e9; } .theirs { fill: #5d6772; } .loss { fill: #f59e5b; }
}
"""


class Bar(NamedTuple):
    """A row of a panel: `text` says the value, and for a loss to whom; `kind` is "ours", "theirs" or "loss"."""

    label: str
    value: float
    text: str
    kind: str = "theirs"


class Panel(NamedTuple):
    """Bars on a scale of their own; `mark` is a value that a dashed line shows, such as a limit."""

    title: str
    bars: Sequence[Bar]
    mark: float | None = None


def chart(title: str, panels: Sequence[Panel], notes: Sequence[str] = ()) -> str:
    """Return an SVG picture of horizontal bars.

    Parameters
    ----------
    title : str
    panels : sequence of Panel
        From top to bottom.
    notes : sequence of str
        Small lines at the end; they are wrapped.

    Returns
    -------
    str
    """
    parts: list[str] = []
    y = _MARGIN + 16.0
    for line in _wrapped(title, 50):
        parts.append(_text(_MARGIN, y, "ink title", line))
        y += 23
    start = _MARGIN + _LETTER * max(len(bar.label) for panel in panels for bar in panel.bars) + _GAP
    for panel in panels:
        y += 14
        parts.append(_text(_MARGIN, y, "ink head", panel.title))
        y += 8
        room = _WIDTH - _MARGIN - _GAP - start
        scale = min((room - _LETTER * len(bar.text)) / max(bar.value, 1e-300) for bar in panel.bars)
        if panel.mark is not None:
            scale = min(scale, room / max(panel.mark, 1e-300))
        above, texts = y, []
        for bar in panel.bars:
            length, middle = max(1.0, scale * bar.value), y + _LINE / 2
            top = middle - _BAR / 2
            parts.append(_text(start - _GAP, middle + 5, "ink" if bar.kind != "theirs" else "dim", bar.label, "end"))
            parts.append(
                f'<rect class="{bar.kind}" x="{start:.1f}" y="{top:.1f}" width="{length:.1f}" height="{_BAR}" rx="2"/>'
            )
            ends = start + length + 6
            texts.append(_text(ends, middle + 5, {"theirs": "dim", "loss": "loss"}.get(bar.kind, "ink"), bar.text))
            y += _LINE
        if panel.mark is not None:
            x = start + scale * panel.mark
            parts.append(f'<path class="mark" d="M{x:.1f} {above:.1f}V{y:.1f}"/>')
        parts += texts
        y += 6
    y += 8
    for note in notes:
        for line in _wrapped(note, 84):
            y += 17
            parts.append(_text(_MARGIN, y, "dim small", line))
    height = round(y + _MARGIN)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{_STYLE}</style>\n'
        f'<rect class="page" width="{_WIDTH}" height="{height}" rx="8"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, style: str, text: str, anchor: str = "") -> str:
    end = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}"{end}>{escape(text)}</text>'


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
