"""Calls of transformers that denoise video at any size."""

from __future__ import annotations

from dataclasses import replace

import torch

from vdqc.ir.inputs.draw import Call, Config, Draw, Extent, text


def _video(c: Config, s: Extent, draw: Draw, channels: int | None = None) -> Call:
    return {
        "hidden_states": draw.normal(s.B, channels or c["in_channels"], s.F, s.H, s.W),
        "timestep": draw.timesteps(s.B),
    }


def wan(c: Config, s: Extent, draw: Draw) -> Call:
    """Wan t2v; i2v where the configuration has an image encoder's width.

    The i2v forward takes the last 512 tokens for text, so the image tokens vary with L instead.
    """
    if not c.get("image_dim"):
        return _video(c, s, draw) | text(c, s, draw, "text_dim")
    image_tokens = c.get("pos_embed_seq_len") or s.L
    return (
        _video(c, s, draw)
        | text(c, replace(s, L=512), draw, "text_dim")
        | {"encoder_hidden_states_image": draw.normal(s.B, image_tokens, c["image_dim"])}
    )


def wan_token_timesteps(c: Config, s: Extent, draw: Draw) -> Call:
    """Wan 2.2 ti2v: one timestep per token."""
    _, height, width = c["patch_size"]
    tokens = s.F * (s.H // height) * (s.W // width)
    return wan(c, s, draw) | {"timestep": draw.timesteps(s.B, tokens)}


def wan_vace(c: Config, s: Extent, draw: Draw) -> Call:
    """Wan VACE: a control video and one scale per control layer."""
    layers = len(c["vace_layers"])
    return wan(c, s, draw) | {
        "control_hidden_states": draw.normal(s.B, c["vace_in_channels"], s.F, s.H, s.W),
        "control_hidden_states_scale": torch.full((layers,), 0.7),
    }


def cogvideox(c: Config, s: Extent, draw: Draw) -> Call:
    """CogVideoX; rotary tables come from outside where the configuration uses them."""
    call = {
        "hidden_states": draw.normal(s.B, s.F, c["in_channels"], s.H, s.W),
        "encoder_hidden_states": draw.normal(s.B, s.L, c["text_embed_dim"]),
        "timestep": draw.timesteps(s.B),
    }
    if not c["use_rotary_positional_embeddings"]:
        return call
    patch = c["patch_size"]
    tokens = s.F * (s.H // patch) * (s.W // patch) // (c.get("patch_size_t") or 1)
    angle = draw.normal(tokens, c["attention_head_dim"])
    return call | {"image_rotary_emb": (angle.cos(), angle.sin())}


def hunyuan_video(c: Config, s: Extent, draw: Draw) -> Call:
    """HunyuanVideo: padded text with its mask, pooled text, distilled guidance."""
    call = (
        _video(c, s, draw)
        | text(c, s, draw, "text_embed_dim")
        | {
            "encoder_attention_mask": draw.mask(s.B, s.L).float(),
            "pooled_projections": draw.normal(s.B, c["pooled_projection_dim"]),
        }
    )
    return call | ({"guidance": draw.timesteps(s.B).float()} if c["guidance_embeds"] else {})


def hunyuan_video15(c: Config, s: Extent, draw: Draw) -> Call:
    """HunyuanVideo-1.5: two padded texts and image tokens, which are zero for text to video."""
    image = draw.normal(s.B, s.L // 2, c["image_embed_dim"])
    second = s.L - 3
    return (
        _video(c, s, draw)
        | text(c, s, draw, "text_embed_dim")
        | {
            "timestep": draw.timesteps(s.B).float(),
            "encoder_attention_mask": draw.mask(s.B, s.L).float(),
            "encoder_hidden_states_2": draw.normal(s.B, second, c["text_embed_2_dim"]),
            "encoder_attention_mask_2": draw.mask(s.B, second).float(),
            "image_embeds": image if c["task_type"] == "i2v" else torch.zeros_like(image),
        }
    )


def ltx(c: Config, s: Extent, draw: Draw) -> Call:
    """LTX: a token sequence whose grid is given as python integers."""
    return {
        "hidden_states": draw.normal(s.B, s.F * s.H * s.W, c["in_channels"]),
        "encoder_hidden_states": draw.normal(s.B, s.L, c["caption_channels"]),
        "timestep": draw.timesteps(s.B),
        "encoder_attention_mask": draw.mask(s.B, s.L),
        "num_frames": s.F,
        "height": s.H,
        "width": s.W,
    }


def ltx2(c: Config, s: Extent, draw: Draw) -> Call:
    """LTX-2: LTX and an audio stream of three tokens per frame."""
    return ltx(c, s, draw) | {
        "timestep": draw.timesteps(s.B).float(),
        "audio_hidden_states": draw.normal(s.B, s.F * 3, c["audio_in_channels"]),
        "audio_encoder_hidden_states": draw.normal(s.B, s.L, c["caption_channels"]),
        "audio_num_frames": s.F * 3,
        "fps": 25.0,
    }


def mochi(c: Config, s: Extent, draw: Draw) -> Call:
    """Mochi: padded text with a bool mask."""
    return (
        _video(c, s, draw)
        | text(c, s, draw, "text_embed_dim")
        | {"encoder_attention_mask": draw.mask(s.B, s.L)}
    )


def captioned_video(c: Config, s: Extent, draw: Draw) -> Call:
    """Latte and Allegro: text at the width of a caption projection."""
    return _video(c, s, draw) | text(c, s, draw, "caption_channels")


def easyanimate(c: Config, s: Extent, draw: Draw) -> Call:
    """EasyAnimate: text without a mask."""
    return _video(c, s, draw) | text(c, s, draw, "text_embed_dim")


def cosmos(c: Config, s: Extent, draw: Draw) -> Call:
    """Cosmos: text and a frame rate."""
    return _video(c, s, draw) | text(c, s, draw, "text_embed_dim") | {"fps": 30}


def kandinsky5(c: Config, s: Extent, draw: Draw) -> Call:
    """Kandinsky 5: channels last, rotary positions as index vectors."""
    _, height, width = c["patch_size"]
    rows, columns = s.H // height, s.W // width
    return {
        "hidden_states": draw.normal(s.B, s.F, s.H, s.W, c["in_visual_dim"]),
        "encoder_hidden_states": draw.normal(s.B, s.L, c["in_text_dim"]),
        "timestep": draw.timesteps(s.B).float(),
        "pooled_projections": draw.normal(s.B, c["in_text_dim2"]),
        "visual_rope_pos": (torch.arange(s.F), torch.arange(rows), torch.arange(columns)),
        "text_rope_pos": torch.arange(s.L),
    }


def sana_video(c: Config, s: Extent, draw: Draw) -> Call:
    """SanaVideo: caption and its float mask."""
    mask = {"encoder_attention_mask": draw.mask(s.B, s.L).float()}
    return captioned_video(c, s, draw) | mask
