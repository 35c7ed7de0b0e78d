"""The default example: a trained video transformer that draws two bouncing handwritten digits.

    vdqc compile examples/digits/model.py -o out/

`model` is a `WanTransformer3DModel` of 4.9 M weights, trained by `train.py` in this folder.
`generate` is its whole sampling run, and `accuracy` says how many of the generated videos show the
digits that were asked for, read by a classifier that has only ever seen real ones. See README.md.
"""

from __future__ import annotations

import itertools
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
    import digits_data as data
finally:
    sys.path.remove(str(HERE))

VIDEOS = 8
"""Videos that `generate` makes."""
STEPS = 16
"""Euler steps, each one call of the model."""
GUIDANCE = 3.0
"""Classifier-free guidance: 1 follows the condition as learned, more exaggerates it."""
SHIFT = 3.0
"""How far the noise levels of the steps lean towards noise; training leaned the same way."""


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
    digits = data.typical(data.handwriting("train"), data.TYPICAL)
    levels = noise_levels(STEPS)[:-1]
    chosen = levels[torch.linspace(0, len(levels) - 1, 8).round().long()].flip(0)
    shapes = [(2, 16, 3), (3, 8, 2)] + [(8, 16, 2)] * 6  # batch, frames, tokens
    for index, (sigma, (batch, frames, length)) in enumerate(
        zip(chosen.tolist(), shapes, strict=True)
    ):
        random = torch.Generator().manual_seed(index)
        videos, pairs = data.draw(digits, batch, random, frames=frames)
        pairs[batch // 2 :] = data.DROPPED
        noise = torch.randn(videos.shape, generator=random)
        inputs = {
            "hidden_states": torch.lerp(videos, noise, sigma),
            "timestep": torch.full((batch,), 1000 * sigma),
            "encoder_hidden_states": data.tokens(pairs, length),
            "return_dict": False,
        }
        yield Sample(inputs, timestep=1000 * sigma)


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
    frames = video.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [N F, 1, 1, 32, 32]
    wanted = labels(seed).repeat_interleave(video.shape[2], dim=0)
    return (read(frames) == wanted).all(dim=1).float().mean().item()


def read(video: Tensor) -> Tensor:
    """What the classifier sees in videos [N, 1, F, 32, 32] in [0, 1]: int64 [N, 2], left first."""
    reader = classifier.load_reader(HERE / "classifier.safetensors")
    with torch.no_grad():
        logits: Tensor = reader(video.detach().float().cpu() * 2 - 1)
    return logits.argmax(dim=-1)


@torch.no_grad()
def sample(
    model: nn.Module, pairs: Tensor, seed: int, *, steps: int = STEPS, guidance: float = GUIDANCE
) -> Tensor:
    """Integrate the learned velocity from noise to videos [N, 1, 16, 32, 32] for labels [N, 2].

    `model` is anything called like the transformer. Each Euler step is one call on 2 N videos,
    first the conditional half, then the unconditional one. The videos are in [0, 1].
    """
    weight = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if weight is None else weight.device
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(len(pairs), 1, data.FRAMES, data.SIZE, data.SIZE, generator=random).to(device)
    both = torch.cat([pairs, torch.full_like(pairs, data.DROPPED)])
    condition = data.tokens(both).to(device)
    for sigma, following in itertools.pairwise(noise_levels(steps).tolist()):
        velocity = model(
            hidden_states=torch.cat([x, x]),
            timestep=torch.full((len(both),), 1000 * sigma, device=device),
            encoder_hidden_states=condition,
            return_dict=False,
        )[0]
        wanted, unconditional = velocity.float().chunk(2)
        x = x + (following - sigma) * torch.lerp(unconditional, wanted, guidance)
    return ((x + 1) / 2).clamp(0, 1).cpu()


def noise_levels(steps: int) -> Tensor:
    """Noise levels of the Euler steps, [steps + 1] from 1 to 0, shifted as diffusers does."""
    even = torch.linspace(1, 0, steps + 1)
    return SHIFT * even / (1 + (SHIFT - 1) * even)
