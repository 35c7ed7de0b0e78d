"""The report of an artifact: what was done, what it cost in fidelity, where, and what runs now.

One self-contained HTML page from what the artifact's manifest and printed IR say, and from a check
against the float model where there is one. It holds no script and fetches nothing;
``docs/report.md`` says how to read it.
"""

from __future__ import annotations

import json
from pathlib import Path

from vdqc.check_result import CheckResult
from vdqc.ir.artifact import Artifact
from vdqc.ir.manifest import MANIFEST
from vdqc.report import errors, frames, layers, masks, program, sites
from vdqc.report.data import ReportData, report_data
from vdqc.report.page import Html, figure, page, tag
from vdqc.text import count, decibel, duration, size


def write(folder: Path) -> None:
    """Write ``report.html`` into an artifact folder that is not sealed yet."""
    manifest = json.loads((folder / MANIFEST).read_text())
    text = render(report_data(Artifact(folder, manifest)))
    (folder / "report.html").write_text(text, encoding="utf-8")


def render(data: ReportData, check: CheckResult | None = None, block: str = "") -> str:
    """The page for one compilation, with the comparison if there is one.

    ``block`` names the block whose program is shown, by default the first repeated one; raises
    ConfigError if there is none of that name.
    """
    parts = [_head(data, check), _figures(data, check)]
    if check is not None:
        parts += [frames.comparison(check), errors.steps(check), errors.sites(check)]
    parts += [
        program.passes(data),
        layers.layers(data, check),
        masks.masks(data, check),
        sites.sites(data),
        sites.kernels(data),
        program.diagnostics(data),
        program.ir(data, block),
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
    if data.masks:
        density = sum(row.density for row in data.masks) / len(data.masks)
        note = f"in {len(data.masks)} sparse attentions"
        figures.append(figure(f"{density:.0%}", "of block pairs computed", note))
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
    warnings = len(program.messages_of(data, "warning"))
    if warnings:
        label = "warning" if warnings == 1 else "warnings"
        figures.append(figure(str(warnings), label, "see Diagnostics"))
    return tag("div", *figures, class_="figures")


def _foot(data: ReportData) -> Html:
    words = ", ".join(f"{key} {value}" for key, value in data.versions.items())
    return tag("footer", f"Written by vdqc. {words}")
