"""How the weight of a linear is quantised: its scale and zero point, its rounding, what it loses.

::

    max|w| / qmax                                  read off the weight: a parameter
    max|w| · sigmoid(@w_clip) · e^@w_step / qmax   an expression of the weight, its factors free
    s·(floor(w / s) + h(@w_rounding))              a weight that learns how it rounds

Ranges cover every weight, or clip where that lowers the squared error of a scale. Reading a weight
is work that a resumed run finds done and that several workers share; of a weight on disk the packed
codes are kept as well.

Error: InputError for a rounding to learn where codes lie on no even grid or the weight is learned.
Source: Banner et al., arXiv 1810.05723, section 3 (clipping that minimises the squared error); Shao
et al., OmniQuant, arXiv 2308.13137, equation 2 (learnable clipping); Nagel et al., AdaRound, arXiv
2004.10568, equation 23 (h).
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.base import numerics
from vdqc.base.diagnostics import InputError
from vdqc.base.packing import pack, stored_bytes
from vdqc.base.ranges import clipped_range
from vdqc.base.rounding import per_column
from vdqc.base.scheme import QuantSpec
from vdqc.ir import learned, transforms
from vdqc.ir.finished import Piece
from vdqc.ir.graph import Graph
from vdqc.ir.learned import CLIP_START, learned_ratio, parameter_dtype
from vdqc.ir.peers import param_name, scale_params, scheme_of
from vdqc.ir.resume import WeightWork, codes_key, finish, may_keep_codes
from vdqc.ir.site import Site


class WeightRange(enum.StrEnum):
    """How the range of a weight is chosen."""

    ABSMAX = "absmax"
    MSE = "mse"


def fixed_weight_scale(
    graph: Graph, site: Site, spec: QuantSpec, weight_range: WeightRange
) -> tuple[tuple[fx.Node, fx.Node | None], dict[str, Any]]:
    """Scale and zero point of the weight of ``site``, as parameters, and facts about it."""
    found = finish(graph, measuring(graph, site, spec, weight_range))
    zero_point = found.tensor("zero_point") if "zero_point" in found.tensors else None
    params = scale_params(graph, site, "weight", found.tensor("scale"), zero_point)
    if graph.finished is not None and "codes" in found.tensors:
        key = codes_key(graph, site.weight, params[0], spec)
        graph.finished.codes[key] = found.tensors["codes"]
    return params, {"scheme": str(scheme_of(site)), **found.facts}


def measuring(graph: Graph, site: Site, spec: QuantSpec, weight_range: WeightRange) -> WeightWork:
    """What finds scale, zero point and facts of the weight of ``site``: one reading of it.

    Of a weight on disk also the packed codes, which lowering would else read it again for.
    """
    # where both operands are codes, the sum over groups stays whole
    whole = scheme_of(site).input is not None
    keeps_codes = graph.finished is not None and may_keep_codes(spec)

    def compute() -> Piece:
        weight = graph.evaluate(site.weight)
        scale, zero_point = weight_scale(weight, spec, weight_range)
        if whole:
            scale = numerics.whole_multiples(scale, spec)
        tensors = {"scale": scale} | ({} if zero_point is None else {"zero_point": zero_point})
        if not keeps_codes:
            return Piece(tensors, measured(weight, scale, zero_point, spec))
        codes = numerics.by_rows(numerics.quantize, weight, scale, zero_point, spec)
        packed = pack(codes, spec.dtype.bits)
        facts = measured(weight, scale, zero_point, spec, codes)
        return Piece({**tensors, "codes": packed}, facts)

    return WeightWork(f"quant {site.name} {spec} {weight_range} {whole}", [site.weight], compute)


def learned_weight_scale(
    graph: Graph, site: Site, spec: QuantSpec, weight_range: WeightRange, clip: bool, step: bool
) -> tuple[fx.Node, fx.Node | None]:
    """Scale and zero point of the weight of ``site``, as expressions of it and free parameters."""
    low, high = clip_start(graph.evaluate(site.weight), spec, weight_range)
    ratios: tuple[fx.Node | None, fx.Node | None] = (None, None)

    def ratio(leaf: str, start: Tensor) -> fx.Node:
        return learned_ratio(graph, param_name(site, leaf), start, site.node)

    if clip and spec.symmetric:
        ratios = (None, ratio("weight_clip", torch.minimum(low, high)))
    elif clip:
        ratios = (ratio("weight_clip_low", low), ratio("weight_clip_high", high))
    factor = None
    if step:
        factor = graph.set_param(param_name(site, "weight_step"), torch.zeros_like(high), free=True)
    whole = scheme_of(site).input is not None
    return learned.weight_scale(
        graph, site.weight, spec, site.node, ratios=ratios, step=factor, whole=whole
    )


def learn_rounding(graph: Graph, site: Site, spec: QuantSpec, scale: fx.Node) -> None:
    """Let a free parameter say which neighbour on the grid each weight of ``site`` takes.

    Raises InputError where the weight follows a free parameter or has no even grid.
    """
    if spec.dtype.is_float or spec.planes:
        raise InputError(
            f"rounding=learned: the codes of {spec} lie on no even grid",
            f"give it another scheme: {site.name}=<scheme>",
            site=site.name,
        )
    if learned.is_learned(graph, site.weight):
        raise InputError(
            "rounding=learned needs a weight that stays as it is; a transform of it is free",
            "learn the transform or the rounding, not both",
            site=site.name,
        )
    weight = graph.evaluate(site.weight)
    step = per_column(graph.evaluate(scale), spec, weight.shape[-1])
    name = param_name(site, "rounding")
    transforms.bound(graph, f"{name}_floor", site.weight)
    value = learned.chosen_neighbour(graph, name, weight, step, site.node)
    graph.set_operand(site.node, 1, learned.cast(graph, value, weight.dtype, site.node))


def clip_start(weight: Tensor, spec: QuantSpec, weight_range: WeightRange) -> tuple[Tensor, Tensor]:
    """Logits of the clip ratios of float[N, K]'s low and high ends, shaped like its scale."""
    low, high = numerics.value_range(weight, spec)
    low, high = low.to(parameter_dtype(low.dtype)), high.to(parameter_dtype(high.dtype))
    start = torch.full_like(high, CLIP_START)
    if weight_range is WeightRange.ABSMAX:
        return start, start.clone()
    kept = clipped_range(weight, spec)
    low, high = (
        torch.where(full == 0, 1.0, end / full).logit().clamp(max=CLIP_START)
        for full, end in ((low, kept[0]), (high, kept[1]))
    )
    return low, high


