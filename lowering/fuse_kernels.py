"""Fusion on GPUs: what stands behind a GEMM and before a quantiser moves into their kernels.

::

    %y = vdqc_kernels.int8_linear(...)
    %s = aten.add(%x, aten.mul(%y, %gate))            ->  int8_linear(..., gate=%gate, residual=%x)
    %g = aten.gelu(%y, approximate='tanh')            ->  int8_linear(..., activation='gelu_tanh')

    %n = aten.layer_norm(%x, [K], None, None, eps)
    %m = aten.add(aten.mul(%n, aten.add(%scale, 1)), %shift)
    %r = vdqc_kernels.rotation(%m, @signs, 128, False)
    %q = vdqc_kernels.quantize_rows(aten.mul(%r, @post), 127, False, @clip)
        ->  fused_quantize(%x, 'layer', None, None, eps, %scale, %shift, 'none', None, @signs, 128,
                           None, 8, False, @post, @clip)

    %s = aten.add(%x, aten.mul(%y, %gate))            what no linear took in; later blocks read %s
    %q = fused_quantize(%s, ...)
        ->  %s, %q... = residual_quantize(%x, %y, %gate, ...)

Only values that nothing else reads are taken in, so nothing is computed twice. Fused kernels keep
float32 inside where separate ops round to the model's dtype after each: codes may be drawn anew
(``REDRAWN_NOISE``), never further off. On a CPU the compiler fuses by itself; nothing is done
there.

Source: traffic: one read of x and one write of codes, 3 bytes a value in bfloat16.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.ir.graph import Graph
from vdqc.ir.sizes import size_expression
from vdqc.kernels.fused_quantize import (
    FUSED_QUANTIZE,
    FUSED_QUANTIZE_ASYM,
    RESIDUAL_QUANTIZE,
    RESIDUAL_QUANTIZE_ASYM,
)
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS, QUANTIZE_ROWS_ASYM
from vdqc.kernels.rotation import ROTATION

A = torch.ops.aten
_LINEARS = {INT8_LINEAR.op, PACKED_LINEAR.op}
#: Operands that come before the activation: an epilogue may follow them.
_BEFORE_EPILOGUE = {"row_sum", "down", "up", "code_bits"}
#: Position of ``dtype`` among the operands.
_DTYPE = {INT8_LINEAR.op: 8, PACKED_LINEAR.op: 10}


def fuse_kernels(graph: Graph) -> tuple[int, int]:
    """Fuse in place; (epilogues, prologues) that moved into a kernel."""
    epilogues = sum(_fuse_epilogue(graph, n) for n in graph.nodes if n.target in _LINEARS)
    quantisers = [n for n in graph.nodes if n.target in (QUANTIZE_ROWS.op, QUANTIZE_ROWS_ASYM.op)]
    return epilogues, sum(_fuse_prologue(graph, node) for node in quantisers)


# epilogues ----------------------------------------------------------------------------------------


def _fuse_epilogue(graph: Graph, linear: fx.Node) -> bool:
    """Take in an activation, or a gate and a residual, or a residual alone."""
    given = [*linear.args[_DTYPE[linear.target] + 1 :], *linear.kwargs]  # type: ignore[index]
    if any(value is not None and value not in _BEFORE_EPILOGUE for value in given):
        return False  # it ends in something already, as the sums of binary planes
    end = _past_casts(linear)
    user = _only_user(end)
    if user is None:
        return False
    if _is_gelu_tanh(user):
        return _finish(graph, linear, user, activation="gelu_tanh")
    gate = None
    if user.target is A.mul.Tensor:
        gate = _before_casts(_other(user, end))
        end = _past_casts(user)
        user = _only_user(end)
    if user is None or user.target is not A.add.Tensor or user.kwargs:
        return False
    residual = _before_casts(_other(user, end))
    if not _same_shape(residual, user) or (gate is not None and not _spreads(gate, user)):
        return False
    return _finish(graph, linear, user, gate=gate, residual=residual)


def _finish(graph: Graph, linear: fx.Node, last: fx.Node, **epilogue: Any) -> bool:
    """Replace ``last`` by the linear with an epilogue, in the dtype that leaves the chain."""
    cast = _only_user(last)
    if cast is not None and _is_cast(cast) and not _widens(cast):
        last = cast
    args = list(linear.args)
    args[_DTYPE[linear.target]] = last.meta["val"].dtype  # type: ignore[index]
    given = {key: value for key, value in epilogue.items() if value is not None}
    fused = graph.call(linear.target, *args, before=last, **linear.kwargs, **given)
    for key in ("nn_module_stack", "stack_trace"):
        if key in linear.meta:
            fused.meta[key] = linear.meta[key]
    graph.replace(last, fused)
    fused.meta["custom"] = linear.meta.get("custom", {})
    _drop_dead(graph)
    return True


# prologues ----------------------------------------------------------------------------------------


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
    x, limit, per_tensor, clip = _operands(quantiser, 4)
    if per_tensor:
        return False
    steps = _Steps(_before_private_casts(x))
    for take in (_rotation, _smoothing, _activation, _modulation, _norm):
        steps = take(graph, steps)
    if steps == _Steps(steps.x):
        return False
    while _is_cast(steps.x) and _widens(steps.x):  # the kernel widens by itself
        steps = replace(steps, x=_operands(steps.x, 1)[0])
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
    _drop_dead(graph)
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
    total = _before_private_casts(_operands(stream, 1)[0]) if _is_cast(stream) else stream
    if total.target is not A.add.Tensor or total.kwargs:
        return None
    if len(_readers(graph, stream, quantiser)[0]) != 1 or (total is not stream and _shared(total)):
        return None
    dtype = stream.meta["val"].dtype
    for one, other in _both_ways(total):
        x, y = _before_widening(one), _before_widening(other)
        if not (_same_shape(x, stream) and _same_shape(y, stream) and x.meta["val"].dtype == dtype):
            continue
        product = _before_private_casts(y)
        if product.target is A.mul.Tensor and not _shared(product):
            for value, factor in _both_ways(product):
                branch, gate = _before_widening(value), _before_widening(factor)
                if _same_shape(branch, stream) and _spreads(gate, stream):
                    return x, branch, gate
    x, y = (_before_widening(operand) for operand in _operands(total, 2))
    if not (_same_shape(x, stream) and _same_shape(y, stream)):
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
    for cast in filter(_is_cast, before):
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
    x, signs, block = _operands(node, 3)
    return replace(steps, x=_before_private_casts(x), signs=signs, block=int(block), post=post)


def _smoothing(graph: Graph, steps: _Steps) -> _Steps:
    x, factor = _scaled(steps.x)
    return steps if factor is None else replace(steps, x=x, smooth=factor)


def _scaled(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(value, channel vector) whose product ``node`` is; (``node``, None) if it is none."""
    if node.target is A.mul.Tensor and len(node.users) == 1:
        for value, factor in _both_ways(node):
            if isinstance(value, fx.Node) and _is_channel_vector(factor):
                return _before_private_casts(value), factor
    return node, None


