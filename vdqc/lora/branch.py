"""Adapters as branches beside the linears of a lowered program.

::

    %c = vdqc_kernels.quantize_rows(%x, 127, False)
    %y = vdqc_kernels.int8_linear(%c[0], %c[1], ...)
    -->
    %h = aten.mul(aten.linear(%x, @down), @weight)
    %y = aten.add(vdqc_kernels.int8_linear(...), aten.linear(%h, @up))

``x`` is what the site reads before it is quantised; where a kernel quantises as it goes, the codes
times their scale. Behind an activation that the kernel applies itself, the branch goes through the
kernel's own operands for one; behind a gate it is gated alike. ``weight`` has no axes, so changing
it compiles nothing again.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import InputError
from vdqc.base.target import Target
from vdqc.ir.graph import Graph
from vdqc.ir.site import Site
from vdqc.kernels.group_linear import GROUP_LINEAR
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS, QUANTIZE_ROWS_ASYM, QUANTIZE_STATIC
from vdqc.kernels.weight_only_linear import WEIGHT_ONLY_LINEAR
from vdqc.lowering.branch import GPU_RANKS
from vdqc.lowering.pack import parameter_prefix

aten = torch.ops.aten
_ON_CODES = {INT8_LINEAR.op, PACKED_LINEAR.op, GROUP_LINEAR.op}
_ON_VALUES = {WEIGHT_ONLY_LINEAR.op, aten.linear.default}


@final
@dataclass(frozen=True)
class Branch:
    """One adapter at one site, in the basis of the program: float[r, K], float[N, r]."""

    adapter: str
    down: Tensor
    up: Tensor


def weight_name(adapter: str) -> str:
    """The parameter that holds the weight of ``adapter``."""
    return f"lora_weights.{adapter}"


def factor_names(site: str, adapter: str) -> tuple[str, str]:
    """The parameters that hold its factors at ``site``: down, up."""
    start = f"{parameter_prefix(site)}.lora.{adapter}"
    return f"{start}.down", f"{start}.up"


def takes_branch(site: Site) -> str:
    """Why no branch can stand beside ``site``, or ""."""
    node = site.node
    if node.target in _ON_VALUES:
        return ""
    if node.target not in _ON_CODES:
        return f"{node.target} computes it, which takes no branch"
    if operands(node).get("code_bits", 8) != 8:
        return "its input exists in packed codes alone"
    return ""


def attach(
    graph: Graph, site: Site, branches: Sequence[Branch], target: Target, inputs: dict[Any, fx.Node]
) -> None:
    """Add ``branches`` to what ``site`` computes; ``inputs`` keeps what sites share.

    Raises InputError, naming the site, where its kernel has no room for them.
    """
    node = site.node
    given = operands(node)
    cursor = _Cursor(graph, node)
    inside = given.get("activation", "none") != "none"
    before = _Cursor(graph, node, ahead=True)
    value = _input(site, inputs, before)
    pairs = [_factors(graph, site, branch, value.meta["val"].dtype) for branch in branches]
    place = before if inside else cursor
    narrow = []
    for branch, (down, _) in zip(branches, pairs, strict=True):
        h = place.call(aten.linear.default, value, down)
        narrow.append(place.call(aten.mul.Tensor, h, _node(graph, weight_name(branch.adapter))))
    ups = [up for _, up in pairs]
    if inside:
        _through_kernel(site, given, narrow, ups, target, before)
        return
    total = node
    gate = given.get("gate")
    for h, up in zip(narrow, ups, strict=True):
        wide = cursor.call(aten.linear.default, h, up)
        if gate is not None:
            wide = cursor.call(aten.mul.Tensor, wide, gate)
        wide = cursor.cast(wide, node.meta["val"].dtype)
        added = cursor.call(aten.add.Tensor, total, wide)
        graph.replace(total, added)
        total = added


def operands(node: fx.Node) -> dict[str, Any]:
    """Operands of ``node`` by name; those left out are absent."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _through_kernel(
    site: Site,
    given: Mapping[str, Any],
    narrow: list[fx.Node],
    ups: list[fx.Node],
    target: Target,
    before: _Cursor,
) -> None:
    if given.get("down") is not None:
        narrow, ups = [given["down"], *narrow], [given["up"], *ups]
    rank = sum(int(up.meta["val"].shape[1]) for up in ups)
    if target.device == "cuda" and rank not in GPU_RANKS:
        room = [size for size in GPU_RANKS if size > rank]
        if not room:
            raise InputError(
                f"expected at most rank {GPU_RANKS[-1]} of adapters and branches together, got "
                f"{rank}: its kernel on {target} applies an activation and takes no more",
                "load fewer adapters or one of lower rank, or compile for the CPU",
                site=site.name,
            )
        narrow, ups = _padded(narrow, ups, room[0] - rank, before)
    dtype = narrow[0].meta["val"].dtype
    narrow = [before.cast(h, dtype) for h in narrow]
    ups = [before.cast(up, dtype) for up in ups]
    joined = [
        parts[0] if len(parts) == 1 else before.call(aten.cat.default, parts, -1)
        for parts in (narrow, ups)
    ]
    for name, value in zip(("down", "up"), joined, strict=True):
        _set(site.node, name, value)


