"""Calls of transformers that denoise images at any size."""

from __future__ import annotations

import torch
from torch import Tensor

from vdqc.ir.inputs.draw import Call, Config, Draw, Extent, text


def dit(c: Config, s: Extent, draw: Draw) -> Call:
    """DiT: a class label; height and width are the configuration's."""
    size = c["sample_size"]
    return {
        "hidden_states": draw.normal(s.B, c["in_channels"], size, size),
        "timestep": draw.timesteps(s.B),
        "class_labels": draw.integers(c["num_embeds_ada_norm"], s.B),
    }


def _image(c: Config, s: Extent, draw: Draw) -> Call:
    return {
        "hidden_states": draw.normal(s.B, c["in_channels"], s.H, s.W),
        "timestep": draw.timesteps(s.B),
    }


def pixart(c: Config, s: Extent, draw: Draw) -> Call:
    """PixArt: caption with a mask; resolution conditions unused."""
    return (
        _image(c, s, draw)
        | text(c, s, draw, "caption_channels")
        | {
            "encoder_attention_mask": draw.mask(s.B, s.L).float(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    )


def sd3(c: Config, s: Extent, draw: Draw) -> Call:
    """Stable Diffusion 3: text and pooled text."""
    return (
        _image(c, s, draw)
        | text(c, s, draw, "joint_attention_dim")
        | {"pooled_projections": draw.normal(s.B, c["pooled_projection_dim"])}
    )


def flux2(c: Config, s: Extent, draw: Draw) -> Call:
    """Flux 2: a token sequence with position ids, timestep and guidance in [0, 1)."""
    axes = len(c["axes_dims_rope"])
    call = {
        "hidden_states": draw.normal(s.B, s.H * s.W, c["in_channels"]),
        "encoder_hidden_states": draw.normal(s.B, s.L, c["joint_attention_dim"]),
        "timestep": draw.timesteps(s.B) / 1000,
        "img_ids": _grid_ids(s, axes),
        "txt_ids": torch.zeros(s.L, axes),
    }
    guided = c.get("guidance_embeds", True)
    return call | ({"guidance": draw.timesteps(s.B) / 100} if guided else {})


def flux(c: Config, s: Extent, draw: Draw) -> Call:
    """Flux: as Flux 2, with pooled text."""
    return flux2(c, s, draw) | {"pooled_projections": draw.normal(s.B, c["pooled_projection_dim"])}


def _grid_ids(s: Extent, axes: int) -> Tensor:
    ids = torch.zeros(s.H, s.W, axes)
    ids[..., 1] += torch.arange(s.H)[:, None]
    ids[..., 2] += torch.arange(s.W)[None]
    return ids.reshape(s.H * s.W, axes)


def qwen_image(c: Config, s: Extent, draw: Draw) -> Call:
    """Qwen-Image: a packed token sequence, its grid as python integers, an integer text mask."""
    return {
        "hidden_states": draw.normal(s.B, s.H * s.W, c["in_channels"]),
        "encoder_hidden_states": draw.normal(s.B, s.L, c["joint_attention_dim"]),
        "encoder_hidden_states_mask": draw.mask(s.B, s.L).long(),
        "timestep": draw.timesteps(s.B) / 1000,
        "img_shapes": [(1, s.H, s.W)],
    }


def hunyuan_dit(c: Config, s: Extent, draw: Draw) -> Call:
    """HunyuanDiT: two texts of configured lengths, size conditions, rotary tables from outside."""
    patch = c["patch_size"]
    angle = draw.normal((s.H // patch) * (s.W // patch), c["attention_head_dim"])
    length, length_t5 = c["text_len"], c["text_len_t5"]
    return {
        "hidden_states": draw.normal(s.B, c["in_channels"], s.H, s.W),
        "timestep": draw.timesteps(s.B).float(),
        "encoder_hidden_states": draw.normal(s.B, length, c["cross_attention_dim"]),
        "text_embedding_mask": draw.mask(s.B, length).float(),
        "encoder_hidden_states_t5": draw.normal(s.B, length_t5, c["cross_attention_dim_t5"]),
        "text_embedding_mask_t5": draw.mask(s.B, length_t5).float(),
        "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]]).repeat(s.B, 1),
        "style": torch.zeros(s.B, dtype=torch.long),
        "image_rotary_emb": [angle.cos(), angle.sin()],
    }


def lumina2(c: Config, s: Extent, draw: Draw) -> Call:
    """Lumina 2: padded text with a bool mask, timestep in [0, 1)."""
    return {
        "hidden_states": draw.normal(s.B, c["in_channels"], s.H, s.W),
        "timestep": draw.timesteps(s.B) / 1000,
        "encoder_hidden_states": draw.normal(s.B, s.L, c["cap_feat_dim"]),
        "encoder_attention_mask": draw.mask(s.B, s.L),
    }
