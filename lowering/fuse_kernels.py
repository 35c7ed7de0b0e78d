"""Fusion on GPUs: what stands behind a GEMM and before a quantiser moves into their kernels.

Behind a GEMM: ``lowering/fuse_epilogue.py``; before a quantiser: ``lowering/fuse_prologue.py``,
which also takes in the residual sums that no linear took in. Only values that nothing else reads
are taken in, so nothing is computed twice. Fused kernels keep float32 inside where separate ops
round to the model's dtype after each: codes may be drawn anew (``REDRAWN_NOISE``), never further
off. On a CPU the compiler fuses by itself; nothing is done there.
"""

from __future__ import annotations

from vdqc.ir.graph import Graph
from vdqc.lowering.fuse_epilogue import fuse_epilogues
from vdqc.lowering.fuse_prologue import fuse_prologues


def fuse_kernels(graph: Graph) -> tuple[int, int]:
    """Fuse in place; (epilogues, prologues) that moved into a kernel."""
    epilogues = fuse_epilogues(graph)
    return epilogues, fuse_prologues(graph)
