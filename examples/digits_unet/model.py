"""A trained UNet that draws a handwritten digit: the kind of model that MPQ-DM compresses.

    vdqc compile examples/digits_unet/model.py -o out/

`model` is a `UNet2DConditionModel` of 2.7 M weights, trained by `train.py` in this folder, told the
digit through cross attention as latent diffusion is told a class. `generate` is its whole sampling
run, and `accuracy` says how many of the images show the digit that was asked for, read by a
classifier that has only ever seen real ones. See README.md.

Source: the UNet, Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
2022; velocity and its angle, Salimans and Ho, "Progressive Distillation", 2022, appendix D; the
sampler, Song et al., "Denoising Diffusion Implicit Models", 2021, eq. 12 with sigma 0.
"""

from __future__ import annotations

import itertools
import math
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
    import unet_data as data
    import unet_reader as reader
finally:
    sys.path.remove(str(HERE))

IMAGES = 20
"""Images that `generate` makes: each digit twice."""
STEPS = 20
"""DDIM steps, each one call of the model."""
GUIDANCE = 2.0
"""Classifier-free guidance: 1 follows the condition as learned, more exaggerates it."""


def model(folder: Path = HERE / "unet") -> nn.Module:
    """The trained UNet in evaluation mode, float32 (float16 on disk)."""
    from diffusers import UNet2DConditionModel

    load = cast(Any, UNet2DConditionModel).from_pretrained
    loaded: nn.Module = load(folder, torch_dtype=torch.float32)
    return loaded.eval()


def samples() -> Iterable[Sample]:
    """Real images at eight noise levels of the sampling run, half of each batch unconditional.

    The first two differ in their batch, so that axis is dynamic.
    """
    digits = data.handwriting("train")
    for index, time in enumerate(torch.linspace(0.1, 1, 8).tolist()):
        random = torch.Generator().manual_seed(index)
        images, labels = data.draw(digits, 6 if index else 4, random)
        labels[len(labels) // 2 :] = data.DROPPED
        noised = mix(images, torch.randn(images.shape, generator=random), time)
        inputs = {
            "sample": noised,
            "timestep": torch.full((len(labels),), 1000 * time),
            "encoder_hidden_states": data.tokens(labels),
            "return_dict": False,
        }
        yield Sample(inputs, timestep=1000 * time)


def generate(model: nn.Module, seed: int) -> Tensor:
    """Images [20, 1, 16, 16] in [0, 1] of the digits `labels(seed)`; same seed, same noise."""
    return sample(model, labels(seed), seed)


def labels(seed: int) -> Tensor:
    """The digits that `generate` draws for a seed, each twice in random order: int64 [20]."""
    return torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed)) % 10


def accuracy(images: Tensor, seed: int) -> float:
    """Share of the images of `generate(model, seed)` whose digit reads as asked for."""
    return (read(images) == labels(seed)).float().mean().item()


@torch.no_grad()
def read(images: Tensor) -> Tensor:
    """What the classifier sees in images [N, 1, 16, 16] in [0, 1]: int64 [N]."""
    judge = reader.load_reader(HERE / "reader.safetensors")
    return judge(images.detach().float().cpu() * 2 - 1).argmax(dim=-1)


@torch.no_grad()
def sample(
    model: nn.Module,
    digits: Tensor,
    seed: int,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """DDIM without noise: from noise to images [N, 1, 16, 16] in [0, 1] for labels [N].

    `model` is anything called like the UNet. Each step is one call on 2 N images, first the
    conditional half, then the unconditional one.
    """
    weight = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if weight is None else weight.device
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(len(digits), 1, data.SIZE, data.SIZE, generator=random).to(device)
    both = torch.cat([digits, torch.full_like(digits, data.DROPPED)])
    condition = data.tokens(both).to(device)
    for time, following in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        velocity = model(
            sample=torch.cat([x, x]),
            timestep=torch.full((len(both),), 1000 * time, device=device),
            encoder_hidden_states=condition,
            return_dict=False,
        )[0]
        wanted, unconditional = velocity.float().chunk(2)
        v = torch.lerp(unconditional, wanted, guidance)
        image, noise = unmix(x, v, time)
        x = mix(image, noise, following)
    return ((x + 1) / 2).clamp(0, 1).cpu()


def mix(image: Tensor, noise: Tensor, time: float | Tensor) -> Tensor:
    """`cos(a) image + sin(a) noise`, a = time pi / 2: the cosine schedule; time in [0, 1]."""
    cos, sin = _angle(time)
    return cos * image + sin * noise


def unmix(x: Tensor, velocity: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Image, in range, and the noise that goes with it, of `x` and its velocity."""
    cos, sin = _angle(time)
    image = (cos * x - sin * velocity).clamp(-1, 1)
    return image, (x - cos * image) / sin


def velocity(image: Tensor, noise: Tensor, time: float | Tensor) -> Tensor:
    """`cos(a) noise - sin(a) image`, what the UNet learns."""
    cos, sin = _angle(time)
    return cos * noise - sin * image


def _angle(time: float | Tensor) -> tuple[Any, Any]:
    if isinstance(time, Tensor):
        angle = time.view(-1, 1, 1, 1) * (math.pi / 2)
        return angle.cos(), angle.sin()
    return math.cos(time * math.pi / 2), math.sin(time * math.pi / 2)
