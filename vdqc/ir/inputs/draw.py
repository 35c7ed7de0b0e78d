"""What calls are made of: the sizes of one (``Extent``) and random values of them (``Draw``).

Values are standard normal, timesteps uniform, masks ragged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

Config = Mapping[str, Any]
Call = dict[str, Any]


@final
@dataclass(frozen=True)
class Extent:
    """Sizes of one call: batch, frames, height and width of the latent, text tokens.

    The default keeps every size at least 2 and pairwise distinct: export bakes sizes of 0 and 1 and
    may take equal sizes for one.
    """

    B: int = 2
    F: int = 3
    H: int = 8
    W: int = 12
    L: int = 10

    def grown(self, axes: str, step: int = 4) -> Extent:
        """Another extent that is larger in ``axes`` (letters of the fields)."""
        more = {"B": 1, "F": 2, "H": step, "W": step, "L": 4}
        return replace(self, **{axis: getattr(self, axis) + more[axis] for axis in axes})


@final
class Draw:
    """Random values in a fixed order; two with one seed draw the same."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32."""
        return torch.randn(*shape, generator=self._generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform in ``[0, high)``, int64."""
        return torch.randint(0, high, shape, generator=self._generator)

    def timesteps(self, *shape: int) -> Tensor:
        """Integer timesteps in ``[0, 1000)``."""
        return self.integers(1000, *shape)

    def mask(self, batch: int, length: int) -> Tensor:
        """Bool ``[batch, length]``; each row keeps fewer leading tokens than the one before."""
        kept = (length - 1 - torch.arange(batch) - self._seed % 3).clamp_min(1)
        return torch.arange(length)[None] < kept[:, None]


Factory = Callable[[Config, Extent, Draw], Call]


def text(c: Config, s: Extent, draw: Draw, key: str) -> Call:
    """Encoded text, as wide as the configuration's ``key`` says."""
    return {"encoder_hidden_states": draw.normal(s.B, s.L, c[key])}
