"""Random-sign Hadamard rotation of what a group of linears reads, undone in their weights.

::

    linear(x, @w, b)  ->  r = vdqc.rotate(x, @signs, block)
                          linear(r, vdqc.rotate(@w, @signs, block), b)

x·D·H·(W·D·H)ᵀ = x·Wᵀ because D (random signs) and H (normalised Hadamard) are orthogonal. An
outlier channel is spread over its block, so that one large value no longer decides the step of all.

Source: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4; Tseng et al., QuIP#, arXiv 2402.04396,
section 3 (signs first). Peers share one rotation.
Invariant: the function of the graph is unchanged; norms of inputs and of weight rows are kept.
Online: one block-diagonal matmul per group, K·block multiply-adds a token (``fold`` removes those
whose producer can carry the rotation); ``block=full`` is one Kronecker product over all K channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from vdqc.base import hadamard
from vdqc.base.diagnostics import ConfigError
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.ops import ROTATE
from vdqc.ir.peers import feed, param_name, quantised_groups, wrap_weight
from vdqc.ir.site import Site, note, set_note

#: Below this order a rotation mixes too few channels to level an outlier.
LEAST_BLOCK = 4


@final
@dataclass(frozen=True)
class Rotate(Pass):
    """Rotates the shared input of each quantised group.

    Attributes:
        block: order of the Hadamard blocks: a number, or ``full`` for one over all channels.
            Where it does not divide a width, the largest order below it that does is taken.
        seed: of the random signs; each group has its own.
        select: glob of sites.
    """

    block: int | str = 64
    seed: int = 0
    select: str = "*"

    name: ClassVar[str] = "rotate"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block != "full" and (isinstance(self.block, str) or self.block < LEAST_BLOCK):
            raise ConfigError(
                f"rotate.block: expected 'full' or a number from {LEAST_BLOCK}, got '{self.block}'"
            )

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Rotate; facts: how many groups got which block, how many values are rotated a token."""
        blocks: dict[int, int] = {}
        width = 0
        for group in quantised_groups(graph, self.select):
            block = self.match(group, ctx)
            if block is None:
                continue
            rewrite(graph, group, block, self.seed + ctx.seed)
            blocks[block] = blocks.get(block, 0) + 1
            width += _width(group)
        return PassResult(sum(blocks.values()), {"blocks": blocks, "values_per_token": width})

    def match(self, group: Sequence[Site], ctx: Context) -> int | None:
        """The block to rotate ``group`` by, or None with a remark."""
        first, width = group[0], _width(group)
        if any("rotated" in note(site.node) for site in group):
            ctx.diagnostics.remark(first.name, "already-rotated", "its input is rotated already")
            return None
        wanted = width if isinstance(self.block, str) else self.block
        block = choose_block(width, wanted)
        if block is None:
            ctx.diagnostics.remark(
                first.name, "no-rotation", f"no Hadamard order from {LEAST_BLOCK} divides {width}"
            )
            return None
        if block != wanted:
            ctx.diagnostics.remark(
                first.name,
                "rotation-block",
                f"block {block} instead of {self.block}, which does not divide {width} channels",
            )
        return block


def choose_block(width: int, wanted: int) -> int | None:
    """``wanted`` if its blocks tile ``width``, else the largest lesser order that does, or None."""
    if wanted == width and hadamard.factors(width):
        return width
    limit = min(wanted, width, hadamard.DENSE_LIMIT)
    block = hadamard.largest_order(limit, divides=width)
    return block if block >= LEAST_BLOCK else None


def rewrite(graph: Graph, group: Sequence[Site], block: int, seed: int) -> None:
    """Rotate the input that ``group`` shares and each weight of it."""
    dtype = group[0].weight.meta["val"].dtype
    name = param_name(group[0], "rotation_signs")
    # the name takes part: the signs of a group do not depend on which others are rotated
    signs = hadamard.random_signs(_width(group), seed ^ zlib.crc32(name.encode()))
    param = graph.set_param(name, signs.to(dtype))
    feed(graph, group, ROTATE, param, block)
    for site in group:
        wrap_weight(graph, site, ROTATE, param, block)
        set_note(site.node, rotated=block)


def _width(group: Sequence[Site]) -> int:
    return int(group[0].weight.meta["val"].shape[-1])
