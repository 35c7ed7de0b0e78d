"""Rounds quantised weights by the error of the output: later columns take up what earlier lose.

::

    fake_quantize(@w, @w_scale, @w_zero_point, spec)  ->  fake_quantize(@w_rounded, ..., spec)

The rounded weight lies on the grid that ``quant`` chose, so the quantiser changes nothing more and
lowering packs its codes as any others. H is the second moment of what the site reads, which is its
quantised input, over all samples; block after block, so that each is rounded for the inputs that
the rounded blocks before it make.

With ``propagate``, a weight first moves to where those inputs give the output that the float model
has, as far as one weight can: it takes up what earlier weights and every quantised input up to its
own have lost. It costs a third forward pass, and the activations of the float model beside those
of the quantised one; whole steps (1) overfit where samples have few tokens for each channel.

Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1 (1 % damping, blocks of 128 columns);
Arai and Ichikawa, QEP, arXiv 2504.09629 (``propagate`` is their α).
Invariant: scales and zero points stay, codes fit their dtype; where inputs are uncorrelated, every
weight rounds to nearest; where nothing was lost before, ``propagate`` changes nothing.
Online: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor, fx

from vdqc.base import numerics
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.rounding import InputFactor, compensated, input_factor, output_error, taken_up
from vdqc.base.scheme import QuantSpec
from vdqc.engine.moments import input_moments
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir import transforms
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.peers import param_name
from vdqc.ir.site import Site

#: Widest moment that is factored in float64; wider ones keep their dtype, at half the memory.
WIDE = 4096

#: Tokens for each channel below which what weights take up fits the samples, not the model: at 8
#: whole steps gained nothing on inputs that were not seen (a chain of linears, W8A4).
ENOUGH = 8


@final
@dataclass(frozen=True)
class Gptq(Pass):
    """Rounds the weights of quantised linears against the second moment of their inputs.

    Attributes:
        block: columns that are finished before the rest hears of their error.
        damping: share of the mean diagonal of the moment that is added to it.
        order: round the channels with the largest inputs first.
        sequential: moments of a block see the rounding of all blocks before it; without, one run
            of the samples serves all.
        propagate: share of the error in the inputs that weights make up for, 0 ... 1.
        select: glob of sites.
    """

    block: int = 128
    damping: float = 0.01
    order: bool = False
    sequential: bool = True
    propagate: float = 0.0
    select: str = "*"

    name: ClassVar[str] = "gptq"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.COMPRESSED})
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"gptq.block: expected at least 1, got {self.block}")
        if not 0 <= self.damping <= 1:
            raise ConfigError(f"gptq.damping: expected 0 ... 1, got {self.damping:g}")
        if not 0 <= self.propagate <= 1:
            raise ConfigError(f"gptq.propagate: expected 0 ... 1, got {self.propagate:g}")
        if self.propagate and not self.sequential:
            raise ConfigError(
                "gptq.propagate: expected sequential=true, as weights take up what those before "
                "them lost, got sequential=false"
            )

    def forwards(self) -> float:
        """One; another to see what rounding did, and one in float to know what inputs lost."""
        return 1.0 + self.sequential + (self.propagate > 0)

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Round; facts: per site the output error to that of rounding to nearest, and its SQNR."""
        groups = quantised(graph, self.select, ctx)
        if groups and not ctx.samples:
            raise InputError(
                "gptq rounds for the inputs that samples show, and there are none",
                "give samples, or leave gptq out: quant alone rounds to nearest",
                code="no-samples",
            )
        ratios: dict[str, float] = {}
        sites: dict[str, dict[str, Any]] = {}
        walk = (
            input_moments(
                graph,
                ctx.samples,
                groups,
                rewritten=self.sequential,
                drift=self.propagate > 0,
                progress=ctx.progress,
            )
            if groups
            else ()
        )
        made: list[tuple[Site, Tensor]] = []
        for group, moments in walk:
            moment = moments.second
            wide = moment.double() if len(moment) <= WIDE else moment
            factor = input_factor(wide, self.damping, ordered=self.order)
            if factor.damping > self.damping:
                ctx.diagnostics.remark(
                    group[0].name,
                    "moment-damped",
                    f"the inputs are nearly dependent: damped by {factor.damping:.2g} of the mean "
                    f"diagonal instead of {self.damping:.2g}",
                )
            shift = None
            if moments.drift is not None:
                if moments.tokens < ENOUGH * len(moment):
                    ctx.diagnostics.remark(
                        group[0].name,
                        "few-tokens",
                        f"{moments.tokens} tokens to learn from for {len(moment)} channels: "
                        f"propagate={self.propagate:g} fits the samples below {ENOUGH} a channel; "
                        "give more samples, or propagate less",
                    )
                shift = taken_up(moments.drift, factor, self.propagate)
            for site in group:
                rounded, ratio, sqnr = self.rounded(graph, site, factor, wide, shift)
                ratios[site.name], sites[site.name] = round(ratio, 4), {"sqnr_db": round(sqnr, 2)}
                if self.sequential:
                    rewrite(graph, site, rounded)
                else:
                    made.append((site, rounded))
        for site, rounded in made:
            rewrite(graph, site, rounded)
        return PassResult(len(sites), {"error_to_nearest": ratios, "sites": sites})

    def rounded(
        self,
        graph: Graph,
        site: Site,
        factor: InputFactor,
        moment: Tensor,
        shift: Tensor | None,
    ) -> tuple[Tensor, float, float]:
        """The rounded weight, its output error to that of rounding to nearest, its SQNR.

        Both to the weight that it should be: with ``shift``, the one that makes up for its inputs.
        """
        weight, scale, zero_point, spec = quantiser(graph, site)
        wide = weight.to(moment.dtype)
        meant = wide if shift is None else wide + wide @ shift
        value = compensated(meant, factor, scale, zero_point, spec, self.block)
        nearest = numerics.fake_quantize(wide, scale, zero_point, spec)
        plain = output_error(meant - nearest, moment).sum()
        ratio = output_error(meant - value, moment).sum() / plain if float(plain) > 0 else 1.0
        return value.to(weight.dtype), float(ratio), numerics.sqnr_db(value, meant)


