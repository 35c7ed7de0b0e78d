"""Tiny configurations of encoders of text and of images, and of a depth model on them."""

from __future__ import annotations

from vdqc.ir.inputs.draw import Config
from vdqc.testing.configs import Row

_T5: Config = {
    "vocab_size": 99,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}

_VIT: Config = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}

_DINOV2: Config = {**_VIT, "mlp_ratio": 2}

ENCODERS: list[Row] = [
    ("t5", "T5EncoderModel", _T5),
    ("vit", "ViTModel", {**_VIT, "intermediate_size": 96}),
    ("dinov2", "Dinov2Model", _DINOV2),
    (
        "depth-anything",
        "DepthAnythingForDepthEstimation",
        {
            "backbone_config": {
                **_DINOV2,
                "num_hidden_layers": 4,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
                "reshape_hidden_states": False,
                "apply_layernorm": True,
            },
            "patch_size": 4,
            "reassemble_hidden_size": 64,
            "neck_hidden_sizes": [8, 16, 32, 32],
            "fusion_hidden_size": 16,
            "head_hidden_size": 8,
        },
    ),
]
