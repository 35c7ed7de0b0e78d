"""What the project promised on the H200, line by line, and whether results meet it.

A line is judged by its worst case; the median of its cases is given beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from benchmarks.gpu.names import AUTO, WITH_MASK, WITH_QUANTISER

Row = Mapping[str, Any]


@final
@dataclass(frozen=True)
class Line:
    """One promise: the ratio to ``peer`` (or the fraction of the ceiling) is at least ``need``.

    Attributes:
        contains: what the case's name holds, any of these; none for all.
        without: and none of these.
    """

    op: str
    text: str
    need: float
    moonshot: float
    peer: str | None = None
    variant: str = AUTO
    contains: tuple[str, ...] = ()
    without: tuple[str, ...] = ("rows-",)

    def fits(self, row: Row) -> bool:
        """True if the row speaks about this line."""
        case = str(row["case"])
        return (
            row["variant"] == self.variant
            and (self.peer is None or row["peer"] == self.peer)
            and (not self.contains or any(part in case for part in self.contains))
            and not any(part in case for part in self.without)
        )

    def value(self, row: Row) -> float | None:
        """What is compared with ``need``."""
        found = row["ceiling_fraction"] if self.peer is None else row["ratio"]
        return None if found is None else float(found)


def _overhead(limit: float) -> float:
    return 1 / (1 + limit)


_SHARP = ("/density-15", "/density-25")
LINES: tuple[Line, ...] = (
    Line("w8a8", "W8A8 over cuBLAS bf16", 1.60, 1.75, "cublas bf16"),
    Line("w8a8", "W8A8 over fp8 _scaled_mm", 1.0, 1.0, "_scaled_mm fp8"),
    Line("w8a8", "W8A8 over _int_mm + eager", 1.3, 1.3, "_int_mm + eager"),
    Line("w8a8", "W8A8 over humming", 1.0, 1.0, "humming", WITH_QUANTISER),
    Line("w4a8", "W4A8 over W8A8 at M >= 4k", 0.97, 1.0, "vdqc w8a8"),
    Line("w4a8", "W4A8 over humming", 1.0, 1.0, "humming", WITH_QUANTISER),
    Line("w4a8", "W4A8 over gemlite", 1.5, 1.5, "gemlite", WITH_QUANTISER),
    Line("w4a8-g128", "W4A8 in groups over W8A8", 0.90, 0.95, "vdqc w8a8"),
    Line("w4a4", "W4A4 over W8A8 (no int4 tensor cores)", 0.90, 0.97, "vdqc w8a8"),
    Line("w2a8", "W2A8 over W8A8", 0.95, 0.95, "vdqc w8a8"),
    Line("w3a8", "W3A8 over W8A8", 0.90, 0.90, "vdqc w8a8"),
    Line("w6a8", "W6A8 over W8A8", 0.92, 0.92, "vdqc w8a8"),
    Line("fp8", "fp8 over _scaled_mm", 1.0, 1.0, "_scaled_mm fp8"),
    Line("quantise", "fused quantisers, share of copy", 0.84, 0.92, None, without=("hadamard",)),
    Line("quantise", "fused quantisers over torch.compile", 1.0, 1.0, "torch.compile"),
    Line("quantise", "fused quantisers over eager", 6.0, 6.0, "eager", contains=("adaln", "gelu")),
    Line("rope", "QK norm + RoPE over eager", 8.0, 8.0, "eager"),
    Line(
        "low-rank", "rank 32 costs at most 6 % [3 %]", _overhead(0.06), _overhead(0.03),
        "without it", contains=("rank32",),
    ),
    Line(
        "low-rank-w4a8", "rank 32 costs at most 6 % [3 %]", _overhead(0.06), _overhead(0.03),
        "without it", contains=("rank32",),
    ),
    Line(
        "weight-only", "W4A16 over bf16 at M <= 16", 3.0, 3.0, "cublas bf16",
        contains=("rows-1/", "rows-16/"), without=(),
    ),
    Line(
        "binary", "binary residual costs at most 3 %", _overhead(0.03), _overhead(0.03),
        "vdqc w4a8",
    ),
    Line(
        "attention", "executed rate, share of dense cuDNN", 0.85, 0.92,
        contains=("/density-25", "/density-15"), without=("blocks-64",),
    ),
    Line(
        "attention", "75 % sparse over dense cuDNN, mask included", 3.4, 3.7,
        "cudnn dense, mask included", WITH_MASK, ("/density-25",), ("blocks-64",),
    ),
    Line(
        "attention", "85 % sparse over dense cuDNN, mask included", 5.4, 6.1,
        "cudnn dense, mask included", WITH_MASK, ("/density-15",), ("blocks-64",),
    ),
    Line(
        "attention", "sparse over FlexAttention", 1.5, 1.5, "flex, same mask", AUTO, _SHARP,
        ("blocks-64",),
    ),
    Line(
        "attention-int8", "int8 QK over bf16, head_dim 128", 1.15, 1.35, "vdqc bf16, same mask",
        AUTO, _SHARP, ("cogvideox", "residual"),
    ),
    Line(
        "attention-int8", "dense int8 QK over cuDNN", 1.25, 1.25, "cudnn dense",
        contains=("hunyuan", "wan"),
    ),
    Line("mask", "mask over dense attention (at most 2 %)", 50.0, 50.0, "cudnn dense"),
    Line(
        "blocks", "HunyuanVideo block at 33k, 15 %, 20 % dense steps", 2.2, 2.8, "bf16 compiled",
        "w8a8 15 %, 20 % dense steps", ("hunyuan-13b-33k",),
    ),
    Line(
        "blocks", "HunyuanVideo block at 118.8k, 15 %, 20 % dense steps", 2.5, 3.0, "bf16 compiled",
        "w8a8 15 %, 20 % dense steps", ("hunyuan-13b-118.8k",),
    ),
    Line(
        "blocks", "W4A8 alone, dense attention", 1.15, 1.2, "bf16 compiled", "w4a8 dense",
        ("/block",),
    ),
)  # fmt: skip


def judge(op: str, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Each line of ``op``: what it needs, what was found, met, missed or unmeasured."""
    rows = list(rows)
    return [_judged(line, rows) for line in LINES if line.op == op]


def _judged(line: Line, rows: list[Row]) -> dict[str, Any]:
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        value = line.value(row) if line.fits(row) else None
        if value is not None:
            best[str(row["case"]), str(row["variant"])] = value
    found = list(best.values())
    verdict: dict[str, Any] = {
        "line": line.text, "need": round(line.need, 3), "moonshot": round(line.moonshot, 3),
        "cases": len(found),
    }  # fmt: skip
    if not found:
        return {**verdict, "worst": None, "median": None, "verdict": "unmeasured"}
    worst = min(found)
    word = "moonshot" if worst >= line.moonshot else "met" if worst >= line.need else "missed"
    return {
        **verdict,
        "met_in": sum(value >= line.need for value in found),
        "worst": round(worst, 3),
        "median": round(statistics.median(found), 3),
        "verdict": word,
    }
