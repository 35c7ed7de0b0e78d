"""The report of an artifact: what was done, what it cost in fidelity, where, and what runs now.

One self-contained HTML page from what the artifact's manifest and printed IR say, and from a check
against the float model where there is one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vdqc.check import CheckResult
from vdqc.ir.artifact import MANIFEST, Artifact
from vdqc.report import charts, png
from vdqc.report.data import ReportData, report_data
from vdqc.report.page import Html, details, figure, page, section, table, tag
from vdqc.text import count, decibel, duration, size

ROLE_KINDS = "abcdfg"


def write(folder: Path) -> None:
    """Write ``report.html`` into an artifact folder that is not sealed yet."""
    manifest = json.loads((folder / MANIFEST).read_text())
    page = render(report_data(Artifact(folder, manifest)))
    (folder / "report.html").write_text(page, encoding="utf-8")


def render(data: ReportData, check: CheckResult | None = None) -> str:
    """The page for one compilation, with the comparison if there is one."""
    parts = [_head(data, check), _figures(data, check)]
    if check is not None:
        parts += [_comparison(check), _steps(check)]
    parts += [
        _passes(data),
        _sites(data),
        _kernels(data),
        _diagnostics(data),
        _ir(data),
        _foot(data),
    ]
    return page(f"{data.name}: vdqc report", *(part for part in parts if part))


def _head(data: ReportData, check: CheckResult | None) -> Html:
    what = (
        "compiled by vdqc"
        if check is None
        else "compiled by vdqc and compared with its float model"
    )
    sub = f"{data.model_class} in {data.dtype}, {what} for target {data.target}"
    rules = "  ".join(data.rules)
    return tag(
        "header",
        tag("h1", data.name),
        tag("div", sub, class_="sub"),
        tag("div", tag("code", f"{data.recipe}   {rules}".strip()), class_="recipe"),
    )


def _figures(data: ReportData, check: CheckResult | None) -> Html:
    quantised = [row for row in data.sites if row.scheme not in ("", "none")]
    figures = [
        figure(
            f"{data.bytes_compiled / max(data.bytes_float, 1):.2f}×",
            "size of the weights",
            f"{size(data.bytes_float)} to {size(data.bytes_compiled)}",
        )
    ]
    if data.sqnr_db is not None:
        figures.append(
            figure(decibel(data.sqnr_db), "SQNR on the probe", "against the float model")
        )
    if data.effective_bits is not None:
        figures.append(
            figure(
                f"{data.effective_bits:.2f}",
                "bits a weight",
                f"{len(quantised)} of {count(len(data.sites), 'site')} quantised",
            )
        )
    if check is not None:
        figures.append(figure(decibel(check.sqnr_db), "step-locked SQNR", "whole trajectory"))
        if check.videos:
            first = check.videos[0]
            figures.append(
                figure(decibel(first.psnr_db), "PSNR of the video", f"SSIM {first.ssim:.4f}")
            )
            if first.accuracy is not None and first.accuracy_float is not None:
                figures.append(
                    figure(
                        f"{first.accuracy:.0%}", "accuracy", f"float: {first.accuracy_float:.0%}"
                    )
                )
        if check.timings:
            timing = check.timings[0]
            note = f"{duration(timing.float_seconds)} to {duration(timing.compiled_seconds)}"
            figures.append(figure(f"{timing.speedup:.2f}×", "speed of a forward pass", note))
    else:
        figures.append(figure(duration(data.seconds), "to compile"))
    return tag("div", *figures, class_="figures")


def _comparison(check: CheckResult) -> Html:
    if check.frames is None:
        return Html("")
    reference, video = (
        frames if frames.ndim == 5 else frames.unsqueeze(2) for frames in check.frames
    )
    difference = (video - reference).abs()
    peak = float(difference.max())
    gain = 1.0 if peak == 0 else max(1.0, 2.0 ** math.floor(math.log2(1 / peak)))
    films = []
    for index in range(min(4, reference.shape[0])):
        shown = (
            ("float", reference[index]),
            ("compiled", video[index]),
            (f"difference ×{gain:g}", difference[index] * gain),
        )
        cells = []
        for label, frames in shown:
            picture = png.strip(_shown(frames), 12)
            image = Html(f'<img alt="video {index}: {label}" src="{png.data_uri(picture)}"/>')
            cells += [tag("div", label), tag("div", image)]
        films.append(tag("div", *cells, class_="films"))
    rows = [
        [
            str(v.seed),
            decibel(v.psnr_db),
            f"{v.ssim:.4f}",
            f"{v.flicker_float:.4f}",
            f"{v.flicker:.4f}",
            "" if v.accuracy_float is None else f"{v.accuracy_float:.1%}",
            "" if v.accuracy is None else f"{v.accuracy:.1%}",
        ]
        for v in check.videos
    ]
    headers = ["seed", "PSNR", "SSIM", "flicker, float", "compiled", "accuracy, float", "compiled"]
    return section(
        "The same seed, float and compiled",
        "Whole generations from the same noise. Small differences early in sampling move what "
        "follows, so these numbers mix error with divergence; the next section separates them.",
        *films,
        table(headers, rows, numbers=range(7)),
    )


def _shown(frames: torch.Tensor) -> torch.Tensor:
    return frames if frames.shape[0] in (1, 3) else frames[:1]


def _steps(check: CheckResult) -> Html:
    has_time = all(step.timestep is not None for step in check.steps)
    marks = [
        charts.Mark(
            step.timestep if has_time and step.timestep is not None else float(step.call),
            step.sqnr_db,
            f"call {step.call}, timestep {step.timestep}: {decibel(step.sqnr_db)}",
        )
        for step in check.steps
    ]
    worst = check.worst
    where = f"timestep {worst.timestep:g}" if worst.timestep is not None else f"call {worst.call}"
    return section(
        "Step-locked error",
        "Both models on the same inputs, along the float model's own trajectory: the error of the "
        f"compiled model alone. Worst at {where}: {decibel(worst.sqnr_db)}, "
        f"{worst.relative_error:.2%} of the output's norm.",
        _chart(
            marks,
            x_label="timestep, in the order of sampling" if has_time else "call",
            y_label="SQNR, dB",
            title="Step-locked SQNR per timestep",
            joined=True,
            reverse_x=has_time and check.steps[0].timestep > check.steps[-1].timestep,  # type: ignore[operator]
        ),
    )


def _passes(data: ReportData) -> Html:
    top = max((record.seconds for record in data.records), default=1.0) or 1.0
    rows = []
    for number, record in enumerate(data.records, 1):
        kind = "exact" if record.exact else "lossy"
        rows.append(
            [
                str(number),
                tag("code", record.text),
                tag("span", kind, class_=kind),
                str(record.rewrites),
                ""
                if record.error is None
                else ("0" if record.error == 0 else f"{record.error:.1e}"),
                "" if record.sqnr_db is None else decibel(record.sqnr_db),
                Html(charts.bar(record.seconds / top, duration(record.seconds))),
                duration(record.seconds),
            ]
        )
    headers = ["", "pass", "", "rewrites", "moved the output by", "SQNR after it", "time", ""]
    return section(
        "Passes",
        "What ran, in order. Exact passes keep the function and were held to it on the probe; "
        "lossy ones spend fidelity. SQNR is of the whole graph so far against the float model. "
        "Behind a quantiser an exact step may still move the output, by another draw of the noise.",
        table(headers, rows, numbers=(0, 3, 4, 5, 7)),
        *(_facts(record.text, record.facts) for record in data.records if record.facts),
    )


def _facts(text: str, facts: Mapping[str, Any]) -> Html:
    # what passes say of each site is in the table of sites
    rows = [[key, _short(value)] for key, value in facts.items() if key != "sites"]
    return details(f"{text}: what it reports", table(["", ""], rows))


def _chart(marks: Sequence[charts.Mark], **options: Any) -> Html:
    return Html(charts.chart(marks, **options))


def _short(value: Any, limit: int = 400) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}: {_short(item)}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(_short(item) for item in value)
    else:
        text = str(value)
    return text if len(text) <= limit else f"{text[:limit]} …"


def _sites(data: ReportData) -> Html:
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
    chart = _chart(
        marks,
        x_label="site, in program order",
        y_label="weight SQNR, dB",
        title="Weight SQNR per site",
    )
    groups: dict[str, list[Any]] = {}
    for row in data.sites:
        groups.setdefault(row.block, []).append(row)
    first = next((name for name in groups if name), "")
    only = len(data.sites) <= 30
    tables = [
        details(
            f"{name or 'outside the blocks'} ({count(len(rows), 'site')})",
            _site_table(rows),
            is_open=name == first,
        )
        for name, rows in groups.items()
    ]
    return section(
        "Sites",
        "Every linear, attention and convolution, by its module path.",
        *([_legend(kinds), chart] if measured else []),
        *([_site_table(data.sites)] if only else tables),
    )


def _legend(kinds: Mapping[str, str]) -> Html:
    spans = [tag("span", tag("i", class_=kind), role) for role, kind in kinds.items()]
    return tag("div", *spans, class_="legend")


def _site_table(rows: Sequence[Any]) -> Html:
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


def _kernels(data: ReportData) -> Html:
    by_kernel: dict[tuple[str, str], list[Any]] = {}
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


def _diagnostics(data: ReportData) -> Html:
    order = {"error": 0, "warning": 1, "remark": 2}
    made: dict[str, list[Html]] = {"warning": [], "remark": []}
    for entry in sorted(data.diagnostics, key=lambda item: order.get(item["severity"], 3)):
        severity = "remark" if entry["severity"] == "remark" else "warning"
        where = tag("span", f"{entry['site']}: ", class_="mono") if entry.get("site") else ""
        code = tag("span", f"  [{entry['code']}]", class_="mono")
        notes = [tag("div", note, class_="mono") for note in entry.get("notes", ())]
        made[severity].append(
            tag("div", where, entry["message"], code, *notes, class_=f"message {severity}")
        )
    if not made["warning"] and not made["remark"]:
        return section("Diagnostics", "Nothing to say: no pass and no kernel had a remark.")
    remarks = made["remark"]
    folded = [details(count(len(remarks), "remark"), *remarks)] if remarks else []
    return section("Diagnostics", "", *made["warning"], *folded)


def _ir(data: ReportData) -> Html:
    if len(data.ir) < 2:
        return Html("")
    names = list(data.ir)
    first, last = names[0], names[-1]
    columns = [
        tag("div", tag("h3", title), tag("pre", _excerpt(data.ir[name])))
        for title, name in ((f"before: {first}", first), (f"after: {last}", last))
    ]
    return section(
        "The program, before and after",
        "The first lines of one block; the whole text after every pass is in the folder ir/ of the "
        "artifact.",
        *columns,
    )


def _excerpt(text: str, lines: int = 24) -> str:
    """The lines from the first block's first site on."""
    rows = text.splitlines()
    start = next((i for i, row in enumerate(rows) if "# site blocks.0." in row), 1)
    start = max(1, start - 6)
    shown = [row.strip() for row in rows[start : start + lines]]
    return "\n".join(shown)


def _foot(data: ReportData) -> Html:
    words = ", ".join(f"{key} {value}" for key, value in data.versions.items())
    return tag("footer", f"Written by vdqc. {words}")
