"""A chart as SVG: panels of horizontal bars, each panel with a scale of its own, each bar with its value beside it."""

from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH = 760
_MARGIN = 28
_BAR, _STEP = 18, 26
_HEADING, _GAP = 30, 18
_LABEL_WIDTH, _VALUE_WIDTH = 150, 110
_INK, _MUTED, _COLOR, _TRACK = "#1f2328", "#656d76", "#2f6f9f", "#eef1f4"
_FONT = "font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif\""


@dataclass(frozen=True)
class Panel:
    """Bars of one quantity. `unit` is written after every value."""

    title: str
    unit: str
    bars: list[tuple[str, float]]


def svg(title: str, headline: str, small_print: str, panels: list[Panel]) -> str:
    """The chart, as the text of an SVG file."""
    body = [_text(_MARGIN, 36, title, 18, _INK, weight=600), _text(_MARGIN, 58, headline, 14, _INK)]
    y = 64
    for line in _wrapped(small_print):
        y += 17
        body.append(_text(_MARGIN, y, line, 12, _MUTED))
    y += 14
    for panel in panels:
        y += _GAP
        body.append(_text(_MARGIN, y + 14, panel.title, 14, _INK, weight=600))
        y += _HEADING
        largest = max((value for _, value in panel.bars), default=0.0)
        for label, value in panel.bars:
            body += _bar(y, label, value, largest, panel.unit)
            y += _STEP
    height = y + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def _bar(y: int, label: str, value: float, largest: float, unit: str) -> list[str]:
    left, room = _MARGIN + _LABEL_WIDTH, _WIDTH - 2 * _MARGIN - _LABEL_WIDTH - _VALUE_WIDTH
    width = room * value / largest if largest > 0 else 0.0
    middle = y + _BAR / 2 + 4.5
    return [
        _text(left - 10, middle, label, 13, _INK, anchor="end"),
        f'<rect x="{left}" y="{y}" width="{room}" height="{_BAR}" rx="2" fill="{_TRACK}"/>',
        f'<rect x="{left}" y="{y}" width="{max(width, 1.0):.1f}" height="{_BAR}" rx="2" fill="{_COLOR}"/>',
        _text(left + room + 10, middle, f"{number(value)} {unit}", 13, _INK),
    ]


def _text(x: float, y: float, content: str, size: int, color: str, *, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" {_FONT} font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{color}">{escape(content)}</text>'
    )


def _wrapped(text: str, width: int = 112) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
