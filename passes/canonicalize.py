"""One spelling per op and no op without effect: the subset of aten that later passes rely on.

::

    type_as(clone(x), x)                              ->  x
    slice(x, 0, 0, 9223372036854775807), x * 1        ->  x
    repeat_interleave(x, 1), slice_scatter(y, x) of all of y  ->  x
    to(x, bf16), type_as(x, bf16 value)               ->  _to_copy(x, dtype=bf16)
    view, _unsafe_view, squeeze, flatten, view_as     ->  reshape
    split_with_sizes(x, [n, n]), chunk                ->  split(x, n)
    x * rsqrt(mean(x²) + eps) [cast] * w              ->  rms_norm(x, w, eps) [casts]
    softmax(q @ k.mT * scale + mask) @ v              ->  scaled_dot_product_attention(q, k, v, ...)
    sym_size(any value), size arithmetic              ->  once, at the top, from the inputs' sizes
    two equal pure nodes                              ->  one

Only legal because capture functionalised the graph: nothing writes, so a copy is its source.

Source: RMSNorm: Zhang and Sennrich, arXiv 1910.07467, eq. 4.
Invariant: bit-exact, except that a fused rms_norm rounds once where half-precision code rounds
    twice (its sum of squares stays in float32), and what ``written_attention`` says of its own.
Online: costs nothing, removes nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx

from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.engine.pass_manager import Context, Pass, PassResult, probe_output
from vdqc.ir.blocks import block_name
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.names import module_path
from vdqc.ir.pattern import Mismatch, any_, any_list, either, match, number, op
from vdqc.ir.site import note
from vdqc.ir.sizes import SizeBuilder
from vdqc.ir.spelling import noop_source, respelled
from vdqc.ir.written_attention import SOFTMAXES, fuse_attentions

A = torch.ops.aten


@final
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrite to the canonical subset; see the module's text."""

    name: ClassVar[str] = "canonicalize"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED})
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Respell, drop, fuse, hoist and merge; the counts are the facts."""
        before = len(graph.nodes)
        counts = {
            "respelled": _respell_all(graph),
            "sizes": _hoist_sizes(graph),
            "dropped": _drop_noops(graph),
            "rms_norm": _fuse_rms_norms(graph),
            "attention": _fuse_attentions(graph, ctx),
            "merged": _merge_equal(graph),
        }
        graph.module.graph.eliminate_dead_code()
        graph.version += 1
        return PassResult(
            sum(counts.values()), {**counts, "nodes": f"{before} -> {len(graph.nodes)}"}
        )


# rewrite: spelling ------------------------------------------------------------------------------


def _drop_noops(graph: Graph) -> int:
    count = 0
    for node in graph.nodes:
        source = noop_source(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.module.graph.erase_node(node)
            count += 1
    return count


def _respell_all(graph: Graph) -> int:
    count = 0
    for node in graph.nodes:
        spelled = respelled(graph, node)
        if spelled is None:
            continue
        target, args, kwargs = spelled
        if (target, args, kwargs) != (node.target, node.args, dict(node.kwargs)):
            node.target, node.args, node.kwargs = target, args, kwargs
            count += 1
    return count


# rewrite: sizes ---------------------------------------------------------------------------------


def _hoist_sizes(graph: Graph) -> int:
    """One node per size expression, before everything else, under no module."""
    maker = SizeBuilder(graph, anchor=_first_call(graph))
    count = 0
    for node in graph.nodes:
        size = node.meta.get("val")
        if node.op != "call_function" or not isinstance(size, (int, torch.SymInt)):
            continue
        try:
            value = maker.operand(size)
        except KeyError:  # a size that depends on data stays where it is computed
            continue
        _replace_value(node, value)
        count += node.target is not A.sym_size.int or node.args[0] not in graph.inputs
    graph.module.graph.eliminate_dead_code()
    return count


def _first_call(graph: Graph) -> fx.Node:
    """The first node after all inputs and weights."""
    nodes = graph.nodes
    leaves = [at for at, node in enumerate(nodes) if node.op in ("placeholder", "get_attr")]
    return nodes[max(leaves, default=-1) + 1]


def _replace_value(node: fx.Node, value: Any) -> None:
    """Every user of ``node`` gets ``value``, which may be a python number."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)


# rewrite: RMSNorm -------------------------------------------------------------------------------

_WIDE = (torch.float32, torch.float64)
_NORMALIZED = op(
    A.mul.Tensor,
    any_("x"),
    op(
        A.rsqrt.default,
        op(
            A.add.Tensor,
            op(
                A.mean.dim,
                either(
                    op(A.pow.Tensor_Scalar, any_("squared"), 2),
                    op(A.square.default, any_("squared")),
                    op(A.mul.Tensor, any_("squared"), any_("squared")),
                ),
                any_list("dims"),
                True,
            ),
            number("eps"),
        ),
    ),
    commutes=True,
)


def _fuse_rms_norms(graph: Graph) -> int:
    return sum(_fuse_rms_norm(graph, node) for node in graph.nodes if node.target is A.mul.Tensor)


