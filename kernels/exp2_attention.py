"""Softmax and its product with values without a maximum: powers of two, summed and divided at last.

bfloat16 has the exponents of float32, so powers of two lose nothing as long as they fit, and their
sums tell whether they did. Measured on bfloat16[512, 4096], one Zen 5 core: 2^x in place and its
sums 0.30 ns a score, torch's softmax 0.47.

Error: weights, sums, products and quotients are rounded once each.
Source: ours; softmax does not change when its scores are shifted, and here none are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: 2^(x log2 e) is e^x.
LOG2_E = math.log2(math.e)
#: Sums of powers between these bounds: every weight that counts is a normal number, and so are its
#: products with values of magnitude 2^-40 to 2^60.
_LEAST_SUM, _GREATEST_SUM = 2.0**-60, 2.0**60


def attend_exp2(scores: Tensor, value: Tensor, out: Tensor | None = None) -> Tensor | None:
    """``softmax(scores ln 2) value``; None if powers of two of these scores do not fit.

    ``scores[..., S, T]`` bfloat16 or float32, overwritten; ``value[..., T, E]``; two or three axes.
    """
    weights = torch.exp2(scores, out=scores)
    sums = weights.sum(-1, keepdim=True)
    least, greatest = torch.aminmax(sums)
    if not (float(least) >= _LEAST_SUM and float(greatest) <= _GREATEST_SUM):  # or not a number
        return None
    return torch.matmul(weights, value, out=out).div_(sums)
