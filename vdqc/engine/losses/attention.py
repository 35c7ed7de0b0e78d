"""Multi-Scale Salient Attention Distillation: keep the attention map where it counts.

::

    L = global · |softmax(Q~ K~ᵀ) - softmax(Q~' K~'ᵀ)|²      Q~, K~ averaged over ``stride`` tokens
      + local  · |softmax(Q_I Kᵀ) - softmax(Q_I' K'ᵀ)|²      I the tokens that receive most

Q, K [B, H, L, D] as they enter the attention op (after norm and rotary embedding), dense whatever
mask the deployed graph has. I comes from the float model, once per block and sample. In joint
attention video is pooled and text is not.

Error: the full map never exists: at most h·(L~² + k·L) floats beside the inputs, L~ = ceil(L / s).
Padding masks leave their tokens out of the averages; a mask that differs between queries counts in
the local part and is left out of the global one.
Source: Feng et al., QuantSparse, arXiv 2509.23681, section 3.2 and appendix C. The paper's equation
says L / s², its table 13 ceil(L / s); its lambdas are 1e-4 for Wan and 1, 100 for HunyuanVideo:
``auto`` instead makes each part as large as the block error at the first call.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from vdqc.base.diagnostics import ConfigError
from vdqc.engine.frames import FrameMap
from vdqc.engine.losses import AUTO, AttentionSite, LossContext, LossTerm, auto_weight, tap
from vdqc.engine.losses.block import output_error
from vdqc.engine.losses.maps import (
    SalientAxis,
    Segment,
    kept_keys,
    map_error,
    pool,
    saliency,
    take_rows,
)
from vdqc.engine.losses.reduction import Reduction

#: A chunk is this part of what may be held: softmax and its backward keep about six of them.
_PARTS = 16


@final
@dataclass(frozen=True)
class AttentionDistillation(LossTerm):
    """See the module.

    Attributes:
        global_: weight of the pooled map, or ``auto``.
        local: weight of the salient rows, or ``auto``.
        stride: tokens that are averaged into one.
        salient: rows of the local part; all rows where there are fewer.
        axis: what makes a token salient.
        segments: leave text tokens un-pooled, where the token to frame map tells them apart.
        reduction: of each squared map; ``mean`` over heads, queries and keys.
    """

    global_: float | str = 1e-4
    local: float | str = 1e-4
    stride: int = 128
    salient: int = 256
    axis: SalientAxis = SalientAxis.RECEIVED
    segments: bool = True
    reduction: Reduction = Reduction.MEAN

    name: ClassVar[str] = "msad"
    taps: ClassVar[tuple[str, ...]] = ("query", "key", "mask")

    def __post_init__(self) -> None:
        for option in ("global_", "local"):
            value = getattr(self, option)
            if value != AUTO and (isinstance(value, str) or value < 0):
                raise ConfigError(
                    f"msad.{option.rstrip('_')}: expected a number of at least 0 or auto, "
                    f"got {value}"
                )
        for option in ("stride", "salient"):
            if getattr(self, option) < 1:
                raise ConfigError(f"msad.{option}: expected 1 or more, got {getattr(self, option)}")

    def misfit(
        self, attention: Mapping[str, AttentionSite], frames: FrameMap | None, out: Tensor
    ) -> str:
        """Blocks without self-attention have no map to keep."""
        return "" if self_attention(attention) else "expected self-attention in the block, got none"

    def __call__(self, ctx: LossContext) -> Tensor:
        """Both parts, summed over the self-attention sites of the block."""
        self.require_fit(ctx)
        loss = ctx.q_out.new_zeros(())
        for weight, part in ((self.global_, self.global_error), (self.local, self.local_error)):
            if weight == 0:
                continue
            error = sum(
                (part(ctx, site) for site in self_attention(ctx.attention)), loss.new_zeros(())
            )
            if weight == AUTO:
                reference = float(output_error(ctx).detach())
                weight = auto_weight(self, ctx, float(error.detach()), reference, part.__name__)
            loss = loss + float(weight) * error
        return loss

    def global_error(self, ctx: LossContext, site: str) -> Tensor:
        """Squared error of the pooled map."""
        facts, mask = ctx.attention[site], site_mask(ctx, site)
        parts = segments(facts.frames) if self.segments and facts.frames is not None else None
        pairs = []
        allowed: Tensor | None = None
        for taps in (ctx.fp_taps, ctx.q_taps):
            query, key = taps[tap(site, "query")], taps[tap(site, "key")]
            keep = kept_keys(mask, key.shape[0])
            (query, _), (key, groups) = (pool(x, self.stride, parts, keep) for x in (query, key))
            pairs.append((query, key))
            allowed = None if keep is None else groups[:, None, None]
        rows = max(1, pairs[0][0].shape[2] // _PARTS)
        return map_error(
            pairs[0], pairs[1], facts.scale, allowed, rows=rows, reduction=self.reduction
        )

    def local_error(self, ctx: LossContext, site: str) -> Tensor:
        """Squared error of the salient rows."""
        facts, mask = ctx.attention[site], site_mask(ctx, site)
        index = salient_tokens(token_saliency(ctx, site, self.axis, self.salient), self.salient)
        pairs = [
            (take_rows(taps[tap(site, "query")], index), taps[tap(site, "key")])
            for taps in (ctx.fp_taps, ctx.q_taps)
        ]
        if mask is not None and mask.shape[2] > 1:
            mask = take_rows(mask, index)
        rows = max(1, index.shape[1] // _PARTS)
        return map_error(pairs[0], pairs[1], facts.scale, mask, rows=rows, reduction=self.reduction)


def self_attention(attention: Mapping[str, AttentionSite]) -> list[str]:
    """Names of the sites whose keys are the tokens of their queries."""
    return [name for name, site in attention.items() if not site.cross]


def site_mask(ctx: LossContext, site: str) -> Tensor | None:
    """The mask at ``site`` as [B or 1, H or 1, L or 1, M], or None."""
    mask = ctx.fp_taps.get(tap(site, "mask"))
    return mask if mask is None or mask.ndim == 4 else mask[(None,) * (4 - mask.ndim)]


def token_saliency(
    ctx: LossContext, site: str, axis: SalientAxis = SalientAxis.RECEIVED, salient: int = 256
) -> Tensor:
    """float64[B, L] of the float map at ``site``: measured once, then from the block's state."""
    key = "|".join(("saliency", ctx.block, str(ctx.sample), site, str(axis)))
    if key not in ctx.state:
        query, keys = ctx.fp_taps[tap(site, "query")], ctx.fp_taps[tap(site, "key")]
        mask, rows = site_mask(ctx, site), max(1, salient // _PARTS)
        found = saliency(query, keys, ctx.attention[site].scale, mask, rows=rows, axis=axis)
        ctx.state[key] = found.cpu()
    return ctx.state[key].to(ctx.fp_out.device)


def salient_tokens(received: Tensor, count: int) -> Tensor:
    """int64[B, k]: the tokens of greatest saliency, in their order in the sequence."""
    index = received.topk(min(count, received.shape[1]), dim=1).indices
    return index.sort(dim=1).values


def segments(frames: FrameMap) -> list[Segment]:
    """Runs of video (pooled) and of other tokens (not pooled)."""
    video = frames.video.tolist()
    edges = [0, *(at for at in range(1, len(video)) if video[at] != video[at - 1]), len(video)]
    return [(a, b, video[a]) for a, b in itertools.pairwise(edges)]
