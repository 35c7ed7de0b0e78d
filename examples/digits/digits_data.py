"""Bouncing handwritten digits: the data of this example, drawn on the fly.

A video shows two digits of scikit-learn's `load_digits` (8 x 8 pixels, 1797 handwritings),
enlarged to 14 x 14, on a black frame of 32 x 32. Each moves in a straight line and bounces off the
frame and off the other digit, so the left one stays left: a video is described by the *ordered*
pair (left, right).

    videos, labels = draw(handwriting("train"), 16, torch.Generator().manual_seed(0))
    videos   float32 [B, 1, F, 32, 32] in [-1, 1]; -1 is black
    labels   int64 [B, 2], the left and the right digit
    tokens(labels)   float32 [B, L, 32], the condition as a transformer wants it

Source: the digits are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998), as shipped with scikit-learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 32
"""Height and width of a frame, pixels, unless another is asked for."""
FRAMES = 16
"""Frames of a whole video."""
TOKEN_DIM = 32
"""Channels of a condition token."""
TYPICAL = 10
"""Handwritings per digit that the transformer has learned."""
DROPPED = -1
"""The label of an unconditional video: `tokens` turns it into the null token."""

DIGIT = 14.0  # height and width of an enlarged digit, pixels
CENTRES = 0.5  # how near the two digits come, as a share of the frame: each has its half
SPEED_X = (0.2, 1.0)  # pixels a frame
SPEED_Y = (0.5, 1.5)

_NULL_ROW, _PAD_ROW, _POSITION_ROW = 10, 11, 12


@dataclass(frozen=True)
class Handwriting:
    """Single digits: `images` float32 [N, 8, 8] in [0, 1], `labels` int64 [N]."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Handwriting:
        """The same digits on another device."""
        return Handwriting(self.images.to(device), self.labels.to(device))


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


def typical(digits: Handwriting, count: int) -> Handwriting:
    """The `count` handwritings of each digit that are nearest to its mean picture."""
    chosen = []
    for digit in range(10):
        (members,) = (digits.labels == digit).nonzero(as_tuple=True)
        images = digits.images[members]
        distance = (images - images.mean(dim=0)).square().sum(dim=(1, 2))
        chosen.append(members[distance.argsort()[:count]])
    order = torch.cat(chosen)
    return Handwriting(digits.images[order], digits.labels[order])


def draw(
    digits: Handwriting,
    batch: int,
    generator: torch.Generator,
    *,
    frames: int = FRAMES,
    size: int = SIZE,
) -> tuple[Tensor, Tensor]:
    """Videos [B, 1, F, size, size] in [-1, 1] of random pairs, places, speeds; their labels [B, 2].

    Left and right digit are independent; `generator` lives on the device of `digits`.
    """
    device = digits.images.device
    chosen = torch.randint(len(digits.labels), (batch, 2), generator=generator, device=device)
    top, left = _paths(batch, frames, size, generator, device)
    return render(digits.images[chosen], top, left, size), digits.labels[chosen]


def render(images: Tensor, top: Tensor, left: Tensor, size: int = SIZE) -> Tensor:
    """Digits at sub-pixel places: images [B, 2, 8, 8], top and left [B, F, 2] → videos.

    Videos [B, 1, F, size, size].

    One separable interpolation enlarges and places at once, `rows @ image @ columns^T`, with the
    cubic kernel of R. Keys (1981); the brighter of the two digits wins a pixel.
    """
    rows, columns = _placement(top, size), _placement(left, size)  # [B, F, 2, size, 8]
    grey = rows @ images[:, None] @ columns.mT  # [B, F, 2, size, size]
    grey = (
        ((grey - 0.15) * 1.6).clamp(0, 1).amax(dim=2)
    )  # steeper edges: 8 pixels enlarged are soft
    return grey[:, None] * 2 - 1


def tokens(labels: Tensor, length: int = 2) -> Tensor:
    """The condition [B, L, 32] for labels [B, 2]: token p says "digit d at place p", left first.

    A token is the sum of two rows of an orthogonal cosine basis, one for the digit and one for the
    place, so it is dense, of unit scale, and needs no text encoder. `DROPPED` labels become null
    tokens; places from 2 up to `length` are padding.
    """
    batch, count = labels.shape
    if count != 2 or length < 2:
        raise ValueError(
            f"expected labels [B, 2] and length >= 2, got {list(labels.shape)}, {length}"
        )
    rows = torch.full((batch, length), _PAD_ROW, device=labels.device)
    rows[:, :2] = torch.where(labels == DROPPED, _NULL_ROW, labels)
    places = torch.arange(length, device=labels.device) % (TOKEN_DIM - _POSITION_ROW)
    basis = _cosine_basis(TOKEN_DIM, labels.device)
    return basis[rows] + basis[_POSITION_ROW + places]


def _paths(
    batch: int, frames: int, size: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Upper left corners (top, left) of both digits, each [B, F, 2], pixels.

    Two equal balls that bounce off each other on a line swap their speeds, which is two balls that
    pass through each other and swap names: walk both freely, sort, push the right one a width away.
    """

    def walk(room: float, speed: tuple[float, float]) -> Tensor:
        start, rate, sign = torch.rand(3, batch, 1, 2, generator=generator, device=device)
        rate = (speed[0] + (speed[1] - speed[0]) * rate) * torch.where(sign < 0.5, -1.0, 1.0)
        time = torch.arange(frames, device=device).view(1, frames, 1)
        travelled = (2 * room * start + rate * time).remainder(2 * room)
        position: Tensor = room - (room - travelled).abs()
        return position

    apart = CENTRES * size
    top = walk(size - DIGIT, SPEED_Y)
    left = walk(size - DIGIT - apart, SPEED_X).sort(dim=-1).values
    return top, left + torch.tensor([0.0, apart], device=device)


def _placement(corner: Tensor, size: int) -> Tensor:
    """Weights [..., size, 8] that lay 8 source pixels, enlarged to 14, at `corner` [...]."""
    pixel = torch.arange(size, device=corner.device)
    source = (pixel + 0.5 - corner[..., None]) * (8 / DIGIT) - 0.5
    distance = (source[..., None] - torch.arange(8, device=corner.device)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _cosine_basis(size: int, device: torch.device) -> Tensor:
    """The orthogonal DCT-II basis [size, size], rows of mean square one."""
    index = torch.arange(size, device=device)
    basis = torch.cos(math.pi / size * (index + 0.5) * index[:, None]) * math.sqrt(2)
    return torch.cat([torch.ones_like(basis[:1]), basis[1:]])


def contact_sheet(videos: Tensor, columns: int = 8) -> Tensor:
    """Videos [N, 1, F, H, W] in [0, 1] → uint8 picture: a row a video, `columns` frames each."""
    count, _, frames, height, width = videos.shape
    shown = torch.linspace(0, frames - 1, columns).round().long()
    picture = F.pad(videos[:, 0, shown], (1, 1, 1, 1), value=0.5).clamp(0, 1)
    picture = picture.permute(0, 2, 1, 3).reshape(count * (height + 2), columns * (width + 2))
    return (picture * 255).round().to(torch.uint8)
