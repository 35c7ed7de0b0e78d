"""The report's section on bits, size and time by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vdqc.check_result import CheckResult
from vdqc.ir.blocks import block_of
from vdqc.observe import SiteTime
from vdqc.report import charts
from vdqc.report.data import ReportData, weighted_bits
from vdqc.report.page import Html, section, table, tag
from vdqc.sites import SiteRow
from vdqc.text import duration, size


def layers(data: ReportData, check: CheckResult | None) -> Html:
    """A row per layer: bits a weight, bytes, predicted and measured time, each with a bar."""
    groups = by_block(data.sites)
    if not groups:
        return Html("")
    times = check.times if check is not None else ()
    predicted = {row.name: (row.predicted_us or 0.0) / 1e6 for row in data.sites}
    if check is not None and check.predicted:
        predicted = dict(check.predicted)
    rows = [_row(name, rows, times, predicted) for name, rows in groups.items()]
    tops = {key: max((row[key] or 0.0 for row in rows), default=0.0) for key in _BARS}
    cells = [
        [
            tag("span", row["name"], class_="mono"),
            str(row["sites"]),
            *_cells(row, tops, bool(times)),
        ]
        for row in rows
    ]
    headers = ["layer", "sites", "bits a weight", "weights", "float", "predicted"]
    if times:
        headers += ["measured", "rest of it"]
    measured = ""
    if times:
        measured = (
            " Measured is the same, on this machine, node by node in eager mode; the rest of it is "
            "everything else in the layer: quantisers, norms, activations, residuals."
        )
    return section(
        "Bits, size and time by layer",
        "Bits count scales, zero points and branches. Predicted is what the cost models say for "
        f"the kernels of a layer's sites on target {data.target}, for a call like the first sample."
        + measured,
        table(headers, cells, numbers=range(1, len(headers))),
    )


def by_block(rows: Sequence[SiteRow]) -> dict[str, list[SiteRow]]:
    """Sites by the block that their name says; "" holds those outside."""
    groups: dict[str, list[SiteRow]] = {}
    for row in rows:
        groups.setdefault(block_of(row.name), []).append(row)
    return groups


_BARS = ("bits", "bytes", "predicted", "measured")


def _row(
    name: str, rows: Sequence[SiteRow], times: Iterable[SiteTime], predicted: Mapping[str, float]
) -> dict[str, Any]:
    names = {row.name for row in rows}
    own = [t.seconds for t in times if t.name in names]
    rest = [t.seconds for t in times if not t.name and t.block == name]
    return {
        "name": name or "outside",
        "sites": len(rows),
        "bits": weighted_bits(rows),
        "bytes": sum(row.bytes or 0 for row in rows),
        "float": sum(row.bytes_float or 0 for row in rows),
        "predicted": sum(predicted.get(name, 0.0) for name in names),
        "measured": sum(own) if own else None,
        "rest": sum(rest) if rest else None,
    }


def _cells(row: dict[str, Any], tops: dict[str, float], timed: bool) -> list[str]:
    def barred(key: str, text: str) -> Html:
        value = row[key]
        drawn = charts.bar(value / (tops[key] or 1.0), text) if value else ""
        return tag("span", Html(drawn), tag("b", text), class_="barred")

    bits = "" if row["bits"] is None else f"{row['bits']:.2f}"
    predicted = duration(row["predicted"]) if row["predicted"] else ""
    made: list[str] = [barred("bits", bits), barred("bytes", size(row["bytes"]))]
    made += [size(row["float"]), barred("predicted", predicted)]
    if timed:
        measured = "" if row["measured"] is None else duration(row["measured"])
        made.append(barred("measured", measured))
        made.append("" if row["rest"] is None else duration(row["rest"]))
    return made
