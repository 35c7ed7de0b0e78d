"""Binary planes: what integers of few bits leave of a weight, as signs times one number a row.

R_0 float[..., K] is what is left of W; each plane z = 1 ... Z takes the nearest multiple of signs::

    B_z = sign(R_{z-1})        a_z = mean |R_{z-1}|        R_z = R_{z-1} - a_z · B_z

a_z is the least-squares amplitude, so no plane adds to the squared error, and the levels of the sum
need not be equidistant. The sign of 0 is +1. A residual that is uniform within half a step has
a_1 of a quarter: there one plane is as good as one more bit.

Source: Feng et al., MPQ-DMv2, arXiv 2507.04290, figure 2 (orders of residuals); the amplitudes as
in Huang et al., BiLLM, arXiv 2402.04291, equation 5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def binary_planes(residual: Tensor, planes: int) -> tuple[list[Tensor], list[Tensor]]:
    """(amplitudes [..., 1], signs [..., K] of +1 or -1) of each plane; last axis shares one."""
    amplitudes, signs = [], []
    for _ in range(planes):
        sign = torch.where(residual < 0, -1.0, 1.0).to(residual.dtype)
        amplitude = residual.abs().mean(-1, keepdim=True)
        residual = residual - amplitude * sign
        amplitudes.append(amplitude)
        signs.append(sign)
    return amplitudes, signs