def _fuse_rms_norm(graph: Graph, node: fx.Node) -> bool:
    found = match(_NORMALIZED, node)
    if isinstance(found, Mismatch):
        return False
    x, squared = found["x"], found["squared"]
    value = x.meta["val"]
    if (
        (squared is not x and _narrow(squared) is not x)
        or squared.meta["val"].dtype not in _WIDE
        or list(found["dims"]) not in ([-1], [value.ndim - 1])
        or not isinstance(value.shape[-1], int)
    ):
        return False
    last, source = _rounding(node, x, squared)
    weight = None
    scaled = _only_user(last)
    if scaled is not None and (weight := _channel_weight(graph, scaled, last)) is not None:
        last = scaled
    norm = graph.call(
        A.rms_norm.default, source, [value.shape[-1]], weight, float(found["eps"]), before=last
    )
    graph.replace(last, norm)
    return True


def _rounding(node: fx.Node, x: fx.Node, squared: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The value that one rms_norm replaces and what it reads: casts around the norm go with it."""
    narrow = x if x.meta["val"].dtype not in _WIDE else _narrow(x)
    cast = _only_user(node)
    if (
        narrow is not None
        and cast is not None
        and cast.target is A._to_copy.default
        and cast.meta["val"].dtype == narrow.meta["val"].dtype
    ):
        return cast, narrow
    return node, squared if squared.meta["val"].dtype == node.meta["val"].dtype else x


def _narrow(node: fx.Node) -> fx.Node | None:
    """What ``node`` is a widening cast of, or None."""
    if node.target is not A._to_copy.default:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source if source.meta["val"].dtype in (torch.float16, torch.bfloat16) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _channel_weight(graph: Graph, node: fx.Node, normalized: fx.Node) -> fx.Node | None:
    """The weight that ``node`` multiplies the normalised value by, if rms_norm can take it."""
    if node.target is not A.mul.Tensor:
        return None
    left, right = node.args[:2]
    weight = right if left is normalized else left
    value = normalized.meta["val"]
    if not isinstance(weight, fx.Node) or weight is normalized or not graph.is_constant(weight):
        return None
    same = weight.meta["val"].dtype == value.dtype
    return weight if same and tuple(weight.meta["val"].shape) == (value.shape[-1],) else None


# rewrite: attention -----------------------------------------------------------------------------


def _fuse_attentions(graph: Graph, ctx: Context) -> int:
    """Fuse attention that is written out, unless the probe feels that narrow scores were rounded.

    Code in half precision rounds its scores, by 0.25 where they reach 64; the one op does not.
    """

    def tell(softmax: fx.Node, reason: str) -> None:
        sentence = f"attention stays written out, so it is no site: {reason}"
        ctx.diagnostics.remark(module_path(softmax), "attention-written-out", sentence)

    if not any(node.target in SOFTMAXES for node in graph.nodes):
        return 0
    dtype = getattr(torch, graph.origin.dtype)
    if dtype in (torch.float16, torch.bfloat16) and ctx.samples:
        graph.version += 1
        fused = graph.clone()
        count = fuse_attentions(fused, lambda softmax, reason: None)
        inputs = ctx.probe_inputs(graph)
        moved = relative_error(*(probe_output(g, inputs) for g in (fused, graph))) if count else 0.0
        if moved > TOLERANCE[dtype] / 2:
            ctx.diagnostics.warning(
                "",
                "attention-written-out",
                f"{count} attentions stay written out, so they are no sites: the model rounds "
                f"scores to {graph.origin.dtype}, and not to do so moves its output by {moved:.1e}",
                "compute the scores in float32, or call scaled_dot_product_attention",
            )
            return 0
    return fuse_attentions(graph, tell)


# rewrite: equal nodes ---------------------------------------------------------------------------

_IMPURE = (
    A.empty_like,
    A.empty,
    A.new_empty,
    A.rand,
    A.randn,
    A.rand_like,
    A.randn_like,
    A.dropout,
)


def _merge_equal(graph: Graph) -> int:
    """Merge equal pure nodes of one block; equal ones of two blocks move in front of both.

    Moving keeps blocks alike: the first must not own a value that the others borrow. Sites stay
    apart, because each is an address.
    """
    seen: dict[Any, fx.Node] = {}
    first = _first_call(graph)
    count = 0
    for node in graph.nodes:
        if node.op != "call_function" or "site" in note(node) or _is_impure(node):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        twin = seen.setdefault(key, node)
        if twin is node or not (block_name(twin) == block_name(node) or _hoist(twin, first)):
            continue
        node.replace_all_uses_with(twin)
        graph.module.graph.erase_node(node)
        count += 1
    return count


def _is_impure(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _IMPURE


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return (type(value), value)


def _hoist(node: fx.Node, first: fx.Node) -> bool:
    """Move ``node`` behind its operands and out of its block, if they are all outside blocks."""
    operands = [operand for operand in node.all_input_nodes if operand.op == "call_function"]
    if any(block_name(operand) for operand in operands):
        return False
    if block_name(node):
        at = node.prev
        while at not in operands and at is not first and at.op != "root":
            at = at.prev
        if at.op != "root":
            at.append(node)
        node.meta.pop("nn_module_stack", None)
    return True