def _padded(
    narrow: list[fx.Node], ups: list[fx.Node], missing: int, before: _Cursor
) -> tuple[list[fx.Node], list[fx.Node]]:
    pads = [
        before.call(aten.constant_pad_nd.default, parts[-1], [0, missing])
        for parts in (narrow, ups)
    ]
    return [*narrow[:-1], pads[0]], [*ups[:-1], pads[1]]


def _set(node: fx.Node, name: str, value: fx.Node) -> None:
    schema: Any = node.target._schema  # type: ignore[union-attr]
    position = [argument.name for argument in schema.arguments].index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _input(site: Site, inputs: dict[Any, fx.Node], before: _Cursor) -> fx.Node:
    """The float value that ``site`` reads."""
    node = site.node
    first = node.args[0]
    assert isinstance(first, fx.Node)
    if node.target in _ON_VALUES:
        return first
    made = first.args[0] if first.target is operator.getitem else first
    assert isinstance(made, fx.Node)
    if made.target in (QUANTIZE_ROWS.op, QUANTIZE_ROWS_ASYM.op, QUANTIZE_STATIC.op):
        value = made.args[0]
        assert isinstance(value, fx.Node)
        return value
    if first not in inputs:
        inputs[first] = _dequantised(site, before)
    return inputs[first]


def _dequantised(site: Site, before: _Cursor) -> fx.Node:
    codes, scale, zero_point = site.node.args[:3]
    assert isinstance(scale, fx.Node)
    if zero_point is not None:
        codes = before.call(aten.sub.Tensor, codes, zero_point)
    value = before.call(aten.mul.Tensor, codes, scale)
    dtype: torch.dtype = site.node.meta["val"].dtype
    return before.cast(value, dtype)


def _factors(
    graph: Graph, site: Site, branch: Branch, dtype: torch.dtype
) -> tuple[fx.Node, fx.Node]:
    names = factor_names(site.name, branch.adapter)
    down, up = (
        bind(graph, name, value.to(dtype).contiguous())
        for name, value in zip(names, (branch.down, branch.up), strict=True)
    )
    return down, up


def bind(graph: Graph, name: str, value: Tensor) -> fx.Node:
    """``value`` as a buffer that no state dictionary holds: an artifact is saved without it."""
    node = graph.set_param(name, value)
    owner = graph.module.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    delattr(owner, leaf)
    owner.register_buffer(leaf, value, persistent=False)
    return node


def _node(graph: Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "get_attr" and n.target == name)


@final
class _Cursor:
    """Inserts nodes one behind the other: after a node, or in front of it."""

    def __init__(self, graph: Graph, node: fx.Node, *, ahead: bool = False) -> None:
        self.graph, self.node, self.ahead = graph, node, ahead
        self.made: list[fx.Node] = []

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """``op`` at this place."""
        if self.ahead:
            new = self.graph.call(op, *args, before=self.node, **kwargs)
        else:
            after = self.made[-1] if self.made else self.node
            new = self.graph.call_after(op, *args, after=after, **kwargs)
        self.made.append(new)
        return new

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` in ``dtype``; itself if it is."""
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(aten._to_copy.default, node, dtype=dtype)
