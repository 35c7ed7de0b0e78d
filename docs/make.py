"""Writes the pages that are made from the repository itself: docs/recipes/*.md, docs/support.md.

    python docs/make.py            # write them
    python docs/make.py --check    # exit code 1 if one is not current

A recipe's page says what its file says, what the paper reports in its own terms, and what
``benchmarks/results/quality.json`` holds of it beside every other recipe at the same scheme. The
support table lists what the tests of the architectures assert.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdqc.engine.named import NamedRecipe, named, names
from vdqc.testing.architectures import ARCHITECTURES, Architecture

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "benchmarks")]

from quality_claims import SLACK  # noqa: E402
from sections import (  # noqa: E402
    WHOLE,
    ablation_section,
    claims_section,
    dense,
    grouped,
    mean,
    shown,
    sparsity_section,
)

QUALITY = DOCS.parent / "benchmarks" / "results" / "quality.json"
AXES = {"B": "batch", "F": "frames", "HW": "height and width", "L": "text length"}
MODELS = {
    "digits": "a Wan-architecture video transformer (examples/digits)",
    "planted": "the same function with outlier channels planted by exact scaling",
    "large": "the same architecture at 4096 tokens (examples/digits_large)",
    "unet": "a class-conditional UNet, convolutions included (examples/digits_unet)",
    "views": "a VGGT-like model of poses and depth (examples/views)",
}


def main(arguments: Sequence[str]) -> int:
    """Write or check."""
    stale = [path for path, text in pages().items() if read(path) != text]
    for path in stale:
        if "--check" not in arguments:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages()[path], encoding="utf-8")
        print(
            f"{path.relative_to(DOCS.parent)}: {'stale' if '--check' in arguments else 'written'}"
        )
    return 1 if stale and "--check" in arguments else 0


def pages() -> dict[Path, str]:
    """Every generated page."""
    rows = json.loads(QUALITY.read_text(encoding="utf-8"))["rows"]
    found = {DOCS / "recipes" / f"{name}.md": recipe_page(named(name), rows) for name in names()}
    found[DOCS / "recipes" / "README.md"] = recipe_index(rows)
    found[DOCS / "support.md"] = support_page()
    return found


def read(path: Path) -> str:
    """What the page holds, nothing if there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


# recipes ------------------------------------------------------------------------------------------


def recipe_index(rows: Sequence[Mapping[str, Any]]) -> str:
    """All recipes, and all measured rows."""
    lines = ["# Recipes", "", "Made by `docs/make.py` from the recipe files and the results.", ""]
    lines += ["| recipe | what it does | source |", "| --- | --- | --- |"]
    for name in names():
        recipe = named(name)
        lines.append(f"| [{name}]({name}.md) | {recipe.about} | {recipe.source or 'none'} |")
    lines += ["", *HOW_TO_READ, *claims_section(rows)]
    for model, title in MODELS.items():
        measured = [row for row in dense(rows) if row["model"] == model]
        if measured:
            lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
            lines += grid(measured, "sqnr_db", "step-locked SQNR, dB")
            lines += ["", *grid(measured, "psnr_db", "PSNR, dB")]
            lines += ["", *grid(measured, "accuracy", "accuracy", digits=3)]
            lines += ["", *grid(measured, "effective_bits", "effective bits", digits=2)]
    return "\n".join(lines) + "\n"


HOW_TO_READ = (
    "Step-locked SQNR compares single calls along the float model's own trajectory; PSNR compares",
    "whole generations from the same seed. Mean over seeds, then half the distance between the",
    "largest and the smallest; a row of one seed has no spread. A scheme is taken in the form of",
    "the recipe's own (groups, zero points). Effective bits count scales, zero points and branches",
    "over all weights that are quantised: compare recipes at equal bits. Rows of views that do not",
    "say `generations` in the results are of 32 rooms, too few for a hundredth of accuracy.",
)


