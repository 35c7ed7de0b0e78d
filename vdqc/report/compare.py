"""One page that sets several artifacts side by side: figures, curves, and where their sites differ.

Artifacts are lettered A, B, … in the order given; a check's JSON, where there is one for each, adds
what was measured against the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from vdqc.base.diagnostics import ConfigError
from vdqc.check_result import CheckResult
from vdqc.report import charts
from vdqc.report.data import ReportData
from vdqc.report.errors import step_axes, step_marks
from vdqc.report.page import Html, page, section, table, tag
from vdqc.report.sites import ROLE_KINDS
from vdqc.site_errors import SiteError
from vdqc.sites import SiteRow
from vdqc.text import decibel, duration, size

#: Artifacts that have colours of their own, and sites that the table holds.
MOST, SITES = len(ROLE_KINDS) + 1, 40

Both = tuple[ReportData, CheckResult | None]


def render(found: Sequence[ReportData], checks: Sequence[CheckResult] = ()) -> str:
    """The page for two artifacts or more; ``checks`` are as many, in the same order, or none.

    Raises ConfigError for another number of either.
    """
    if not 2 <= len(found) <= MOST:
        raise ConfigError(f"expected 2 to {MOST} artifacts to compare, got {len(found)}")
    if checks and len(checks) != len(found):
        raise ConfigError(
            f"expected one --check for each of the {len(found)} artifacts, got {len(checks)}",
            "give them in the order of the artifacts: --check A.json --check B.json",
        )
    given: list[CheckResult | None] = [*checks] or [None] * len(found)
    both: list[Both] = list(zip(found, given, strict=True))
    names = list(dict.fromkeys(data.name for data in found))
    title = f"{' and '.join(names)}: {len(found)} artifacts"
    parts = [_head(title, found), _figures(both), _curves(both), _weights(found), _sites(both)]
    versions = ", ".join(f"{key} {value}" for key, value in found[0].versions.items())
    parts.append(tag("footer", f"Written by vdqc. {versions}"))
    return page(title, *(part for part in parts if part))


def _head(title: str, found: Sequence[ReportData]) -> Html:
    rows = [
        [
            tag("span", letter(i), class_=f"letter {kind(i)}"),
            data.name,
            tag("code", data.recipe),
            tag("code", " ".join(data.rules)),
            data.target,
        ]
        for i, data in enumerate(found)
    ]
    models = {data.model_class for data in found}
    other = "" if len(models) == 1 else "These are different models: only shares compare."
    return tag(
        "header",
        tag("h1", title),
        tag("div", other, class_="sub") if other else "",
        table(["", "name", "recipe", "scheme", "target"], rows),
    )


@final
class _Figure:
    """One line of the table of figures: a number of each artifact, and which way is better."""

    def __init__(
        self,
        label: str,
        value: Callable[[Both], float | None],
        text: Callable[[float], str],
        *,
        least: bool = False,
    ) -> None:
        self.label, self.value, self.text, self.least = label, value, text, least


def _check(of: Callable[[CheckResult], float | None]) -> Callable[[Both], float | None]:
    return lambda both: None if both[1] is None else of(both[1])


_FIGURES = (
    _Figure("weights", lambda b: float(b[0].bytes_compiled), size, least=True),
    _Figure(
        "share of the float model's",
        lambda b: b[0].bytes_compiled / max(b[0].bytes_float, 1),
        lambda v: f"{v:.2f}×",
        least=True,
    ),
    _Figure("bits a weight", lambda b: b[0].effective_bits, lambda v: f"{v:.2f}", least=True),
    _Figure(
        "block pairs computed",
        lambda b: sum(m.density for m in b[0].masks) / len(b[0].masks) if b[0].masks else None,
        lambda v: f"{v:.0%}",
        least=True,
    ),
    _Figure("SQNR on the probe", lambda b: b[0].sqnr_db, decibel),
    _Figure(
        "predicted time of the sites",
        lambda b: sum(row.predicted_us or 0.0 for row in b[0].sites) / 1e6 or None,
        duration,
        least=True,
    ),
    _Figure("time to compile", lambda b: b[0].seconds, duration, least=True),
    _Figure("step-locked SQNR", _check(lambda c: c.sqnr_db), decibel),
    _Figure("worst step", _check(lambda c: c.worst.sqnr_db), decibel),
    _Figure("PSNR", _check(lambda c: c.videos[0].psnr_db if c.videos else None), decibel),
    _Figure("SSIM", _check(lambda c: c.videos[0].ssim if c.videos else None), lambda v: f"{v:.4f}"),
    _Figure(
        "accuracy",
        _check(lambda c: c.videos[0].accuracy if c.videos else None),
        lambda v: f"{v:.1%}",
    ),
    _Figure(
        "forward pass",
        _check(lambda c: c.timings[0].compiled_seconds if c.timings else None),
        duration,
        least=True,
    ),
    _Figure(
        "speed against float",
        _check(lambda c: c.timings[0].speedup if c.timings else None),
        lambda v: f"{v:.2f}×",
    ),
)


def _figures(both: Sequence[Both]) -> Html:
    rows = []
    for figure in _FIGURES:
        values = [figure.value(each) for each in both]
        there = [value for value in values if value is not None]
        if not there:
            continue
        best = (min if figure.least else max)(there)
        apart = len(set(there)) > 1
        cells = [
            ""
            if value is None
            else tag("strong" if apart and value == best else "span", figure.text(value))
            for value in values
        ]
        rows.append([figure.label, *cells])
    headers = ["", *map(letter, range(len(both)))]
    made = table(headers, rows, numbers=range(1, len(headers)))
    return section("Figures", "The best of each line is bold.", tag("div", made, class_="narrow"))


def _curves(both: Sequence[Both]) -> Html:
    checks = [(i, check) for i, (_, check) in enumerate(both) if check is not None]
    if not checks:
        return Html("")
    marks = [mark for i, check in checks for mark in step_marks(check.steps, kind(i))]
    labels = {kind(i): _label(both[i][0], i, both) for i, _ in checks}
    axes = step_axes(checks[0][1].steps)
    return section(
        "Teacher-forced error along the trajectory",
        "Each artifact on the inputs of the float model's own trajectory.",
        Html(charts.chart(marks, labels=labels, title="Step-locked SQNR of each", **axes)),
    )


def _weights(found: Sequence[ReportData]) -> Html:
    names = list(dict.fromkeys(row.name for data in found for row in data.sites))
    place = {name: float(i) for i, name in enumerate(names)}
    marks = [
        charts.Mark(
            place[row.name],
            row.weight_sqnr_db,
            f"{letter(i)} {row.name} ({row.scheme}): {decibel(row.weight_sqnr_db)}",
            kind(i),
        )
        for i, data in enumerate(found)
        for row in data.sites
        if row.weight_sqnr_db is not None
    ]
    if not marks:
        return Html("")
    spans = [
        tag("span", tag("i", class_=kind(i)), _label(data, i, [(d, None) for d in found]))
        for i, data in enumerate(found)
    ]
    return section(
        "Weights, site by site",
        "SQNR of each quantised weight against the weight that entered the quantiser.",
        tag("div", *spans, class_="legend"),
        Html(
            charts.chart(
                marks,
                x_label="site, in program order",
                y_label="SQNR of the weight, dB",
                title="Weight SQNR per site, of each",
            )
        ),
    )


def _sites(both: Sequence[Both]) -> Html:
    """The sites that differ most: by output error where all were checked, else by weight error."""
    rows = [{row.name: row for row in data.sites} for data, _ in both]
    shared = [name for name in rows[0] if all(name in other for other in rows)]
    outputs = [_outputs(check) for _, check in both]
    measured = all(outputs)
    values = {
        name: [
            outputs[i].get(name) if measured else rows[i][name].weight_sqnr_db for i in _of(both)
        ]
        for name in shared
    }
    differing = [
        (name, [v for v in found if v is not None], found)
        for name, found in values.items()
        if any(_differs(rows[0][name], other[name]) for other in rows)
        or len({v for v in found if v is not None}) > 1
    ]
    differing.sort(key=lambda item: -(max(item[1]) - min(item[1])) if item[1] else 0.0)
    cells = []
    for name, _, found in differing[:SITES]:
        cells.append(
            [
                tag("span", name, class_="mono"),
                *(decibel(value) for value in found),
                *(_how(rows[i][name]) for i in _of(both)),
            ]
        )
    letters = [letter(i) for i in _of(both)]
    only = [name for other in rows for name in other if name not in shared]
    missing = f" {len(set(only))} sites are not in all of them." if only else ""
    if not cells:
        return section("Differences, site by site", f"Every shared site is the same.{missing}")
    what = (
        "lowest SQNR of the site's output over the steps"
        if measured
        else "SQNR of the weight; with a --check for each artifact it is that of the output"
    )
    cut = f", the first {SITES} of {len(differing)}" if len(differing) > SITES else ""
    return section(
        "Differences, site by site",
        f"Numbers are the {what}; those that differ most come first{cut}.{missing}",
        table(["site", *letters, *letters], cells, numbers=range(1, 1 + len(letters))),
    )


def _of(both: Sequence[Both]) -> range:
    return range(len(both))


def _outputs(check: CheckResult | None) -> dict[str, float]:
    if check is None:
        return {}

    def lowest(error: SiteError) -> float:
        return min(value for value in error.sqnr_db if value is not None)

    reached = (e for e in check.sites if any(v is not None for v in e.sqnr_db))
    return {error.name: lowest(error) for error in reached}


def _differs(one: SiteRow, other: SiteRow) -> bool:
    return (one.scheme, one.kernel, one.bits) != (other.scheme, other.kernel, other.bits)


def _how(row: SiteRow) -> str:
    bits = f", {row.bits:.2f} bits" if row.bits is not None else ""
    return f"{row.scheme or 'none'}{bits}, {row.kernel}" if row.kernel else f"{row.scheme}{bits}"


def _label(data: ReportData, index: int, both: Sequence[Both]) -> str:
    """A, with the scheme where that tells the artifacts apart."""
    told = len({each.rules for each, _ in both}) == len(both)
    words = " ".join(data.rules).removeprefix("*=") if told else data.name
    return f"{letter(index)}  {words}"[:20]


def letter(index: int) -> str:
    """A for the first artifact."""
    return chr(ord("A") + index)


def kind(index: int) -> str:
    """Its colour."""
    return ROLE_KINDS[index] if index < len(ROLE_KINDS) else "e"
