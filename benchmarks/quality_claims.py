"""What each paper claims to be better than, and what this repository's own rows say of it.

A claim names the kind of model that the paper is about, the schemes of its tables and the
baselines in them that are recipes here; published figures are on each recipe's page. A recipe is
compared with the best of its baselines of no more effective bits; a difference counts where it is
larger than both spreads over seeds. Baselines of more bits that do better are named beside it.

Papers measure pretrained models by other measures. What compares is the share of the best
baseline's loss that the recipe removes: of the distance to 16 bits in the paper's own measure, of
the power of the error here.

Source: tables of arXiv 2509.21302 (QuantVGGT), 2508.04016 (S2Q-VDiT), 2505.22167 (Q-VDiT),
2412.11549 (MPQ-DM); MPQ-DMv2 (2507.04290) has no public table, QuantSparse is compared part by
part (``quality_sparsity.py``).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """A paper's own figures at one scheme, more is better: recipe, best baseline, 16 bits."""

    measure: str
    own: float
    baseline: str
    best: float
    full: float

    @property
    def removed(self) -> float:
        """Share of the best baseline's loss that the recipe removes."""
        return (self.own - self.best) / (self.full - self.best)


@dataclass(frozen=True)
class Claim:
    """``recipe`` is better than ``against`` at ``schemes``, the first of which is its headline.

    ``published``: the paper's figures by scheme, where it has a table of them.
    """

    recipe: str
    model: str
    schemes: tuple[str, ...]
    against: tuple[str, ...]
    published: Mapping[str, Published] = field(default_factory=dict)


#: Effective bits that count as equal.
SLACK = 0.1
VIDEO = ("smoothquant", "quarot", "vidit_q", "qdit", "ptq4dit")
#: QuantVGGT with 20 frames, S2Q-VDiT on CogVideoX-2B, Q-VDiT on Open-Sora.
AUC, QUALITY = "AUC@30 on CO3Dv2", "imaging quality, VBench"
CLAIMS = (
    Claim(
        "quantvggt",
        "views",
        ("w4a4", "w6a6", "w8a8"),
        ("rtn", "smoothquant", "quarot", "gptq", "awq"),
        {
            "w4a4": Published(AUC, 88.2, "quarot", 81.6, 90.0),
            "w6a6": Published(AUC, 89.3, "quarot", 89.1, 90.0),
            "w8a8": Published(AUC, 89.6, "quarot", 89.4, 90.0),
        },
    ),
    Claim(
        "s2q_vdit",
        "digits",
        ("w4a6", "w4a4"),
        VIDEO,
        {
            "w4a6": Published(QUALITY, 55.49, "vidit_q", 51.94, 58.69),
            "w4a4": Published(QUALITY, 53.71, "vidit_q", 45.56, 58.69),
        },
    ),
    Claim(
        "qvdit",
        "digits",
        ("w3a6", "w3a8", "w4a6", "w4a8", "w6a6", "w8a8"),
        (*VIDEO, "efficientdm", "svdquant"),
        {
            "w3a6": Published(QUALITY, 53.60, "efficientdm", 48.82, 63.68),
            "w3a8": Published(QUALITY, 54.94, "vidit_q", 50.62, 63.68),
            "w4a6": Published(QUALITY, 57.49, "qdit", 55.99, 63.68),
        },
    ),
    Claim("mpq_dm", "unet", ("w3a6", "w4a4", "w2a6"), ("rtn", "efficientdm")),
    Claim("mpq_dmv2", "unet", ("w3a6", "w4a4", "w2a6"), ("rtn", "efficientdm", "mpq_dm")),
)


@dataclass(frozen=True)
class Cell:
    """A recipe at one scheme on one model, over its seeds.

    ``bits`` are effective bits a weight; ``sqnr_db`` is step-locked, ``spread`` half of the largest
    minus the smallest.
    """

    recipe: str
    bits: float
    sqnr_db: float
    spread: float
    seeds: int


@dataclass(frozen=True)
class Verdict:
    """One claim at one scheme: the recipe, its best baseline of no more bits, and what is beside.

    ``richer``: baselines of more bits that do better; ``missing``: those that were not measured.
    """

    claim: Claim
    scheme: str
    own: Cell
    best: Cell
    richer: tuple[Cell, ...]
    missing: tuple[str, ...]

    @property
    def margin(self) -> float:
        """Recipe minus best baseline, dB."""
        return self.own.sqnr_db - self.best.sqnr_db

    @property
    def removed(self) -> float:
        """Share of the power of the best baseline's error that the recipe removes."""
        return 1.0 - 10.0 ** (-self.margin / 10.0)

    @property
    def word(self) -> str:
        """What the rows say."""
        if abs(self.margin) <= self.own.spread + self.best.spread:
            return "level"
        return "ahead" if self.margin > 0 else "behind"


def verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    """Every claim at every scheme where the recipe and a baseline of its bits were measured."""
    for claim in CLAIMS:
        for scheme in claim.schemes:
            own = cell(rows, claim.model, claim.recipe, scheme)
            found = [cell(rows, claim.model, name, scheme) for name in claim.against]
            measured = [other for other in found if other is not None]
            equal = [o for o in measured if own is not None and o.bits <= own.bits + SLACK]
            if own is None or not equal:
                continue
            richer = [o for o in measured if o not in equal and o.sqnr_db > own.sqnr_db]
            missing = [n for n, o in zip(claim.against, found, strict=True) if o is None]
            best = max(equal, key=lambda other: other.sqnr_db)
            yield Verdict(claim, scheme, own, best, tuple(richer), tuple(missing))


def cell(rows: Sequence[Mapping[str, Any]], model: str, recipe: str, scheme: str) -> Cell | None:
    """All seeds of a recipe at a scheme; None if it was not measured."""
    wanted = (model, recipe, scheme)
    group = [
        row
        for row in rows
        if (row["model"], row["recipe"], row["scheme"]) == wanted and "sqnr_db" in row
    ]
    if not group:
        return None
    values = [row["sqnr_db"] for row in group]
    bits = statistics.mean(row["effective_bits"] for row in group)
    half = (max(values) - min(values)) / 2
    return Cell(recipe, bits, statistics.mean(values), half, len(values))
