"""The judge of this example: a small convolutional net that reads the digit of an image.

    reader = load_reader(Path("reader.safetensors"))
    reader(images).argmax(-1)     # images [B, 1, 16, 16] in [-1, 1] → labels [B]

It learns from real images only (`train.py reader`) and never sees a generated one.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import unet_data as data
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Reader(nn.Module):
    """Images [B, 1, 16, 16] in [-1, 1] → logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((1, 16, 32, 48)):
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, stride=2),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)  # [B, 48, 2, 2]
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(48 * 4, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10]."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


@torch.no_grad()
def real_accuracy(reader: Reader, digits: data.Handwriting, count: int) -> float:
    """Share of `count` real images of this handwriting that `reader` reads right."""
    images, labels = data.draw(digits, count, torch.Generator().manual_seed(7))
    return (reader(images).argmax(dim=-1) == labels).float().mean().item()


def save_reader(reader: Reader, path: Path) -> None:
    """Write the weights, float16 on disk."""
    save_file({name: value.half() for name, value in reader.state_dict().items()}, path)


def load_reader(path: Path) -> Reader:
    """The trained judge in evaluation mode, float32."""
    reader = Reader()
    state = load_file(path)
    reader.load_state_dict({name: value.to(torch.float32) for name, value in state.items()})
    return reader.eval()
