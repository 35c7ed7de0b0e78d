"""Repairs of position tables: python arithmetic on sizes as tensor arithmetic on symbolic sizes.

Arithmetic that python does in double precision is done here on float64 scalars, so the values are
the same. Each function stands in for a method of the class that its docstring names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def scalar(value: Any, device: torch.device | None = None) -> Tensor:
    """A size as a float64 scalar; ``torch.tensor`` would bake it in."""
    return torch.full((), value, dtype=torch.float64, device=device)


def linspace(start: Tensor, stop: Tensor, steps: Any, device: torch.device | None) -> Tensor:
    """``torch.linspace`` in float32 for symbolic ``steps``, which its schema takes as a constant.

    As torch's kernel: forward from ``start`` in the first half, back from ``stop`` in the second.
    """
    start, stop = start.float(), stop.float()
    step = (stop - start) / (steps - 1)
    index = torch.arange(steps, device=device, dtype=torch.float32)
    backward = (steps - 1) - index
    return torch.where(index < steps // 2, start + step * index, stop - step * backward)


def cogvideox_positions(
    self: Any, sample_height: Any, sample_width: Any, sample_frames: Any, device: Any = None
) -> Tensor:
    """CogVideoXPatchEmbed: the sine table of a grid, after zeros for the text.

    The original writes the table into ``.data`` of a new tensor, which export sees as a constant.
    """
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    table = get_3d_sincos_pos_embed(
        self.embed_dim,
        (sample_width // self.patch_size, sample_height // self.patch_size),
        (sample_frames - 1) // self.temporal_compression_ratio + 1,
        self.spatial_interpolation_scale,
        self.temporal_interpolation_scale,
        device=device,
        output_type="pt",
    ).flatten(0, 1)
    text = table.new_zeros(self.max_text_seq_length, self.embed_dim)
    return torch.cat([text, table]).unsqueeze(0)


def cosmos_positions(self: Any, hidden_states: Tensor) -> Tensor:
    """CosmosLearnablePositionalEmbed: three tables added over the grid and normalised per token.

    The norm is scaled by sqrt(tokens / (tokens · C)) = sqrt(1 / C); ``numpy.sqrt`` does not take
    the symbolic quotient. Both round to the same double for every C that is a size.
    """
    sizes = [
        size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)
    ]
    grid = (hidden_states.shape[0], *sizes, -1)
    tables = (self.pos_emb_t, self.pos_emb_h, self.pos_emb_w)
    along = [
        table[:size][(None, *(slice(None) if axis == i else None for axis in range(3)))]
        for i, (table, size) in enumerate(zip(tables, sizes, strict=True))
    ]
    emb = (along[0].expand(grid) + along[1].expand(grid) + along[2].expand(grid)).flatten(1, 3)
    norm = torch.linalg.vector_norm(emb, dim=-1, keepdim=True, dtype=torch.float32)
    norm = torch.add(self.eps, norm, alpha=(1 / emb.shape[-1]) ** 0.5)
    return (emb / norm).type_as(hidden_states)


def mochi_positions(
    self: Any, num_frames: Any, height: Any, width: Any, device: Any = None, dtype: Any = None
) -> Tensor:
    """MochiRoPE: cell centres of a grid of constant area, ``[F * H * W, 3]``."""
    scale = (self.target_area / scalar(height * width, device)) ** 0.5

    def centers(size: Any) -> Tensor:
        edge = scalar(size, device) * scale / 2
        edges = linspace(-edge, edge, size + 1, device)
        return (edges[:-1] + edges[1:]) / 2

    t = torch.arange(num_frames, device=device, dtype=dtype)
    grid = torch.meshgrid(t, centers(height).to(dtype), centers(width).to(dtype), indexing="ij")
    return torch.stack(grid, dim=-1).reshape(-1, 3)


def mochi_rope(self: Any, freqs: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """MochiRoPE: cosine and sine of positions ``[N, 3]`` by frequencies ``[3, H, D]``.

    The original's autocast region asks for float32, to which it also casts; autocast does not exist
    on the meta device.
    """
    angles = torch.einsum("nd,dhf->nhf", pos.float(), freqs.float())
    return angles.cos(), angles.sin()


def easyanimate_rope(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """EasyAnimateRotaryPosEmbed: rotary tables over a crop of the base grid.

    The crop keeps the aspect ratio: one side fills the base, the other is scaled and rounded. Both
    branches are the minimum of base and scaled size, since the side that fills is the one whose
    scaled size is not below its base.
    """
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    frames, height, width = hidden_states.shape[2:]
    height, width = height // self.patch_size, width // self.patch_size
    base_height, base_width = 60 // self.patch_size, 90 // self.patch_size
    rows, columns = scalar(height), scalar(width)
    crop_height = (base_width / columns * rows).round().clamp(max=base_height)
    crop_width = (base_height / rows * columns).round().clamp(max=base_width)
    axes: tuple[Any, ...] = (
        torch.arange(frames, dtype=torch.float32),
        _crop(crop_height, base_height, rows, height),
        _crop(crop_width, base_width, columns, width),
    )
    dim = self.rope_dim
    parts = (dim // 4, dim // 8 * 3, dim // 8 * 3)
    tables = [
        get_1d_rotary_pos_embed(part, axis, use_real=True)
        for part, axis in zip(parts, axes, strict=True)
    ]
    grid = (frames, height, width)
    cos, sin = (
        torch.cat([_along(table[i], axis, grid) for axis, table in enumerate(tables)], dim=-1)
        for i in range(2)
    )
    return cos, sin


def _crop(size: Tensor, base: int, count: Tensor, steps: Any) -> Tensor:
    """``steps`` points over a centred crop of ``size`` in ``base``, its end excluded."""
    start = ((base - size) / 2.0).round()
    return linspace(start, (start + size) * (count - 1) / count, steps, None)


def _along(table: Tensor, axis: int, grid: tuple[Any, Any, Any]) -> Tensor:
    """``[n, D]`` along one axis of a grid, repeated over the others: ``[F * H * W, D]``."""
    view = [1, 1, 1, table.shape[-1]]
    view[axis] = grid[axis]
    return table.reshape(view).expand(*grid, -1).reshape(-1, table.shape[-1])


def qwen_text_length(
    encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor | None
) -> tuple[Any, None, Tensor | None]:
    """Text length and bool mask; the original's length per sample is not used by the forward."""
    length = encoder_hidden_states.shape[1]
    if encoder_hidden_states_mask is None:
        return length, None, None
    return length, None, encoder_hidden_states_mask.to(torch.bool)