def recipe_page(recipe: NamedRecipe, rows: Sequence[Mapping[str, Any]]) -> str:
    """One recipe: what it is, what its paper reports, what was measured, where it differs."""
    lines = [f"# {recipe.name}", "", recipe.about, ""]
    if recipe.source:
        lines += [f"Source: {recipe.source}.", ""]
    lines += ["```", f"vdqc compile model.py --recipe {recipe.name}", "```", ""]
    lines += [f"Scheme: {', '.join(f'`{text}`' for text in recipe.scheme)}. Passes:", ""]
    lines += [f"{number}. `{text}`" for number, text in enumerate(recipe.passes, 1)]
    if recipe.claims:
        lines += ["", "## What the paper reports", "", recipe.claims]
    lines += ["", "## What we measured", ""]
    own = [row for row in dense(rows) if row["recipe"] == recipe.name]
    if recipe.name == "quantsparse":
        lines += [f"The whole recipe is `{WHOLE}` below, on two sizes of one video model."]
    elif own:
        lines += measured_table(own, dense(rows))
        lines += ["", "All recipes side by side: [README.md](README.md)."]
    else:
        lines += ["Nothing yet: `benchmarks/quality.py` has no row of it."]
    lines += ablation_section(recipe.name, rows)
    if recipe.name == "quantsparse":
        lines += sparsity_section(rows)
    if recipe.source or recipe.departures:
        lines += ["", "## Where we differ", ""]
        lines += [f"* {text}" for text in recipe.departures] or ["Nowhere that we know of."]
    return "\n".join(lines) + "\n"


def measured_table(
    own: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """A line for each model and scheme, and beside it the best other recipe of no more bits."""
    lines = [
        "| model | scheme | bits | SQNR, dB | PSNR, dB | accuracy (float) | seconds | seeds "
        "| best other of no more bits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (model, scheme), group in grouped(own, "model", "scheme"):
        limit = mean(group, "effective_bits") + SLACK
        others = [
            (mean(part, "sqnr_db"), name)
            for (name,), part in grouped(
                [r for r in rows if (r["model"], r["scheme"]) == (model, scheme)], "recipe"
            )
            if name != group[0]["recipe"]
            and name in names()
            and mean(part, "effective_bits") <= limit
        ]
        best = max(others, default=None)
        beside = "none measured" if best is None else f"{best[1]} {best[0]:.1f} dB"
        accuracy = f"{shown(group, 'accuracy', 3)} ({mean(group, 'accuracy_float'):.3g})"
        cells = [
            model,
            scheme,
            f"{mean(group, 'effective_bits'):.2f}",
            shown(group, "sqnr_db"),
            shown(group, "psnr_db"),
            accuracy if group[0].get("accuracy") is not None else "",
            shown(group, "seconds", 0),
            str(len(group)),
            beside,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def grid(rows: Sequence[Mapping[str, Any]], key: str, title: str, digits: int = 1) -> list[str]:
    """Recipes down, schemes across."""
    schemes = sorted({row["scheme"] for row in rows}, key=scheme_order)
    lines = [f"| {title} | {' | '.join(schemes)} |", f"| --- |{' --- |' * len(schemes)}"]
    for (name,), part in grouped(rows, "recipe"):
        cells = []
        for scheme in schemes:
            group = [row for row in part if row["scheme"] == scheme]
            cells.append(shown(group, key, digits) if group else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def scheme_order(scheme: str) -> tuple[int, str]:
    """Most bits first."""
    bits = sum(int(letter) for letter in scheme if letter.isdigit())
    return -bits, scheme


# support ------------------------------------------------------------------------------------------


def support_page() -> str:
    """Architectures whose capture is compared with eager by a test, and what may vary in a call."""
    lines = [
        "# Supported models",
        "",
        "Made by `docs/make.py` from `vdqc/testing/architectures.py`. Every line is a test",
        "(`tests/core/test_frontend.py`): a tiny model of the architecture is captured from two",
        "calls, and the graph is compared with the model on fresh calls of other sizes in every",
        "axis that is named. A model that is not in the table is captured the same way; where",
        "`torch.export` cannot follow a forward, the error names file, line and operation.",
        "",
        "| name | class | sizes that may vary |",
        "| --- | --- | --- |",
    ]
    for name, architecture in sorted(ARCHITECTURES.items()):
        cells = [name, f"{architecture.library}.{architecture.class_name}", varying(architecture)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def varying(architecture: Architecture) -> str:
    """Words for the axes that a test changes."""
    words = [word for axes, word in AXES.items() if set(axes) <= set(architecture.axes)]
    return ", ".join(words) or "none"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
