"""The report's sections on error: along the trajectory, and site by site over its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vdqc.check_result import CheckResult, StepError
from vdqc.report import charts
from vdqc.report.heat import Panel, Scale, panel
from vdqc.report.page import Html, details, section, table, tag
from vdqc.site_errors import SiteError, worst_sites
from vdqc.text import count, decibel

#: Columns of a heat map: more steps are put together.
COLUMNS = 64


def steps(check: CheckResult) -> Html:
    """Teacher-forced and free-running error of every step, in one chart."""
    worst = check.worst
    where = f"timestep {worst.timestep:g}" if worst.timestep is not None else f"call {worst.call}"
    free = any(step.free_error is not None for step in check.steps)
    apart = (
        " Free-running, each model makes its own trajectory from the same noise: what earlier "
        "steps moved is in it too, and where the curves part errors feed on themselves."
        if free
        else ""
    )
    return section(
        "Error along the trajectory",
        "Teacher-forced, both models get the same inputs, those of the float model's own "
        "trajectory: the error of the compiled model alone. Worst at "
        f"{where}: {decibel(worst.sqnr_db)}, {worst.relative_error:.2%} of the output's norm."
        + apart,
        Html(
            charts.chart(
                [*step_marks(check.steps, "a"), *step_marks(check.steps, "b", free=True)],
                labels={"a": "teacher-forced", **({"b": "free-running"} if free else {})},
                title="SQNR per timestep, teacher-forced and free-running",
                **step_axes(check.steps),
            )
        ),
    )


def step_axes(steps: Sequence[StepError]) -> dict[str, Any]:
    """The axes that step marks are drawn on."""
    times = [step.timestep for step in steps if step.timestep is not None]
    timed = bool(times) and len(times) == len(steps)
    return {
        "x_label": "timestep, in the order of sampling" if timed else "call",
        "y_label": "SQNR, dB",
        "joined": True,
        "reverse_x": timed and times[0] > times[-1],
    }


def step_marks(steps: Sequence[StepError], kind: str, *, free: bool = False) -> list[charts.Mark]:
    """One mark per timestep; calls of one timestep (branches of guidance) count together."""
    timed = all(step.timestep is not None for step in steps)
    errors: dict[float, list[float]] = {}
    for step in steps:
        error = step.free_error if free else step.relative_error
        if error is not None:
            place = step.timestep if timed and step.timestep is not None else float(step.call)
            errors.setdefault(place, []).append(error)
    marks = []
    for place, found in errors.items():
        value = _decibel(sum(e * e for e in found) / len(found))
        what = f"{'timestep' if timed else 'call'} {place:g}"
        way = "free-running" if free else "teacher-forced"
        marks.append(charts.Mark(place, value, f"{what}, {way}: {decibel(value)}", kind))
    return marks


def sites(check: CheckResult) -> Html:
    """Small multiples of heat maps: one per place in a block, a row per layer."""
    measured = [error for error in check.sites if error.sqnr_db]
    if not measured:
        return Html("")
    columns = _columns(check.steps)
    first, last = _ends(check.steps)
    panels = _panels(measured, columns)
    values = [v for p in panels for row in p.rows for v in row if v is not None]
    scale = Scale.over(values)
    maps = [panel(p, scale, first, last) for p in panels]
    return section(
        "Error by site and timestep",
        "SQNR of what each site puts out in the compiled program as it runs, against the float "
        "model on the same teacher-forced call: it holds the error of everything before the site. "
        "One map per place in a block: layers downwards, sampling steps to the right.",
        scale.legend(),
        tag("div", *maps, class_="heats"),
        _unmeasured(check.sites),
        _worst(check),
    )


def _panels(errors: Sequence[SiteError], columns: Sequence[Sequence[int]]) -> list[Panel]:
    groups: dict[str, list[tuple[str, SiteError]]] = {}
    for error in errors:
        title, row = _place(error)
        groups.setdefault(title, []).append((row, error))
    outside = groups.pop("", [])
    found = [
        Panel(
            title,
            tuple(row for row, _ in rows),
            tuple(_row(error, columns) for _, error in rows),
        )
        for title, rows in groups.items()
    ]
    several = len({title.partition(" ")[0] for title in groups}) > 1
    if not several:
        found = [Panel(p.title.partition(" ")[2], p.names, p.rows) for p in found]
    for _, error in outside:  # one row each, under its own name
        found.append(Panel(error.name, ("",), (_row(error, columns),)))
    return found


def _place(error: SiteError) -> tuple[str, str]:
    """("blocks attn1.to_q", "3") for blocks.3.attn1.to_q; ("", name) outside of blocks."""
    if not error.block:
        return "", error.name
    stem, _, index = error.block.rpartition(".")
    rest = error.name.removeprefix(error.block).lstrip(".:") or "output of the block"
    return f"{stem} {rest}", index


def _row(error: SiteError, columns: Sequence[Sequence[int]]) -> tuple[float | None, ...]:
    made: list[float | None] = []
    for calls in columns:
        values = [error.sqnr_db[call] for call in calls if call < len(error.sqnr_db)]
        noise = [10 ** (-v / 10) for v in values if v is not None]
        made.append(_decibel(sum(noise) / len(noise)) if noise else None)
    return tuple(made)


def _columns(steps: Sequence[StepError]) -> list[list[int]]:
    """Calls of each column: those of one timestep in a row, or more where there are many."""
    groups: list[list[int]] = []
    for at, step in enumerate(steps):
        before = steps[at - 1].timestep if at else None
        if groups and step.timestep is not None and step.timestep == before:
            groups[-1].append(step.call)
        else:
            groups.append([step.call])
    size = math.ceil(len(groups) / COLUMNS)
    return [
        [call for group in groups[i : i + size] for call in group]
        for i in range(0, len(groups), size)
    ]


def _ends(steps: Sequence[StepError]) -> tuple[str, str]:
    ends = steps[0], steps[-1]
    if any(step.timestep is None for step in ends):
        return f"call {ends[0].call}", f"call {ends[1].call}"
    return f"t = {ends[0].timestep:.4g}", f"t = {ends[1].timestep:.4g}"


def _unmeasured(errors: Sequence[SiteError]) -> Html:
    reasons: dict[str, dict[str, int]] = {}
    for error in errors:
        if not error.sqnr_db:
            place = _place(error)[0].partition(" ")[2] or error.name
            places = reasons.setdefault(error.why, {})
            places[place] = places.get(place, 0) + 1
    if not reasons:
        return Html("")
    parts = [
        tag("div", f"{', '.join(_times(p, n) for p, n in places.items())}: {why}", class_="quiet")
        for why, places in reasons.items()
    ]
    return tag("div", "Not measured: ", *parts, class_="small")


def _times(place: str, number: int) -> str:
    return place if number == 1 else f"{place} ({number}×)"


def _worst(check: CheckResult) -> Html:
    rows = []
    for error, call, value in worst_sites(check.sites, 8):
        step = check.steps[call]
        at = f"{step.timestep:g}" if step.timestep is not None else f"call {call}"
        reached = [v for v in error.sqnr_db if v is not None]
        best = max(reached)
        rows.append([tag("span", error.name, class_="mono"), decibel(value), at, decibel(best)])
    return details(
        f"the {count(len(rows), 'site')} with the lowest SQNR",
        tag(
            "div",
            table(["site", "lowest", "at timestep", "highest"], rows, (1, 2, 3)),
            class_="narrow",
        ),
        is_open=True,
    )


def _decibel(noise: float) -> float:
    return math.inf if noise == 0 else -10 * math.log10(noise)
