"""Tiny configurations of transformers that denoise video."""

from __future__ import annotations

from vdqc.ir.inputs.draw import Config
from vdqc.ir.inputs.video import wan_token_timesteps
from vdqc.testing.configs import CAPTIONED, HEADS, LATENT, Row

_WAN: Config = {
    **HEADS,
    **LATENT,
    "patch_size": (1, 2, 2),
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}

_COGVIDEOX: Config = {
    **HEADS,
    **LATENT,
    "time_embed_dim": 32,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 10,
}

_HUNYUAN: Config = {
    **HEADS,
    **LATENT,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size_t": 1,
    "text_embed_dim": 24,
    "rope_axes_dim": (4, 6, 6),
}

_HUNYUAN15: Config = {
    **_HUNYUAN,
    "num_layers": 1,
    "patch_size": 1,
    "text_embed_2_dim": 20,
    "image_embed_dim": 28,
    "target_size": 16,
}

_LTX: Config = {
    **HEADS,
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 64,
    "num_layers": 1,
    "caption_channels": 24,
}

_COSMOS: Config = {
    **HEADS,
    **LATENT,
    "num_layers": 1,
    "mlp_ratio": 2,
    "text_embed_dim": 24,
    "adaln_lora_dim": 8,
    "max_size": (16, 32, 32),
    "concat_padding_mask": False,
}

VIDEO: list[Row] = [
    ("wan-t2v", "WanTransformer3DModel", _WAN),
    ("wan-i2v", "WanTransformer3DModel", {**_WAN, "image_dim": 28, "added_kv_proj_dim": 64}),
    ("wan-ti2v", "WanTransformer3DModel", _WAN, wan_token_timesteps),
    (
        "wan-vace",
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": (0, 1), "vace_in_channels": 12},
    ),
    ("skyreels-v2", "SkyReelsV2Transformer3DModel", _WAN),
    (
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        {
            **_HUNYUAN,
            "num_layers": 1,
            "num_single_layers": 2,
            "patch_size": 2,
            "guidance_embeds": True,
            "pooled_projection_dim": 20,
        },
    ),
    (
        "hunyuan-video15-t2v",
        "HunyuanVideo15Transformer3DModel",
        {**_HUNYUAN15, "task_type": "t2v"},
    ),
    (
        "hunyuan-video15-i2v",
        "HunyuanVideo15Transformer3DModel",
        {**_HUNYUAN15, "task_type": "i2v"},
    ),
    (
        "cogvideox-2b",
        "CogVideoXTransformer3DModel",
        {**_COGVIDEOX, "use_rotary_positional_embeddings": False},
    ),
    (
        "cogvideox-5b",
        "CogVideoXTransformer3DModel",
        {**_COGVIDEOX, "use_rotary_positional_embeddings": True},
    ),
    ("ltx", "LTXVideoTransformer3DModel", _LTX),
    (
        "ltx2",
        "LTX2VideoTransformer3DModel",
        {
            **_LTX,
            "num_layers": 1,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 4,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 32,
            "rope_double_precision": False,
        },
    ),
    (
        "mochi",
        "MochiTransformer3DModel",
        {
            **HEADS,
            "patch_size": 2,
            "num_layers": 2,
            "pooled_projection_dim": 48,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 32,
            "max_sequence_length": 16,
        },
    ),
    (
        "latte",
        "LatteTransformer3DModel",
        {
            **CAPTIONED,
            "num_layers": 1,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "video_length": 3,
        },
    ),
    (
        "allegro",
        "AllegroTransformer3DModel",
        {
            **LATENT,
            "num_attention_heads": 4,
            "attention_head_dim": 24,
            "num_layers": 1,
            "cross_attention_dim": 96,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "caption_channels": 24,
        },
    ),
    (
        "easyanimate",
        "EasyAnimateTransformer3DModel",
        {
            **HEADS,
            **LATENT,
            "patch_size": 2,
            "mmdit_layers": 2,
            "num_layers": 2,
            "sample_height": 60,
            "sample_width": 90,
            "text_embed_dim": 24,
            "time_embed_dim": 32,
        },
    ),
    (
        "cosmos",
        "CosmosTransformer3DModel",
        {**_COSMOS, "extra_pos_embed_type": "learnable"},
    ),
    ("cosmos2", "CosmosTransformer3DModel", {**_COSMOS, "extra_pos_embed_type": None}),
    (
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 24,
            "in_text_dim2": 20,
            "time_dim": 32,
            "out_visual_dim": 4,
            "patch_size": (1, 2, 2),
            "model_dim": 64,
            "ff_dim": 96,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (8, 12, 12),
        },
    ),
    (
        "sana-video",
        "SanaVideoTransformer3DModel",
        {
            **HEADS,
            **LATENT,
            "num_layers": 1,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 24,
            "sample_size": 8,
            "rope_max_seq_len": 64,
        },
    ),
]
