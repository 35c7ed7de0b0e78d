"""Static block masks for video attention, derived from sizes and a density; nothing is stored.

A policy is an order of the tokens and a distance between blocks in that order. Each query block
keeps its nearest key blocks, as many as the density allows, the same number in every row: at the
borders the window moves inwards instead of shrinking, which balances the work.

============== ============================ =====================================================
policy         order                        distance of two blocks (by their middle tokens)
============== ============================ =====================================================
spatial_band   as given (frame by frame)    places apart: neighbours in the same frame first
temporal_band  pixel by pixel, all frames   places apart: the same pixel in other frames first
sliding_tile   3-D tiles of one block each  the largest of the distances in tiles along t, y, x
radial         as given                     places apart within the frame, doubled with every
                                            doubling of the distance in frames
============== ============================ =====================================================

Blocks with a text token, and blocks of the first ``sinks`` frames as keys, are always on; text
queries attend to everything. The density counts all of that, and is never exceeded.

Source: Xi et al., Sparse VideoGen, arXiv 2502.01776 (bands, classification of heads); Zhang et al.,
Sliding Tile Attention, arXiv 2502.04507; Li et al., Radial Attention, arXiv 2506.19852. They cut
windows off at the borders; here they move inwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from vdqc.base.block_mask import BlockMask, blocks
from vdqc.base.diagnostics import InputError

Device = torch.device | str


@final
@dataclass(frozen=True)
class Layout:
    """Where the tokens of one attention lie: text before or after a video, frame by frame.

    Attributes:
        frame_width: tokens in a row of a frame; 0 if unknown (``sliding_tile`` needs it).
        sinks: leading frames that every query attends to.
    """

    frames: int
    tokens_per_frame: int
    text: int = 0
    text_first: bool = False
    frame_width: int = 0
    sinks: int = 0

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return self.frames * self.tokens_per_frame

    @property
    def tokens(self) -> int:
        """Tokens of video and text."""
        return self.video + self.text

    @property
    def first(self) -> int:
        """Place of the first token of the video."""
        return self.text if self.text_first else 0

    def text_blocks(self, size: int) -> tuple[int, int]:
        """Leading and trailing blocks of ``size`` that hold text."""
        if not self.text:
            return 0, 0
        if self.text_first:
            return blocks(self.text, size), 0
        return 0, blocks(self.tokens, size) - self.video // size

    def always_keys(self, size: int) -> tuple[int, int]:
        """Leading and trailing key blocks that every query attends to: text and sinks."""
        lead, tail = self.text_blocks(size)
        if self.sinks:
            lead = blocks(self.first + self.sinks * self.tokens_per_frame, size)
        return lead, tail


def frame_order(layout: Layout, device: Device = "cpu") -> Tensor:
    """The order that the tokens have."""
    return torch.arange(layout.tokens, device=device)


def pixel_order(layout: Layout, device: Device = "cpu") -> Tensor:
    """Token at each place when a pixel's tokens of all frames are neighbours; sinks stay first."""
    video = torch.arange(layout.video, device=device).reshape(layout.frames, -1)
    moved = [video[: layout.sinks].flatten(), video[layout.sinks :].T.flatten()]
    return _with_text(layout, torch.cat(moved))


