"""Fusion on GPUs: what stands before a quantiser moves into its kernel, as its prologue.

::

    %n = aten.layer_norm(%x, [K], None, None, eps)
    %m = aten.add(aten.mul(%n, aten.add(%scale, 1)), %shift)
    %r = vdqc_kernels.rotation(%m, @signs, 128, False)
    %q = vdqc_kernels.quantize_rows(aten.mul(%r, @post), 127, False, @clip)
        ->  fused_quantize(%x, 'layer', None, None, eps, %scale, %shift, 'none', None, @signs, 128,
                           None, 8, False, @post, @clip)

    %s = aten.add(%x, aten.mul(%y, %gate))            what no linear took in; later blocks read %s
    %q = fused_quantize(%s, ...)
        ->  %s, %q... = residual_quantize(%x, %y, %gate, ...)

Only values that nothing else reads are taken in. The chain is read against the flow: rotation,
smoothing, activation, modulation, norm, and the residual sum under them.

Source: traffic: one read of x and one write of codes, 3 bytes a value in bfloat16.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import fx

from vdqc.ir.graph import Graph
from vdqc.kernels.fused_quantize import (
    FUSED_QUANTIZE,
    FUSED_QUANTIZE_ASYM,
    RESIDUAL_QUANTIZE,
    RESIDUAL_QUANTIZE_ASYM,
)
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS, QUANTIZE_ROWS_ASYM
from vdqc.kernels.rotation import ROTATION
from vdqc.lowering.operands import (
    DTYPE_AT,
    LINEARS,
    before_casts,
    before_private_casts,
    before_widening,
    both_ways,
    is_cast,
    is_gelu_tanh,
    operands,
    same_shape,
    spreads,
    widens,
)

A = torch.ops.aten


def fuse_prologues(graph: Graph) -> int:
    """Fuse in place; how many prologues moved into a quantiser's kernel."""
    quantisers = [n for n in graph.nodes if n.target in (QUANTIZE_ROWS.op, QUANTIZE_ROWS_ASYM.op)]
    return sum(_fuse_prologue(graph, node) for node in quantisers)


@final
@dataclass(frozen=True)
class _Steps:
    """The chain found so far against the flow: ``x`` is where it begins; rest as the kernel's."""

    x: fx.Node
    norm: str = "none"
    norm_weight: fx.Node | None = None
    norm_bias: fx.Node | None = None
    eps: float = 1e-6
    mod_scale: fx.Node | None = None
    mod_shift: fx.Node | None = None
    activation: str = "none"
    smooth: fx.Node | None = None
    signs: fx.Node | None = None
    block: int = 0
    post: fx.Node | None = None


def _fuse_prologue(graph: Graph, quantiser: fx.Node) -> bool:
    x, limit, per_tensor, clip = operands(quantiser, 4)
    if per_tensor:
        return False
    steps = _Steps(before_private_casts(x))
    for take in (_rotation, _smoothing, _activation, _modulation, _norm):
        steps = take(graph, steps)
    if steps == _Steps(steps.x):
        return False
    while is_cast(steps.x) and widens(steps.x):  # the kernel widens by itself
        steps = replace(steps, x=operands(steps.x, 1)[0])
    symmetric = quantiser.target is QUANTIZE_ROWS.op
    bits = limit.bit_length() + 1 if symmetric else limit
    args = (steps.norm, steps.norm_weight, steps.norm_bias, steps.eps, steps.mod_scale,
            steps.mod_shift, steps.activation, steps.smooth, steps.signs, steps.block,
            None, bits, False, *_given(steps.post, clip))  # fmt: skip
    total = _residual(graph, steps.x, quantiser)
    if total is None:
        op = FUSED_QUANTIZE.op if symmetric else FUSED_QUANTIZE_ASYM.op
        fused = graph.call(op, steps.x, *args, before=quantiser)
        graph.replace(quantiser, fused)
    else:
        op = RESIDUAL_QUANTIZE.op if symmetric else RESIDUAL_QUANTIZE_ASYM.op
        fused = graph.call(op, *total, *args, before=quantiser)
        for part in list(quantiser.users):  # the stream comes first
            place = int(part.args[1]) + 1  # type: ignore[arg-type]
            graph.replace(part, graph.call(operator.getitem, fused, place, before=quantiser))
        stream = graph.call(operator.getitem, fused, 0, before=quantiser)
        _read_instead(graph, steps.x, stream, quantiser)
    first = 0 if total is None else 1
    _give_row_sums(graph, fused, first, first + (2 if symmetric else 3))
    graph.module.graph.eliminate_dead_code()
    return True


def _given(*values: Any) -> list[Any]:
    """``values`` up to the last that is not None, which is what the others default to."""
    while values and values[-1] is None:
        values = values[:-1]
    return list(values)


