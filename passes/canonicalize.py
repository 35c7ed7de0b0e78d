"""One spelling per op, nothing that does nothing: the subset of aten that every later pass may rely on.

::

    type_as(clone(x), x)                              ->  x
    slice(x, 0, 0, 9223372036854775807), x * 1        ->  x
    to(x, bf16), type_as(x, bf16 value)               ->  _to_copy(x, dtype=bf16)
    view, _unsafe_view, squeeze, flatten, view_as     ->  reshape
    split_with_sizes(x, [n, n]), chunk                ->  split(x, n)
    x * rsqrt(mean(x²) + eps) [cast] * w              ->  rms_norm(x, w, eps) [casts]
    sym_size(any value), size arithmetic              ->  once, at the top, from the inputs' sizes
    two equal pure nodes                              ->  one

Only legal because capture functionalised the graph: nothing writes, so a copy is its source.

Source: RMSNorm: Zhang and Sennrich, arXiv 1910.07467, eq. 4.
Invariant: bit-exact, except that a fused rms_norm rounds once where half-precision code rounds twice
    (its sum of squares stays in float32).
Online: costs nothing, removes nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, final

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy import functions as size_functions

from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.graph import Graph, Stage, block_name
from vdqc.ir.pattern import any_, any_list, either, match, number, op
from vdqc.ir.site import note

A = torch.ops.aten
_END = 9223372036854775807


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
            "merged": _merge_equal(graph),
        }
        graph.module.graph.eliminate_dead_code()
        graph.version += 1
        return PassResult(
            sum(counts.values()), {**counts, "nodes": f"{before} -> {len(graph.nodes)}"}
        )


# match: which nodes do nothing ------------------------------------------------------------------

_COPIES = {
    A.clone.default,
    A.contiguous.default,
    A.alias.default,
    A.detach.default,
    A.lift_fresh_copy.default,
    A.type_as.default,
    A._to_copy.default,
    A.to.dtype,
    A.to.dtype_layout,
    A.to.device,
    A.to.other,
    A.expand.default,
    A.reshape.default,
}
_VIEWS = {
    A.reshape.default,
    A.permute.default,
    A.transpose.int,
    A.unsqueeze.default,
    A.slice.Tensor,
    A.select.int,
    A.expand.default,
    A.split.Tensor,
    A.split_with_sizes.default,
    A.unbind.int,
    operator.getitem,
}
_STRIDED = {A.view_as_complex.default, A.as_strided.default, A.view.dtype}
_ONE = {A.mul.Tensor, A.div.Tensor}
_ZERO = {A.add.Tensor, A.sub.Tensor}


def noop_source(node: fx.Node) -> fx.Node | None:
    """The operand that ``node`` equals bit for bit, or None if it does something."""
    if node.op != "call_function" or not node.args:
        return None
    if node.target is A.cat.default:
        return _rejoined(node)
    source = node.args[0]
    if not isinstance(source, fx.Node) or not _same_type(source, node):
        return None
    if node.target in _COPIES:
        return None if _strides_matter(node) or _escapes(node, source) else source
    if node.target is A.slice.Tensor:
        return source if (len(node.args) < 5 or node.args[4] == 1) else None
    if node.target is A.dropout.default:
        return source if not node.args[2] else None
    neutral = 1 if node.target in _ONE else 0 if node.target in _ZERO else None
    other = node.args[1] if len(node.args) > 1 else None
    if neutral is not None and isinstance(other, (int, float)) and other == neutral:
        return source
    return None


def _rejoined(node: fx.Node) -> fx.Node | None:
    """What was cut into consecutive slices that ``node`` puts together again, or None."""
    parts, dim = node.args
    assert isinstance(parts, (list, tuple))
    if not all(isinstance(part, fx.Node) and part.target is A.slice.Tensor for part in parts):
        return None
    cuts = [part.args for part in parts]  # type: ignore[union-attr]
    source, axis = cuts[0][0], cuts[0][1]
    if any(len(cut) != 4 or cut[0] is not source or cut[1] != axis for cut in cuts):
        return None
    bounds = [0, *(cut[3] for cut in cuts)]
    if dim != axis or bounds[-1] != _END or any(
        cut[2] != bound for cut, bound in zip(cuts, bounds, strict=False)
    ):
        return None
    return source if isinstance(source, fx.Node) else None


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.dtype == y.dtype
        and x.device == y.device
        and x.ndim == y.ndim
        and all(_expr(m) == _expr(n) for m, n in zip(x.shape, y.shape, strict=True))
    )


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _strides_matter(node: fx.Node) -> bool:
    """True if an op that needs certain strides reads ``node`` through views."""
    if node.target not in (A.clone.default, A.contiguous.default):
        return False
    frontier, seen = list(node.users), set()
    while frontier:
        user = frontier.pop()
        if user.target in _STRIDED:
            return True
        if user.target in _VIEWS and user not in seen:
            seen.add(user)
            frontier.extend(user.users)
    return False


def _escapes(node: fx.Node, source: fx.Node) -> bool:
    """True if dropping the copy would hand an input or a weight itself to the caller."""
    if source.op not in ("placeholder", "get_attr"):
        return False
    return any(user.op == "output" for user in node.users)


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
        rule = _SPELLINGS.get(node.target) if node.op == "call_function" else None
        try:
            spelled = rule(graph, node) if rule is not None else None
        except KeyError:  # a size that the inputs do not tell: the old spelling stands
            spelled = None
        if spelled is None:
            continue
        target, args, kwargs = spelled
        if (target, args, kwargs) != (node.target, node.args, dict(node.kwargs)):
            node.target, node.args, node.kwargs = target, args, kwargs
            count += 1
    return count


_Spelling = tuple[Any, tuple[Any, ...], dict[str, Any]] | None
_Rule = Callable[[Graph, fx.Node], _Spelling]


def _cast(graph: Graph, node: fx.Node) -> _Spelling:
    value, source = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
    if value.device != source.device:
        return A._to_copy.default, (node.args[0],), {"dtype": value.dtype, "device": value.device}
    return A._to_copy.default, (node.args[0],), {"dtype": value.dtype}


def _renamed(target: Any) -> _Rule:
    return lambda graph, node: (target, node.args, dict(node.kwargs))


def _reshape(graph: Graph, node: fx.Node) -> _Spelling:
    return A.reshape.default, (node.args[0], _size_operands(graph, node)), {}


def _expand(graph: Graph, node: fx.Node) -> _Spelling:
    return A.expand.default, (node.args[0], _size_operands(graph, node)), {}


def _size_operands(graph: Graph, node: fx.Node) -> list[Any]:
    """Sizes of ``node``'s own value as operands; symbolic ones as nodes in front of it."""
    maker = _Sizes(graph, anchor=node)
    return [maker.operand(size) for size in node.meta["val"].shape]