def _is_channel_vector(value: Any) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    return value.meta["val"].ndim == 1 and value.meta["val"].numel() > 1


def _activation(graph: Graph, steps: _Steps) -> _Steps:
    node = steps.x
    if len(node.users) != 1:
        return steps
    if _is_gelu_tanh(node) or node.target is A.silu.default:
        x: Any = node.args[0]
        name = "silu" if node.target is A.silu.default else "gelu_tanh"
        return replace(steps, x=_before_private_casts(x), activation=name)
    return steps


def _modulation(graph: Graph, steps: _Steps) -> _Steps:
    """``add(mul(norm, 1 + scale), shift)``; taken only together with the norm under it."""
    node = steps.x
    if node.target is not A.add.Tensor or node.kwargs or len(node.users) != 1:
        return steps
    for value, shift in _both_ways(node):
        product = _before_private_casts(value) if isinstance(value, fx.Node) else None
        if product is None or product.target is not A.mul.Tensor or len(product.users) != 1:
            continue
        for normed, factor in _both_ways(product):
            if not isinstance(normed, fx.Node) or not isinstance(factor, fx.Node):
                continue
            base = _before_private_casts(normed)
            if _is_norm(base) and _spreads(factor, node) and _spreads(shift, node):
                scale = _one_plus(graph, factor, product)
                return replace(steps, x=base, mod_scale=scale, mod_shift=_before_casts(shift))
    return steps