def weight_scale(
    weight: Tensor, spec: QuantSpec, weight_range: WeightRange
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of float[N, K], shaped as ``Granularity`` documents."""
    if weight_range is WeightRange.MSE:
        return numerics.scale_from_range(*clipped_range(weight, spec), spec)
    return numerics.scale_from_range(*numerics.value_range(weight, spec), spec)


def weight_facts(
    graph: Graph, site: Site, spec: QuantSpec, scale: fx.Node, zero_point: fx.Node | None
) -> dict[str, Any]:
    """Scheme, SQNR, bytes and bits of the weight that ``site`` reads, quantised so."""
    zero = None if zero_point is None else graph.evaluate(zero_point)
    found = measured(graph.evaluate(site.weight), graph.evaluate(scale), zero, spec)
    return {"scheme": str(scheme_of(site)), **found}


def measured(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: QuantSpec,
    codes: Tensor | None = None,
) -> dict[str, Any]:
    """SQNR, bytes and bits of float[N, K] quantised so, perhaps to ``codes`` already."""
    rows, width = weight.shape
    stored = stored_bytes(rows, width, spec)
    if codes is None:
        quantised = numerics.by_rows(numerics.fake_quantize, weight, scale, zero_point, spec)
    else:

        def dequantized(part: Tensor, *how: Any) -> Tensor:
            return numerics.dequantize(part, *how).to(weight.dtype)

        quantised = numerics.by_rows(dequantized, codes, scale, zero_point, spec)
    return {
        "sqnr_db": round(numerics.sqnr_db(quantised, weight), 2),
        "weights": weight.numel(),
        "bytes": stored,
        "bits_per_weight": round(8 * stored / weight.numel(), 3),
    }
