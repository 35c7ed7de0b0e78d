"""What the rows of the quality table say, for the pages of recipes: claims, parts, sparsity."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vdqc.engine.named import names

# the benchmarks are no package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from quality_claims import Cell, Verdict, verdicts

# claims ------------------------------------------------------------------------------------------


def claims_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each paper's recipe beside the best of the baselines that it names."""
    found: list[Verdict] = list(verdicts(rows))
    if not found:
        return []
    lines = [
        "",
        "## What the papers claim, and what was found here",
        "",
        "Each paper's recipe against the best of the baselines in its own tables that has no more",
        "effective bits, on the kind of model it is made for (`benchmarks/quality_claims.py`).",
        "*Level*: within both spreads over seeds; one seed has no spread. Parts that fail stand on",
        "the recipe's page, part by part. *Removed* is the share of that baseline's error power",
        "that the recipe takes away; beside it the share of the loss against 16 bits that the",
        "paper's figures take from the best baseline there, in the paper's own measure.",
        "",
        "| recipe | model | scheme | bits | SQNR, dB | seeds | best baseline | bits | SQNR, dB "
        "| seeds | margin, dB | found | removed | the paper | more bits, and better "
        "| not measured |",
        f"|{' --- |' * 16}",
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
            f"{verdict.removed:.0%}",
            published_text(verdict),
            ", ".join(richer),
            ", ".join(verdict.missing),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def published_text(verdict: Verdict) -> str:
    """The paper's own margin at this scheme; nothing where it has none."""
    paper = verdict.claim.published.get(verdict.scheme)
    if paper is None:
        return ""
    figures = f"{paper.own:g}, {paper.baseline} {paper.best:g}, 16 bits {paper.full:g}"
    return f"{paper.removed:.0%} ({paper.measure}: {figures})"


def cell_texts(cell: Cell) -> list[str]:
    """Bits, SQNR with its spread, seeds."""
    spread = f" ± {cell.spread:.1f}" if cell.seeds > 1 else ""
    return [f"{cell.bits:.2f}", f"{cell.sqnr_db:.1f}{spread}", str(cell.seeds)]


# parts -------------------------------------------------------------------------------------------


#: What the parts say in a sentence or two, checked by eye against the rows when they change.
FINDINGS = {
    "qvdit": (
        "Rounding does the work: learned steps in its place lose 2 to 7 dB, the released code's",
        "second branch and whole-model training included. The token-aware branch, to which the",
        "paper's own ablation gives most of the gain, earns nothing beyond the spread over seeds",
        "on this model, whose layers are so narrow that it costs 0.2 bits a weight; without the",
        "relation of frames one seed is 1.0 dB better, about the distance between two seeds. At",
        "W6A6 and W8A8, where the rounding of weights matters least, EfficientDM is 0.5 and",
        "ViDiT-Q 0.9 dB ahead; without the branch W6A6 is the same.",
    ),
    "mpq_dm": (
        "The branch inside the quantiser does the work. Rows of mixed widths and the relation loss",
        "earn a tenth of a decibel at most on this UNet.",
    ),
    "mpq_dmv2": (
        "As in MPQ-DM the branch does the work. Binary planes earn nothing at three bits, where a",
        "binary residual of a well-behaved row loses to uniform codes; the relation to the memory",
        "costs 0.3 to 0.4 dB at weight 1 at W3A6 and W4A4, nothing at more bits; at 0.1, the",
        "recipe's, nothing there, but 0.4 dB at W4A6 and 0.2 at W6A6. The recipe is within 0.2 dB",
        "of MPQ-DM except at W4A6, where it is 0.4 behind; one seed each.",
    ),
    "quantvggt": (
        "Rotation, scale, clips and distillation earn 1 to 3 dB each. The choice of samples earns",
        "nothing here, where all scenes come from one generator.",
    ),
    "composed": (
        "Against `searched`, which learns nothing: 1.1 to 1.6 dB ahead where activations have four",
        "bits, 0.3 to 1.3 where they have six, but for the digits at W3A6 (0.2 behind). Where they",
        "have eight it is 0.3 to 0.6 dB ahead on the views; on the digits between 0.5 behind (at",
        "W3A8) and 0.4 ahead (W8A8); on the UNet 1.2 ahead at W2A8, within 0.2 at W3A8 and W4A8,",
        "1.0 behind at W8A8. Error propagation (without it: `propagate`) earns up to 2.7 dB,",
        "nothing from six bits on.",
    ),
    "searched": (
        "The scale in front of the rotation (without it: `front`) holds where channels have",
        "outliers, 3.0 dB at W4A4; it earns up to 0.9 dB on the UNet, nothing on the views, where",
        "it costs 0.4 dB at W4A8 and W3A8. The one behind (without it: `behind`) earns 0.3 to",
        "0.9 dB at W4A4. What error propagation earns is the difference of `front` and",
        "`front+propagate`: up to 3.2 dB, the more the fewer bits the weights have.",
    ),
}


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
                against(found, whole),
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
        "A part that does its work leaves a minus behind *against the recipe*, over equal seeds.",
        "",
        "| model | scheme | part | bits | SQNR, dB | against the recipe | PSNR, dB | accuracy "
        "| seeds |",
        f"|{' --- |' * 9}",
        *lines,
        *(("", *FINDINGS[name]) if name in FINDINGS else ()),
    ]


