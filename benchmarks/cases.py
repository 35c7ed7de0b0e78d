"""The models that benchmarks run: shapes of real configurations, random weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vdqc.ir.sample import Sample
from vdqc.testing.architectures import cast_model

#: WanTransformer3DModel with the width, heads, feed-forward and text widths of Wan2.1 1.3B.
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


def wan(layers: int, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The model with weights from ``seed``: the same in every dtype, up to rounding."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model: Any = WanTransformer3DModel(**WAN, num_layers=layers)
    return cast_model(model, dtype).eval()


def wan_call(tokens: int, text: int, dtype: torch.dtype, batch: int = 1) -> dict[str, Any]:
    """One call with ``tokens`` video tokens (four frames, square) and ``text`` text tokens."""
    side = math.isqrt(tokens // 4)
    if 4 * side * side != tokens:
        raise ValueError(f"expected four times a square of tokens, got {tokens}")
    return wan_inputs(batch, 4, 2 * side, 2 * side, text, dtype)


def wan_inputs(
    batch: int, frames: int, height: int, width: int, text: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of one call, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": draw(batch, 16, frames, height, width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": draw(batch, text, 4096),
    }


def wan_samples(dtype: torch.dtype) -> list[Sample]:
    """Two small calls that differ in every size: what the graph is captured from."""
    return [
        Sample(wan_inputs(2, 3, 8, 12, 7, dtype), timestep=500.0),
        Sample(wan_inputs(3, 4, 10, 16, 9, dtype), timestep=500.0),
    ]