def tile_order(
    layout: Layout, device: Device = "cpu", tile: tuple[int, int, int] = (4, 4, 8)
) -> Tensor:
    """Token at each place when tiles of ``tile`` frames, rows and columns follow each other.

    Tiles of one block's size are blocks where they divide the video, and roughly so elsewhere.
    """
    where = _coordinates(layout, device)
    size = torch.tensor(tile, device=device)
    major, minor = where // size, where % size
    extent = [-(-int(n) // t) for n, t in zip(_extent(layout), tile, strict=True)]
    places = [(major, extent), (minor, list(tile))]
    key = torch.zeros(layout.video, dtype=torch.long, device=device)
    for coordinate, sizes in places:
        for axis in range(3):
            key = key * sizes[axis] + coordinate[:, axis]
    return _with_text(layout, key.argsort(stable=True))


def inverse(order: Tensor) -> Tensor:
    """Place of each token: ``x[order][inverse(order)] == x``."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def spatial_band(
    layout: Layout, density: float, block_q: int = 128, block_k: int = 128, device: Device = "cpu"
) -> BlockMask:
    """Nearest places in the order given; in ``pixel_order`` that is the temporal band."""

    def distance(q: Tensor, k: Tensor) -> Tensor:
        return (q[:, None] - k).abs().float()

    return _nearest(layout, density, block_q, block_k, device, distance)


def sliding_tile(
    layout: Layout,
    density: float,
    block_q: int = 128,
    block_k: int = 128,
    device: Device = "cpu",
    tile: tuple[int, int, int] = (4, 4, 8),
) -> BlockMask:
    """Nearest tiles, for tokens in ``tile_order``."""
    where = _coordinates(layout, device) / torch.tensor(tile, device=device)
    order = tile_order(layout, device, tile)
    own = order[layout.first : layout.first + layout.video] - layout.first
    where = where[own]

    def distance(q: Tensor, k: Tensor) -> Tensor:
        apart = (_at(where, layout, q)[:, None] - _at(where, layout, k)).abs()
        return apart.amax(-1) + 1e-3 * apart.norm(dim=-1)  # among equals the rounder window

    return _nearest(layout, density, block_q, block_k, device, distance)


def radial(
    layout: Layout, density: float, block_q: int = 128, block_k: int = 128, device: Device = "cpu"
) -> BlockMask:
    """Windows within the frame that shrink by half with every doubling of the frames between."""
    size = layout.tokens_per_frame

    def distance(q: Tensor, k: Tensor) -> Tensor:
        q, k = (q - layout.first)[:, None], k - layout.first
        frames = (q // size - k // size).abs().clamp_min(1)
        apart = (q % size - k % size).abs() * torch.exp2(frames.float().log2().floor())
        return apart + 1e-3 * frames  # among equals the nearer frame

    return _nearest(layout, density, block_q, block_k, device, distance)


@final
@dataclass(frozen=True)
class Policy:
    """How tokens are reordered, and the mask for them in that order."""

    order: Callable[[Layout, Device], Tensor]
    mask: Callable[[Layout, float, int, int, Device], BlockMask]


POLICIES: Mapping[str, Policy] = {
    "spatial_band": Policy(frame_order, spatial_band),
    "temporal_band": Policy(pixel_order, spatial_band),
    "sliding_tile": Policy(tile_order, sliding_tile),
    "radial": Policy(frame_order, radial),
}


def sampled_rows(layout: Layout, count: int, device: Device = "cpu") -> Tensor:
    """``count`` tokens spread over the video, in no step with its frames (golden ratio)."""
    place = torch.arange(1, count + 1, device=device, dtype=torch.float64) * 0.6180339887498949 % 1
    return layout.first + (place * layout.video).long()


def classify_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    candidates: Sequence[tuple[Tensor, BlockMask]],
    rows: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which candidate serves each head best, judged by the outputs of the queries ``rows``.

    query, key, value are [B, H, tokens, ...] as given, in no candidate's order; a candidate is an
    order and a mask (of shape [1, 1, R]) in that order; keys outside of ``valid`` bool[B, tokens]
    do not count. Gives the choice int64[B, H], and the mean
    squared error of every candidate f32[candidates, B, H]. Nothing waits for the device.
    """
    scores = query[:, :, rows].float() @ key.float().mT * scale
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], float("-inf"))
    dense = torch.ops.aten._safe_softmax(scores, -1) @ value.float()
    errors = []
    for order, mask in candidates:
        place = inverse(order)
        kept = mask.kept()[0, 0].index_select(0, place[rows] // mask.block_q)
        kept = kept.index_select(1, place // mask.block_k)
        out = torch.ops.aten._safe_softmax(scores.masked_fill(~kept, float("-inf")), -1)
        errors.append((out @ value.float() - dense).square().mean((-1, -2)))
    found = torch.stack(errors)
    return found.argmin(0), found


def _nearest(
    layout: Layout,
    density: float,
    block_q: int,
    block_k: int,
    device: Device,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> BlockMask:
    """The nearest key blocks of every query block, to the density; see the module's text."""
    tokens = layout.tokens
    rows, columns = blocks(tokens, block_q), blocks(tokens, block_k)
    lead_rows, tail_rows = layout.text_blocks(block_q)
    lead, tail = layout.always_keys(block_k)
    inner = rows - lead_rows - tail_rows
    keep = _budget(density, rows, columns, inner, lead + tail + blocks(block_q, block_k))
    middles = [
        (torch.arange(count, device=device) * size + size // 2).clamp_max(tokens - 1)
        for count, size in ((rows, block_q), (columns, block_k))
    ]
    apart = distance(middles[0][lead_rows : rows - tail_rows], middles[1])
    place = torch.arange(columns, device=device)
    row = torch.arange(lead_rows, rows - tail_rows, device=device)[:, None]
    own = (
        place * block_k // block_q == row
        if block_q > block_k
        else place == row * block_q // block_k
    )
    apart.masked_fill_(own | (place < lead) | (place >= columns - tail), -1)
    ids = apart.argsort(dim=-1, stable=True)[:, :keep].sort(-1).values.to(torch.int32)
    counts = torch.full((1, 1, rows), columns, dtype=torch.int32, device=device)
    starts = torch.zeros((1, 1, rows), dtype=torch.int32, device=device)
    video = slice(lead_rows, rows - tail_rows)
    counts[..., video] = keep
    starts[..., video] = columns + keep * torch.arange(inner, dtype=torch.int32, device=device)
    everything = torch.arange(columns, dtype=torch.int32, device=device)
    ids = torch.cat([everything, ids.flatten()])
    return BlockMask(starts, counts, ids, tokens, tokens, block_q, block_k)


def _budget(density: float, rows: int, columns: int, inner: int, least: int) -> int:
    """Key blocks per query block of the video."""
    if not inner:
        return columns
    full = (rows - inner) * columns
    keep = min(int((density * rows * columns - full) / inner + 1e-9), columns)
    if keep < min(least, columns):
        lowest = (full + inner * min(least, columns)) / (rows * columns)
        raise InputError(
            f"expected a density of at least {lowest:.3f} for {rows} x {columns} blocks, got "
            f"{density:g}: text, first frames and the diagonal take that much",
            "choose a higher density, or smaller blocks",
            code="density",
        )
    return keep


def _extent(layout: Layout) -> tuple[int, int, int]:
    width = layout.frame_width
    if not width or layout.tokens_per_frame % width:
        raise InputError(
            f"expected the width of a frame of {layout.tokens_per_frame} tokens, got {width}",
            "sliding_tile needs rows and columns; other policies do not",
        )
    return layout.frames, layout.tokens_per_frame // width, width


def _coordinates(layout: Layout, device: Device) -> Tensor:
    """int64[video, 3]: frame, row, column of each token of the video."""
    _, height, width = _extent(layout)
    place = torch.arange(layout.video, device=device)
    return torch.stack([place // (height * width), place // width % height, place % width], -1)


def _at(where: Tensor, layout: Layout, places: Tensor) -> Tensor:
    return where[(places - layout.first).clamp(0, layout.video - 1)]


def _with_text(layout: Layout, video: Tensor) -> Tensor:
    text = torch.arange(layout.text, device=video.device)
    if layout.text_first:
        return torch.cat([text, video + layout.text])
    return torch.cat([video, text + layout.video])
