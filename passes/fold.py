"""Moves what exact passes inserted into the weights and small values around it.

::

    linear(mul(norm(x, @g, @b), @s), w)   ->  linear(norm(x, @g·s, @b·s), w)
    linear(rotate(linear(x, @v), @r), w)  ->  linear(linear(x, rotate(@vᵀ, @r)ᵀ), w)
    mul(mul(x, @s), @t)                   ->  mul(x, @s·t)
    linear(x, mul(@w, @s))                ->  linear(x, @w·s)

Scales go into norms, modulations and linears, rotations into linears, where dataflow shows that the
value is scaled or rotated for its readers alone; what nothing can carry stays one multiply or one
rotation. Behind quantisers only what rounds nothing moves (powers of two): a float that differs in
its last digit may get another code, so the place to fold is before ``quant``. Then constant
expressions become plain weights, unless they read a weight that is on disk or one that is being
trained; the weight behind a ``fake_quantize`` is folded, the quantiser stays.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438, section 4 (norms); Ashkboos et al., QuaRot,
arXiv 2404.00456, section 4 (linears); attention values and adaLN modulation by the same algebra.
Invariant: the function of the graph is unchanged, at compressed bit for bit, and folding twice
changes nothing more.
Online: less than before; a scale that adaLN carries costs a multiply of a value without tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir import transforms
from vdqc.ir.analysis.absorb_rotation import RotateEdit, absorb_rotation
from vdqc.ir.analysis.absorb_scale import Cost, ScaleEdit, absorb_scale
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.names import weight_source
from vdqc.ir.ops import FAKE_QUANTIZE, ROTATE
from vdqc.ir.site import note, set_note

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class Fold(Pass):
    """Folds scales, rotations and constant expressions."""

    name: ClassVar[str] = "fold"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED, Stage.COMPRESSED})
    exact: ClassVar[bool] = True

    def planned(self) -> PlannedFold:
        """The same moves, without computing any weight."""
        return PlannedFold()

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Fold; facts: how many of each kind went, how many stay online."""
        facts = {
            "rotations": fold_rotations(graph, ctx),
            "merged": merge_scales(graph),
            "scales": fold_scales(graph, ctx),
            "weights": fold_constants(graph, ctx),
        }
        online = {
            "online_rotations": len(online_rotations(graph)),
            "online_scales": len(online_scales(graph)),
        }
        return PassResult(sum(facts.values()), {**facts, **online})


