"""Calls of UNets, of images and of video at any size."""

from __future__ import annotations

import torch

from vdqc.ir.inputs.draw import Call, Config, Draw, Extent, text


def unet(c: Config, s: Extent, draw: Draw) -> Call:
    """UNet2D, unconditional."""
    return {
        "sample": draw.normal(s.B, c["in_channels"], s.H, s.W),
        "timestep": draw.timesteps(s.B),
    }


def unet_condition(c: Config, s: Extent, draw: Draw) -> Call:
    """UNet2D with cross-attention."""
    return unet(c, s, draw) | text(c, s, draw, "cross_attention_dim")


def unet3d(c: Config, s: Extent, draw: Draw) -> Call:
    """UNet3D with cross-attention."""
    sample = {"sample": draw.normal(s.B, c["in_channels"], s.F, s.H, s.W)}
    return unet_condition(c, s, draw) | sample


def unet_spatio_temporal(c: Config, s: Extent, draw: Draw) -> Call:
    """Stable Video Diffusion: one image token, three added conditions."""
    return {
        "sample": draw.normal(s.B, s.F, c["in_channels"], s.H, s.W),
        "timestep": draw.timesteps(s.B),
        "encoder_hidden_states": draw.normal(s.B, 1, c["cross_attention_dim"]),
        "added_time_ids": torch.tensor([[6.0, 127, 0.02]]).repeat(s.B, 1),
    }
