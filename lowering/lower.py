"""Lowering: a compressed graph to aten and ``vdqc_kernels::`` ops, weights packed site by site.

::

    %x  = vdqc.fake_quantize(%0, None, None, 'int8/token/dynamic')
    %w  = vdqc.fake_quantize(@fc1.weight, @fc1.weight_scale, None, 'int8/channel')
    %y  = aten.linear(%x, %w, @fc1.bias)
    -->
    %c  = vdqc_kernels.quantize_rows(%0, 127, False)
    %y  = vdqc_kernels.int8_linear(%c[0], %c[1], None, @fc1.kernel.weight, ..., @fc1.bias, bf16)

A branch beside a site joins its kernel (``lowering/branch.py``); binary planes of a weight are
linears of one bit whose sum the site's own kernel takes in::

    Δ·q + a·B  ->  packed_linear(%c, @q, ..., residual=packed_linear(%c, @B, ...))

Codes are those of ``fake_quantize``, so the result equals the compressed graph's up to float
rounding. A site that no kernel supports runs in plain aten, with a warning that names it and the
reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from vdqc.base.diagnostics import Diagnostics, LoweringError
from vdqc.base.scheme import GranularityKind
from vdqc.base.target import Target
from vdqc.ir import transforms
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.learned import cast
from vdqc.ir.ops import FAKE_QUANTIZE, KRONECKER, ROTATE
from vdqc.ir.resume import WeightWork, share
from vdqc.ir.site import Site, SiteKind, set_note
from vdqc.ir.verifier import verify
from vdqc.kernels.attention import ATTENTION
from vdqc.kernels.group_linear import GROUP_LINEAR
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS, QUANTIZE_ROWS_ASYM, QUANTIZE_STATIC
from vdqc.kernels.rotation import ROTATION
from vdqc.kernels.weight_only_linear import WEIGHT_ONLY_LINEAR
from vdqc.lowering.branch import branch_of, stored_bytes
from vdqc.lowering.fuse import RowOrder, reorder_rope
from vdqc.lowering.fuse_kernels import fuse_kernels
from vdqc.lowering.fuse_rope import fuse_rope
from vdqc.lowering.pack import (
    grouped_work,
    integer_work,
    pack_planes,
    pack_weight,
    parameter_prefix,
    plane_work,
)
from vdqc.lowering.rules import (
    LinearSite,
    Operand,
    attention_mask,
    linear_site,
)
from vdqc.lowering.select import KernelChoice, attention_scale, choose
from vdqc.lowering.sparse import emit_sparse, is_sparse
from vdqc.lowering.spell import spell_fake_quantize, spell_kronecker

_aten = torch.ops.aten


@torch.no_grad()
def lower(
    graph: Graph,
    target: Target,
    diagnostics: Diagnostics,
    *,
    progress: Callable[[Any, str], Any] = lambda items, description: items,
) -> list[KernelChoice]:
    """Lower ``graph`` in place for ``target`` and return what runs each site.

    Raises LoweringError for a graph at another stage than annotated or compressed.
    """
    if graph.stage not in (Stage.ANNOTATED, Stage.COMPRESSED):
        raise LoweringError(
            f"expected a graph at annotated or compressed, got {graph.stage}",
            "run the passes first: canonicalize, annotate, quant",
        )
    with graph.edited_by("lower"):
        _settle(graph)
        choices = choose(graph, target)
        stored: dict[str, tuple[int, float]] = {}
        packed = {choice.site for choice in choices if choice.kernel != "aten"}
        orders = reorder_rope(graph, packed)
        for site in graph.sites(kind=SiteKind.LINEAR):
            order = orders.get(site.name)
            transforms.place(graph, site, None if order is None else order.rows)
        emit = _Emitter(graph, orders, target)
        pairs = list(zip(graph.sites(), choices, strict=True))
        share(graph, emit.work(pairs), "pack", progress)
        for site, choice in progress(pairs, "lower"):
            _report(choice, diagnostics)
            if site.kind is SiteKind.LINEAR and choice.kernel != "aten":
                linear = linear_site(graph, site)
                size = emit.linear(linear, choice.kernel)
                count = max(1, linear.problem.n * linear.problem.k)
                stored[site.name] = size, round(8 * size / count, 3)
            elif is_sparse(site.node):
                emit_sparse(graph, site.node, choice.kernel, target)
            elif site.kind is SiteKind.ATTENTION and choice.kernel != "aten":
                emit.attention(site.node)
        _rotations(graph)
        _leftovers(graph)
        if target.device == "cuda":
            fuse_kernels(graph)
            fuse_rope(graph)
    graph.stage = Stage.LOWERED
    graph.clean()
    verify(graph)
    return [
        replace(choice, bytes=stored[choice.site][0], bits=stored[choice.site][1])
        if choice.site in stored
        else choice
        for choice in choices
    ]


def _report(choice: KernelChoice, diagnostics: Diagnostics) -> None:
    if choice.fallback:
        diagnostics.warning(
            choice.site, "kernel-fallback", f"runs in float, in plain aten: {choice.why}"
        )
    elif choice.kernel != "aten":
        diagnostics.remark(
            choice.site,
            "kernel-choice",
            f"{choice.kernel} chosen at {choice.predicted_us:.0f} us, next {choice.runner_up}",
        )


class _Emitter:
    """Replaces site nodes by kernel calls; shared activations and shared weights are made once."""

    def __init__(self, graph: Graph, orders: dict[str, RowOrder], target: Target) -> None:
        self._graph = graph
        self._orders = orders
        self._target = target
        self._activations: dict[Any, tuple[fx.Node, fx.Node, fx.Node | None]] = {}
        self._weights: dict[Any, dict[str, fx.Node | None]] = {}

    def linear(self, linear: LinearSite, kernel: str) -> int:
        """Emit ``kernel`` and what goes with it; bytes of the parameters that it reads."""
        graph, node = self._graph, linear.site.node
        bias, dtype = self._bias(linear), node.meta["val"].dtype
        weight = self._weight(linear, kernel)
        w, ws, wz = weight["weight"], weight["scale"], weight["zero_point"]
        bits = linear.weight.spec.dtype.bits if linear.weight.spec is not None else 0
        branch = branch_of(node)
        planes, read = self._planes(linear, kernel)
        size = stored_bytes([*weight.values(), *read], branch)
        end: dict[str, Any] = {} if planes is None else {"residual": planes}
        if branch is not None and branch.fits(self._target):
            end |= {"down": branch.narrow, "up": branch.up}
        if kernel == WEIGHT_ONLY_LINEAR.name:
            args: tuple[Any, ...] = (linear.input.value, w, bits, ws, wz, bias)
            new = graph.call(WEIGHT_ONLY_LINEAR.op, *args, before=node)
        else:
            x = self._activation(linear.input, node)
            if kernel == INT8_LINEAR.name:
                args = (*x, w, ws, wz, weight["sum"], bias, dtype)
                new = graph.call(INT8_LINEAR.op, *args, before=node, **end)
            elif kernel == PACKED_LINEAR.name:
                args = (*x, w, bits, weight["multiplier"], ws, wz, weight["sum"], bias, dtype)
                new = graph.call(PACKED_LINEAR.op, *args, before=node, **end)
            else:
                new = graph.call(GROUP_LINEAR.op, *x, w, bits, ws, wz, bias, dtype, before=node)
        if kernel in (INT8_LINEAR.name, PACKED_LINEAR.name):
            if "down" in end:
                assert branch is not None
                graph.replace(branch.total, new)
        elif planes is not None:
            new = cast(graph, graph.call(_aten.add.Tensor, new, planes, before=node), dtype, node)
        graph.replace(node, new)
        set_note(new, kernel=kernel)
        order = self._orders.get(linear.site.name)
        if order is not None:
            set_note(new, basis=f"halves{{{order.width}}}")
        return size

    def work(self, pairs: Iterable[tuple[Site, KernelChoice]]) -> Iterator[WeightWork]:
        """What packing the weights of all sites will ask for."""
        for site, choice in pairs:
            if site.kind is SiteKind.LINEAR and choice.kernel != "aten":
                linear = linear_site(self._graph, site)
                yield self._weight_work(linear, choice.kernel)
                if linear.weight.spec is not None and linear.weight.spec.planes:
                    yield plane_work(self._graph, linear, **self._plane_form(linear, choice.kernel))

    def _weight_work(self, linear: LinearSite, kernel: str) -> WeightWork:
        order = self._orders.get(linear.site.name)
        rows = None if order is None else order.rows
        if kernel in (INT8_LINEAR.name, PACKED_LINEAR.name):
            packed = kernel == PACKED_LINEAR.name
            return integer_work(self._graph, linear, packed=packed, rows=rows)
        return grouped_work(self._graph, linear, rows)

    def _plane_form(self, linear: LinearSite, kernel: str) -> dict[str, Any]:
        order, spec = self._orders.get(linear.site.name), linear.weight.spec
        grouped = spec is not None and spec.granularity.kind is GranularityKind.GROUP
        integer = kernel != WEIGHT_ONLY_LINEAR.name and not grouped
        return {"integer": integer, "rows": None if order is None else order.rows}

    def _planes(
        self, linear: LinearSite, kernel: str
    ) -> tuple[fx.Node | None, list[fx.Node | None]]:
        """The sum of the products with binary planes, and the parameters that it reads."""
        graph, before, spec = self._graph, linear.site.node, linear.weight.spec
        if spec is None or not spec.planes:
            return None, []
        grouped = spec.granularity.kind is GranularityKind.GROUP
        weight_only = kernel == WEIGHT_ONLY_LINEAR.name
        parts = pack_planes(graph, linear, **self._plane_form(linear, kernel))
        total: fx.Node | None = None
        for part in parts:
            w, scale, zero = part["weight"], part["scale"], part.get("zero_point")
            if weight_only:
                args: tuple[Any, ...] = (linear.input.value, w, 1, scale, zero, None)
                value = graph.call(WEIGHT_ONLY_LINEAR.op, *args, before=before)
            else:
                x = self._activation(linear.input, before)
                wide = x[1].meta["val"].dtype
                if not grouped:
                    end: dict[str, Any] = {} if total is None else {"residual": total}
                    if part["offset"] is not None:
                        end |= {"down": self._row_sum(x, before), "up": part["offset"]}
                    args = (*x, w, 1, None, scale, None, part["sum"], None, wide)
                    total = graph.call(PACKED_LINEAR.op, *args, before=before, **end)
                    continue
                value = graph.call(
                    GROUP_LINEAR.op, *x, w, 1, scale, zero, None, wide, before=before
                )
            if total is not None:
                value = graph.call(_aten.add.Tensor, total, value, before=before)
            total = value
        return total, [node for part in parts for node in part.values()]

    def _row_sum(self, x: tuple[fx.Node, fx.Node, fx.Node | None], before: fx.Node) -> fx.Node:
        """Sum of the quantised input over its channels, [..., 1] in the dtype of its scale."""
        codes, scale, zero_point = x

        def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return self._graph.call(op, *args, before=before, **kwargs)

        total = call(_aten.sum.dim_IntList, codes, [-1], True, dtype=torch.int32)
        if zero_point is not None:
            width = codes.meta["val"].shape[-1]
            total = call(_aten.sub.Tensor, total, call(_aten.mul.Tensor, zero_point, width))
        return call(_aten.mul.Tensor, total, scale)

    def attention(self, node: fx.Node) -> None:
        graph = self._graph
        query, key, value = node.args[:3]
        args = (query, key, value, attention_mask(node), attention_scale(node))
        new = graph.call(ATTENTION.op, *args, before=node)
        graph.replace(node, new)
        set_note(new, kernel=ATTENTION.name)

    def _bias(self, linear: LinearSite) -> fx.Node | None:
        bias = linear.site.bias
        order = self._orders.get(linear.site.name)
        if bias is None or order is None:
            return bias
        name = f"{parameter_prefix(linear.site.name)}.bias"
        return self._graph.set_param(name, self._graph.evaluate(bias)[order.rows])

    def _weight(self, linear: LinearSite, kernel: str) -> dict[str, fx.Node | None]:
        order = self._orders.get(linear.site.name)
        rows = None if order is None else order.rows
        key = (linear.site.weight.target, linear.site.weight.args, linear.input.spec, kernel)
        if rows is not None or key not in self._weights:
            made = pack_weight(self._graph, linear, self._weight_work(linear, kernel))
            if rows is not None:
                return made
            self._weights[key] = made
        return self._weights[key]

    def _activation(
        self, operand: Operand, before: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        key = (operand.value, operand.spec, operand.scale, operand.zero_point)
        if key not in self._activations:
            dynamic = operand.spec is not None and operand.spec.dynamic
            made = self._static if operand.scale is not None and not dynamic else self._dynamic
            self._activations[key] = made(operand, before)
        return self._activations[key]

    def _dynamic(
        self, operand: Operand, before: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        graph, spec = self._graph, operand.spec
        assert spec is not None
        per_tensor = spec.granularity.kind is GranularityKind.TENSOR
        if spec.symmetric:
            op, limit = QUANTIZE_ROWS.op, spec.qmax
        else:
            op, limit = QUANTIZE_ROWS_ASYM.op, spec.dtype.bits
        clip = () if operand.scale is None else (operand.scale,)
        both = graph.call(op, operand.value, limit, per_tensor, *clip, before=before)
        parts = [
            graph.call(operator.getitem, both, index, before=before)
            for index in range(2 if spec.symmetric else 3)
        ]
        return parts[0], parts[1], None if spec.symmetric else parts[2]

    def _static(self, operand: Operand, before: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        graph, spec = self._graph, operand.spec
        assert spec is not None
        assert operand.scale is not None
        half = 0 if spec.symmetric else 2 ** (spec.dtype.bits - 1)
        zero = None
        if operand.zero_point is not None:
            moved = graph.evaluate(operand.zero_point) - half
            owner = str(operand.zero_point.target).rpartition(".")[0]
            name = f"{parameter_prefix(owner)}.input_zero_point"
            zero = graph.set_param(name, moved.to(torch.int32))
        args = (operand.value, operand.scale, zero, spec.qmin - half, spec.qmax - half)
        codes = graph.call(QUANTIZE_STATIC.op, *args, before=before)
        return codes, operand.scale, zero


def _settle(graph: Graph) -> None:
    """What is free becomes plain, and what is computed from it a weight: nobody trains any more."""
    trained = set(graph.free)
    for name in sorted(trained):
        graph.set_param(name, graph.param(name).detach())
    reads: dict[fx.Node, bool] = {}  # constant expressions: do they read a trained parameter?
    for node in graph.nodes:
        if node.op == "get_attr":
            reads[node] = node.target in trained
        elif node.op == "call_function" and node.target is not FAKE_QUANTIZE:
            operands = node.all_input_nodes
            if operands and all(operand in reads for operand in operands):
                reads[node] = any(reads[operand] for operand in operands)
    for index, (node, learned) in enumerate(reads.items()):
        ends = any(user not in reads for user in node.users)
        if learned and ends and node.op == "call_function":
            name = f"learned.value_{index}"
            transforms.bound(graph, name, node)
            graph.replace(node, graph.set_param(name, graph.evaluate(node)))


def _rotations(graph: Graph) -> None:
    for node in graph.nodes:
        if node.target is ROTATE and not graph.is_constant(node):
            inverse = bool(node.args[3]) if len(node.args) > 3 else False
            args = (*node.args[:3], inverse)
            graph.replace(node, graph.call(ROTATION.op, *args, before=node))


def _leftovers(graph: Graph) -> None:
    """Whatever is left of the ``vdqc::`` dialect: constants become weights, the rest plain aten."""
    graph.module.graph.eliminate_dead_code()
    for index, node in enumerate(graph.nodes):
        namespace = getattr(node.target, "namespace", "")
        if node.op != "call_function" or namespace != "vdqc":
            continue
        if graph.is_constant(node):
            param = graph.set_param(f"folded.value_{index}", graph.evaluate(node))
            node.replace_all_uses_with(param)
            graph.module.graph.erase_node(node)
        elif node.target is FAKE_QUANTIZE:
            spell_fake_quantize(graph, node)
        elif node.target is KRONECKER:
            spell_kronecker(graph, node)
        else:
            raise LoweringError(f"no kernel computes {node.target} (%{node.name})")


__all__ = ["KernelChoice", "lower"]
