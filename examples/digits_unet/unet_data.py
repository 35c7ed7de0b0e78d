"""Single handwritten digits on a frame of 16 x 16: the data of this example, drawn on the fly.

    images, labels = draw(handwriting("train"), 32, torch.Generator().manual_seed(0))
    images   float32 [B, 1, 16, 16] in [-1, 1]; -1 is black
    labels   int64 [B]
    tokens(labels)   float32 [B, 1, 32], the condition as a UNet with cross attention wants it

The handwriting is scikit-learn's `load_digits` (8 x 8 pixels, 1797 digits), enlarged, moved, turned
and sheared a little.

Source: the digits are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998), as shipped with scikit-learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 16
"""Height and width of an image, pixels."""
TOKEN_DIM = 32
"""Channels of a condition token."""
DROPPED = 10
"""The label of an unconditional image."""


@dataclass(frozen=True)
class Handwriting:
    """Single digits: `images` float32 [N, 8, 8] in [0, 1], `labels` int64 [N]."""

    images: Tensor
    labels: Tensor


def handwriting(split: str) -> Handwriting:
    """The digits of one split: "train" (4 of 5) or "test" (1 of 5), disjoint and fixed for ever."""
    if split not in ("train", "test"):
        raise ValueError(f'expected split "train" or "test", got {split!r}')
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1998))
    held_out = len(labels) // 5
    chosen = order[:held_out] if split == "test" else order[held_out:]
    return Handwriting(images[chosen], labels[chosen])


def draw(
    digits: Handwriting, batch: int, generator: torch.Generator, *, vary: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Images [B, 1, 16, 16] in [-1, 1] of random digits, and their labels [B].

    `vary` scales how far a digit is turned and sheared (6 % at 1) and moved (a pixel at 1).
    """
    chosen = torch.randint(len(digits.labels), (batch,), generator=generator)
    turn = 0.06 * vary * torch.randn(batch, 2, 2, generator=generator)
    shift = 0.12 * vary * (torch.rand(batch, 2, 1, generator=generator) * 2 - 1)
    affine = torch.cat([1.1 * torch.eye(2) + turn, shift], dim=2)
    grid = F.affine_grid(affine, [batch, 1, SIZE, SIZE], align_corners=False)
    grey = F.grid_sample(digits.images[chosen, None], grid, "bicubic", align_corners=False)
    # steeper edges: 8 pixels enlarged are soft
    return ((grey - 0.15) * 1.6).clamp(0, 1) * 2 - 1, digits.labels[chosen]


def tokens(labels: Tensor) -> Tensor:
    """The condition [B, 1, 32]: a row of an orthogonal cosine basis of mean square one."""
    index = torch.arange(TOKEN_DIM, device=labels.device)
    basis = torch.cos(math.pi / TOKEN_DIM * (index + 0.5) * (index[:, None] + 1)) * math.sqrt(2)
    return basis[labels][:, None]
