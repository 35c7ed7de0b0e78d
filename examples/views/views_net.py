"""A model of VGGT's kind: several views of a scene to camera poses and depth maps, in one pass.

Each view is cut into patches with learned places and joined by one camera token and two register
tokens; the first view has its own. Blocks alternate between attention within each view and
attention over all views, with qk-norm and LayerScale. Heads read the camera token (pose) and the
patch tokens (logarithm of depth).

    {"pose": [B, F, 9], "depth": [B, F, H, W]} = ViewsNet()(images)      # images [B, F, 3, H, W]

A pose is a camera's place in the first camera's frame, and the first two columns of its rotation.
Source: Wang et al., "VGGT: Visual Geometry Grounded Transformer", 2025, section 3; rotations, Zhou
et al., "On the Continuity of Rotation Representations in Neural Networks", 2019, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdqc.testing.vggt import Block


class ViewsNet(nn.Module):
    """Views ``[B, F, 3, H, W]`` in [0, 1] to poses and depth."""

    def __init__(
        self,
        width: int = 128,
        heads: int = 2,
        depth: int = 4,
        size: int = 32,
        patch: int = 8,
        registers: int = 2,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.patch, self.cells = patch, size // patch
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.place = nn.Parameter(torch.randn(self.cells**2, width) * 0.5)
        self.camera_token = nn.Parameter(torch.randn(2, 1, width) * 0.5)
        self.register_token = nn.Parameter(torch.randn(2, registers, width) * 0.5)
        self.frame_blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pose_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 9))
        self.depth_head = nn.Linear(width, patch * patch)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pose and depth of every view."""
        batch, frames = images.shape[:2]
        patches = self.patch_embed(images.flatten(0, 1) * 2 - 1).flatten(2).transpose(1, 2)
        x = torch.cat([self._special_tokens(batch, frames), patches + self.place], 1)
        tokens = x.shape[1]
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame_block(x)
            x = global_block(x.reshape(batch, frames * tokens, -1))
            x = x.reshape(batch * frames, tokens, -1)
        x = self.norm(x).unflatten(0, (batch, frames))
        depth = self.depth_head(x[:, :, tokens - self.cells**2 :]).exp()
        grid = depth.reshape(batch, frames, self.cells, self.cells, self.patch, self.patch)
        size = self.cells * self.patch
        return {
            "pose": self.pose_head(x[:, :, 0]),
            "depth": grid.transpose(3, 4).reshape(batch, frames, size, size),
        }

    def _special_tokens(self, batch: int, frames: int) -> Tensor:
        """Camera and register tokens, ``[B * F, 1 + R, C]``; the first view has its own."""
        both = torch.cat([self.camera_token, self.register_token], 1)
        first, rest = both[:1], both[1:].expand(frames - 1, -1, -1)
        return torch.cat([first, rest]).repeat(batch, 1, 1)


def encode_pose(rotation: Tensor, centre: Tensor) -> Tensor:
    """Rotations [..., 3, 3] and places [..., 3] as poses [..., 9]."""
    return torch.cat([centre, rotation[..., 0], rotation[..., 1]], dim=-1)


def decode_pose(pose: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations [..., 3, 3], by Gram and Schmidt, and places [..., 3] of poses [..., 9]."""
    centre, x, y = pose.split(3, dim=-1)
    x = F.normalize(x, dim=-1)
    y = F.normalize(y - (x * y).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], dim=-1), centre
