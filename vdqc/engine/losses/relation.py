"""Temporal Maintenance Distillation: frames keep their likeness to each other.

::

    T_ij = cos(v_i, v_j)      v_i all tokens of frame i in one vector
    L = sum_i KL(softmax_j T_ij of the float block || softmax_j T_ij of the quantised one)

Needs frames: an output [B, C, F, H, W], or tokens with a token to frame map.

Error: dL/dT_ij = D_q[i, j] - D_fp[i, j] at temperature 1, summed.
Source: Feng et al., Q-VDiT, arXiv 2505.22167, section 3.3; gamma = 100 is the weight, and belongs
to the ``mean`` over all entries beside a mean squared error, which the released code takes. The
paper sums both (``reduction=sum``). ``compat=code`` reshapes [B, C, F, H, W] to [B, F, ...] without
moving the frames to the front, as the released code does: its "frames" are mixed from channels.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from vdqc.base.diagnostics import ConfigError
from vdqc.engine.frames import FrameMap
from vdqc.engine.losses import AttentionSite, LossContext, LossTerm
from vdqc.engine.losses.divergence import kl, unit
from vdqc.engine.losses.layout import frame_pixels, lacks_frames
from vdqc.engine.losses.reduction import Reduction


class Compat(enum.StrEnum):
    """Whose behaviour: the paper's, or that of the code released with it."""

    PAPER = "paper"
    CODE = "code"


class Level(enum.StrEnum):
    """Where a relation term applies: every block, the last block, or the model's own output."""

    BLOCK = "block"
    LAST = "last"
    MODEL = "model"


@final
@dataclass(frozen=True)
class FrameRelation(LossTerm):
    """See the module.

    Attributes:
        temperature: of the softmax over cosines; 1 makes it nearly even, hence the weight of 100.
        reduction: ``mean`` over all F·F entries, ``row`` over frames, ``sum``.
        at: ``block`` (and the model in end-to-end training), ``last`` or ``model``.
        compat: see the module.
    """

    temperature: float = 1.0
    reduction: Reduction = Reduction.MEAN
    at: Level = Level.BLOCK
    compat: Compat = Compat.PAPER

    name: ClassVar[str] = "tmd"

    def __post_init__(self) -> None:
        require_positive("tmd.temperature", self.temperature)

    @property
    def level(self) -> str:
        """Where it applies."""
        return str(self.at)

    def misfit(
        self, attention: Mapping[str, AttentionSite], frames: FrameMap | None, out: Tensor
    ) -> str:
        """Outputs without frames have no relation to keep."""
        return lacks_frames(out, frames)

    def __call__(self, ctx: LossContext) -> Tensor:
        """The divergence between both frame relations."""
        self.require_fit(ctx)
        fp, q = (self.relation(out, ctx.frames) for out in (ctx.fp_out, ctx.q_out))
        return kl(fp / self.temperature, q / self.temperature, self.reduction)

    def relation(self, out: Tensor, frames: FrameMap | None) -> Tensor:
        """T [B, F, F], the cosines of all pairs of frames."""
        if self.compat is Compat.CODE and out.ndim == 5:
            vectors = unit(out.reshape(out.shape[0], out.shape[2], -1))
        else:
            vectors = unit(frame_pixels(out, frames).flatten(2))
        return vectors @ vectors.transpose(-1, -2)


def require_positive(option: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is above zero."""
    if not value > 0:
        raise ConfigError(f"{option}: expected a number above 0, got {value:g}")
