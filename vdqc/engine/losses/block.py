"""The squared error of a block's output.

::

    L = mean (fp_out - q_out)²                    [B, T, C] and any other shape

Several outputs (a video and a text stream) count element by element, as if they were one.

Error: accumulated in float32 (float64 for float64 outputs).
Source: Li et al., BRECQ, arXiv 2102.05426, equation 10 without the Fisher weights; the block loss
of QuantVGGT, arXiv 2509.21302, and of QuantSparse, arXiv 2509.23681.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from vdqc.engine.losses import LossContext, LossTerm
from vdqc.engine.losses.layout import pixel_count
from vdqc.engine.losses.reduction import Reduction, widened


@final
@dataclass(frozen=True)
class BlockError(LossTerm):
    """Squared error; ``reduction`` ``row`` is per token, summed over its channels."""

    reduction: Reduction = Reduction.MEAN

    name: ClassVar[str] = "block"

    def __call__(self, ctx: LossContext) -> Tensor:
        """See the module."""
        return output_error(ctx, self.reduction)


def output_error(
    ctx: LossContext, reduction: Reduction = Reduction.MEAN, weights: Sequence[Tensor] = ()
) -> Tensor:
    """Squared error over all outputs of the block, each times its ``weights`` if there are any."""
    pairs = [(ctx.fp_out, ctx.q_out), *zip(ctx.fp_rest, ctx.q_rest, strict=True)]
    errors = [(widened(q) - widened(fp)).square() for fp, q in pairs]
    if weights:
        errors = [error * weight for error, weight in zip(errors, weights, strict=True)]
    sums = [error.sum() for error in errors]
    whole = sum(sums[1:], sums[0])
    if reduction is Reduction.SUM:
        return whole
    return whole / sum(rows(out, reduction) for out, _ in pairs)


def rows(out: Tensor, reduction: Reduction) -> int:
    """What the sum over ``out`` is divided by: its elements, or its tokens."""
    return out.numel() if reduction is Reduction.MEAN else out.shape[0] * pixel_count(out)
