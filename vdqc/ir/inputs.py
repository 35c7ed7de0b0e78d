"""Calls synthesised from a configuration: what ``forward`` of each known class wants, at any size.

A diffusers or transformers folder holds no samples, so vdqc makes them: one factory per class reads
widths from the configuration and gives keyword arguments for a requested ``Extent``. Values are
standard normal, timesteps uniform, masks ragged; good for capture and for probes, not for
calibration that must be faithful.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from vdqc.ir.sample import Sample

Config = Mapping[str, Any]
Call = dict[str, Any]


@final
@dataclass(frozen=True)
class Extent:
    """Sizes of one call: batch, frames, height and width of the latent, text tokens.

    The default keeps every size at least 2 and pairwise distinct: export bakes sizes of 0 and 1 and
    may take equal sizes for one.
    """

    B: int = 2
    F: int = 3
    H: int = 8
    W: int = 12
    L: int = 10

    def grown(self, axes: str, step: int = 4) -> Extent:
        """Another extent that is larger in ``axes`` (letters of the fields)."""
        more = {"B": 1, "F": 2, "H": step, "W": step, "L": 4}
        return replace(self, **{axis: getattr(self, axis) + more[axis] for axis in axes})


@final
class Draw:
    """Random values in a fixed order; two with one seed draw the same."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32."""
        return torch.randn(*shape, generator=self._generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform in ``[0, high)``, int64."""
        return torch.randint(0, high, shape, generator=self._generator)

    def timesteps(self, *shape: int) -> Tensor:
        """Integer timesteps in ``[0, 1000)``."""
        return self.integers(1000, *shape)

    def mask(self, batch: int, length: int) -> Tensor:
        """Bool ``[batch, length]``; each row keeps fewer leading tokens than the one before."""
        kept = (length - 1 - torch.arange(batch) - self._seed % 3).clamp_min(1)
        return torch.arange(length)[None] < kept[:, None]


Factory = Callable[[Config, Extent, Draw], Call]


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


def _video(c: Config, s: Extent, draw: Draw, channels: int | None = None) -> Call:
    return {
        "hidden_states": draw.normal(s.B, channels or c["in_channels"], s.F, s.H, s.W),
        "timestep": draw.timesteps(s.B),
    }


def _text(c: Config, s: Extent, draw: Draw, key: str) -> Call:
    return {"encoder_hidden_states": draw.normal(s.B, s.L, c[key])}


def wan(c: Config, s: Extent, draw: Draw) -> Call:
    """Wan t2v; i2v where the configuration has an image encoder's width.

    The i2v forward takes the last 512 tokens for text, so the image tokens vary with L instead.
    """
    if not c.get("image_dim"):
        return _video(c, s, draw) | _text(c, s, draw, "text_dim")
    image_tokens = c.get("pos_embed_seq_len") or s.L
    return (
        _video(c, s, draw)
        | _text(c, replace(s, L=512), draw, "text_dim")
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
        | _text(c, s, draw, "text_embed_dim")
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
        | _text(c, s, draw, "text_embed_dim")
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
        | _text(c, s, draw, "text_embed_dim")
        | {"encoder_attention_mask": draw.mask(s.B, s.L)}
    )


def captioned_video(c: Config, s: Extent, draw: Draw) -> Call:
    """Latte and Allegro: text at the width of a caption projection."""
    return _video(c, s, draw) | _text(c, s, draw, "caption_channels")


def easyanimate(c: Config, s: Extent, draw: Draw) -> Call:
    """EasyAnimate: text without a mask."""
    return _video(c, s, draw) | _text(c, s, draw, "text_embed_dim")


def cosmos(c: Config, s: Extent, draw: Draw) -> Call:
    """Cosmos: text and a frame rate."""
    return _video(c, s, draw) | _text(c, s, draw, "text_embed_dim") | {"fps": 30}


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
        | _text(c, s, draw, "caption_channels")
        | {
            "encoder_attention_mask": draw.mask(s.B, s.L).float(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    )


def sd3(c: Config, s: Extent, draw: Draw) -> Call:
    """Stable Diffusion 3: text and pooled text."""
    return (
        _image(c, s, draw)
        | _text(c, s, draw, "joint_attention_dim")
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


def unet(c: Config, s: Extent, draw: Draw) -> Call:
    """UNet2D, unconditional."""
    return {
        "sample": draw.normal(s.B, c["in_channels"], s.H, s.W),
        "timestep": draw.timesteps(s.B),
    }


def unet_condition(c: Config, s: Extent, draw: Draw) -> Call:
    """UNet2D with cross-attention."""
    return unet(c, s, draw) | _text(c, s, draw, "cross_attention_dim")


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


#: Class name to its factory.
INPUTS: Mapping[str, Factory] = {
    "WanTransformer3DModel": wan,
    "WanVACETransformer3DModel": wan_vace,
    "SkyReelsV2Transformer3DModel": wan,
    "CogVideoXTransformer3DModel": cogvideox,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "HunyuanVideo15Transformer3DModel": hunyuan_video15,
    "LTXVideoTransformer3DModel": ltx,
    "LTX2VideoTransformer3DModel": ltx2,
    "MochiTransformer3DModel": mochi,
    "LatteTransformer3DModel": captioned_video,
    "AllegroTransformer3DModel": captioned_video,
    "EasyAnimateTransformer3DModel": easyanimate,
    "CosmosTransformer3DModel": cosmos,
    "Kandinsky5Transformer3DModel": kandinsky5,
    "SanaVideoTransformer3DModel": sana_video,
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "Flux2Transformer2DModel": flux2,
    "QwenImageTransformer2DModel": qwen_image,
    "HunyuanDiT2DModel": hunyuan_dit,
    "Lumina2Transformer2DModel": lumina2,
    "UNet2DModel": unet,
    "UNet2DConditionModel": unet_condition,
    "UNet3DConditionModel": unet3d,
    "UNetSpatioTemporalConditionModel": unet_spatio_temporal,
    "T5EncoderModel": token_encoder,
    "UMT5EncoderModel": token_encoder,
    "ViTModel": vit,
    "Dinov2Model": patch_encoder,
    "DepthAnythingForDepthEstimation": patch_encoder,
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
