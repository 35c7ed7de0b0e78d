"""``vdqc::`` ops of activations in plain aten, for operands that no kernel takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from vdqc.base.numerics import MIN_SCALE
from vdqc.base.scheme import GranularityKind, QuantSpec
from vdqc.ir.graph import Graph
from vdqc.lowering.rules import Operand

_aten = torch.ops.aten


def spell_fake_quantize(graph: Graph, node: fx.Node) -> None:
    """Replace ``node`` by aten ops that compute the same value; scales of groups are static."""
    operand = Operand.of(node)
    spec = operand.spec
    assert spec is not None

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call(op, *args, before=node, **kwargs)

    x = operand.value
    shape = list(x.meta["val"].shape)
    dtype = x.meta["val"].dtype
    wide = x
    if dtype != torch.float64:
        wide = call(_aten._to_copy.default, x, dtype=torch.float32)
    if spec.granularity.kind is GranularityKind.GROUP:
        wide = call(_aten.unflatten.int, wide, -1, [-1, spec.granularity.size])
    scale, zero = operand.scale, operand.zero_point
    if scale is None or spec.dynamic:
        scale, zero = dynamic_range(call, wide, spec, scale)
    elif spec.granularity.kind is GranularityKind.GROUP:
        scale = call(_aten.unsqueeze.default, scale, -1)
        zero = None if zero is None else call(_aten.unsqueeze.default, zero, -1)
    codes = call(_aten.div.Tensor, wide, scale)
    if not spec.dtype.is_float:
        codes = call(_aten.round.default, codes)
    if zero is not None:
        codes = call(_aten.add.Tensor, codes, zero)
    codes = call(_aten.clamp.default, codes, spec.qmin, spec.qmax)
    if spec.dtype.is_float:
        codes = call(_aten._to_copy.default, codes, dtype=torch.float8_e4m3fn)
        codes = call(_aten._to_copy.default, codes, dtype=torch.float32)
    if zero is not None:
        codes = call(_aten.sub.Tensor, codes, zero)
    value = call(_aten.mul.Tensor, codes, scale)
    if spec.granularity.kind is GranularityKind.GROUP:
        value = call(_aten.flatten.using_ints, value, len(shape) - 1, len(shape))
    if value.meta["val"].dtype != dtype:
        value = call(_aten._to_copy.default, value, dtype=dtype)
    graph.replace(node, value)


def dynamic_range(
    call: Callable[..., fx.Node], wide: fx.Node, spec: QuantSpec, clip: fx.Node | None = None
) -> tuple[fx.Node, fx.Node | None]:
    """Scale and zero point of a dynamic range, as ``numerics.scale_from_range`` computes them.

    ``clip`` is the ratio of the range that is kept.
    """
    whole = spec.granularity.kind is GranularityKind.TENSOR
    axes: tuple[Any, ...] = () if whole else ([-1], True)
    low, high = call(_aten.amin.default, wide, *axes), call(_aten.amax.default, wide, *axes)
    if clip is not None:
        low, high = (call(_aten.mul.Tensor, end, clip) for end in (low, high))
    if spec.symmetric:
        absolute = [call(_aten.abs.default, end) for end in (low, high)]
        top = call(_aten.maximum.default, *absolute)
        scale = call(_aten.div.Tensor, top, spec.qmax)
        return call(_aten.clamp_min.default, scale, MIN_SCALE), None
    low, high = call(_aten.clamp_max.default, low, 0), call(_aten.clamp_min.default, high, 0)
    span = call(_aten.sub.Tensor, high, low)
    scale = call(_aten.div.Tensor, span, spec.qmax - spec.qmin)
    scale = call(_aten.clamp_min.default, scale, MIN_SCALE)
    zero = call(_aten.round.default, call(_aten.div.Tensor, call(_aten.neg.default, low), scale))
    return scale, call(_aten.clamp.default, zero, spec.qmin, spec.qmax)


def spell_kronecker(graph: Graph, node: fx.Node) -> None:
    """Replace a ``vdqc::kronecker`` of an activation by two matmuls, computed as the op does."""
    x, left, right = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call(op, *args, before=node, **kwargs)

    dtype, orders = x.meta["val"].dtype, [int(f.meta["val"].shape[0]) for f in (left, right)]
    compute = torch.promote_types(left.meta["val"].dtype, torch.promote_types(dtype, torch.float32))
    value = x if dtype == compute else call(_aten._to_copy.default, x, dtype=compute)
    value = call(_aten.unflatten.int, value, -1, orders)
    value = call(_aten.matmul.default, value, right)
    value = call(_aten.matmul.default, call(_aten.transpose.int, left, 0, 1), value)
    rank = len(x.meta["val"].shape)
    value = call(_aten.flatten.using_ints, value, rank - 1, rank)
    if dtype != compute:
        value = call(_aten._to_copy.default, value, dtype=dtype)
    graph.replace(node, value)