def _norm(graph: Graph, steps: _Steps) -> _Steps:
    node = steps.x
    if not _is_norm(node):
        return steps
    layer = node.target is A.layer_norm.default
    x, _, weight, *rest = _operands(node, 5)
    bias, eps = rest if layer else (None, rest[0])
    default = 1e-5 if layer else torch.finfo(node.meta["val"].dtype).eps
    return replace(
        steps,
        x=_before_private_casts(x),
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
    inner = _before_casts(factor)
    if inner.target in (A.add.Tensor, A.add.Scalar) and not inner.kwargs:
        for value, one in _both_ways(inner):
            if isinstance(value, fx.Node) and not isinstance(one, fx.Node) and one == 1:
                return _before_casts(value)
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
    for linear in [user for part in codes for user in part.users if user.target in _LINEARS]:
        weight_zero_point = linear.args[_DTYPE[linear.target] - 3]  # type: ignore[index]
        if weight_zero_point is None:
            continue
        if sums is None:
            sums = graph.call_after(operator.getitem, fused, index, after=fused)
        linear.update_kwarg("row_sum", sums)


# walking ------------------------------------------------------------------------------------------


def _operands(node: fx.Node, count: int) -> list[Any]:
    """The first ``count`` operands; None for those not given."""
    return [*node.args[:count], *[None] * (count - len(node.args))]


def _both_ways(node: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The two operands in either order."""
    first, second = _operands(node, 2)
    return (first, second), (second, first)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _past_casts(node: fx.Node) -> fx.Node:
    """The last of the casts that alone read ``node``, or ``node``."""
    user = _only_user(node)
    while user is not None and _is_cast(user):
        node, user = user, _only_user(user)
    return node


def _before_casts(node: Any) -> Any:
    while isinstance(node, fx.Node) and _is_cast(node):
        node = node.args[0]
    return node


def _before_widening(node: Any) -> Any:
    """``node`` before the casts that lose nothing."""
    while isinstance(node, fx.Node) and _is_cast(node) and _widens(node):
        node = node.args[0]
    return node


def _before_private_casts(node: fx.Node) -> fx.Node:
    """``node`` before the casts that only the chain reads."""
    while _is_cast(node) and len(node.users) == 1:
        inner: Any = node.args[0]
        node = inner
    return node


def _is_cast(node: fx.Node) -> bool:
    """A change of dtype and nothing else."""
    return node.target is A._to_copy.default and set(node.kwargs) == {"dtype"}


def _widens(cast: fx.Node) -> bool:
    """True for a cast that loses nothing."""
    source: torch.dtype = _operands(cast, 1)[0].meta["val"].dtype
    target: torch.dtype = cast.meta["val"].dtype
    return source != target and torch.promote_types(source, target) == target


def _is_gelu_tanh(node: fx.Node) -> bool:
    return node.target is A.gelu.default and node.kwargs.get("approximate") == "tanh"


def _other(node: fx.Node, operand: fx.Node) -> Any:
    return node.args[1] if node.args[0] is operand else node.args[0]


def _same_shape(value: Any, like: fx.Node) -> bool:
    if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
        return False
    return _sizes(value) == _sizes(like)


def _spreads(value: Any, like: fx.Node) -> bool:
    """True if ``value`` has a size of ``like`` or 1 along every axis, and all of the last."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
        return False
    own, other = _sizes(value), _sizes(like)
    if len(own) not in (1, len(other)) or own[-1] != other[-1]:
        return False
    return all(a in (1, b) for a, b in zip(reversed(own), reversed(other), strict=False))


def _sizes(node: fx.Node) -> list[Any]:
    return [size_expression(size) for size in node.meta["val"].shape]


def _drop_dead(graph: Graph) -> None:
    graph.module.graph.eliminate_dead_code()