def quantised(graph: Graph, select: str, ctx: Context) -> list[list[Site]]:
    """Groups of peers whose weights sit behind a quantiser of one grid."""
    groups = []
    for group in graph.groups(select):
        kept = [site for site in group if site.weight.target is FAKE_QUANTIZE]
        for site in list(kept):
            if QuantSpec.parse(_operands(site.weight)[3]).planes:
                kept.remove(site)
                ctx.diagnostics.remark(
                    site.name,
                    "not-rounded",
                    "the levels of its binary planes move with the weight: rounded to nearest",
                )
        if kept:
            groups.append(kept)
    return groups


def quantiser(graph: Graph, site: Site) -> tuple[Tensor, Tensor, Tensor | None, QuantSpec]:
    """Weight, scale, zero point and spec of a site whose weight is quantised."""
    value, scale, zero_point, text = _operands(site.weight)
    zero = None if zero_point is None else graph.evaluate(zero_point)
    return graph.evaluate(value), graph.evaluate(scale), zero, QuantSpec.parse(text)


def rewrite(graph: Graph, site: Site, rounded: Tensor) -> None:
    """Put ``rounded`` behind the quantiser of ``site``, whose scales become plain parameters."""
    value, scale, zero_point, text = _operands(site.weight)
    name = param_name(site, "weight_rounded")
    transforms.bound(graph, name, value)
    weight = graph.set_param(name, rounded)
    scales = [
        _settled(graph, site, node, leaf)
        for node, leaf in ((scale, "rounded_scale"), (zero_point, "rounded_zero_point"))
    ]
    node = graph.call(FAKE_QUANTIZE, weight, *scales, text, before=site.node)
    graph.set_operand(site.node, 1, node)


def _settled(graph: Graph, site: Site, node: fx.Node | None, leaf: str) -> fx.Node | None:
    """``node`` as a parameter: an expression of the weight would follow the rounded one."""
    if node is None or (node.op == "get_attr" and node.target not in graph.free):
        return node
    return graph.set_param(param_name(site, leaf), graph.evaluate(node).detach())


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, str]:
    value, scale, zero_point, text = node.args
    assert isinstance(value, fx.Node)
    assert isinstance(scale, fx.Node)
    assert zero_point is None or isinstance(zero_point, fx.Node)
    return value, scale, zero_point, str(text)
