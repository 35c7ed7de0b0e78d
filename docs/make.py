"""Writes the pages that are made from the repository itself: docs/recipes/*.md, docs/support.md.

    python docs/make.py            # write them
    python docs/make.py --check    # exit code 1 if one is not current

A recipe's page says what its file says, what the paper reports in its own terms, and what
``benchmarks/results/quality.json`` holds of it beside every other recipe at the same scheme. The
support table lists what the tests of the architectures assert.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vdqc.engine.named import NamedRecipe, named, names
from vdqc.testing.architectures import ARCHITECTURES, Architecture

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "benchmarks"))  # the benchmarks are no package

from quality_claims import Cell, Verdict, verdicts  # noqa: E402

QUALITY = DOCS.parent / "benchmarks" / "results" / "quality.json"
AXES = {"B": "batch", "F": "frames", "HW": "height and width", "L": "text length"}
MODELS = {
    "digits": "a Wan-architecture video transformer (examples/digits)",
    "planted": "the same function with outlier channels planted by exact scaling",
    "large": "the same architecture at 4096 tokens (examples/digits_large)",
    "unet": "a class-conditional UNet (examples/digits_unet): its linears, 43 % of the weights",
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
    lines += ["", *HOW_TO_READ, *claims_section(list(verdicts(rows)))]
    for model, title in MODELS.items():
        measured = [row for row in dense(rows) if row["model"] == model]
        if measured:
            lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
            lines += grid(measured, "sqnr_db", "step-locked SQNR, dB")
            lines += ["", *grid(measured, "psnr_db", "PSNR, dB")]
            lines += ["", *grid(measured, "accuracy", "accuracy", digits=3)]
            lines += ["", *grid(measured, "effective_bits", "effective bits", digits=2)]
    return "\n".join(lines) + "\n"


def claims_section(found: Sequence[Verdict]) -> list[str]:
    """Each paper's recipe beside the best of the baselines that it names."""
    if not found:
        return []
    lines = [
        "",
        "## What the papers claim, and what was found here",
        "",
        "Each paper's recipe against the best of the baselines in its own tables that has no more",
        "effective bits, on the kind of model it is made for (`benchmarks/quality_claims.py`).",
        "*Level*: within both spreads over seeds; one seed has no spread. Parts that fail stand on",
        "the recipe's page, part by part.",
        "",
        "| recipe | model | scheme | bits | SQNR, dB | seeds | best baseline | bits | SQNR, dB "
        "| seeds | margin, dB | found | more bits, and better | not measured |",
        f"|{' --- |' * 14}",
    ]
    for verdict in found:
        own, best = verdict.own, verdict.best
        richer = (f"{o.recipe} {o.sqnr_db:.1f} ({o.bits:.2f} bits)" for o in verdict.richer)
        cells = [
            f"[{own.recipe}]({own.recipe}.md)",
            verdict.claim.model,
            verdict.scheme,
            *cell_texts(own),
            best.recipe,
            *cell_texts(best),
            f"{verdict.margin:+.1f}",
            verdict.word,
            ", ".join(richer),
            ", ".join(verdict.missing),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cell_texts(cell: Cell) -> list[str]:
    """Bits, SQNR with its spread, seeds."""
    spread = f" ± {cell.spread:.1f}" if cell.seeds > 1 else ""
    return [f"{cell.bits:.2f}", f"{cell.sqnr_db:.1f}{spread}", str(cell.seeds)]


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
    if own:
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
    """A line for each model and scheme, with the best other recipe beside it."""
    lines = [
        "| model | scheme | bits | SQNR, dB | PSNR, dB | accuracy (float) | seconds | seeds "
        "| best other recipe |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (model, scheme), group in grouped(own, "model", "scheme"):
        others = [
            (mean(part, "sqnr_db"), name)
            for (name,), part in grouped(
                [r for r in rows if (r["model"], r["scheme"]) == (model, scheme)], "recipe"
            )
            if name != group[0]["recipe"] and name in names()
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


def ablation_section(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The recipe beside itself without each of its parts, where that was measured."""
    parts = [r for r in rows if "sqnr_db" in r and r["recipe"].startswith(f"{name}-")]
    lines = []
    for (model, scheme), group in grouped(parts, "model", "scheme"):
        whole = [r for r in dense(rows) if (r["model"], r["scheme"]) == (model, scheme)]
        whole = [r for r in whole if r["recipe"] == name]
        for (part,), found in [((name,), whole), *grouped(group, "recipe")]:
            if not found:
                continue
            cells = [
                model,
                scheme,
                part.partition("-")[2] or "nothing",
                f"{mean(found, 'effective_bits'):.2f}",
                shown(found, "sqnr_db"),
                shown(found, "psnr_db"),
                shown(found, "accuracy", 3) if found[0].get("accuracy") is not None else "",
                str(len(found)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    return [
        "",
        "## Part by part",
        "",
        "The recipe with a part taken out or changed: `benchmarks/quality_ablations.py` says how.",
        "",
        "| model | scheme | part | bits | SQNR, dB | PSNR, dB | accuracy | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *lines,
    ]


def sparsity_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every part of QuantSparse with and without the others."""
    from_study = [row for row in rows if "sqnr_db" in row and is_study(row)]
    if not from_study:
        return []
    lines = [
        "",
        "## Part by part",
        "",
        "The digits model has 512 video tokens, so blocks are 32 tokens instead of 128; the large",
        "one has 4096 and blocks of 128. `naive` is",
        "rotation and rounding to nearest, `learned` learns on the block error alone, `msad` with",
        "the attention terms, `joint` with the masks in place; `first`, `second` and `linear` add",
        "what the masks drop. The residual makes every fifth step dense: the share that is",
        "computed over the whole run stands under *effective*.",
        "",
        "| variant | scheme | density | effective | SQNR, dB | PSNR, dB | SSIM | digits | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (model, scheme, density, variant), group in grouped(
        from_study, "model", "scheme", "density", "recipe"
    ):
        effective = mean(group, "effective_density") if "effective_density" in group[0] else 1.0
        cells = [
            variant if model == "digits" else f"{variant} ({model})",
            scheme,
            f"{density:g}",
            f"{effective:.2f}",
            shown(group, "sqnr_db"),
            shown(group, "psnr_db"),
            shown(group, "ssim", 3),
            shown(group, "accuracy", 3),
            str(len(group)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + sums(from_study)


def sums(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether masks and quantisation together cost more than the sum of both."""
    found = {(r["model"], r["recipe"], r["density"], r["seed"]): r["sqnr_db"] for r in rows}
    lines = []
    for (model, variant, density, seed), together in sorted(found.items()):
        method, _, rest = variant.partition("+")
        apart = [found.get((model, "sparse", density, 0)), found.get((model, method, 1.0, seed))]
        if rest == "sparse" and None not in apart and method != "joint":
            noise = sum(10 ** (-decibels / 10) for decibels in apart if decibels is not None)
            added = -10 * math.log10(noise)
            lines.append(
                f"* {model}, `{variant}` at {density:g}: the errors of `sparse` and `{method}`, "
                f"added as powers, make {added:.1f} dB; together they measure {together:.1f} dB."
            )
    if not lines:
        return []
    return ["", "Does the combination lose more than the sum of both? By single steps:", "", *lines]


def is_study(row: Mapping[str, Any]) -> bool:
    """True for a row of ``benchmarks/quality_sparsity.py``."""
    return row["recipe"] not in names() and row["recipe"].partition("+")[0] in STUDY


STUDY = ("sparse", "naive", "learned", "msad", "joint")


def dense(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of named recipes that were measured."""
    return [row for row in rows if "sqnr_db" in row and row["recipe"] in names()]


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


def grouped(
    rows: Iterable[Mapping[str, Any]], *keys: str
) -> list[tuple[tuple[Any, ...], list[Mapping[str, Any]]]]:
    """Rows that agree in ``keys``, in order of these."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return sorted(found.items(), key=lambda item: item[0])


def shown(rows: Sequence[Mapping[str, Any]], key: str, digits: int = 1) -> str:
    """Mean and half the spread over seeds; nothing where it does not apply."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.{digits}f}"
    return text


def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean over rows that have a value, 0 if none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.mean(values) if values else 0.0


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
