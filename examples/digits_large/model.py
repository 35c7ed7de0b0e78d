"""Two bouncing digits on a canvas four times as large, in twice as many frames: 4096 tokens.

    vdqc compile examples/digits_large/model.py --passes sparsify,quant -o out/

The transformer of `examples/digits`, trained further on 32 frames of 64 x 64 by that folder's
`train.py`, for measuring what sparse attention costs: at 4096 tokens a mask of blocks of 128 is
one of a large model, in small. Everything but the sizes is that example's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vdqc import Sample

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "digits"

sys.path.insert(0, str(DIGITS))
try:
    import digits_classifier as classifier
    import digits_sampler as sampler
finally:
    sys.path.remove(str(DIGITS))

VIDEOS = 2
"""Videos that `generate` makes."""
CANVAS: dict[str, Any] = {"size": 64, "shift": 4.0}
"""Height and width of a frame, and how far the noise levels lean towards noise."""
FRAMES = 32


def model(folder: Path = HERE / "transformer") -> nn.Module:
    """The trained transformer in evaluation mode, float32 (float16 on disk)."""
    from diffusers import WanTransformer3DModel

    load = cast(Any, WanTransformer3DModel).from_pretrained
    loaded: nn.Module = load(folder, torch_dtype=torch.float32)
    return loaded.eval()


def samples() -> Iterable[Sample]:
    """Real videos at six noise levels of the sampling run, half of each batch unconditional.

    The second differs from the first in batch, frames and condition tokens: these are dynamic.
    """
    shapes = [(2, FRAMES, 3), (3, 16, 2)] + [(2, FRAMES, 2)] * 4  # batch, frames, tokens
    for timestep, inputs in sampler.noised_calls(shapes, **CANVAS):
        yield Sample(inputs, timestep=timestep)


def generate(model: nn.Module, seed: int) -> Tensor:
    """Videos [2, 1, 32, 64, 64] in [0, 1] of the digits `labels(seed)`; same seed, same noise."""
    return sample(model, labels(seed), seed)


def sample(model: nn.Module, pairs: Tensor, seed: int, **options: Any) -> Tensor:
    """The sampling run of `examples/digits` for labels [N, 2] on this canvas."""
    return sampler.sample(model, pairs, seed, frames=FRAMES, **CANVAS, **options)


def labels(seed: int) -> Tensor:
    """The digits that `generate` draws for a seed: int64 [2, 2], left and right."""
    return torch.randint(10, (VIDEOS, 2), generator=torch.Generator().manual_seed(seed))


def accuracy(video: Tensor, seed: int) -> float:
    """Share of single frames in which both digits read as asked for: two videos tell little."""
    wanted = labels(seed).repeat_interleave(video.shape[2], dim=0)
    reader = classifier.load_reader(HERE / "classifier.safetensors")
    read = classifier.read(classifier.single_frames(video), reader)
    return (read == wanted).all(dim=1).float().mean().item()
