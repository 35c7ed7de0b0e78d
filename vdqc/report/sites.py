"""The report's sections on sites and on the kernels that run them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vdqc.report import charts
from vdqc.report.data import ReportData
from vdqc.report.layers import by_block
from vdqc.report.page import Html, details, section, table, tag
from vdqc.sites import SiteRow
from vdqc.text import count, decibel, duration, size

ROLE_KINDS = "abcdfg"


def sites(data: ReportData) -> Html:
    """Every site in a table per block, and the fidelity of the weights as a chart."""
    if not data.sites:
        return Html("")
    measured = [row for row in data.sites if row.weight_sqnr_db is not None]
    roles = list(dict.fromkeys(row.role or row.kind for row in measured))
    kinds = {role: ROLE_KINDS[i] if i < len(ROLE_KINDS) else "e" for i, role in enumerate(roles)}
    marks = [
        charts.Mark(
            float(index),
            row.weight_sqnr_db if row.weight_sqnr_db is not None else math.nan,
            f"{row.name} ({row.scheme}): {decibel(row.weight_sqnr_db)}",
            kinds[row.role or row.kind],
        )
        for index, row in enumerate(measured)
    ]
    chart = Html(
        charts.chart(
            marks,
            x_label="site, in program order",
            y_label="SQNR of the weight, dB",
            title="Weight SQNR per site",
        )
    )
    groups = by_block(data.sites)
    first = next((name for name in groups if name), "")
    only = len(data.sites) <= 30
    tables = [
        details(
            f"{name or 'outside the blocks'} ({count(len(rows), 'site')})",
            site_table(rows),
            is_open=name == first,
        )
        for name, rows in groups.items()
    ]
    return section(
        "Sites",
        "Every linear, attention and convolution, by its module path.",
        *([_legend(kinds), chart] if measured else []),
        *([site_table(data.sites)] if only else tables),
    )


def _legend(kinds: Mapping[str, str]) -> Html:
    spans = [tag("span", tag("i", class_=kind), role) for role, kind in kinds.items()]
    return tag("div", *spans, class_="legend")


def site_table(rows: Sequence[SiteRow]) -> Html:
    """Sites with what is known of each."""
    headers = ["site", "role", "shape", "scheme", "kernel", "weight SQNR", "bits", "bytes", "float"]
    cells = [
        [
            tag("span", row.name, class_="mono"),
            row.role,
            row.shape,
            row.scheme,
            tag("span", row.kernel, title=row.why),
            "" if row.weight_sqnr_db is None else decibel(row.weight_sqnr_db),
            "" if row.bits is None else f"{row.bits:.2f}",
            size(row.bytes) if row.bytes else "",
            size(row.bytes_float) if row.bytes_float else "",
        ]
        for row in rows
    ]
    return table(headers, cells, numbers=(5, 6, 7, 8))


def kernels(data: ReportData) -> Html:
    """What runs, at which predicted time, and why."""
    by_kernel: dict[tuple[str, str], list[SiteRow]] = {}
    for row in data.sites:
        by_kernel.setdefault((row.kernel, row.why), []).append(row)
    rows = [
        [
            kernel,
            str(len(found)),
            duration(sum(row.predicted_us or 0.0 for row in found) / 1e6),
            why,
            tag("span", found[0].name, class_="mono"),
        ]
        for (kernel, why), found in by_kernel.items()
        if kernel
    ]
    if not rows:
        return Html("")
    headers = ["kernel", "sites", "predicted", "why", "for example"]
    return section(
        "Kernels",
        f"What runs on target {data.target}, and the time its cost model predicts for the probe.",
        table(headers, rows, numbers=(1, 2)),
    )
