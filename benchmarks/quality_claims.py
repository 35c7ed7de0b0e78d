"""What each paper claims to be better than, and what this repository's own rows say of it.

A claim names the kind of model that the paper is about, the schemes of its tables and the
baselines in them that are recipes here; published figures are on each recipe's page. ``verdict``
compares a recipe with the best of its baselines at one scheme: a difference counts where it is
larger than both spreads over seeds.

Source: tables of arXiv 2509.21302 (QuantVGGT), 2508.04016 (S2Q-VDiT), 2505.22167 (Q-VDiT),
2412.11549 (MPQ-DM); MPQ-DMv2 (2507.04290) has no public table, QuantSparse is compared part by
part (``quality_sparsity.py``).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """``recipe`` is better than ``against`` at ``schemes``, the first of which is its headline."""

    recipe: str
    model: str
    schemes: tuple[str, ...]
    against: tuple[str, ...]


VIDEO = ("smoothquant", "quarot", "vidit_q", "qdit", "ptq4dit")
CLAIMS = (
    Claim("quantvggt", "views", ("w4a4", "w6a6", "w8a8"), ("rtn", "smoothquant", "quarot", "gptq")),
    Claim("s2q_vdit", "digits", ("w4a6", "w4a4"), VIDEO),
    Claim(
        "qvdit",
        "digits",
        ("w3a6", "w3a8", "w4a6", "w4a8", "w6a6", "w8a8"),
        (*VIDEO, "efficientdm", "svdquant"),
    ),
    Claim("mpq_dm", "unet", ("w3a6", "w4a4", "w2a6"), ("rtn", "efficientdm")),
    Claim("mpq_dmv2", "unet", ("w3a6", "w4a4", "w2a6"), ("rtn", "efficientdm", "mpq_dm")),
)


@dataclass(frozen=True)
class Verdict:
    """One claim at one scheme; decibels of step-locked SQNR, ``spread`` half of largest - smallest.

    ``bits`` are effective bits of the recipe and of the baseline: compare at equal bits.
    """

    claim: Claim
    scheme: str
    bits: tuple[float, float]
    sqnr_db: tuple[float, float]
    spread: tuple[float, float]
    seeds: tuple[int, int]
    best: str
    missing: tuple[str, ...]

    @property
    def margin(self) -> float:
        """Recipe minus best baseline, dB."""
        return self.sqnr_db[0] - self.sqnr_db[1]

    @property
    def word(self) -> str:
        """What the rows say."""
        if abs(self.margin) <= sum(self.spread):
            return "level"
        return "ahead" if self.margin > 0 else "behind"


def verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    """Every claim at every scheme where the recipe and one of its baselines were measured."""
    for claim in CLAIMS:
        for scheme in claim.schemes:
            found = {
                name: group
                for name in (claim.recipe, *claim.against)
                if (group := measured(rows, claim.model, name, scheme))
            }
            own = found.pop(claim.recipe, None)
            if own is None or not found:
                continue
            best = max(found, key=lambda name: middle(found[name], "sqnr_db"))
            yield Verdict(
                claim,
                scheme,
                (middle(own, "effective_bits"), middle(found[best], "effective_bits")),
                (middle(own, "sqnr_db"), middle(found[best], "sqnr_db")),
                (half_spread(own), half_spread(found[best])),
                (len(own), len(found[best])),
                best,
                tuple(name for name in claim.against if name not in found),
            )


def measured(
    rows: Sequence[Mapping[str, Any]], model: str, recipe: str, scheme: str
) -> list[Mapping[str, Any]]:
    """Rows of one cell, one a seed."""
    wanted = (model, recipe, scheme)
    return [
        row
        for row in rows
        if (row["model"], row["recipe"], row["scheme"]) == wanted and "sqnr_db" in row
    ]


def middle(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean over seeds."""
    return statistics.mean(row[key] for row in rows)


def half_spread(rows: Sequence[Mapping[str, Any]]) -> float:
    """Half of largest minus smallest SQNR over seeds, dB; 0 of one seed."""
    values = [row["sqnr_db"] for row in rows]
    return float(max(values) - min(values)) / 2
