"""What a search prints: the choice, the front and the recipe; and the front as a page."""

from __future__ import annotations

from vdqc.report.charts import Mark, chart
from vdqc.report.page import Html, page, section, table, tag
from vdqc.search import Point, SearchResult
from vdqc.search.budget import shown
from vdqc.text import columns, count, decibel, duration, size

_HEADERS = ["", "size", "", "time", "", "SQNR", "schemes of groups"]


def searched(result: SearchResult, recipe: str | None, model: str) -> str:
    """The end of ``vdqc search``; ``recipe`` is where it was written, None to print it."""
    chosen = result.chosen
    names = count(len(result.groups), "group")
    lines = [
        f"{result.name}, target {result.target}, {result.budget.text}: {names} of linears",
        "",
        columns([_cells(result, point) for point in result.front], _HEADERS, right="12345"),
        "",
        f"predicted   {shown('size', chosen.bytes, result.bytes_float)}, "
        f"{shown('time', chosen.us, result.us_float)}, {decibel(chosen.sqnr_db)} SQNR",
    ]
    if result.applied is not None:
        lines.append(
            f"measured    {shown('size', result.applied.bytes, result.bytes_float)}, "
            f"{decibel(result.applied.sqnr_db)} SQNR over {count(result.probes, 'call')}"
        )
    if result.density is not None and result.applied is not None:
        lines.append(
            f"attention   density {result.density:g}, predicted "
            f"{duration((result.attention_us_dense or 0.0) * 1e-6)} -> "
            f"{duration(result.applied.attention_us * 1e-6)}"
        )
    lines += [f"FAILED      {miss}" for miss in result.misses]
    if recipe is None:
        return "\n".join([*lines, "", result.recipe.to_toml().rstrip()])
    lines += [f"recipe      {recipe}", "", f"next: vdqc compile {model} --recipe {recipe}"]
    return "\n".join(lines)


def front_page(result: SearchResult) -> str:
    """The front as one HTML page: SQNR over size, and the table."""
    marks = [
        Mark(
            100 * point.bytes / max(result.bytes_float, 1),
            point.sqnr_db,
            f"{size(point.bytes)}, {duration(point.us * 1e-6)}, {decibel(point.sqnr_db)}: "
            f"{point.mix}",
            "b" if point.ways == result.chosen.ways else "a",
        )
        for point in result.front
    ]
    drawing = chart(
        marks,
        x_label="weights, % of float",
        y_label="predicted SQNR, dB",
        title="predicted SQNR by size",
    )
    rows = [_cells(result, point) for point in result.front]
    applied = result.applied
    measured = "" if applied is None else f" Measured: {decibel(applied.sqnr_db)}."
    lead = (
        "Each point is the choice of least predicted error at its size or time. The chosen one, "
        f"for {result.budget.text}, is marked *.{measured}"
    )
    return page(
        f"{result.name}: search",
        tag("h1", result.name),
        tag("p", f"search on {result.target}", class_="sub"),
        section("Front", lead, Html(drawing), table(_HEADERS, rows, (1, 2, 3, 4, 5))),
        section("Recipe", "", tag("pre", result.recipe.to_toml())),
    )


def _cells(result: SearchResult, point: Point) -> list[str]:
    return [
        "*" if point.ways == result.chosen.ways else "",
        size(point.bytes),
        f"{point.bytes / max(result.bytes_float, 1):.3f}",
        duration(point.us * 1e-6),
        f"{point.us / result.us_float:.3f}" if result.us_float else "",
        decibel(point.sqnr_db),
        point.mix,
    ]
