"""Charts as inline SVG text: points and lines over labelled axes, coloured by the page's style.

Marks carry a ``<title>``, which browsers show on hover without any script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import final

WIDTH, HEIGHT = 960, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 30, 44
_LABELS = 150  # room at the right for the names of lines
_LINE = 16


@final
@dataclass(frozen=True)
class Mark:
    """One point; ``kind`` becomes its CSS class, ``text`` shows on hover."""

    x: float
    y: float
    text: str
    kind: str = "a"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that cover ``[low, high]``."""
    span = max(high - low, 1e-9)
    raw = span / max(count, 1)
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def chart(
    marks: Sequence[Mark],
    *,
    x_label: str,
    y_label: str,
    title: str,
    joined: bool = False,
    x_names: Sequence[str] = (),
    reverse_x: bool = False,
    labels: Mapping[str, str] | None = None,
) -> str:
    """An SVG of ``marks``; ``joined`` draws a line per kind, ``x_names`` label whole positions.

    ``labels`` names the lines of kinds, written at their right ends.
    """
    labels = labels or {}
    right = WIDTH - (_LABELS if labels else _RIGHT)
    shown = [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]
    if not shown:
        return '<p class="quiet">Nothing to draw: every value is exact.</p>'
    y_ticks = ticks(min(m.y for m in shown), max(m.y for m in shown))
    y_ticks = y_ticks if len(y_ticks) > 1 else [y_ticks[0] - 1, y_ticks[0] + 1]
    xs = [mark.x for mark in shown]
    x_ticks = [float(i) for i in range(len(x_names))] or ticks(min(xs), max(xs), 8)
    low, high = (-0.5, len(x_names) - 0.5) if x_names else (min(x_ticks), max(x_ticks))
    low, high = (low, high) if high > low else (low - 1, high + 1)

    def px(x: float) -> float:
        share = (x - low) / (high - low)
        return _LEFT + (1 - share if reverse_x else share) * (right - _LEFT)

    def py(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for y in y_ticks:
        parts.append(_line(_LEFT, py(y), right, py(y), "grid"))
        parts.append(_text(_LEFT - 8, py(y) + 4, f"{y:g}", "end"))
    for index, x in enumerate(x_ticks):
        label = x_names[index] if x_names else f"{x:g}"
        parts.append(_text(px(x), HEIGHT - _BOTTOM + 18, label, "middle"))
    parts.append(_text(right, HEIGHT - 6, x_label, "end", "label"))
    parts.append(_text(_LEFT, 12, y_label, "start", "label"))
    for kind in dict.fromkeys(mark.kind for mark in shown) if joined else ():
        line = sorted((m for m in shown if m.kind == kind), key=lambda mark: mark.x)
        points = " ".join(f"{px(m.x):.1f},{py(m.y):.1f}" for m in line)
        parts.append(f'<polyline class="line {escape(kind)}" points="{points}"/>')
    for mark in shown:
        parts.append(
            f'<circle class="mark {escape(mark.kind)}" cx="{px(mark.x):.1f}" cy="{py(mark.y):.1f}" '
            f'r="{4 if len(shown) < 200 else 3}"><title>{escape(mark.text)}</title></circle>'
        )
    ends = {kind: [m for m in shown if m.kind == kind] for kind in labels}
    wanted = {
        kind: py((min if reverse_x else max)(found, key=lambda mark: mark.x).y)
        for kind, found in ends.items()
        if found
    }
    for kind, y in spread(wanted, _LINE).items():
        parts.append(_text(right + 10, y + 4, labels[kind], "start", f"name {kind}"))
    return "".join([*parts, "</svg>"])


def spread(places: Mapping[str, float], least: float) -> dict[str, float]:
    """``places`` in their order, moved down where two would be nearer than ``least``."""
    made: dict[str, float] = {}
    before = -math.inf
    for key, place in sorted(places.items(), key=lambda item: item[1]):
        before = max(place, before + least)
        made[key] = before
    return made


def bar(share: float, text: str) -> str:
    """A thin horizontal bar for a table cell; ``share`` in [0, 1]."""
    width = max(0.0, min(1.0, share)) * 100
    return (
        f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(text)}"><rect class="bar-back" width="100" height="8"/>'
        f'<rect class="bar-fill" width="{width:.1f}" height="8"/></svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
