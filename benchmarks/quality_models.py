"""The models of the quality table, and the calls that recipes learn from.

``SOURCES`` names functions that make a source. Small trained models have no outlier channels, large
ones do: ``planted`` is the digits model with some planted by exact scaling, the same function.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdqc.engine.trajectory import record
from vdqc.ir.source import Source, load_source

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DIGITS = EXAMPLES / "digits" / "model.py"
#: Recorded trajectories by name of the example; each has as many calls as the sampler has steps.
TRAJECTORIES = {"digits": 6, "digits_large": 3, "digits_unet": 6, "views": 6}
#: How much of a generation each holds, by name of the example: videos, images, scenes.
RECORDED = {"digits": 1, "digits_large": 1, "digits_unet": 2, "views": 32}

#: Generations that a row is measured on. One of views, 32 rooms, is too few for its pose measure:
#: two compilations that differ by the order of float additions were 0.015 apart.
GENERATIONS = {"digits": 1, "planted": 1, "unet": 1, "views": 8, "large": 1}

#: Examples whose frames follow each other in time.
MOVING = ("digits", "digits_large")


def record_calls(source: Source, folder: Path, seed: int = 0) -> None:
    """Keep calls along the model's own trajectories, on a part of a generation each.

    Every ``seed`` has trajectories of its own; none is of a generation that rows are measured on.
    A sampler's calls hold its unconditional half, too. The views model has no sampler: its calls
    look at scenes, two at a time.
    """
    assert source.generate is not None
    sample = source.generate.__globals__["sample"]
    labels = source.generate.__globals__["labels"]
    count = RECORDED[source.name]

    def generate(model: nn.Module, seed: int) -> Tensor:
        video: Tensor = sample(model, labels(seed)[:count], seed)
        return video

    first = 100 * (1 + seed)
    record(source.model, generate, range(first, first + TRAJECTORIES[source.name]), folder)


def digits() -> Source:
    """The default example as it is."""
    return load_source(DIGITS)


def planted() -> Source:
    """The same function with outlier channels between linears, as large models have them.

    A few channels of what each linear pair shares are made large by the producer and small again
    by the consumer: value to output projection, through attention, which mixes tokens only.
    """
    source = load_source(DIGITS)
    model: Any = copy.deepcopy(source.model)
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        for attention in (block.attn1, block.attn2):
            factor = outliers(attention.to_v.weight.shape[0], generator)
            plant(attention.to_v, attention.to_out[0], factor)
        norm = block.norm2  # affine: its weight and bias feed the query of cross attention
        factor = outliers(norm.weight.numel(), generator)
        norm.weight.data.mul_(factor)
        norm.bias.data.mul_(factor)
        block.attn2.to_q.weight.data.div_(factor)
    return Source(**{**vars(source), "model": model})


def outliers(width: int, generator: torch.Generator, share: float = 0.02) -> Tensor:
    """float[width]: 32 on a random ``share`` of channels, 1 elsewhere: powers of two are exact."""
    factor = torch.ones(width)
    chosen = torch.randperm(width, generator=generator)[: max(1, round(share * width))]
    factor[chosen] = 32.0
    return factor


def plant(producer: nn.Linear, consumer: nn.Linear, factor: Tensor) -> None:
    """Scale the channels between two linears."""
    producer.weight.data.mul_(factor[:, None])
    if producer.bias is not None:
        producer.bias.data.mul_(factor)
    consumer.weight.data.div_(factor)


def unet() -> Source:
    """The digits UNet: MPQ-DM's kind of model. Its generation is images, not videos."""
    return load_source(EXAMPLES / "digits_unet" / "model.py")


def views() -> Source:
    """The views model: QuantVGGT's kind. Its generation is depth and points of held-out scenes."""
    return load_source(EXAMPLES / "views" / "model.py")


def large() -> Source:
    """The digits on a larger canvas: 4096 tokens, where sparse attention has blocks of 128."""
    return load_source(EXAMPLES / "digits_large" / "model.py")


#: What comes before any recipe: more than half of the UNet's weights are in convolutions.
BEFORE = {"unet": "im2col,"}

SOURCES = {"digits": digits, "planted": planted, "unet": unet, "views": views, "large": large}