def _split(graph: Graph, node: fx.Node) -> _Spelling:
    dim = _argument(node, 2, "dim", 0)
    extents = [piece.shape[dim] for piece in node.meta["val"]]
    whole = node.args[0].meta["val"].shape[dim]  # type: ignore[union-attr]
    if all(isinstance(extent, int) for extent in (*extents, whole)):
        if all(extent == extents[0] for extent in extents[:-1]) and extents[-1] <= extents[0]:
            return A.split.Tensor, (node.args[0], extents[0], dim), {}
        return A.split_with_sizes.default, (node.args[0], extents, dim), {}
    if node.target is A.split.sizes:
        return A.split_with_sizes.default, (node.args[0], node.args[1], dim), {}
    return None


def _slice(graph: Graph, node: fx.Node) -> _Spelling:
    dim, start = _argument(node, 1, "dim", 0), _argument(node, 2, "start", None)
    end, step = _argument(node, 3, "end", None), _argument(node, 4, "step", 1)
    bounds = (0 if start is None else start, _END if end is None else end)
    return A.slice.Tensor, (node.args[0], dim, *bounds, *((step,) if step != 1 else ())), {}


def _cat(graph: Graph, node: fx.Node) -> _Spelling:
    return A.cat.default, (node.args[0], _argument(node, 1, "dim", 0)), {}


def _layer_norm(graph: Graph, node: fx.Node) -> _Spelling:
    weight, bias = _argument(node, 2, "weight", None), _argument(node, 3, "bias", None)
    eps = _argument(node, 4, "eps", 1e-5)
    return A.layer_norm.default, (*node.args[:2], weight, bias, eps), {}


def _rms_norm(graph: Graph, node: fx.Node) -> _Spelling:
    weight, eps = _argument(node, 2, "weight", None), _argument(node, 3, "eps", None)
    return A.rms_norm.default, (*node.args[:2], weight, eps), {}


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


