"""A compressed stack of two blocks, copies of it, and how it is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vdqc.engine import losses
from vdqc.engine.block_trainer import Schedule
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import Recipe
from vdqc.engine.reconstruct import Training
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.learned import frozen
from vdqc.ir.sample import Sample
from vdqc.passes.table import PASSES
from vdqc.testing.harness import AdaLNBlock


class Stack(nn.Module):
    """Two blocks that share a context vector, and a linear before them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList([AdaLNBlock(width, 2) for _ in range(2)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.embed(y)
        for block in self.blocks:
            x = block(x, y)
        return x


def compressed(
    width: int = 16, dtype: torch.dtype = torch.float32, scheme: str = "w4a4"
) -> tuple[Graph, list[Sample]]:
    torch.manual_seed(0)
    model = Stack(width).to(dtype).eval()
    shapes = [(2, 6), (2, 6), (3, 5), (3, 5)]  # two steps of two trajectories
    random = torch.Generator().manual_seed(1)
    samples = [
        Sample(
            {
                "x": torch.randn(batch, tokens, width, generator=random).to(dtype),
                "y": torch.randn(batch, width, generator=random).to(dtype),
            },
            trajectory=index // 2,
            step=index % 2,
        )
        for index, (batch, tokens) in enumerate(shapes)
    ]
    graph = capture(model, samples)
    passes = "canonicalize,annotate{keep=nothing},rotate,smooth{learn=true},quant{clip=learned}"
    recipe = Recipe.parse(passes, PASSES, [scheme])
    PassManager(recipe.passes, probe=False).run(graph, Context(samples, rules=recipe.rules))
    return graph, samples


def fresh(stack: tuple[Graph, list[Sample]]) -> tuple[Graph, list[Sample]]:
    """The same again, with parameters of its own."""
    twin = frozen(stack[0])
    for name in stack[0].free:
        twin.set_param(name, stack[0].param(name).detach().clone(), free=True)
    return twin, stack[1]


def training(folder: Path | None = None, loss: str = "block", **schedule: int) -> Training:
    plan = {"epochs": 2, "check": 1, **schedule}
    return Training(losses.parse(loss), Schedule(**plan), checkpoint=folder)
