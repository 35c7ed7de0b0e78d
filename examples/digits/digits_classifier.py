"""The judge of this example: a small convolutional net that reads both digits from a video.

    reader = load_reader(Path("classifier.safetensors"))
    reader(videos).argmax(-1)     # videos [B, 1, F, 32, 32] in [-1, 1] → labels [B, 2], left first

It learns from real videos only (`train.py classifier`) and never sees a generated one.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import digits_data as data
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class DigitReader(nn.Module):
    """Videos [B, 1, F, size, size] in [-1, 1] → logits [B, 2, 10], the mean over the frames."""

    def __init__(self, size: int = data.SIZE) -> None:
        super().__init__()
        self.size = size
        widths = (1, 16, 32, 48)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, stride=2),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)  # [B F, 48, size / 8, size / 8]
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(48 * (size // 8) ** 2, 20))

    def forward(self, videos: Tensor) -> Tensor:
        """Logits [B, 2, 10] of the left and the right digit."""
        batch, _, frames = videos.shape[:3]
        pixels = videos.transpose(1, 2).flatten(0, 1)
        logits: Tensor = self.head(self.features(pixels).flatten(1))
        return logits.view(batch, frames, 2, 10).mean(dim=1)


@torch.no_grad()
def real_accuracy(reader: DigitReader, digits: data.Handwriting, count: int) -> float:
    """Share of `count` real videos of this handwriting whose digits `reader` gets both right."""
    random = torch.Generator().manual_seed(7)
    videos, labels = data.draw(digits, count, random, size=reader.size)
    read = torch.cat([reader(part).argmax(dim=-1) for part in torch.split(videos, 100)])
    return (read == labels).all(dim=1).float().mean().item()


def save_reader(reader: DigitReader, path: Path) -> None:
    """Write the weights, float16 on disk."""
    save_file({name: value.half() for name, value in reader.state_dict().items()}, path)


def load_reader(path: Path) -> DigitReader:
    """The trained judge in evaluation mode, float32."""
    state = load_file(path)
    reader = DigitReader(8 * math.isqrt(state["head.1.weight"].shape[1] // 48))
    reader.load_state_dict({name: value.to(torch.float32) for name, value in state.items()})
    return reader.eval()


@torch.no_grad()
def read(video: Tensor, reader: DigitReader) -> Tensor:
    """What the judge sees in videos [N, 1, F, H, W] in [0, 1]: int64 [N, 2], left first."""
    logits: Tensor = reader(video.detach().float().cpu() * 2 - 1)
    return logits.argmax(dim=-1)


def single_frames(video: Tensor) -> Tensor:
    """Videos [N, 1, F, H, W] as N F videos of one frame."""
    return video.transpose(1, 2).flatten(0, 1).unsqueeze(2)
