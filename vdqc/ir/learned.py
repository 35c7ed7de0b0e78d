"""Expressions of free parameters: built by passes, trained by distill, evaluated by lowering.

A pass binds a free parameter in an unbounded form (a logarithm, a logit, a square matrix) and lets
the graph compute the value that it stands for, so that any gradient step leaves a valid graph:

=================== ============================================ ==========================
parameter           value                                        at its start
=================== ============================================ ==========================
``.smooth*``        scale = exp(p), positive                     log of the calibrated scale
``.*_clip``         ratio = sigmoid(p), in (0, 1)                4.0: ratio 0.982
``.*_step``         step = exp(p) times the one of the range     0.0
``.rotation_*``     see ``learned_factor``                       0: the start matrix itself
``.rounding``       see ``chosen_neighbour``                     the weight itself
=================== ============================================ ==========================

Rounding inside an expression lets gradients straight through, and its values are whole numbers
exactly. Nodes go in front of ``before``; parameters are float32, float64 in a float64 graph.

Source: Sun et al., FlatQuant, arXiv 2410.09426, section 3 (factors, clipping); Shao et al.,
OmniQuant, arXiv 2308.13137, equation 2 (learnable weight clipping).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.base.numerics import MIN_SCALE
from vdqc.base.rounding import STRETCH, rounding_logits
from vdqc.base.scheme import GranularityKind, QuantSpec
from vdqc.ir.graph import Graph
from vdqc.ir.ops import CAYLEY

aten = torch.ops.aten

#: Where a learned clip starts, in front of the sigmoid.
CLIP_START = 4.0


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of free parameters in a graph whose weights are ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def frozen(graph: Graph) -> Graph:
    """A copy of ``graph`` that training the original does not change; weights are shared."""
    twin = graph.clone()
    for name in sorted(twin.free):
        twin.set_param(name, twin.param(name).detach().clone())
    return twin


def is_learned(graph: Graph, node: fx.Node) -> bool:
    """True if the constant expression ``node`` reads a free parameter."""
    if node.op == "get_attr":
        return node.target in graph.free
    return any(is_learned(graph, operand) for operand in node.all_input_nodes)


def cast(graph: Graph, node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    """``node`` in ``dtype``; itself if it is."""
    if node.meta["val"].dtype == dtype:
        return node
    return graph.call(aten._to_copy.default, node, dtype=dtype, before=before)


def rounded(graph: Graph, op: Any, node: fx.Node, before: fx.Node, *args: Any) -> fx.Node:
    """``op(node)`` forward, the identity backward: op(p) + (p - p), the second pair differentiable.

    The sum is exact: a rounded value stays a whole number.
    """

    def call(target: Any, *operands: Any) -> fx.Node:
        return graph.call(target, *operands, before=before)

    value = call(op, node, *args)
    slope = call(aten.sub.Tensor, node, call(aten.detach.default, node))
    return call(aten.add.Tensor, call(aten.detach.default, value), slope)


def learned_ratio(graph: Graph, name: str, start: Tensor, before: fx.Node) -> fx.Node:
    """sigmoid of a free parameter that starts at ``start``: a clip ratio."""
    param = graph.set_param(name, start, free=True)
    return graph.call(aten.sigmoid.default, param, before=before)


def chosen_neighbour(
    graph: Graph, name: str, weight: Tensor, step: Tensor, before: fx.Node
) -> fx.Node:
    """s·(floor(W / s) + h(V)) with free V, for float[N, K] ``weight`` and ``step``.

    A quantiser behind it rounds h to 0 or 1. Two constants of the weight's size stand in for it.
    """
    dtype = parameter_dtype(weight.dtype)
    step = step.to(dtype)
    down = (weight.to(dtype) / step).floor()
    base = graph.set_param(f"{name}_floor", down * step)
    same = bool((step == step[:, :1]).all())  # one column where all columns share their step
    grid = graph.set_param(f"{name}_step", (step[:, :1] if same else step).contiguous())
    start = rounding_logits(weight.to(dtype) / step - down)

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call(op, *args, before=before)

    share = call(aten.sigmoid.default, graph.set_param(name, start, free=True))
    share = call(aten.sub.Tensor, call(aten.mul.Tensor, share, 1 + 2 * STRETCH), STRETCH)
    up = call(aten.mul.Tensor, call(aten.clamp.default, share, 0, 1), grid)
    return call(aten.add.Tensor, base, up)


def learned_factor(graph: Graph, name: str, start: Tensor, affine: bool, before: fx.Node) -> Any:
    """(P, P⁻ᵀ) of a trainable square matrix P, both expressions of the same free parameters.

    P = U·diag(e^s)·Vᵀ·start with rotations U, V (Cayley) and ``start`` orthogonal, so that the
    inverse is exact at any value of U, s, V: P⁻ᵀ = U·diag(e^-s)·Vᵀ·start. Without ``affine``,
    P = U·start is orthogonal and its own P⁻ᵀ.
    """
    n, dtype = start.shape[0], start.dtype
    base = graph.set_param(f"{name}_start", start)
    if n == 1:  # nothing to turn
        return base, base

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call(op, *args, before=before)

    def free(suffix: str, *shape: int) -> fx.Node:
        return graph.set_param(f"{name}{suffix}", torch.zeros(shape, dtype=dtype), free=True)

    u = call(CAYLEY, free("", n, n))
    if not affine:
        orthogonal = call(aten.matmul.default, u, base)
        return orthogonal, orthogonal
    v = call(aten.transpose.int, call(CAYLEY, free("_v", n, n)), 0, 1)
    logs = free("_scale", n)
    right = call(aten.matmul.default, v, base)
    scales = call(aten.exp.default, logs), call(aten.exp.default, call(aten.neg.default, logs))
    return tuple(
        call(aten.matmul.default, call(aten.mul.Tensor, u, scale), right) for scale in scales
    )


def weight_scale(
    graph: Graph,
    weight: fx.Node,
    spec: QuantSpec,
    before: fx.Node,
    *,
    ratios: tuple[fx.Node | None, fx.Node | None],
    step: fx.Node | None,
    whole: bool,
) -> tuple[fx.Node, fx.Node | None]:
    """Scale and zero point of a weight expression as expressions of it, so that they follow it.

    ``numerics.scale_from_range`` of the range of ``weight``, its (low, high) ends times ``ratios``,
    the scale times e^``step``; ``whole`` as ``numerics.whole_multiples``. A symmetric spec uses the
    second ratio alone.
    """

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call(op, *args, before=before)

    def times(node: fx.Node, ratio: fx.Node | None) -> fx.Node:
        return node if ratio is None else call(aten.mul.Tensor, node, ratio)

    dtype = parameter_dtype(weight.meta["val"].dtype)
    grouped = spec.granularity.kind is GranularityKind.GROUP
    view = weight
    if grouped:
        view = call(aten.unflatten.int, weight, -1, [-1, spec.granularity.size])
    axes: tuple[Any, ...] = ([-1], not grouped)
    if spec.granularity.kind is GranularityKind.TENSOR:
        axes = ()
    # both ends, not max|w|: their gradients need the weight alone, |w| would be one more copy of it
    low, high = (
        cast(graph, call(end, view, *axes), dtype, before)
        for end in (aten.amin.default, aten.amax.default)
    )
    zero_point = None
    if spec.symmetric:
        ends = call(aten.abs.default, low), call(aten.abs.default, high)
        top = call(aten.maximum.default, *ends)
        span = call(aten.div.Tensor, times(top, ratios[1]), spec.qmax)
        scale = _stepped(call, span, step)
    else:
        low = call(aten.clamp_max.default, times(low, ratios[0]), 0)
        high = call(aten.clamp_min.default, times(high, ratios[1]), 0)
        span = call(aten.div.Tensor, call(aten.sub.Tensor, high, low), spec.qmax - spec.qmin)
        scale = _stepped(call, span, step)
        position = call(aten.div.Tensor, call(aten.neg.default, low), scale)
        position = rounded(graph, aten.round.default, position, before)
        zero_point = call(aten.clamp.default, position, spec.qmin, spec.qmax)
    return (_whole(graph, scale, spec, before) if whole else scale), zero_point


def _stepped(call: Callable[..., fx.Node], span: fx.Node, step: fx.Node | None) -> fx.Node:
    if step is not None:
        span = call(aten.mul.Tensor, span, call(aten.exp.default, step))
    return call(aten.clamp_min.default, span, MIN_SCALE)


def _whole(graph: Graph, scale: fx.Node, spec: QuantSpec, before: fx.Node) -> fx.Node:
    limit = 127 // spec.qmax
    if spec.granularity.kind is not GranularityKind.GROUP or not spec.symmetric or limit < 8:
        return scale

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call(op, *args, before=before)

    base = call(aten.div.Tensor, call(aten.amax.default, scale, [-1], True), limit)
    ratio = call(aten.sub.Tensor, call(aten.div.Tensor, scale, base), 1e-5)
    multiple = rounded(graph, aten.ceil.default, ratio, before)
    return call(aten.mul.Tensor, base, call(aten.clamp.default, multiple, 1, limit))
