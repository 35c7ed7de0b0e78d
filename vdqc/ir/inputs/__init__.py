"""Calls synthesised from a configuration: what ``forward`` of each known class wants, at any size.

A diffusers or transformers folder holds no samples, so vdqc makes them: one factory per class reads
widths from the configuration and gives keyword arguments for a requested ``Extent``. Factories are
by family in ``video``, ``image``, ``unet`` and ``encoders``; the table from class to factory is
here. Values are random (``draw``): good for capture and for probes, not for calibration that must
be faithful.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vdqc.ir.inputs import encoders, image, unet, video
from vdqc.ir.inputs.draw import Call, Config, Draw, Extent, Factory
from vdqc.ir.sample import Sample


def inputs_for(class_name: str, config: Config, extent: Extent, seed: int = 0) -> Call:
    """Keyword arguments of one call of ``class_name``; raises KeyError for an unknown class."""
    return INPUTS[class_name](config, extent, Draw(seed))


def axes_for(class_name: str, config: Config) -> str:
    """Which letters of ``Extent`` may vary for a class under its configuration."""
    if class_name == "WanTransformer3DModel" and config.get("pos_embed_seq_len"):
        return "BFHW"
    if config.get("use_rotary_positional_embeddings") is False:
        return "BFHW"
    return AXES.get(class_name, "BFHWL")


def extent_for(class_name: str, config: Config) -> Extent:
    """A small extent that suits the class and avoids the configuration's own sizes.

    Models that keep a position table take another branch at exactly the configured size.
    """
    step = _grain(class_name, config)
    extent = Extent(H=2 * step, W=3 * step)
    own = {config.get(key) for key in ("sample_size", "sample_height", "sample_width")}
    while own & {extent.H, extent.W, extent.H + step, extent.W + step} - {None}:
        extent = replace(extent, H=extent.H + step, W=extent.W + step)
    frames = config.get("video_length") if class_name == "LatteTransformer3DModel" else None
    if config.get("use_rotary_positional_embeddings") is False:
        extent = replace(extent, L=config["max_text_seq_length"])
    return replace(extent, F=frames) if frames else extent


def samples_for(class_name: str, config: Config, dtype: torch.dtype) -> list[Sample]:
    """Two samples in ``dtype`` that differ in every axis that may vary."""
    base = extent_for(class_name, config)
    larger = base.grown(axes_for(class_name, config), _grain(class_name, config))
    return [
        sample_of(cast(inputs_for(class_name, config, extent, seed), dtype))
        for seed, extent in enumerate((base, larger))
    ]


def sample_of(call: Call) -> Sample:
    """A sample whose timestep is the first value of the call's."""
    timestep = call.get("timestep")
    return Sample(call, float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else None)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating tensor in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, dtype) for item in value)
    return value


def _grain(class_name: str, config: Config) -> int:
    """Height and width must be multiples of this; at least 4 so that two steps stay distinct."""
    levels = len(config["block_out_channels"]) - 1 if class_name.startswith("UNet") else 0
    patch = config.get("patch_size", 1)
    patch = max(patch) if isinstance(patch, (list, tuple)) else patch
    in_patches = class_name in ("Dinov2Model", "ViTModel", "DepthAnythingForDepthEstimation")
    return max(4, 2**levels, 1 if in_patches else 2 * int(patch or 1))


#: Class name to its factory.
INPUTS: Mapping[str, Factory] = {
    "WanTransformer3DModel": video.wan,
    "WanVACETransformer3DModel": video.wan_vace,
    "SkyReelsV2Transformer3DModel": video.wan,
    "CogVideoXTransformer3DModel": video.cogvideox,
    "HunyuanVideoTransformer3DModel": video.hunyuan_video,
    "HunyuanVideo15Transformer3DModel": video.hunyuan_video15,
    "LTXVideoTransformer3DModel": video.ltx,
    "LTX2VideoTransformer3DModel": video.ltx2,
    "MochiTransformer3DModel": video.mochi,
    "LatteTransformer3DModel": video.captioned_video,
    "AllegroTransformer3DModel": video.captioned_video,
    "EasyAnimateTransformer3DModel": video.easyanimate,
    "CosmosTransformer3DModel": video.cosmos,
    "Kandinsky5Transformer3DModel": video.kandinsky5,
    "SanaVideoTransformer3DModel": video.sana_video,
    "DiTTransformer2DModel": image.dit,
    "PixArtTransformer2DModel": image.pixart,
    "SD3Transformer2DModel": image.sd3,
    "FluxTransformer2DModel": image.flux,
    "Flux2Transformer2DModel": image.flux2,
    "QwenImageTransformer2DModel": image.qwen_image,
    "HunyuanDiT2DModel": image.hunyuan_dit,
    "Lumina2Transformer2DModel": image.lumina2,
    "UNet2DModel": unet.unet,
    "UNet2DConditionModel": unet.unet_condition,
    "UNet3DConditionModel": unet.unet3d,
    "UNetSpatioTemporalConditionModel": unet.unet_spatio_temporal,
    "T5EncoderModel": encoders.token_encoder,
    "UMT5EncoderModel": encoders.token_encoder,
    "ViTModel": encoders.vit,
    "Dinov2Model": encoders.patch_encoder,
    "DepthAnythingForDepthEstimation": encoders.patch_encoder,
}

#: Axes that may vary, where not all of them do.
AXES: Mapping[str, str] = {
    "LatteTransformer3DModel": "BHWL",
    "DiTTransformer2DModel": "B",
    "PixArtTransformer2DModel": "BHWL",
    "SD3Transformer2DModel": "BHWL",
    "FluxTransformer2DModel": "BHWL",
    "Flux2Transformer2DModel": "BHWL",
    "QwenImageTransformer2DModel": "BHWL",
    "HunyuanDiT2DModel": "BHW",
    "Lumina2Transformer2DModel": "BHWL",
    "UNet2DModel": "BHW",
    "UNet2DConditionModel": "BHWL",
    "UNetSpatioTemporalConditionModel": "BFHW",
    "T5EncoderModel": "BL",
    "UMT5EncoderModel": "BL",
    "ViTModel": "B",
    "Dinov2Model": "BHW",
    "DepthAnythingForDepthEstimation": "BHW",
}
