"""Calls of encoders of text and of images, and of depth models on these."""

from __future__ import annotations

from vdqc.ir.inputs.draw import Call, Config, Draw, Extent


def token_encoder(c: Config, s: Extent, draw: Draw) -> Call:
    """T5 and UMT5 encoders."""
    return {
        "input_ids": draw.integers(c["vocab_size"], s.B, s.L),
        "attention_mask": draw.mask(s.B, s.L).long(),
    }


def vit(c: Config, s: Extent, draw: Draw) -> Call:
    """ViT at its configured image size."""
    size = c["image_size"]
    return {"pixel_values": draw.normal(s.B, c.get("num_channels", 3), size, size)}


def patch_encoder(c: Config, s: Extent, draw: Draw) -> Call:
    """DINOv2 and models on it: any image that is a multiple of the patch size."""
    backbone = c.get("backbone_config") or c
    patch = backbone["patch_size"]
    return {"pixel_values": draw.normal(s.B, 3, s.H * patch, s.W * patch)}
