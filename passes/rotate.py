"""Random-sign Hadamard rotation of what a group of linears reads, undone in their weights.

::

    linear(x, @w, b)  ->  r = vdqc.rotate(x, @signs, block)
                          linear(r, vdqc.rotate(@w, @signs, block), b)

    linear(x, @w, b)  ->  r = vdqc.kronecker(x, L, R)                      learn=true
                          linear(r, vdqc.kronecker(@w, L⁻ᵀ, R⁻ᵀ), b)

x·D·H·(W·D·H)ᵀ = x·Wᵀ because D (random signs) and H (normalised Hadamard) are orthogonal. An
outlier channel is spread over its block, so that one large value no longer decides the step of all.
A learned rotation is P = L ⊗ R over all channels, each factor U·diag(e^s)·Vᵀ·H with rotations U, V
and Hadamard H (the identity for a factor that is no Hadamard order): x·P·(W·P⁻ᵀ)ᵀ = x·Wᵀ at any
value of the parameters that it leaves free for ``distill``.

Source: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4; Tseng et al., QuIP#, arXiv 2402.04396,
section 3 (signs first); Sun et al., FlatQuant, arXiv 2410.09426, section 3.1 (Kronecker factors).
Peers share one rotation.
Invariant: the function of the graph is unchanged; a rotation that is not learned, or whose form is
``orthogonal``, keeps the norms of inputs and of weight rows.
Online: one block-diagonal matmul per group, K·block multiply-adds a token (``fold`` removes those
whose producer can carry the rotation); ``block=full`` is one Kronecker product over all K channels,
and so is a learned rotation: K·(a + b) multiply-adds a token for K = a·b.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vdqc.base import hadamard
from vdqc.base.diagnostics import ConfigError
from vdqc.base.kronecker import hadamard_factors, square_factors
from vdqc.base.options import check_belongs, check_seed
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.learned import learned_factor, parameter_dtype
from vdqc.ir.ops import KRONECKER, ROTATE
from vdqc.ir.peers import feed, param_name, quantised_groups, wrap_weight
from vdqc.ir.site import Site, note, set_note

#: Below this order a rotation mixes too few channels to level an outlier.
LEAST_BLOCK = 4

#: Largest factor of a learned rotation; a width whose factors are larger (a prime) is left alone.
LARGEST_FACTOR = 512


class Form(enum.StrEnum):
    """What a learned rotation may become."""

    AFFINE = "affine"
    ORTHOGONAL = "orthogonal"


@final
@dataclass(frozen=True)
class Rotate(Pass):
    """Rotates the shared input of each quantised group.

    Attributes:
        block: order of the Hadamard blocks: a number, or ``full`` for one over all channels.
            Where it does not divide a width, the largest order below it that does is taken.
        seed: of the random signs; each group has its own.
        learn: leave a Kronecker rotation over all channels free for ``distill``, without ``block``.
        form: of a learned rotation: ``affine`` may also stretch, ``orthogonal`` only turns.
        select: glob of sites.
    """

    block: int | str = 64
    seed: int = 0
    learn: bool = False
    form: Form = Form.AFFINE
    select: str = "*"

    name: ClassVar[str] = "rotate"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_seed(self.seed, "rotate.seed")
        check_belongs(self, (("block", "learn", (False,)), ("form", "learn", (True,))))
        if self.block != "full" and (isinstance(self.block, str) or self.block < LEAST_BLOCK):
            raise ConfigError(
                f"rotate.block: expected 'full' or a number from {LEAST_BLOCK}, got '{self.block}'"
            )

    def planned(self) -> Rotate:
        """This pass, which computes nothing from weights."""
        return self

    def leaves_free(self) -> Sequence[str]:
        """The rotation, if it is learned."""
        return ["learn=true"] if self.learn else []

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Rotate; facts: how many groups got which block, how many values are rotated a token."""
        blocks: dict[int | str, int] = {}
        width = 0
        for group in quantised_groups(graph, self.select):
            if self.learn:
                pair = match_learned(group, ctx)
                if pair is None:
                    continue
                rewrite_learned(graph, group, pair, self.form, self.seed + ctx.seed)
                block: int | str = f"{pair[0]}x{pair[1]}"
            else:
                order = self.match(group, ctx)
                if order is None:
                    continue
                rewrite(graph, group, order, self.seed + ctx.seed)
                block = order
            blocks[block] = blocks.get(block, 0) + 1
            width += _width(group)
        return PassResult(sum(blocks.values()), {"blocks": blocks, "values_per_token": width})

    def match(self, group: Sequence[Site], ctx: Context) -> int | None:
        """The block to rotate ``group`` by, or None with a remark."""
        first, width = group[0], _width(group)
        if _is_rotated(group, ctx):
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


def match_learned(group: Sequence[Site], ctx: Context) -> tuple[int, int] | None:
    """The factors of a learned rotation of ``group``, or None with a remark."""
    width = _width(group)
    if _is_rotated(group, ctx):
        return None
    pair = hadamard_factors(width) or square_factors(width)
    if pair[1] > LARGEST_FACTOR:
        ctx.diagnostics.remark(
            group[0].name,
            "no-rotation",
            f"{width} channels have no two factors up to {LARGEST_FACTOR} to learn",
        )
        return None
    return pair


def rewrite_learned(
    graph: Graph, group: Sequence[Site], pair: tuple[int, int], form: Form, seed: int
) -> None:
    """Rotate the shared input by L ⊗ R and each weight by L⁻ᵀ ⊗ R⁻ᵀ, both free."""
    before = group[0].node
    dtype = parameter_dtype(group[0].weight.meta["val"].dtype)
    forward, backward = [], []
    for side, order in zip(("rotation_left", "rotation_right"), pair, strict=True):
        name = param_name(group[0], side)
        start = start_matrix(order, seed ^ zlib.crc32(name.encode())).to(dtype)
        factor, inverse = learned_factor(graph, name, start, form is Form.AFFINE, before)
        forward.append(factor)
        backward.append(inverse)
    feed(graph, group, KRONECKER, *forward)
    for site in group:
        wrap_weight(graph, site, KRONECKER, *backward)
        set_note(site.node, rotated=_width(group))


def start_matrix(order: int, seed: int) -> Tensor:
    """float64[order, order], orthogonal: random signs times Hadamard; the identity without one."""
    if order == 1 or not hadamard.is_order(order):
        return torch.eye(order, dtype=torch.float64)
    signs = hadamard.random_signs(order, seed).double()
    return signs[:, None] * hadamard.hadamard(order).double() * order**-0.5


def _is_rotated(group: Sequence[Site], ctx: Context) -> bool:
    if not any("rotated" in note(site.node) for site in group):
        return False
    ctx.diagnostics.remark(group[0].name, "already-rotated", "its input is rotated already")
    return True


def _width(group: Sequence[Site]) -> int:
    return int(group[0].weight.meta["val"].shape[-1])
