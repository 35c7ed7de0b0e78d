"""Attention-guided Sparse Token Distillation: the block error, weighted by who is attended to.

::

    L = 1/n · sum_j lambda_j |fp_out_j - q_out_j|²
    lambda_j = low + (high - low) · (S_j - min S) / (max S - min S)

S_j is the attention that token j receives in the float block, over all heads and queries, summed
over the self-attention sites whose tokens are the output's. In joint attention the least and the
greatest are those of the token's own stream (``segments``), since text may receive most of all.

Error: none of its own; low = high = 1 is the block error of the same reduction, bit for bit.
Source: Feng et al., S2Q-VDiT, arXiv 2508.04016, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.numerics import TOLERANCE
from vdqc.engine.frames import FrameMap
from vdqc.engine.losses import AttentionSite, LossContext, LossTerm, tap
from vdqc.engine.losses.attention import self_attention, token_saliency
from vdqc.engine.losses.block import output_error
from vdqc.engine.losses.layout import per_pixel, pixel_count
from vdqc.engine.losses.reduction import Reduction


@final
@dataclass(frozen=True)
class TokenDistillation(LossTerm):
    """See the module.

    Attributes:
        low, high: weights of the tokens that receive least and most.
        segments: least and greatest per stream (video, text) instead of over both.
        reduction: ``row`` is the paper's: summed over channels, averaged over tokens.
    """

    low: float = 0.5
    high: float = 1.0
    segments: bool = True
    reduction: Reduction = Reduction.ROW

    name: ClassVar[str] = "std"
    taps: ClassVar[tuple[str, ...]] = ("query", "key", "mask")

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ConfigError(f"std: expected 0 <= low <= high, got {self.low:g} and {self.high:g}")

    def misfit(
        self, attention: Mapping[str, AttentionSite], frames: FrameMap | None, out: Tensor
    ) -> str:
        """Blocks without self-attention over the output's tokens weigh none of them."""
        sites = [attention[name] for name in self_attention(attention)]
        if not sites:
            return "expected self-attention in the block, got none"
        count = pixel_count(out)
        lengths = [_lengths(site) for site in sites]
        if all(lengths) and not any(count in known for known in lengths):
            return f"expected self-attention over the {count} tokens of the output, got {lengths}"
        return ""

    def __call__(self, ctx: LossContext) -> Tensor:
        """The weighted error of the block."""
        self.require_fit(ctx)
        weights = [
            per_pixel(w, out) for w, out in zip(self.weights(ctx), _outputs(ctx), strict=True)
        ]
        return output_error(ctx, self.reduction, weights)

    def weights(self, ctx: LossContext) -> list[Tensor]:
        """lambda of every token of every output, float32[B, P] each."""
        streams = received(ctx)
        whole, sizes = torch.cat(streams, 1), [stream.shape[1] for stream in streams]
        labels = _streams(sizes, ctx.frames).to(whole.device)
        if not self.segments:
            labels = torch.zeros_like(labels)
        weights = torch.empty_like(whole)
        for label in labels.unique().tolist():
            weights[:, labels == label] = self.scaled(whole[:, labels == label])
        return list(weights.to(ctx.q_out.device, torch.float32).split(sizes, 1))

    def scaled(self, received: Tensor) -> Tensor:
        """``received`` [B, P] in [low, high] per sample; ``high`` where all are alike."""
        least, most = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
        spread = most - least
        alike = spread <= TOLERANCE[torch.float32] * most
        share = (received - least) / torch.where(alike, torch.ones_like(spread), spread)
        share = torch.where(alike, torch.ones_like(share), share)
        return self.low + (self.high - self.low) * share


def received(ctx: LossContext) -> list[Tensor]:
    """float64[B, P] for each output of the block: attention received in the float block.

    Raises InputError if no site's tokens can be laid on the outputs'.
    """
    outputs = _outputs(ctx)
    sums: list[Tensor | None] = [None] * len(outputs)
    for site in self_attention(ctx.attention):
        for at, part in enumerate(
            _laid_out(ctx.attention[site], token_saliency(ctx, site), outputs)
        ):
            before = sums[at]
            sums[at] = part if before is None or part is None else before + part
    if sums[0] is None:
        raise _no_match(ctx, outputs[0])
    # a stream that no site attends in weighs alike: scaled() gives it ``high``
    blank = [sums[0].new_zeros(out.shape[0], pixel_count(out)) for out in outputs]
    return [part if part is not None else zero for part, zero in zip(sums, blank, strict=True)]


def _lengths(site: AttentionSite) -> set[int]:
    """How many output tokens a site may speak for; empty where its shapes do not tell."""
    if site.frames is None or site.extent in ("frame", "time"):
        return set()
    return {site.frames.tokens, int(site.frames.video.sum())}


def _outputs(ctx: LossContext) -> list[Tensor]:
    return [ctx.fp_out, *ctx.fp_rest]


def _streams(sizes: list[int], frames: FrameMap | None) -> Tensor:
    """int64[sum P]: which tokens are compared with each other."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) + 1
    if frames is not None and frames.tokens == sizes[0]:
        labels[: sizes[0]] = torch.where(frames.video.cpu(), 1, 0)
    return labels


def _laid_out(site: AttentionSite, sums: Tensor, outputs: list[Tensor]) -> list[Tensor | None]:
    """``sums`` [B', L] of one site as [B, P] per output, None where it says nothing of it."""
    batch, count = outputs[0].shape[0], pixel_count(outputs[0])
    nothing: list[Tensor | None] = [None] * (len(outputs) - 1)
    if sums.shape == (batch, count):
        return [sums, *nothing]
    if sums.numel() == batch * count and site.extent == "frame":
        return [sums.reshape(batch, count), *nothing]
    if sums.numel() == batch * count and site.extent == "time":
        return [
            sums.reshape(batch, -1, sums.shape[1]).transpose(1, 2).reshape(batch, count),
            *nothing,
        ]
    frames = site.frames
    if frames is None or frames.tokens != sums.shape[1] or sums.shape[0] != batch:
        return [None, *nothing]
    video = frames.video.to(sums.device)
    if int(video.sum()) != count:
        return [None, *nothing]
    text = sums[:, ~video]
    fits = len(outputs) == 2 and pixel_count(outputs[1]) == text.shape[1]
    return [sums[:, video], *([text] if fits else nothing)]


def _no_match(ctx: LossContext, out: Tensor) -> InputError:
    lengths = {
        site: list(ctx.fp_taps[tap(site, "query")].shape) for site in self_attention(ctx.attention)
    }
    return InputError(
        f"expected self-attention over the {pixel_count(out)} tokens of the output, "
        f"got queries {lengths}",
        "use the loss 'block' here, or give the token to frame map of joint attention",
        code="loss-misfit",
        site=ctx.block,
    )
