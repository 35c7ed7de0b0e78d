"""Memory-based Temporal Relation Distillation: pixels keep their likeness to a trajectory's.

::

    bank_t   FIFO of ``capacity`` float pixels of length 1 per timestep t, ``pixels`` more a visit
    V        ``bank`` pixels, drawn evenly from all banks
    L = sum_i KL(softmax(f_i·V / temperature) of the float model || of the quantised one)

No gradient reaches the banks. Drawing depends on ``seed`` and on the number of calls alone.

Error: the relation is computed in chunks of rows; it never exists as a whole.
Source: Feng et al., MPQ-DMv2, arXiv 2507.04290, overview figure (nothing else of the method is
published); completed by the memory of Yang et al., CIRKD, arXiv 2204.06986, section 3.3 and its
defaults. What the figure's refreshing gate does is unknown: here a full bank takes each new pixel
with probability ``gate``. Its weight in CIRKD is 0.1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import ConfigError
from vdqc.engine.frames import FrameMap
from vdqc.engine.losses import AttentionSite, LossContext, LossTerm
from vdqc.engine.losses.divergence import relation_kl, unit
from vdqc.engine.losses.layout import frame_pixels, lacks_frames, pixels
from vdqc.engine.losses.reduction import Reduction
from vdqc.engine.losses.relation import Level, require_positive


@final
@dataclass(frozen=True)
class MemoryRelation(LossTerm):
    """See the module.

    Attributes:
        capacity: pixels that a bank holds.
        pixels: pixels of each sample that enter the bank at a visit.
        bank: pixels that are compared with, over all banks.
        temperature: of the softmax over cosines.
        gate: probability that a full bank takes a new pixel for its oldest.
        per_frame: one bank for each timestep and frame.
        seed: of every draw.
        reduction: ``row`` averages over pixels, as CIRKD does.
        at: the last block, every ``block``, or the ``model``'s output.
    """

    capacity: int = 20000
    pixels: int = 16
    bank: int = 4096
    temperature: float = 0.1
    gate: float = 1.0
    per_frame: bool = False
    seed: int = 0
    reduction: Reduction = Reduction.ROW
    at: Level = Level.LAST

    name: ClassVar[str] = "mtrd"
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive("mtrd.temperature", self.temperature)
        for option in ("capacity", "pixels", "bank"):
            require_positive(f"mtrd.{option}", getattr(self, option))
        if not 0 <= self.gate <= 1:
            raise ConfigError(f"mtrd.gate: expected 0 ... 1, got {self.gate:g}")

    @property
    def level(self) -> str:
        """Where it applies."""
        return str(self.at)

    def misfit(
        self, attention: Mapping[str, AttentionSite], frames: FrameMap | None, out: Tensor
    ) -> str:
        """Only ``per_frame`` needs frames."""
        return lacks_frames(out, frames) if self.per_frame else ""

    def __call__(self, ctx: LossContext) -> Tensor:
        """Remember some float pixels, then compare all with what is remembered."""
        self.require_fit(ctx)
        generator = self._generator(ctx)
        self._remember(ctx, generator)
        fp, q = (unit(pixels(out)) for out in (ctx.fp_out, ctx.q_out))
        drawn = self._draw(ctx, generator).to(q).expand(q.shape[0], -1, -1)
        return relation_kl((fp, drawn), (q, drawn), self.temperature, self.reduction)

    def banks(self, ctx: LossContext) -> dict[str, Tensor]:
        """The banks so far, [n, C] each, oldest first, by ``timestep`` or ``timestep|frame``."""
        prefix = self.key(ctx, "bank", "")
        found = {k: v for k, v in ctx.state.items() if k.startswith(prefix)}
        return {name.removeprefix(prefix): found[name] for name in sorted(found)}

    def _remember(self, ctx: LossContext, generator: torch.Generator) -> None:
        out = ctx.fp_out.detach()
        groups = {f"{ctx.timestep}": pixels(out)}
        if self.per_frame:
            frames = frame_pixels(out, ctx.frames).unbind(1)
            groups = {f"{ctx.timestep}|{index}": frame for index, frame in enumerate(frames)}
        for name, values in groups.items():
            drawn = [sample[_some(len(sample), self.pixels, generator)] for sample in values]
            key = self.key(ctx, "bank", name)
            new = unit(torch.cat(drawn)).cpu()
            held = ctx.state.get(key, new[:0])
            room = max(0, self.capacity - len(held))
            accepted = torch.rand(len(new), generator=generator) < self.gate
            accepted[:room] = True  # the gate guards what a full bank holds
            ctx.state[key] = torch.cat((held, new[accepted]))[-self.capacity :]

    def _draw(self, ctx: LossContext, generator: torch.Generator) -> Tensor:
        banks = self.banks(ctx).values()
        share = max(1, self.bank // len(banks))
        return torch.cat([bank[_some(len(bank), share, generator)] for bank in banks])

    def _generator(self, ctx: LossContext) -> torch.Generator:
        """Seeded by the option, the block and the number of calls, so that a resumed run agrees."""
        key = self.key(ctx, "calls")
        calls = ctx.state.get(key, torch.tensor(0))
        ctx.state[key] = calls + 1
        seed = zlib.crc32(f"{self.seed}|{ctx.block}|{int(calls)}".encode())
        return torch.Generator().manual_seed(seed)


def _some(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """int64[min(count, wanted)]: indices drawn without repetition."""
    return torch.randperm(count, generator=generator)[:wanted]
