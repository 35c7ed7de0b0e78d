"""Numbers as people read them: sizes, times, decibels and aligned columns."""

from __future__ import annotations

import math
from collections.abc import Sequence


def size(amount: float) -> str:
    """``18.9 MB``; decimal units, as file managers and model hubs use."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """``410 µs``, ``12.5 ms``, ``3.2 s`` or ``4 min 05 s``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def decibel(value: float | None) -> str:
    """``41.3 dB``; ``exact`` for infinity, empty for None."""
    if value is None:
        return ""
    return f"{value:.1f} dB" if math.isfinite(value) else "exact"


def count(amount: int, noun: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{amount} {noun}{'' if amount == 1 else 's'}"


def shortened(text: str, width: int) -> str:
    """``text`` with its middle left out, if it is longer than ``width``."""
    if len(text) <= width:
        return text
    half = (width - 3) // 2
    return f"{text[: width - 3 - half]}...{text[-half:]}"


def columns(rows: Sequence[Sequence[str]], headers: Sequence[str] = (), right: str = "") -> str:
    """Rows as aligned text; ``right`` names the columns (by index digit) that align right."""
    everything = [list(headers), *map(list, rows)] if headers else [list(row) for row in rows]
    if not everything:
        return ""
    widths = [max(len(row[i]) for row in everything) for i in range(len(everything[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if str(i) in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in everything)
