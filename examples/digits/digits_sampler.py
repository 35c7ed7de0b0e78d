"""The sampling run of this example: Euler steps from noise to videos, classifier-free guidance.

    videos = sample(model, labels, seed)     # [N, 1, F, H, W] in [0, 1]

`noised_calls` are calls like those of a run, made from real videos.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import digits_data as data
import torch
from torch import Tensor, nn

STEPS = 16
"""Euler steps, each one call of the model."""
GUIDANCE = 3.0
"""Classifier-free guidance: 1 follows the condition as learned, more exaggerates it."""
SHIFT = 3.0
"""How far the noise levels of the steps lean towards noise; training leaned the same way."""


@torch.no_grad()
def sample(
    model: nn.Module,
    pairs: Tensor,
    seed: int,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    frames: int = data.FRAMES,
    size: int = data.SIZE,
    shift: float = SHIFT,
) -> Tensor:
    """Integrate the learned velocity from noise to videos [N, 1, F, size, size] for labels [N, 2].

    `model` is anything called like the transformer. Each Euler step is one call on 2 N videos,
    first the conditional half, then the unconditional one. The videos are in [0, 1].
    """
    weight = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if weight is None else weight.device
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(len(pairs), 1, frames, size, size, generator=random).to(device)
    both = torch.cat([pairs, torch.full_like(pairs, data.DROPPED)])
    condition = data.tokens(both).to(device)
    for sigma, following in itertools.pairwise(noise_levels(steps, shift).tolist()):
        velocity = model(
            hidden_states=torch.cat([x, x]),
            timestep=torch.full((len(both),), 1000 * sigma, device=device),
            encoder_hidden_states=condition,
            return_dict=False,
        )[0]
        wanted, unconditional = velocity.float().chunk(2)
        x = x + (following - sigma) * torch.lerp(unconditional, wanted, guidance)
    return ((x + 1) / 2).clamp(0, 1).cpu()


def noise_levels(steps: int = STEPS, shift: float = SHIFT) -> Tensor:
    """Noise levels of the Euler steps, [steps + 1] from 1 to 0, shifted as diffusers does."""
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def noised_calls(
    shapes: Sequence[tuple[int, int, int]], *, size: int = data.SIZE, shift: float = SHIFT
) -> Iterator[tuple[float, dict[str, Any]]]:
    """(timestep, arguments) of calls on real videos, one per (batch, frames, tokens).

    Noise levels are spread over those of a run, the least noisy first. Half of each batch is
    unconditional, as in `sample`.
    """
    digits = data.typical(data.handwriting("train"), data.TYPICAL)
    levels = noise_levels(shift=shift)[:-1]
    chosen = levels[torch.linspace(0, len(levels) - 1, len(shapes)).round().long()].flip(0)
    for index, (sigma, (batch, frames, length)) in enumerate(
        zip(chosen.tolist(), shapes, strict=True)
    ):
        random = torch.Generator().manual_seed(index)
        videos, pairs = data.draw(digits, batch, random, frames=frames, size=size)
        pairs[batch // 2 :] = data.DROPPED
        noise = torch.randn(videos.shape, generator=random)
        inputs = {
            "hidden_states": torch.lerp(videos, noise, sigma),
            "timestep": torch.full((batch,), 1000 * sigma),
            "encoder_hidden_states": data.tokens(pairs, length),
            "return_dict": False,
        }
        yield 1000 * sigma, inputs
