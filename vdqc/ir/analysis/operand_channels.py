"""Channels of a value on one operand of the op that computes it, where ops do more than move them.

``channels.sources`` undoes ops that only move channels. Attention mixes tokens and elementwise ops
broadcast; here is where a value's channels are on v or on an operand, and in which runs they lie.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from vdqc.ir.analysis.channels import (
    Channels,
    Index,
    Refused,
    describe,
    require_private,
    shape,
)

A = torch.ops.aten


def attention_value(value: Channels) -> Channels:
    """Attention weights mix tokens, so channels and heads of v pass through unchanged."""
    node = value.node
    operand = node.args[2 if node.target is A.scaled_dot_product_attention.default else 1]
    assert isinstance(operand, fx.Node)
    require_private(operand, [node])
    sizes, inner = shape(node), shape(operand)
    if len(sizes) != len(inner) or len(sizes) - 2 in value.coords:
        raise Refused(f"{describe(node)} mixes channels with tokens")
    if any(sizes[axis] != inner[axis] for axis in value.coords):
        raise Refused(f"{describe(node)}: several query heads share one value head")
    return value.moved(operand, value.coords)


def broadcast(value: Channels, operand: fx.Node) -> dict[int, Index]:
    """``value``'s coordinates on an operand of an elementwise op."""
    sizes, inner = shape(value.node), shape(operand)
    shift = len(sizes) - len(inner)
    for axis in value.coords:
        if axis < shift or inner[axis - shift] != sizes[axis]:
            raise Refused(f"%{operand.name} is one number for several channels")
    return {axis - shift: positions for axis, positions in value.coords.items()}


def runs(positions: Index, d: Index) -> list[tuple[int, int, int]]:
    """(first position, first channel, end channel) of runs where both grow by one."""
    order = np.argsort(positions, kind="stable")
    positions, d = positions[order], d[order]
    if len(np.unique(positions)) != len(positions):
        raise Refused("one channel would need two factors")
    breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(d) != 1)) + 1
    return [
        (int(p[0]), int(c[0]), int(c[-1]) + 1)
        for p, c in zip(np.split(positions, breaks), np.split(d, breaks), strict=True)
    ]
