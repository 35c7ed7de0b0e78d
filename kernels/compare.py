"""The place of one attention at which dense and sparse results meet, before a program is split.

======== ================= ==================================================================
dense    float[B, H, T, E] what dense attention gives
sparse   float[B, H, T, E] what sparse attention gives, without a residual
cache    text              ``vdqc.base.residual.CachePolicy``
result   float[B, H, T, E] dense
======== ================= ==================================================================

A program with this op is two: one that *refreshes* (the result is ``dense``, and ``dense - sparse``
is one more output) and one that *reuses* (the result is ``sparse`` plus a residual, one more input,
and nothing is left of ``dense``). ``vdqc.lowering.residual`` splits it; run as it is it refreshes.

Error: none.
Source: Yang et al., QuantSparse, arXiv 2509.23681, equations 11 to 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdqc.kernels.base import define


def compare(dense: Tensor, sparse: Tensor, cache: str) -> Tensor:
    """The truth."""
    return dense.clone()


def _fake(dense: Tensor, sparse: Tensor, cache: str) -> Tensor:
    return torch.empty_like(dense)


COMPARE = define("compare", reference=compare, fake=_fake)
