"""Heat maps of decibels as inline SVG: few levels, one path each, coloured by the page's style.

Low values stand out: dark on a light page, bright on a dark one. The levels rise evenly in
lightness, so that they read the same to colour-blind eyes and in print.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import final

from vdqc.report.page import Html, tag

#: Levels that the style has colours for, lowest first.
LEVELS = 8
_LEFT, _TOP, _WIDTH, _BOTTOM = 30, 18, 300, 14


@final
@dataclass(frozen=True)
class Panel:
    """One map: a row per name, a column per step; None where nothing was measured."""

    title: str
    names: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]


@final
@dataclass(frozen=True)
class Scale:
    """Edges of the levels in dB: level i lies below ``edges[i]``, the last one above all."""

    edges: tuple[float, ...]

    @staticmethod
    def over(values: Sequence[float]) -> Scale:
        """Round edges that spread ``values`` over the levels, the lowest one holding the least."""
        finite = sorted(v for v in values if math.isfinite(v))
        if not finite:
            return Scale((0.0,))
        low, high = finite[0], finite[min(len(finite) - 1, int(0.98 * len(finite)))]
        steps = (0.5, 1, 2, 2.5, 5, 10, 20, 50)
        step = next((s for s in steps if math.floor(low / s) * s + s * (LEVELS - 1) >= high), 100)
        first = (math.floor(low / step) + 1) * step
        count = max(1, min(LEVELS - 1, math.ceil((high - first) / step) + 1))
        return Scale(tuple(first + i * step for i in range(count)))

    def level(self, value: float) -> int:
        """Level of ``value``: 0 is the worst; those of few edges spread over all colours."""
        place = sum(value >= edge for edge in self.edges)
        return round(place * (LEVELS - 1) / len(self.edges))

    def legend(self) -> Html:
        """Swatches with the range of each level."""
        edges = [f"{edge:g}" for edge in self.edges]
        texts = [f"below {edges[0]}"]
        texts += [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
        texts += [f"{edges[-1]} dB and above, exact"]
        count = len(self.edges)
        spans = [
            tag("span", tag("i", class_=f"h{round(i * (LEVELS - 1) / count)}"), text)
            for i, text in enumerate(texts)
        ]
        return tag("div", *spans, class_="legend swatches")


def panel(data: Panel, scale: Scale, first: str, last: str) -> Html:
    """One map as SVG; ``first`` and ``last`` name the ends of its columns."""
    count = max((len(row) for row in data.rows), default=1) or 1
    height = 13 if len(data.rows) <= 12 else 8 if len(data.rows) <= 30 else 5
    width = (_WIDTH - _LEFT) / count
    bottom = _TOP + height * len(data.rows)
    parts = [
        f'<svg class="heat" viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" role="img" '
        f'aria-label="{escape(data.title)}: SQNR per step">',
        f'<text class="title" x="{_LEFT}" y="11">{escape(_ending(data.title))}</text>',
        f'<rect class="none" x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT}" '
        f'height="{bottom - _TOP}"/>',
    ]
    paths: dict[int, list[str]] = {}
    for index, row in enumerate(data.rows):
        for at, length, level in _runs(row, scale):
            x, wide = _LEFT + at * width, length * width
            paths.setdefault(level, []).append(
                f"M{x:.4g} {_TOP + index * height}h{wide:.4g}v{height}h-{wide:.4g}z"
            )
    parts += [f'<path class="h{level}" d="{"".join(d)}"/>' for level, d in sorted(paths.items())]
    every = max(1, math.ceil(12 / height))
    for index in range(0, len(data.names), every):
        y = _TOP + index * height + height / 2 + 4
        name = escape(data.names[index])
        parts.append(f'<text x="{_LEFT - 5}" y="{y:.1f}" text-anchor="end">{name}</text>')
    parts.append(f'<text x="{_LEFT}" y="{bottom + 11}">{escape(first)}</text>')
    if count > 1:
        parts.append(
            f'<text x="{_WIDTH}" y="{bottom + 11}" text-anchor="end">{escape(last)}</text>'
        )
    return Html("".join([*parts, "</svg>"]))


def _ending(text: str, letters: int = 40) -> str:
    """The end of a long module path, which tells more than its beginning."""
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


def _runs(row: Sequence[float | None], scale: Scale) -> list[tuple[int, int, int]]:
    """Stretches of one level: (column, length, level)."""
    found: list[tuple[int, int, int]] = []
    for column, value in enumerate(row):
        if value is None:
            continue
        level = scale.level(value)
        if found and found[-1][2] == level and sum(found[-1][:2]) == column:
            found[-1] = (found[-1][0], found[-1][1] + 1, level)
        else:
            found.append((column, 1, level))
    return found