_SPELLINGS: dict[Any, _Rule] = {
    **dict.fromkeys((A.view.default, A._unsafe_view.default), _renamed(A.reshape.default)),
    **dict.fromkeys(
        (
            A.squeeze.default,
            A.squeeze.dim,
            A.squeeze.dims,
            A.flatten.using_ints,
            A.unflatten.int,
            A.view_as.default,
            A.reshape_as.default,
        ),
        _reshape,
    ),
    A.expand_as.default: _expand,
    **dict.fromkeys(
        (
            A._to_copy.default,
            A.type_as.default,
            A.to.dtype,
            A.to.dtype_layout,
            A.to.device,
            A.to.other,
        ),
        _cast,
    ),
    **dict.fromkeys(
        (
            A.split_with_sizes.default,
            A.split.Tensor,
            A.split.sizes,
            A.chunk.default,
            A.unsafe_chunk.default,
            A.unsafe_split.Tensor,
        ),
        _split,
    ),
    A.slice.Tensor: _slice,
    A.layer_norm.default: _layer_norm,
    A.rms_norm.default: _rms_norm,
    **dict.fromkeys(
        (A.cat.default, A.concat.default, A.concatenate.default),
        _cat,
    ),
    A.mul.Scalar: _renamed(A.mul.Tensor),
    A.add.Scalar: _renamed(A.add.Tensor),
    A.sub.Scalar: _renamed(A.sub.Tensor),
    A.div.Scalar: _renamed(A.div.Tensor),
    A.swapaxes.default: _renamed(A.transpose.int),
    A.swapdims.default: _renamed(A.transpose.int),
}


# rewrite: sizes ---------------------------------------------------------------------------------


@final
class _Sizes:
    """Builds size expressions from the sizes of the graph's inputs, each once, before ``anchor``."""

    def __init__(self, graph: Graph, anchor: fx.Node) -> None:
        self.graph, self.anchor = graph, anchor
        self.made: dict[Any, fx.Node] = {}
        self.sources: dict[Any, tuple[fx.Node, int] | fx.Node] = {}
        for node in graph.inputs:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self.sources.setdefault(_expr(value), node)
            elif isinstance(value, Tensor):
                for axis, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        self.sources.setdefault(_expr(size), (node, axis))

    def operand(self, size: int | torch.SymInt) -> Any:
        """An int, or the node that computes ``size``; raises KeyError if the inputs do not tell."""
        return size if isinstance(size, int) else self.build(_expr(size))

    def build(self, expression: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression in self.made:
            return self.made[expression]
        if expression in self.sources:
            source = self.sources[expression]
            if isinstance(source, fx.Node):
                return source
            node = self._insert(A.sym_size.int, *source)
        else:
            node = self._combine(expression)
        self.made[expression] = node
        return node

    def _combine(self, expression: Any) -> fx.Node:
        negated = expression.is_Mul and expression.args[0] == -1
        if negated:
            return self._insert(operator.neg, self.build(-expression))
        if type(expression) not in _SIZE_OPS or (
            expression.is_Pow and not (expression.exp.is_Integer and expression.exp > 0)
        ):
            raise KeyError(expression)
        operands = [self.build(part) for part in expression.args]
        function = _SIZE_OPS[type(expression)]
        return reduce(lambda left, right: self._insert(function, left, right), operands)

    def _insert(self, function: Any, *args: Any) -> fx.Node:
        with self.graph.module.graph.inserting_before(self.anchor):
            node = self.graph.module.graph.call_function(function, args)
        values = fx.map_arg(args, lambda operand: operand.meta["val"])
        with self.graph.fake_mode:
            node.meta["val"] = function(*values)
        return node


_SIZE_OPS: dict[Any, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Pow: operator.pow,
    size_functions.FloorDiv: operator.floordiv,
    size_functions.PythonMod: operator.mod,
    size_functions.Mod: operator.mod,
    size_functions.Max: torch.sym_max,
    size_functions.Min: torch.sym_min,
}


def _hoist_sizes(graph: Graph) -> int:
    """One node per size expression, before everything else, under no module."""
    maker = _Sizes(graph, anchor=_first_call(graph))
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
    if not found:
        return False
    x, squared = found["x"], found["squared"]
    value = x.meta["val"]
    if (
        squared not in (x, _narrow(x))
        and _narrow(squared) is not x
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

    Moving keeps blocks alike: the first must not own a value that the others borrow. Sites stay apart,
    because each is an address.
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
    """Move ``node`` right after its operands and out of its block, if they are all outside blocks."""
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