@final
@dataclass(frozen=True)
class PlannedFold(Pass):
    """``Fold`` that leaves constant expressions as they are."""

    name: ClassVar[str] = "fold"
    at: ClassVar[frozenset[Stage]] = Fold.at
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Move what can move."""
        count = fold_rotations(graph, ctx) + merge_scales(graph) + fold_scales(graph, ctx)
        graph.module.graph.eliminate_dead_code()
        return PassResult(count)


def online_rotations(graph: Graph) -> list[fx.Node]:
    """Rotations of activations."""
    return [
        node
        for node in graph.nodes
        if node.target is ROTATE and len(node.args) < 4 and not graph.is_constant(node)
    ]


def online_scales(graph: Graph) -> list[fx.Node]:
    """Multiplies of an activation by a positive constant per channel that a pass inserted."""
    return [node for node in graph.nodes if _is_scale(graph, node)]


def _is_scale(graph: Graph, node: fx.Node) -> bool:
    if node.target is not aten.mul.Tensor or not note(node).get("origin"):
        return False
    value, factor = node.args
    return (
        isinstance(value, fx.Node)
        and isinstance(factor, fx.Node)
        and factor.op == "get_attr"
        and factor.meta["val"].ndim == 1
        and str(factor.target) not in graph.free
        and not graph.is_constant(value)
        and bool((graph.param(str(factor.target)) > 0).all())
    )


def fold_rotations(graph: Graph, ctx: Context) -> int:
    """Rotate the rows of producers instead of their output, where all of it is read rotated."""
    count = 0
    for node in online_rotations(graph):
        value, signs, block = node.args[:3]
        assert isinstance(value, fx.Node)
        assert isinstance(signs, fx.Node)
        assert isinstance(block, int)
        fold = absorb_rotation(graph, value, [node], block)
        if reason := fold.reason if not fold.edits else _objection(graph, fold.edits):
            ctx.diagnostics.remark(_reader(node), "online-rotation", reason)
            continue
        for edit in fold.edits:
            operand = _operand(edit.node, edit.operand)
            if operand is not None:
                rotated = rotated_rows(graph, operand, signs, block, edit)
                graph.set_operand(edit.node, edit.operand, rotated)
                _moved(edit.node, "rotated")
        graph.replace(node, value)
        count += 1
    return count


def rotated_rows(
    graph: Graph, operand: fx.Node, signs: fx.Node, block: int, edit: RotateEdit
) -> fx.Node:
    """``operand`` (weight [N, K] or bias [N]) with the rows that ``edit`` names rotated."""

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call(op, *args, before=edit.node)

    end = edit.at + edit.stop - edit.start
    whole = edit.at == 0 and end == edit.size
    rows = operand if whole else call(aten.slice.Tensor, operand, 0, edit.at, end)
    if edit.stop - edit.start != int(signs.meta["val"].shape[0]):
        signs = call(aten.slice.Tensor, signs, 0, edit.start, edit.stop)
    if operand.meta["val"].ndim == 1:
        rows = call(ROTATE, rows, signs, block)
    else:
        columns = call(ROTATE, call(aten.transpose.int, rows, 0, 1), signs, block)
        rows = call(aten.transpose.int, columns, 0, 1)
    if whole:
        return rows
    parts = [call(aten.slice.Tensor, operand, 0, 0, edit.at)] if edit.at else []
    parts.append(rows)
    parts += [call(aten.slice.Tensor, operand, 0, end, edit.size)] if end < edit.size else []
    return call(aten.cat.default, parts)


def merge_scales(graph: Graph) -> int:
    """One multiply for two in a row."""
    count = 0
    for outer in online_scales(graph):
        inner, factor = _nodes(outer.args)
        if not _is_scale(graph, inner) or len(inner.users) > 1 or len(factor.users) > 1:
            continue
        value, other = _nodes(inner.args)
        scales = graph.param(str(factor.target)), graph.param(str(other.target))
        if graph.stage is Stage.COMPRESSED and not any(map(_rounds_nothing, scales)):
            continue
        graph.set_param(str(factor.target), scales[0] * scales[1])
        graph.set_operand(outer, 0, value)
        graph.module.graph.erase_node(inner)
        count += 1
    return count


def fold_scales(graph: Graph, ctx: Context) -> int:
    """Scale what is above a multiply instead, where all of it is read scaled."""
    count = 0
    for node in online_scales(graph):
        value, factor = _nodes(node.args)
        fold = absorb_scale(graph, value, [node])
        online = fold.cost is Cost.ONLINE or not fold.edits
        name = str(factor.target)
        if reason := fold.reason if online else _objection(graph, fold.edits, graph.param(name)):
            ctx.diagnostics.remark(_reader(node), "online-scale", reason)
            continue
        for index, edit in enumerate(fold.edits):
            scale_operand(graph, edit, graph.param(name), f"{name}_{index}")
        graph.replace(node, value)
        count += 1
    return count


def scale_operand(graph: Graph, edit: ScaleEdit, scale: Tensor, name: str) -> None:
    """Carry out one edit: the operand times its piece of ``scale``, bound as parameter ``name``."""
    operand = _operand(edit.node, edit.operand)
    factor = edit.factor(scale)
    dtype = (edit.node if operand is None else operand).meta["val"].dtype
    if operand is None:
        value = graph.set_param(name, (factor - 1 if edit.plus_one else factor).to(dtype))
    else:
        param = graph.set_param(name, factor.to(dtype))
        value = graph.call(aten.mul.Tensor, operand, param, before=edit.node)
        if edit.plus_one:
            offset = graph.set_param(f"{name}_offset", (factor - 1).to(dtype))
            value = graph.call(aten.add.Tensor, value, offset, before=edit.node)
    if len(edit.node.args) <= edit.operand:
        missing = edit.operand + 1 - len(edit.node.args)
        edit.node.args = (*edit.node.args, *[None] * missing)
    graph.set_operand(edit.node, edit.operand, value)
    _moved(edit.node, "scaled")


def _moved(node: fx.Node, basis: str) -> None:
    """Note that a site's output is no longer that of the float model, channel by channel."""
    if "site" in note(node):
        before = note(node).get("basis", "")
        set_note(node, basis=basis if before in ("", basis) else "rotated and scaled")


