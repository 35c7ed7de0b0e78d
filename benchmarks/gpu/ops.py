"""Every op that is measured, the most telling first."""

from __future__ import annotations

from benchmarks.gpu import attentions, floats, linears, quantisers
from benchmarks.gpu.blocks import OPS as BLOCK_OPS
from benchmarks.gpu.trial import Op

_ORDER = ("w8a8", "attention", "quantise", "w4a8", "blocks", "attention-int8", "mask", "low-rank")


def table() -> dict[str, Op]:
    """Name to op, in the order in which they are measured."""
    groups = (linears.OPS, attentions.OPS, quantisers.OPS, floats.OPS, BLOCK_OPS)
    found = {op.name: op for group in groups for op in group}
    first = {name: found.pop(name) for name in _ORDER}
    return first | found
