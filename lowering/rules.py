"""What a site of a compressed graph asks of a kernel, and which kernels may answer.

Reads the graph, never edits it. Sizes that vary are those of the captured example, or of a call
that ``sized_like`` names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.base.scheme import GranularityKind, QuantSpec
from vdqc.ir.graph import Graph
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.site import Site
from vdqc.ir.sizes import size_expression
from vdqc.kernels.attention import ATTENTION
from vdqc.kernels.base import AttentionProblem, Kernel, LinearProblem
from vdqc.kernels.group_linear import GROUP_LINEAR
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.kernels.weight_only_linear import WEIGHT_ONLY_LINEAR

#: Kernels that may answer, in order of preference at equal cost.
LINEAR_KERNELS: tuple[Kernel, ...] = (INT8_LINEAR, PACKED_LINEAR, GROUP_LINEAR, WEIGHT_ONLY_LINEAR)
ATTENTION_KERNELS: tuple[Kernel, ...] = (ATTENTION,)


@final
@dataclass(frozen=True)
class Operand:
    """One operand of a linear: the float value and how it is quantised (``spec`` None: not)."""

    value: fx.Node
    spec: QuantSpec | None = None
    scale: fx.Node | None = None
    zero_point: fx.Node | None = None

    @staticmethod
    def of(node: fx.Node) -> Operand:
        """The operand that ``node`` stands for, seen through its ``fake_quantize``."""
        if node.target is not FAKE_QUANTIZE:
            return Operand(node)
        value, scale, zero_point, text = node.args
        assert isinstance(value, fx.Node)
        return Operand(value, QuantSpec.parse(str(text)), _node(scale), _node(zero_point))


@final
@dataclass(frozen=True)
class LinearSite:
    """One linear site with its operands and the problem it poses."""

    site: Site
    input: Operand
    weight: Operand
    problem: LinearProblem


def linear_site(graph: Graph, site: Site) -> LinearSite:
    """``site`` as kernels see it."""
    activation, weight = Operand.of(site.input), Operand.of(site.weight)
    value, matrix = activation.value.meta["val"], weight.value.meta["val"]
    rows = 1
    for size in value.shape[:-1]:
        rows *= hint(size)
    grouped = weight.spec is not None and weight.spec.granularity.kind is GranularityKind.GROUP
    problem = LinearProblem(
        m=rows,
        n=int(matrix.shape[0]),
        k=int(matrix.shape[1]),
        dtype=value.dtype,
        weight=weight.spec,
        input=activation.spec,
        integer_groups=grouped and group_multipliers(graph, weight) is not None,
    )
    return LinearSite(site, activation, weight, problem)


def attention_problem(node: fx.Node) -> AttentionProblem:
    """The problem of one ``scaled_dot_product_attention`` node."""
    query, key = (node.args[i].meta["val"] for i in (0, 1))  # type: ignore[union-attr]
    batch, heads, queries, width = (hint(size) for size in query.shape)
    masked = attention_mask(node) is not None
    return AttentionProblem(batch, heads, queries, hint(key.shape[2]), width, query.dtype, masked)


def attention_mask(node: fx.Node) -> fx.Node | None:
    """The mask operand, if there is one."""
    return _node(node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask"))


def attention_obstacle(node: fx.Node) -> str | None:
    """Why no kernel can stand in for this attention node whatever its size, or None."""
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    if dropout:
        return f"it drops out with probability {dropout}"
    if causal:
        return "it is causal"
    if node.kwargs.get("enable_gqa", False):
        return "its heads share keys"
    shapes = [operand.meta["val"].ndim for operand in node.all_input_nodes[:3]]
    return None if all(ndim == 4 for ndim in shapes) else "its operands do not have four axes"


def group_multipliers(graph: Graph, weight: Operand) -> tuple[Tensor, Tensor] | None:
    """(scale per channel float[N], whole multiplier int8[N, groups]) that make up group scales.

    None where there is no such pair with |code * multiplier| <= 127, or groups have zero points.
    """
    assert weight.spec is not None
    if weight.scale is None or not weight.spec.symmetric or weight.spec.dtype.is_float:
        return None
    return factor_scales(graph.evaluate(weight.scale), 127 // weight.spec.qmax)


def factor_scales(scale: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
    """``scale[N, G] = base[N, 1] * multiplier[N, G]``, multipliers 1 ... ``limit``, least that fit.

    Equal up to float32 rounding of the products (4e-7 relative); None if any row has no such
    factors.
    """
    top = scale.amax(-1, keepdim=True)
    base = torch.zeros_like(top)
    multiplier = torch.zeros_like(scale)
    for greatest in range(limit, 0, -1):
        candidate = top / greatest
        ratio = scale / candidate
        whole = ratio.round()
        fits = ((ratio - whole).abs() <= 4e-7 * whole).all(-1, keepdim=True)
        base = torch.where(fits, candidate, base)
        multiplier = torch.where(fits, whole, multiplier)
    if not bool((base > 0).all()):
        return None
    return base.squeeze(-1), multiplier.to(torch.int8)


@final
@dataclass(frozen=True)
class _Sizes:
    """What the sizes of one call are: of the inputs, and of what was asked for since (None: not
    known). Substituting takes a tenth of a millisecond, and equal blocks ask for equal sizes.
    """

    known: Mapping[Any, int]
    asked: dict[Any, int | None]

    def of(self, expression: Any) -> int | None:
        if expression not in self.asked:
            value = expression.subs(self.known)
            self.asked[expression] = int(value) if value.is_Integer else None
        return self.asked[expression]


_SIZES: ContextVar[_Sizes | None] = ContextVar("_SIZES", default=None)


def sizes_of(graph: Graph, inputs: Mapping[str, Any]) -> dict[Any, int]:
    """Sizes that vary, by their expression, in a call with these keyword arguments."""
    known: dict[Any, int] = {}
    for node, given in zip(graph.inputs, graph.signature.bind((), inputs), strict=True):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and isinstance(given, Tensor):
            for size, actual in zip(value.shape, given.shape, strict=True):
                if isinstance(size, torch.SymInt):
                    known.setdefault(size_expression(size), int(actual))
        elif isinstance(value, torch.SymInt) and isinstance(given, int):
            known.setdefault(size_expression(value), given)
    return known


@contextmanager
def sized_like(graph: Graph, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Sizes that vary are taken from a call with these keyword arguments meanwhile."""
    known = sizes_of(graph, inputs)
    token = _SIZES.set(_Sizes(known, {}) if known else None)
    try:
        yield
    finally:
        _SIZES.reset(token)


def hint(size: Any) -> int:
    """A size, or for one that varies its value in the call of ``sized_like`` or the example."""
    if isinstance(size, int):
        return size
    sizes = _SIZES.get()
    if sizes is not None and (found := sizes.of(size_expression(size))) is not None:
        return found
    value = size.node.hint
    return 1024 if value is None else int(value)


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None
