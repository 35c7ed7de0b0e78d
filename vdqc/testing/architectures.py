"""Tiny random instances of the real architectures, with calls of every shape that they allow.

Configurations are the smallest that keep each architecture's structure: one or two blocks of each
kind, four heads of 16 channels. Weights are drawn again after construction, zero-initialised gates
and outputs included, so that no branch is invisible in the result. Libraries are imported when a
model is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import nn

from vdqc.ir.folder import kept_in_float32
from vdqc.ir.inputs import INPUTS, axes_for, cast, sample_of
from vdqc.ir.inputs.draw import Config, Draw, Extent, Factory
from vdqc.ir.inputs.video import wan_token_timesteps
from vdqc.ir.sample import Sample


@final
@dataclass(frozen=True)
class Architecture:
    """One architecture at a tiny size.

    Attributes:
        name: the key in ``ARCHITECTURES``.
        library: where the class is: ``diffusers``, ``transformers`` or a module of vdqc.testing.
        class_name: the class.
        config: arguments of the class; for transformers, of its configuration.
        axes: letters of ``Extent`` that may vary.
        extent: sizes of the example call.
        factory: what makes a call; None for the class's own.
    """

    name: str
    library: str
    class_name: str
    config: Config
    axes: str = "BFHWL"
    extent: Extent = field(default_factory=Extent)
    factory: Factory | None = None

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A model with random weights, in eval mode."""
        torch.manual_seed(seed)
        module = importlib.import_module(self.library)
        model: nn.Module = _BUILDERS[self.library](module, self.class_name, self.config)
        return cast_model(randomize(model, seed), dtype).eval()

    def inputs(
        self,
        B: int | None = None,
        F: int | None = None,
        H: int | None = None,
        W: int | None = None,
        L: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Keyword arguments of one call; sizes not given are the example's."""
        sizes = {"B": B, "F": F, "H": H, "W": W, "L": L}
        extent = replace(self.extent, **{k: v for k, v in sizes.items() if v is not None})
        return self._call(extent, seed, dtype)

    def samples(self, dtype: torch.dtype = torch.float32) -> list[Sample]:
        """Two samples that differ in every axis that may vary."""
        extents = (self.extent, self.extent.grown(self.axes))
        return [sample_of(self._call(extent, i, dtype)) for i, extent in enumerate(extents)]

    def variants(self, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
        """Fresh calls by what changes in them: values, batch, one, text, frames, size."""
        changes = {"batch": "B", "text": "L", "frames": "F", "size": "HW"}
        extents = {"values": self.extent}
        for name, axes in changes.items():
            if set(axes) <= set(self.axes):
                extents[name] = self.extent.grown(axes)
        if "B" in self.axes:
            extents["one"] = replace(self.extent, B=1)
        if "F" in self.axes:
            extents["one frame"] = replace(self.extent, F=1)
        if "H" in self.axes:
            extents["other size"] = replace(self.extent, H=self.extent.H + 8, W=self.extent.W)
        return {
            name: self._call(extent, 11 + i, dtype)
            for i, (name, extent) in enumerate(extents.items())
        }

    def _call(self, extent: Extent, seed: int, dtype: torch.dtype) -> dict[str, Any]:
        factory = self.factory or INPUTS[self.class_name]
        call: dict[str, Any] = cast(factory(self.config, extent, Draw(seed)), dtype)
        return call


def randomize(model: nn.Module, seed: int = 0, std: float = 0.08) -> nn.Module:
    """Draw every parameter from N(0, std²), gains of norms from N(1, 0.1²); returns ``model``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim <= 1 and "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * value if is_gain else std * value)
            if name == "head.conv3.bias":  # depth ends in a ReLU, which must not be all zero
                parameter.fill_(1.0)
    return model


def cast_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` in ``dtype`` but for what its class keeps in float32 (as ``from_pretrained``)."""
    if dtype == torch.float32:
        return model
    kept = set(kept_in_float32(model, dtype))
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                name = f"{prefix}.{leaf}".split(".")
                if tensor is None or not tensor.is_floating_point() or kept & set(name):
                    continue
                value = tensor.detach().to(dtype)
                tensors[leaf] = nn.Parameter(value) if tensors is module._parameters else value
    return model


def _diffusers(module: Any, class_name: str, config: Config) -> nn.Module:
    model: nn.Module = getattr(module, class_name)(**config)
    return model


def _transformers(module: Any, class_name: str, config: Config) -> nn.Module:
    arguments = dict(config)
    if backbone := arguments.pop("backbone_config", None):
        arguments["backbone_config"] = module.Dinov2Config(**backbone)
    configuration = getattr(module, class_name).config_class(**arguments)
    model: nn.Module = getattr(module, class_name)(configuration)
    return model


_BUILDERS: Mapping[str, Callable[[Any, str, Config], nn.Module]] = {
    "diffusers": _diffusers,
    "transformers": _transformers,
    "vdqc.testing.vggt": _diffusers,
}


def _views(config: Config, extent: Extent, draw: Draw) -> dict[str, Any]:
    return {"images": draw.normal(extent.B, extent.F, 3, 4 * extent.H, 4 * extent.W)}


_HEADS: Config = {"num_attention_heads": 4, "attention_head_dim": 16}
_LATENT: Config = {"in_channels": 4, "out_channels": 4}

_WAN: Config = {
    **_HEADS,
    **_LATENT,
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
    **_HEADS,
    **_LATENT,
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
    **_HEADS,
    **_LATENT,
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
    **_HEADS,
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 64,
    "num_layers": 1,
    "caption_channels": 24,
}

_COSMOS: Config = {
    **_HEADS,
    **_LATENT,
    "num_layers": 1,
    "mlp_ratio": 2,
    "text_embed_dim": 24,
    "adaln_lora_dim": 8,
    "max_size": (16, 32, 32),
    "concat_padding_mask": False,
}

_CAPTIONED: Config = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "patch_size": 2,
    "sample_size": 8,
    "cross_attention_dim": 64,
    "caption_channels": 24,
}

_JOINT: Config = {**_HEADS, "joint_attention_dim": 24}

_UNET: Config = {
    "block_out_channels": (8, 16),
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}

_UNET_CONDITION: Config = {**_UNET, "cross_attention_dim": 24, "attention_head_dim": 4}

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

_OFF_TABLE = Extent(H=12, W=16)


def _table() -> dict[str, Architecture]:
    diffusers_classes: list[tuple[Any, ...]] = [
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
                **_HEADS,
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
                **_CAPTIONED,
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
                **_LATENT,
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
                **_HEADS,
                **_LATENT,
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
                **_HEADS,
                **_LATENT,
                "num_layers": 1,
                "num_cross_attention_heads": 4,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 64,
                "caption_channels": 24,
                "sample_size": 8,
                "rope_max_seq_len": 64,
            },
        ),
        (
            "dit",
            "DiTTransformer2DModel",
            {
                **_HEADS,
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
            {**_CAPTIONED, "use_additional_conditions": False},
        ),
        (
            "sd3",
            "SD3Transformer2DModel",
            {
                **_JOINT,
                **_LATENT,
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
                **_HEADS,
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
    transformers_classes: list[tuple[Any, ...]] = [
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
    found = [
        _entry(library, *row)
        for library, rows in (
            ("diffusers", diffusers_classes),
            ("transformers", transformers_classes),
        )
        for row in rows
    ]
    found.append(Architecture("vggt", "vdqc.testing.vggt", "VGGT", {}, axes="BFHW", factory=_views))
    return {architecture.name: architecture for architecture in found}


def _entry(
    library: str, name: str, class_name: str, config: Config, factory: Factory | None = None
) -> Architecture:
    off_table = name in ("latte", "pixart", "dinov2", "depth-anything", "cogvideox-2b")
    return Architecture(
        name,
        library,
        class_name,
        config,
        axes=axes_for(class_name, config),
        extent=_OFF_TABLE if off_table else Extent(),
        factory=factory,
    )


#: Every architecture that vdqc promises to capture, by name.
ARCHITECTURES: Mapping[str, Architecture] = _table()
