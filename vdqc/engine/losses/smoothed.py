"""Time-smoothed Relation Distillation: pixels keep their likeness, averaged over sampling steps.

::

    F = mean of the outputs of ``window`` consecutive steps, each pixel brought to length 1
    L = sum_i KL(softmax_j(f_i·f_j / temperature) of the float model || of the quantised one)

Every ``window``-th step of a trajectory gives a value, the others 0; branches of guidance have
windows of their own. A window starts anew where the samples are not consecutive steps of one
trajectory. Earlier steps are remembered without
gradient: it flows through the last step of the window.

Error: the relation is computed in chunks of rows; it never exists as a whole.
Source: Feng et al., MPQ-DM, arXiv 2412.11549; window 2, sum, weight 100 from the released code,
whose features are detached, so that the term trains nothing: ``compat=code`` does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import ConfigError
from vdqc.engine.losses import LossContext, LossTerm
from vdqc.engine.losses.divergence import relation_kl, unit
from vdqc.engine.losses.layout import pixels
from vdqc.engine.losses.reduction import Reduction
from vdqc.engine.losses.relation import Compat, Level, require_positive


@final
@dataclass(frozen=True)
class SmoothedRelation(LossTerm):
    """See the module.

    Attributes:
        window: consecutive steps that are averaged; 1 smooths nothing.
        temperature: of the softmax over cosines.
        reduction: ``sum`` is the released code's.
        at: the last block, every ``block``, or the ``model``'s output.
        compat: see the module.
    """

    window: int = 2
    temperature: float = 1.0
    reduction: Reduction = Reduction.SUM
    at: Level = Level.LAST
    compat: Compat = Compat.PAPER

    name: ClassVar[str] = "trd"
    ordered: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive("trd.temperature", self.temperature)
        if self.window < 1:
            raise ConfigError(f"trd.window: expected 1 or more, got {self.window}")

    @property
    def level(self) -> str:
        """Where it applies."""
        return str(self.at)

    def __call__(self, ctx: LossContext) -> Tensor:
        """The divergence at the last step of a window, else 0."""
        fp, q = pixels(ctx.fp_out), pixels(ctx.q_out)
        if self.compat is Compat.CODE:
            q = q.detach()
        past_fp, past_q = self._window(ctx, fp, q)
        if len(past_fp) + 1 < self.window:
            return q.sum() * 0
        fp_mean, q_mean = (
            unit(sum(past, now) / self.window) for past, now in ((past_fp, fp), (past_q, q))
        )
        return relation_kl((fp_mean, fp_mean), (q_mean, q_mean), self.temperature, self.reduction)

    def _window(self, ctx: LossContext, fp: Tensor, q: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Earlier outputs of the window; the present one is remembered unless it is the last."""
        names = [self.key(ctx, part, ctx.branch) for part in ("at", "fp", "q")]
        at = _position(ctx)
        held = [ctx.state[name] for name in names] if names[0] in ctx.state else None
        if held is not None and not (_follows(at, held[0]) and held[1].shape[1:] == fp.shape):
            held = None
        before = [list(value.to(fp.device)) for value in held[1:]] if held else [[], []]
        if len(before[0]) + 1 >= self.window:
            for name in names:
                ctx.state.pop(name, None)
        else:
            ctx.state[names[0]] = at
            for name, earlier, now in zip(names[1:], before, (fp, q), strict=True):
                ctx.state[name] = torch.stack([*earlier, now.detach()]).cpu()
        return before[0], before[1]


def _position(ctx: LossContext) -> Tensor:
    """int64[2]: trajectory (-1 if unknown) and step (else the sample's index)."""
    known = ctx.trajectory is not None and ctx.step is not None
    return torch.tensor([ctx.trajectory, ctx.step] if known else [-1, ctx.sample])


def _follows(at: Tensor, before: Tensor) -> bool:
    return bool(at[0] == before[0]) and bool(at[1] == before[1] + 1)
