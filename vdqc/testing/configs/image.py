"""Tiny configurations of transformers that denoise images."""

from __future__ import annotations

from vdqc.ir.inputs.draw import Config
from vdqc.testing.configs import CAPTIONED, HEADS, LATENT, Row

_JOINT: Config = {**HEADS, "joint_attention_dim": 24}

IMAGE: list[Row] = [
    (
        "dit",
        "DiTTransformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "num_embeds_ada_norm": 10,
            "patch_size": 2,
            "sample_size": 8,
        },
    ),
    (
        "pixart",
        "PixArtTransformer2DModel",
        {**CAPTIONED, "use_additional_conditions": False},
    ),
    (
        "sd3",
        "SD3Transformer2DModel",
        {
            **_JOINT,
            **LATENT,
            "sample_size": 32,
            "patch_size": 2,
            "num_layers": 2,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 20,
            "pos_embed_max_size": 32,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    (
        "flux",
        "FluxTransformer2DModel",
        {
            **_JOINT,
            "patch_size": 1,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 2,
            "pooled_projection_dim": 20,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    (
        "flux2",
        "Flux2Transformer2DModel",
        {
            **_JOINT,
            "patch_size": 1,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 2,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
    (
        "qwen-image",
        "QwenImageTransformer2DModel",
        {
            **_JOINT,
            "patch_size": 2,
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 1,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    (
        "hunyuan-dit",
        "HunyuanDiT2DModel",
        {
            **HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 64,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "text_len": 5,
            "text_len_t5": 7,
            "activation_fn": "gelu-approximate",
        },
    ),
    (
        "lumina2",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 24,
        },
    ),
]