def fold_constants(graph: Graph, ctx: Context) -> int:
    """Plain weights for expressions of weights in memory; one is held at a time."""
    roots = constant_roots(graph)
    for node in ctx.progress(roots, "fold"):
        name = _weight_name(graph, node)
        operands = node.all_input_nodes
        transforms.bound(graph, name, node)
        graph.replace(node, graph.set_param(name, graph.evaluate(node)))
        erase_unread(graph, operands)
    return len(roots)


def erase_unread(graph: Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase those of ``nodes`` that nothing reads, and what only they read."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if not node.users and not node._erased:
            waiting.extend(node.all_input_nodes)
            graph.module.graph.erase_node(node)


def constant_roots(graph: Graph) -> list[fx.Node]:
    """The largest expressions of weights alone that hold no quantiser and do not grow."""
    leaves: dict[fx.Node, int] = {}  # bytes of the weights that an expression reads
    for node in graph.nodes:
        if node.op == "get_attr":
            if node.target not in graph.stored and node.target not in graph.free:
                leaves[node] = _bytes(node)
        elif node.op == "call_function" and node.target is not FAKE_QUANTIZE:
            operands = node.all_input_nodes
            if operands and all(operand in leaves for operand in operands):
                leaves[node] = sum(leaves[operand] for operand in operands)
    return [
        node
        for node, read in leaves.items()
        if node.op == "call_function"
        and isinstance(node.meta["val"], Tensor)
        and _bytes(node) <= read
        and any(user not in leaves for user in node.users)
    ]


def _weight_name(graph: Graph, node: fx.Node) -> str:
    """The name of the weight that ``node`` starts from if nothing else reads it, else a new one."""
    source = weight_source(node)
    same_shape = source is not None and source.meta["val"].shape == node.meta["val"].shape
    if source is not None and same_shape and _only_feeds(graph, source, node):
        return str(source.target)
    base = f"{source.target if source is not None else node.name}_folded"
    taken = set(graph.param_names())
    names = [base, *(f"{base}_{index}" for index in range(1, len(taken) + 1))]
    return next(name for name in names if name not in taken)


def _only_feeds(graph: Graph, source: fx.Node, root: fx.Node) -> bool:
    same = [n for n in graph.nodes if n.op == "get_attr" and n.target == source.target]
    node = source
    while node is not root and len(node.users) == 1:
        node = next(iter(node.users))
    return node is root and len(same) == 1


def _objection(
    graph: Graph, edits: Sequence[ScaleEdit | RotateEdit], scale: Tensor | None = None
) -> str:
    """Why ``edits`` may not be made although dataflow allows them, or ""."""
    plus_one = any(isinstance(edit, ScaleEdit) and edit.plus_one for edit in edits)
    least = 1.0 if scale is None else float(scale.min())
    for edit in edits:
        operand = _operand(edit.node, edit.operand)
        if operand is not None and operand.target is FAKE_QUANTIZE:
            site = note(edit.node).get("site", edit.node.name)
            return f"{site} could carry it but is quantised already: fold before quant"
        dtype = edit.node.meta["val"].dtype
        if scale is not None and torch.finfo(dtype).eps > torch.finfo(scale.dtype).eps:
            return f"%{edit.node.name} could carry it but computes in {dtype}"
    if plus_one and least < 2.0**-8:  # 1 + (s·d + d - 1) loses the digits by which d is below 1
        return f"1 + scale would lose digits under a factor of {least:.1e}"
    if graph.stage is Stage.COMPRESSED and (plus_one or not _rounds_nothing(scale)):
        return (
            "it would round differently before a quantiser, whose codes change: fold before quant"
        )
    return ""


def _rounds_nothing(scale: Tensor | None) -> bool:
    """True for powers of two: multiplying by them earlier or later gives the same floats."""
    return scale is not None and bool((scale.frexp().mantissa == 0.5).all())


def _operand(node: fx.Node, index: int) -> fx.Node | None:
    operand = node.args[index] if index < len(node.args) else None
    return operand if isinstance(operand, fx.Node) else None


def _nodes(args: Sequence[object]) -> tuple[fx.Node, fx.Node]:
    first, second = args
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return first, second


def _reader(node: fx.Node) -> str:
    """Name of the first site that reads ``node``, through what passes put between."""
    while node.users:
        node = next(iter(node.users))
        if "site" in note(node):
            return str(note(node)["site"])
    return ""


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) * value.dtype.itemsize if isinstance(value, Tensor) else 0
