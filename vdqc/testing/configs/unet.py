"""Tiny configurations of UNets, of images and of video."""

from __future__ import annotations

from vdqc.ir.inputs.draw import Config
from vdqc.testing.configs import Row

_UNET: Config = {
    "block_out_channels": (8, 16),
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}

_UNET_CONDITION: Config = {**_UNET, "cross_attention_dim": 24, "attention_head_dim": 4}

UNET: list[Row] = [
    (
        "unet2d",
        "UNet2DModel",
        {
            **_UNET,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    (
        "unet2d-condition",
        "UNet2DConditionModel",
        {
            **_UNET_CONDITION,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    (
        "unet3d-condition",
        "UNet3DConditionModel",
        {
            **_UNET_CONDITION,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
    ),
    (
        "unet-spatio-temporal",
        "UNetSpatioTemporalConditionModel",
        {
            **_UNET,
            "in_channels": 8,
            "block_out_channels": (32, 64),
            "down_block_types": (
                "CrossAttnDownBlockSpatioTemporal",
                "DownBlockSpatioTemporal",
            ),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 24,
            "num_attention_heads": 4,
            "projection_class_embeddings_input_dim": 96,
            "addition_time_embed_dim": 32,
        },
    ),
]
