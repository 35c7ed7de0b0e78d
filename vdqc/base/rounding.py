"""Which way a weight rounds, chosen by the error of the output instead of the nearest code.

W float[N, K] the weight, H float[K, K] the second moment of its inputs, mean of x·xᵀ. Replacing W
by V costs tr((W - V)·H·(W - V)ᵀ) of squared output error a token, one term for each row.

``compensated`` rounds one column after the other and lets the columns to come take up its error::

    H⁻¹ = Uᵀ·U, U upper        e_j = (w_j - Q(w_j)) / U_jj        w_k -= e_j · U_jk for k > j

Where the inputs x are themselves not what they would be in float, y, the weight can make up for it
before it is rounded; ``taken_up`` goes the share α of the way to the least squared error of W·y::

    W + α·W·D·H⁻¹        D float[K, K] = mean of (y - x)·xᵀ

The learned rounding chooses between the two neighbours of each weight by logits V float[N, K]::

    h(V) = clip(1.2·sigmoid(V) - 0.1, 0, 1)        Wq = s·(floor(W / s) + h(V))

Error: a moment that is not positive definite is damped further, up to its own mean diagonal, where
rounding is nearly to nearest.
Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1; Nagel et al., AdaRound, arXiv
2004.10568, equations 22 to 24; Arai and Ichikawa, QEP, arXiv 2504.09629 (``taken_up``, its α).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from vdqc.base import numerics
from vdqc.base.scheme import GranularityKind, PerChannel, QuantSpec

#: How far h(V) is stretched beyond 0 ... 1 before it is clipped (AdaRound's zeta and gamma).
STRETCH = 0.1

#: Exponent of the penalty on undecided roundings, at the start and at the end of learning.
PENALTY_EXPONENTS = (20.0, 2.0)


@final
@dataclass(frozen=True)
class InputFactor:
    """What rounding needs of the inputs of a linear; peers share it.

    Attributes:
        upper: float[K, K], U with H⁻¹ = Uᵀ·U of the damped moment, columns in rounding order.
        order: int64[K], column that is rounded i-th.
        damping: share of the mean diagonal that was added.
    """

    upper: Tensor
    order: Tensor
    damping: float


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """float[N]: squared output error a token of each row of ``difference`` float[N, K]."""
    return ((difference @ moment) * difference).sum(-1).clamp_min(0)


def input_factor(moment: Tensor, damping: float = 0.01, *, ordered: bool = False) -> InputFactor:
    """Factor of the inverse of ``moment``, damped by a share of its mean diagonal.

    ``ordered`` rounds the columns with the largest inputs first. A channel that is always 0 is
    rounded to nearest.
    """
    diagonal = moment.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(moment.dtype).tiny)
    order = torch.arange(moment.shape[0], device=moment.device)
    if ordered:
        order = diagonal.argsort(descending=True, stable=True)
    dead = torch.where(diagonal > 0, 0.0, mean).diag()
    whole = (moment + dead)[order][:, order]
    identity = torch.eye(len(order), dtype=moment.dtype, device=moment.device)
    share = damping
    while True:
        # reversed, so that the lower factor that Cholesky gives is U's inverse, upper
        damped = (whole + share * mean * identity).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) or share >= 1:
            break
        share = min(1.0, max(10 * share, 1e-4))
    root = lower.flip(0, 1)
    return InputFactor(torch.linalg.solve_triangular(root, identity, upper=True), order, share)


def taken_up(drift: Tensor, factor: InputFactor, share: float) -> Tensor:
    """float[K, K]: α·D·H⁻¹ of ``drift`` D float[K, K]; W plus W times it is the weight to round."""
    columns = drift.to(factor.upper.dtype)[:, factor.order]
    return share * (columns @ factor.upper.T @ factor.upper)[:, factor.order.argsort()]


def compensated(
    weight: Tensor,
    factor: InputFactor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: QuantSpec,
    block: int = 128,
) -> Tensor:
    """``weight`` float[N, K] on the grid of ``scale``, each column's error left to the next ones.

    Computed in the dtype of the factor. ``block`` columns are finished at a time before the rest
    hears of them; the result does not depend on it but for rounding.
    """
    dtype, width = factor.upper.dtype, weight.shape[1]
    inverse = factor.order.argsort()
    waiting = weight.to(dtype)[:, factor.order]
    scales = per_column(scale, spec, width)[:, factor.order].to(dtype)
    zeros = None
    if zero_point is not None:
        zeros = per_column(zero_point, spec, width)[:, factor.order].to(dtype)
    column = replace(spec, granularity=PerChannel)
    result = torch.empty_like(waiting)
    for start in range(0, width, block):
        end = min(start + block, width)
        part, errors = waiting[:, start:end], torch.empty_like(waiting[:, start:end])
        for j in range(start, end):
            zero = None if zeros is None else zeros[:, j : j + 1]
            value = part[:, j - start : j - start + 1]
            rounded = numerics.fake_quantize(value, scales[:, j : j + 1], zero, column)
            result[:, j : j + 1] = rounded
            error = (value - rounded) / factor.upper[j, j]
            errors[:, j - start : j - start + 1] = error
            part[:, j - start :] -= error * factor.upper[j, j:end]
        waiting[:, end:] -= errors @ factor.upper[start:end, end:]
    return result[:, inverse]


def per_column(value: Tensor, spec: QuantSpec, width: int) -> Tensor:
    """A scale or zero point as float[N, ``width``] or [1, ``width``], one entry a column."""
    if spec.granularity.kind is GranularityKind.GROUP:
        return value.repeat_interleave(spec.granularity.size, dim=-1)
    return value.reshape(-1, 1).expand(-1, width)


# learned rounding -------------------------------------------------------------------------------


def soft_rounding(logits: Tensor) -> Tensor:
    """h(V): how much of a step each weight is rounded up, 0 ... 1."""
    return ((1 + 2 * STRETCH) * logits.sigmoid() - STRETCH).clamp(0, 1)


def rounding_logits(fraction: Tensor) -> Tensor:
    """V with h(V) = ``fraction`` in 0 ... 1: where learning starts, every weight as it is."""
    return ((fraction + STRETCH) / (1 + 2 * STRETCH)).logit()


def learned_rounding(weight: Tensor, logits: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """s·(floor(W / s) + h(V)), before it is clamped to the codes; shape of ``weight``."""
    step = per_column(scale, spec, weight.shape[-1])
    return ((weight.to(step.dtype) / step).floor() + soft_rounding(logits)) * step


def rounding_penalty(logits: Tensor, exponent: float) -> Tensor:
    """Sum of 1 - |2 h(V) - 1|^exponent: 0 where every weight has decided."""
    return (1 - (2 * soft_rounding(logits) - 1).abs().pow(exponent)).sum()


def penalty_exponent(progress: float) -> float:
    """The exponent after a share of learning: from 20, which leaves the middle free, down to 2."""
    first, last = PENALTY_EXPONENTS
    return first + (last - first) * min(max(progress, 0.0), 1.0)
