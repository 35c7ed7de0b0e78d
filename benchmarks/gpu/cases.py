"""Shapes of the video transformers that are measured; most telling first.

Source: the published configurations. Tokens are those of the latent grid after patching:
129 frames at 720p are 33 x 45 x 80, 81 frames at 720p 21 x 45 x 80, at 480p 21 x 30 x 52; CogVideoX
is 13 x 30 x 45 with 226 text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Model:
    """One architecture at one number of tokens.

    Attributes:
        ffn: width of the feed-forward.
        text: text tokens that join attention (0: they have a cross attention of their own).
        grid: frames, height, width of the latent in tokens.
    """

    name: str
    width: int
    heads: int
    ffn: int
    layers: int
    grid: tuple[int, int, int]
    text: int = 0

    @property
    def tokens(self) -> int:
        """Video tokens."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def linears(self) -> Mapping[str, tuple[int, int, int]]:
        """Site to (M, N, K)."""
        m, d, f = self.tokens, self.width, self.ffn
        found = {"up": (m, f, d), "down": (m, d, f), "out": (m, d, d)}
        if self.name.startswith("hunyuan"):  # single-stream blocks: attention and MLP in one
            found["single-out"] = (m, d, d + f)
        return found


HUNYUAN_33K = Model("hunyuan-13b-33k", 3072, 24, 12288, 60, (33, 25, 40), 256)
HUNYUAN_119K = Model("hunyuan-13b-118.8k", 3072, 24, 12288, 60, (33, 45, 80), 256)
WAN_33K = Model("wan-14b-32.8k", 5120, 40, 13824, 40, (21, 30, 52))
WAN_76K = Model("wan-14b-75.6k", 5120, 40, 13824, 40, (21, 45, 80))
COG_2B = Model("cogvideox-2b-17.8k", 1920, 30, 7680, 30, (13, 30, 45), 226)
COG_5B = Model("cogvideox-5b-17.8k", 3072, 48, 12288, 42, (13, 30, 45), 226)

MODELS = (HUNYUAN_33K, WAN_33K, COG_2B, HUNYUAN_119K, WAN_76K, COG_5B)

#: Rows of text and of modulation: few, where reading the weights is what takes time.
SMALL_ROWS = (1, 64, 256)


def linears() -> Iterator[tuple[str, int, int, int, int]]:
    """(case, M, N, K, rank): the sites of all models; rank 0 are the most telling, 2 the least."""
    order = {"up": 0, "down": 1, "out": 1, "single-out": 2}
    for index, model in enumerate(MODELS):
        for site, (m, n, k) in model.linears().items():
            rank = min(2, order[site] + (0 if index < 2 else 1))
            yield f"{model.name}/{site}", m, n, k, rank
