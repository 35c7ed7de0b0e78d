"""The squared error of a block's output.

::

    L = mean (fp_out - q_out)²                    [B, T, C] and any other shape

Several outputs (a video and a text stream) count element by element, as if they were one.

Error: accumulated in float32 (float64 for float64 outputs).
Source: Li et al., BRECQ, arXiv 2102.05426, equation 10 without the Fisher weights; the block loss
of QuantVGGT, arXiv 2509.21302, and of QuantSparse, arXiv 2509.23681.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from vdqc.engine.losses import LossContext, LossTerm
from vdqc.engine.losses.reduction import Reduction, divisor, widened


@final
@dataclass(frozen=True)
class BlockError(LossTerm):
    """Squared error; ``reduction`` ``row`` is per token, summed over its channels."""

    reduction: Reduction = Reduction.MEAN

    name: ClassVar[str] = "block"

    def __call__(self, ctx: LossContext) -> Tensor:
        """See the module."""
        return output_error(ctx, self.reduction)


def output_error(ctx: LossContext, reduction: Reduction = Reduction.MEAN) -> Tensor:
    """Squared error over all outputs of the block."""
    pairs = [(ctx.fp_out, ctx.q_out), *zip(ctx.fp_rest, ctx.q_rest, strict=True)]
    error = [(widened(q) - widened(fp)).square().sum() for fp, q in pairs]
    whole = sum(error[1:], error[0])
    if reduction is Reduction.SUM:
        return whole
    return whole / sum(divisor(fp.shape, reduction) for fp, _ in pairs)