def against(part: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]]) -> str:
    """SQNR of ``part`` less that of ``whole`` over the seeds that both have; nothing if none."""
    known = {row["seed"]: row["sqnr_db"] for row in whole}
    pairs = [row["sqnr_db"] - known[row["seed"]] for row in part if row["seed"] in known]
    if not pairs or part is whole:
        return ""
    return f"{statistics.mean(pairs):+.1f}".replace("-0.0", "+0.0")


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
        "one has 4096 and blocks of 128, and learns for 6 epochs instead of 15. `naive` is",
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
    return lines + sums(from_study) + recovery(from_study) + masked_learning(from_study)


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


def recovery(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much of what masks cost a rounded model the whole recipe gives back, in whole videos."""
    lines = []
    for (model, density), group in grouped(rows, "model", "density"):
        dense_rows = [r for r in rows if (r["model"], r["recipe"]) == (model, "naive")]
        parts = {r["recipe"] for r in group}
        if not dense_rows or not {"naive+sparse", WHOLE} <= parts:
            continue
        masked, whole = (
            [r for r in group if r["recipe"] == name] for name in ("naive+sparse", WHOLE)
        )
        before, low, after = (mean(part, "psnr_db") for part in (dense_rows, masked, whole))
        lines.append(
            f"* {model} at {density:g}: `naive` {shown(dense_rows, 'psnr_db')} dB, with masks "
            f"{shown(masked, 'psnr_db')}, `{WHOLE}` {shown(whole, 'psnr_db')}: "
            f"{(after - low) / (before - low):.0%} of what masks cost."
        )
    if not lines:
        return []
    return [
        "",
        "What the whole recipe recovers, PSNR of whole videos (the paper, Wan2.1-14B at 25 %:",
        "13.70 with QuaRot and masks, 18.72 with all):",
        "",
        *lines,
    ]


def masked_learning(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What it changes to learn with the masks in place, instead of dense as the paper does."""
    lines = []
    for (model, density, variant), group in grouped(rows, "model", "density", "recipe"):
        dense_one = variant.replace("joint", "learned", 1)
        others = [
            r
            for r in rows
            if (r["model"], r["density"], r["recipe"]) == (model, density, dense_one)
        ]
        if variant.startswith("joint") and others:
            lines.append(
                f"* {model} at {density:g}: `{dense_one}` {shown(others, 'sqnr_db')} dB by steps, "
                f"PSNR {shown(others, 'psnr_db')}; `{variant}` {shown(group, 'sqnr_db')}, "
                f"PSNR {shown(group, 'psnr_db')}."
            )
    if not lines:
        return []
    return [
        "",
        "Learning on the block error with the masks in place, instead of dense:",
        "",
        *lines,
    ]


#: All parts of QuantSparse.
WHOLE = "msad+sparse+second"


def is_study(row: Mapping[str, Any]) -> bool:
    """True for a row of ``benchmarks/quality_sparsity.py``."""
    return row["recipe"] not in names() and row["recipe"].partition("+")[0] in STUDY


STUDY = ("sparse", "naive", "learned", "msad", "joint")


# rows --------------------------------------------------------------------------------------------


def dense(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of named recipes that were measured."""
    return [row for row in rows if "sqnr_db" in row and row["recipe"] in names()]


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