def qwen_rope(
    self: Any, video_fhw: Any, device: Any = None, max_txt_seq_len: Any = None
) -> tuple[Tensor, Tensor]:
    """QwenEmbedRope: complex tables for the grids of one sample and for the text behind them.

    The original takes ``int()`` of the text length.
    """
    grids = video_fhw[0] if isinstance(video_fhw, list) else video_fhw
    grids = grids if isinstance(grids, list) else [grids]
    tables, start = [], 0
    for index, (frames, height, width) in enumerate(grids):
        tables.append(self._compute_video_freqs(frames, height, width, index, device))
        sides = (height // 2, width // 2) if self.scale_rope else (height, width)
        start = torch.sym_max(start, torch.sym_max(*sides))
    positions, _ = self._get_device_freqs(device)
    return torch.cat(tables), positions[start : start + max_txt_seq_len]


def depth_head(self: Any, hidden_states: Any, patch_height: Any, patch_width: Any) -> Tensor:
    """DepthAnythingDepthEstimationHead: three convolutions around a bilinear resize.

    The original takes ``int()`` of the output size.
    """
    size = (patch_height * self.patch_size, patch_width * self.patch_size)
    x = self.conv1(hidden_states[self.head_in_index])
    x = functional.interpolate(x, size, mode="bilinear", align_corners=True)
    x = self.conv3(self.activation1(self.conv2(x)))
    depth: Tensor = self.activation2(x) * self.max_depth
    return depth.squeeze(dim=1)
