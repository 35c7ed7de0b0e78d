"""A model.py: a two-block transformer over short sequences, with a sampler of three steps."""

import torch
from torch import nn
from torch.nn import functional as F

from vdqc import Sample


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (self.heads(linear(y)) for linear in (self.to_q, self.to_k, self.to_v))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(x)))

    @staticmethod
    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, -1)).transpose(1, 2)


class Tiny(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + self.time(timestep[:, None, None] / 1000)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def samples():
    for batch, tokens, t in ((2, 16, 900.0), (3, 24, 500.0), (2, 16, 100.0)):
        x = torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(int(t)))
        yield Sample({"x": x, "timestep": torch.full((batch,), t)}, timestep=t)


@torch.no_grad()
def generate(model: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(seed))
    for t in (900.0, 500.0, 100.0):
        x = x - 0.3 * model(x=x, timestep=torch.full((2,), t))
    return x.unflatten(1, (4, 4)).unflatten(-1, (8, 4))[:, None, :, 0].sigmoid()


def accuracy(video: torch.Tensor, seed: int) -> float:
    return float((video > 0.01).float().mean())
