"""Looking at the nodes around a kernel: operands, readers, casts on the way, shapes that spread.

Nothing here edits a graph. A cast is a change of dtype and nothing else; one that widens loses
nothing, so that a kernel that computes in float32 may read the value before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from vdqc.ir.sizes import size_expression
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR

A = torch.ops.aten
#: Kernels of linears that take an epilogue, and row sums of their codes.
LINEARS = {INT8_LINEAR.op, PACKED_LINEAR.op}
#: Position of ``dtype`` among their operands.
DTYPE_AT = {INT8_LINEAR.op: 8, PACKED_LINEAR.op: 10}


def operands(node: fx.Node, count: int) -> list[Any]:
    """The first ``count`` operands; None for those not given."""
    return [*node.args[:count], *[None] * (count - len(node.args))]


def both_ways(node: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The two operands in either order."""
    first, second = operands(node, 2)
    return (first, second), (second, first)


def only_user(node: fx.Node) -> fx.Node | None:
    """Who alone reads ``node``, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def past_casts(node: fx.Node) -> fx.Node:
    """The last of the casts that alone read ``node``, or ``node``."""
    user = only_user(node)
    while user is not None and is_cast(user):
        node, user = user, only_user(user)
    return node


def before_casts(node: Any) -> Any:
    """``node`` before its casts, whoever reads them."""
    while isinstance(node, fx.Node) and is_cast(node):
        node = node.args[0]
    return node


def before_widening(node: Any) -> Any:
    """``node`` before the casts that lose nothing."""
    while isinstance(node, fx.Node) and is_cast(node) and widens(node):
        node = node.args[0]
    return node


def before_private_casts(node: fx.Node) -> fx.Node:
    """``node`` before the casts that only the chain reads."""
    while is_cast(node) and len(node.users) == 1:
        inner: Any = node.args[0]
        node = inner
    return node


def is_cast(node: fx.Node) -> bool:
    """A change of dtype and nothing else."""
    return node.target is A._to_copy.default and set(node.kwargs) == {"dtype"}


def widens(cast: fx.Node) -> bool:
    """True for a cast that loses nothing."""
    source: torch.dtype = operands(cast, 1)[0].meta["val"].dtype
    target: torch.dtype = cast.meta["val"].dtype
    return source != target and torch.promote_types(source, target) == target


def is_gelu_tanh(node: fx.Node) -> bool:
    """True for the GELU that kernels know."""
    return node.target is A.gelu.default and node.kwargs.get("approximate") == "tanh"


def other_operand(node: fx.Node, operand: fx.Node) -> Any:
    """The operand of two that is not ``operand``."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def same_shape(value: Any, like: fx.Node) -> bool:
    """True if ``value`` is a tensor of the sizes of ``like``, symbolic ones included."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
        return False
    return _sizes(value) == _sizes(like)


def spreads(value: Any, like: fx.Node) -> bool:
    """True if ``value`` has a size of ``like`` or 1 along every axis, and all of the last."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
        return False
    own, other = _sizes(value), _sizes(like)
    if len(own) not in (1, len(other)) or own[-1] != other[-1]:
        return False
    return all(a in (1, b) for a, b in zip(reversed(own), reversed(other), strict=False))


def _sizes(node: fx.Node) -> list[Any]:
    return [size_expression(size) for size in node.meta["val"].shape]