def _residual(
    graph: Graph, stream: fx.Node, quantiser: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(x, y, gate) of a stream ``x + gate * y`` that only the chain reads before the codes."""
    total = before_private_casts(operands(stream, 1)[0]) if is_cast(stream) else stream
    if total.target is not A.add.Tensor or total.kwargs:
        return None
    if len(_readers(graph, stream, quantiser)[0]) != 1 or (total is not stream and _shared(total)):
        return None
    dtype = stream.meta["val"].dtype
    for one, other in both_ways(total):
        x, y = before_widening(one), before_widening(other)
        if not (same_shape(x, stream) and same_shape(y, stream) and x.meta["val"].dtype == dtype):
            continue
        product = before_private_casts(y)
        if product.target is A.mul.Tensor and not _shared(product):
            for value, factor in both_ways(product):
                branch, gate = before_widening(value), before_widening(factor)
                if same_shape(branch, stream) and spreads(gate, stream):
                    return x, branch, gate
    x, y = (before_widening(operand) for operand in operands(total, 2))
    if not (same_shape(x, stream) and same_shape(y, stream)):
        return None
    return (x, y, None) if x.meta["val"].dtype == dtype else None


def _readers(graph: Graph, node: fx.Node, by: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Who reads ``node`` before ``by`` in the program, and who does after."""
    place = {other: index for index, other in enumerate(graph.nodes)}
    before = [user for user in node.users if place[user] < place[by]]
    return before, [user for user in node.users if user not in before]


def _read_instead(graph: Graph, old: fx.Node, new: fx.Node, by: fx.Node) -> None:
    """Who reads ``old`` after ``by`` reads ``new``, which stands there; casts of it likewise."""
    before, after = _readers(graph, old, by)
    for user in after:
        user.replace_input_with(old, new)
    for cast in filter(is_cast, before):
        if later := _readers(graph, cast, by)[1]:
            again = graph.call(cast.target, new, before=by, **cast.kwargs)
            for user in later:
                user.replace_input_with(cast, again)


def _shared(node: fx.Node) -> bool:
    return len(node.users) != 1


def _rotation(graph: Graph, steps: _Steps) -> _Steps:
    """A rotation, and a scale of its channels behind it."""
    node, post = _scaled(steps.x)
    if (
        node.target is not ROTATION.op
        or len(node.users) != 1
        or (len(node.args) > 3 and node.args[3])
    ):
        return steps
    x, signs, block = operands(node, 3)
    return replace(steps, x=before_private_casts(x), signs=signs, block=int(block), post=post)


def _smoothing(graph: Graph, steps: _Steps) -> _Steps:
    x, factor = _scaled(steps.x)
    return steps if factor is None else replace(steps, x=x, smooth=factor)


def _scaled(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(value, channel vector) whose product ``node`` is; (``node``, None) if it is none."""
    if node.target is A.mul.Tensor and len(node.users) == 1:
        for value, factor in both_ways(node):
            if isinstance(value, fx.Node) and _is_channel_vector(factor):
                return before_private_casts(value), factor
    return node, None


def _is_channel_vector(value: Any) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    return value.meta["val"].ndim == 1 and value.meta["val"].numel() > 1


def _activation(graph: Graph, steps: _Steps) -> _Steps:
    node = steps.x
    if len(node.users) != 1:
        return steps
    if is_gelu_tanh(node) or node.target is A.silu.default:
        x: Any = node.args[0]
        name = "silu" if node.target is A.silu.default else "gelu_tanh"
        return replace(steps, x=before_private_casts(x), activation=name)
    return steps


def _modulation(graph: Graph, steps: _Steps) -> _Steps:
    """``add(mul(norm, 1 + scale), shift)``; taken only together with the norm under it."""
    node = steps.x
    if node.target is not A.add.Tensor or node.kwargs or len(node.users) != 1:
        return steps
    for value, shift in both_ways(node):
        product = before_private_casts(value) if isinstance(value, fx.Node) else None
        if product is None or product.target is not A.mul.Tensor or len(product.users) != 1:
            continue
        for normed, factor in both_ways(product):
            if not isinstance(normed, fx.Node) or not isinstance(factor, fx.Node):
                continue
            base = before_private_casts(normed)
            if _is_norm(base) and spreads(factor, node) and spreads(shift, node):
                scale = _one_plus(graph, factor, product)
                return replace(steps, x=base, mod_scale=scale, mod_shift=before_casts(shift))
    return steps


def _norm(graph: Graph, steps: _Steps) -> _Steps:
    node = steps.x
    if not _is_norm(node):
        return steps
    layer = node.target is A.layer_norm.default
    x, _, weight, *rest = operands(node, 5)
    bias, eps = rest if layer else (None, rest[0])
    default = 1e-5 if layer else torch.finfo(node.meta["val"].dtype).eps
    return replace(
        steps,
        x=before_private_casts(x),
        norm="layer" if layer else "rms",
        norm_weight=weight,
        norm_bias=bias,
        eps=float(default if eps is None else eps),
    )


def _is_norm(node: fx.Node) -> bool:
    if node.target not in (A.layer_norm.default, A.rms_norm.default) or len(node.users) != 1:
        return False
    shape: Any = node.args[1]
    return len(shape) == 1


def _one_plus(graph: Graph, factor: fx.Node, before: fx.Node) -> fx.Node:
    """``scale`` of ``1 + scale``; where the graph has another factor, that minus one in float32."""
    inner = before_casts(factor)
    if inner.target in (A.add.Tensor, A.add.Scalar) and not inner.kwargs:
        for value, one in both_ways(inner):
            if isinstance(value, fx.Node) and not isinstance(one, fx.Node) and one == 1:
                return before_casts(value)
    wide = inner
    if inner.meta["val"].dtype.itemsize < 4:
        wide = graph.call(A._to_copy.default, inner, before=before, dtype=torch.float32)
    return graph.call(A.sub.Tensor, wide, 1, before=before)


def _give_row_sums(graph: Graph, fused: fx.Node, codes_at: int, index: int) -> None:
    """Linears with zero points in their weights read the row sums that the quantiser knows."""
    sums: fx.Node | None = None
    codes = [
        user for user in fused.users if user.target is operator.getitem and user.args[1] == codes_at
    ]
    for linear in [user for part in codes for user in part.users if user.target in LINEARS]:
        weight_zero_point = linear.args[DTYPE_AT[linear.target] - 3]  # type: ignore[index]
        if weight_zero_point is None:
            continue
        if sums is None:
            sums = graph.call_after(operator.getitem, fused, index, after=fused)
        linear.update_kwarg("row_sum", sums)
