"""A block with one self-attention, as loss terms see it: the student is the teacher with noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdqc.engine.frames import FrameMap
from vdqc.engine.losses import AttentionSite, LossContext, tap

SITE = "attn:attention"


def context(
    *,
    seed: int = 0,
    noise: float = 0.1,
    heads: int = 2,
    length: int = 12,
    width: int = 4,
    frames: FrameMap | None = None,
    site: AttentionSite | None = None,
    **fields: Any,
) -> LossContext:
    """A block of ``length`` tokens with one self-attention; the student is the teacher + noise."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    taps = {tap(SITE, kind): draw(2, heads, length, width) for kind in ("query", "key")}
    out = draw(2, length, 6)
    values: dict[str, Any] = {
        "fp_out": out,
        "q_out": (out + noise * draw(*out.shape)).requires_grad_(),
        "fp_taps": taps,
        "q_taps": {n: (v + noise * draw(*v.shape)).requires_grad_() for n, v in taps.items()},
        "frames": FrameMap.of(3, length // 3) if frames is None else frames,
        "attention": {SITE: site or AttentionSite()},
        "timestep": 500.0,
        "sample": 0,
        **fields,
    }
    return LossContext("blocks.0", **values)


def dense_map(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
