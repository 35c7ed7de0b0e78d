"""The default example: a trained video transformer that draws two bouncing handwritten digits.

    vdqc compile examples/digits/model.py -o out/

`model` is a `WanTransformer3DModel` of 4.9 M weights, trained by `train.py` in this folder.
`generate` is its whole sampling run, and `accuracy` says how many of the generated videos show the
digits that were asked for, read by a classifier that has only ever seen real ones. See README.md.
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

sys.path.insert(0, str(HERE))
try:
    import digits_classifier as classifier
    from digits_sampler import noised_calls, sample
finally:
    sys.path.remove(str(HERE))

VIDEOS = 8
"""Videos that `generate` makes."""


def model(folder: Path = HERE / "transformer") -> nn.Module:
    """The trained transformer in evaluation mode, float32 (float16 on disk)."""
    from diffusers import WanTransformer3DModel

    load = cast(Any, WanTransformer3DModel).from_pretrained
    loaded: nn.Module = load(folder, torch_dtype=torch.float32)
    return loaded.eval()


def samples() -> Iterable[Sample]:
    """Real videos at eight noise levels of the sampling run, half of each batch unconditional.

    The first has batch 2, 16 frames and 3 condition tokens; the second differs in all three, so
    these axes are dynamic. The others have the shapes that `generate` uses, at half its batch.
    """
    shapes = [(2, 16, 3), (3, 8, 2)] + [(8, 16, 2)] * 6  # batch, frames, tokens
    for timestep, inputs in noised_calls(shapes):
        yield Sample(inputs, timestep=timestep)


def generate(model: nn.Module, seed: int) -> Tensor:
    """Videos [8, 1, 16, 32, 32] in [0, 1] of the digits `labels(seed)`; same seed, same noise."""
    return sample(model, labels(seed), seed)


def labels(seed: int) -> Tensor:
    """The digits that `generate` draws for a seed: int64 [8, 2], left and right."""
    return torch.randint(10, (VIDEOS, 2), generator=torch.Generator().manual_seed(seed))


def accuracy(video: Tensor, seed: int) -> float:
    """Share of the videos of `generate(model, seed)` in which both digits read as asked for."""
    return (read(video) == labels(seed)).all(dim=1).float().mean().item()


def frame_accuracy(video: Tensor, seed: int) -> float:
    """Share of single frames in which both digits read as asked for: stricter than `accuracy`."""
    wanted = labels(seed).repeat_interleave(video.shape[2], dim=0)
    return (read(classifier.single_frames(video)) == wanted).all(dim=1).float().mean().item()


def read(video: Tensor) -> Tensor:
    """What the classifier sees in videos [N, 1, F, 32, 32] in [0, 1]: int64 [N, 2], left first."""
    return classifier.read(video, classifier.load_reader(HERE / "classifier.safetensors"))
