"""A small VGGT-like model: several views of a scene to camera poses and depth maps.

Each view is cut into patches and joined by one camera token and a few register tokens (the first
view has its own). Blocks alternate between attention within each frame and attention over all
frames; both have qk-norm and LayerScale. Heads read the camera token (pose) and the patch tokens
(depth). Source: Wang et al., "VGGT: Visual Geometry Grounded Transformer", 2025, section 3.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional


@final
class Attention(nn.Module):
    """Self-attention with layer-normalised queries and keys; ``[N, T, C]`` to ``[N, T, C]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads)
        self.k_norm = nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over the second axis."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attended = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(attended.transpose(1, 2).flatten(2))


@final
class LayerScale(nn.Module):
    """A learned gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        """``x * gamma``."""
        return x * self.gamma


@final
class Block(nn.Module):
    """Pre-norm transformer block with LayerScale on both branches."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, C]`` to ``[N, T, C]``."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.fc2(functional.gelu(self.fc1(self.norm2(x)))))


@final
class VGGT(nn.Module):
    """Views ``[B, F, 3, H, W]`` to ``{"pose": [B, F, 9], "depth": [B, F, H, W]}``."""

    def __init__(
        self,
        width: int = 64,
        heads: int = 4,
        depth: int = 2,
        patch: int = 4,
        registers: int = 2,
        mlp_ratio: int = 2,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.camera_token = nn.Parameter(torch.randn(2, 1, width) * 0.02)
        self.register_token = nn.Parameter(torch.randn(2, registers, width) * 0.02)
        self.frame_blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pose_head = nn.Linear(width, 9)
        self.depth_head = nn.Linear(width, patch * patch)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pose and depth of every view."""
        batch, frames, _, height, width = images.shape
        rows, columns = height // self.patch, width // self.patch
        patches = self.patch_embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self._special_tokens(batch, frames), patches], 1)
        tokens = x.shape[1]
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame_block(x)
            x = global_block(x.reshape(batch, frames * tokens, -1))
            x = x.reshape(batch * frames, tokens, -1)
        x = self.norm(x).unflatten(0, (batch, frames))
        cells = self.depth_head(x[:, :, tokens - rows * columns :])
        grid = cells.reshape(batch, frames, rows, columns, self.patch, self.patch)
        depth = grid.transpose(3, 4).reshape(batch, frames, height, width)
        return {"pose": self.pose_head(x[:, :, 0]), "depth": functional.softplus(depth)}

    def _special_tokens(self, batch: int, frames: int) -> Tensor:
        """Camera and register tokens, ``[B * F, 1 + R, C]``; the first frame has its own."""
        both = torch.cat([self.camera_token, self.register_token], 1)
        first, rest = both[:1], both[1:].expand(frames - 1, -1, -1)
        return torch.cat([first, rest]).repeat(batch, 1, 1)
