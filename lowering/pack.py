"""Weights of one site, from the expression that passes built to the tensors a kernel reads.

The expression is evaluated once, quantised, packed and dropped; what stays are the parameters
``<site>.kernel.*``. Rows can be permuted on the way (see ``lowering/fuse.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vdqc.base.numerics import plane_parts, quantize
from vdqc.base.packing import pack
from vdqc.base.scheme import GranularityKind, QuantSpec
from vdqc.ir.graph import Graph
from vdqc.lowering.rules import LinearSite, Operand, factor_scales


def parameter_prefix(site: str) -> str:
    """Where the packed parameters of ``site`` live; a repeated call of one module gets its own."""
    return site.replace("#", "_call") + ".kernel"


def weight_codes(graph: Graph, weight: Operand) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, zero point) of a quantised weight, as ``vdqc.base.numerics`` shapes them."""
    assert weight.spec is not None
    assert weight.scale is not None
    scale = graph.evaluate(weight.scale)
    zero_point = None if weight.zero_point is None else graph.evaluate(weight.zero_point)
    codes = quantize(graph.evaluate(weight.value), scale, zero_point, weight.spec)
    return codes, scale, zero_point


def pack_integer(
    graph: Graph, linear: LinearSite, *, packed: bool, rows: Tensor | None = None
) -> dict[str, fx.Node | None]:
    """Parameters of ``int8_linear`` or, if ``packed``, of ``packed_linear``."""
    spec = linear.weight.spec
    assert spec is not None
    codes, scale, zero_point = _permuted(weight_codes(graph, linear.weight), rows)
    codes, zero_point = _signed(codes, zero_point, spec)
    multiplier = None
    if spec.granularity.kind is GranularityKind.GROUP:
        factors = factor_scales(scale, 127 // spec.qmax)
        assert factors is not None, f"{linear.site}: group scales are not whole multiples"
        scale, multiplier = factors
    else:
        scale = scale.expand(codes.shape[0], 1) if scale.ndim == 0 else scale
        scale = scale.squeeze(-1).contiguous()
    wide = codes if multiplier is None else _multiplied(codes, multiplier)
    asymmetric_input = linear.input.spec is not None and not linear.input.spec.symmetric
    total = wide.sum(-1, dtype=torch.int32) if asymmetric_input else None
    bind = _Binder(graph, parameter_prefix(linear.site.name))
    zero = None if zero_point is None else zero_point.reshape(-1).expand(codes.shape[0])
    return {
        "weight": bind("weight", pack(codes, spec.dtype.bits) if packed else codes),
        "multiplier": bind("multiplier", multiplier),
        "scale": bind("scale", scale),
        "zero_point": bind("zero_point", None if zero is None else zero.to(torch.int32)),
        "sum": bind("sum", total),
    }


def pack_grouped(
    graph: Graph, linear: LinearSite, rows: Tensor | None = None
) -> dict[str, fx.Node | None]:
    """Parameters of ``group_linear`` and ``weight_only_linear``: one float scale per group."""
    spec = linear.weight.spec
    assert spec is not None
    codes, scale, zero_point = _permuted(weight_codes(graph, linear.weight), rows)
    codes, zero_point = _signed(codes, zero_point, spec)
    n = codes.shape[0]
    bind = _Binder(graph, parameter_prefix(linear.site.name))
    zero = None if zero_point is None else zero_point.to(scale.dtype).expand_as(scale)
    return {
        "weight": bind("weight", pack(codes, spec.dtype.bits)),
        "scale": bind("scale", scale.reshape(-1, max(1, scale.numel() // n)).expand(n, -1)),
        "zero_point": bind("zero_point", None if zero is None else _columns(zero, n)),
    }


def pack_planes(
    graph: Graph, linear: LinearSite, *, integer: bool, rows: Tensor | None = None
) -> list[dict[str, fx.Node | None]]:
    """Parameters of one linear of one-bit weights for each binary plane.

    The code of -1 is -1 and that of +1 is 0: a plane is 2 a (code + 1/2). Kernels with float zero
    points are given -1/2; for ``integer`` ones ``offset`` float[N, 1] of the first plane is what
    all planes add to a sum of inputs, the amplitudes together.
    """
    spec = linear.weight.spec
    assert spec is not None
    assert linear.weight.scale is not None
    weight = graph.evaluate(linear.weight.value)
    zero = None if linear.weight.zero_point is None else graph.evaluate(linear.weight.zero_point)
    scale = graph.evaluate(linear.weight.scale)
    _, amplitudes, signs = plane_parts(weight, scale, zero, spec)
    n = len(weight)
    factors = [amplitude.reshape(n, -1) for amplitude in amplitudes]
    codes = [((sign.reshape(n, -1) - 1) / 2).to(torch.int8) for sign in signs]
    if rows is not None:
        factors, codes = [f[rows] for f in factors], [c[rows] for c in codes]
    made = []
    asymmetric_input = linear.input.spec is not None and not linear.input.spec.symmetric
    for index, (factor, code) in enumerate(zip(factors, codes, strict=True)):
        bind = _Binder(graph, f"{parameter_prefix(linear.site.name)}.plane{index}")
        parameters = {"weight": bind("weight", pack(code, 1))}
        if integer:
            total = code.sum(-1, dtype=torch.int32) if asymmetric_input else None
            offset = torch.stack(factors).sum(0) if index == 0 else None
            parameters["scale"] = bind("scale", 2 * factor.squeeze(-1))
            parameters["sum"] = bind("sum", total)
            parameters["offset"] = bind("offset", offset)
        else:
            parameters["scale"] = bind("scale", 2 * factor)
            parameters["zero_point"] = bind("zero_point", torch.full_like(factor, -0.5))
        made.append(parameters)
    return made


def _columns(value: Tensor, n: int) -> Tensor:
    return value.reshape(-1, max(1, value.numel() // n)).expand(n, -1)


def _permuted(
    parts: tuple[Tensor, Tensor, Tensor | None], rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if rows is None:
        return parts
    codes, scale, zero_point = parts
    per_row = scale.ndim > 0
    return (
        codes[rows],
        scale[rows] if per_row else scale,
        zero_point[rows] if zero_point is not None and zero_point.ndim > 0 else zero_point,
    )


def _signed(
    codes: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """Unsigned codes moved down by half their range, and their zero point with them."""
    if spec.symmetric:
        return codes, None
    assert zero_point is not None
    half = 2 ** (spec.dtype.bits - 1)
    return (codes.to(torch.int16) - half).to(torch.int8), zero_point - half


def _multiplied(codes: Tensor, multiplier: Tensor) -> Tensor:
    groups = codes.unflatten(-1, (multiplier.shape[-1], -1))
    return (groups * multiplier.unsqueeze(-1)).flatten(-2)


class _Binder:
    """Sets ``<prefix>.<name>``; None stays None."""

    def __init__(self, graph: Graph, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix

    def __call__(self, name: str, value: Tensor | None) -> fx.Node | None:
        if value is None:
            return None
        return self._graph.set_param(f"{self._prefix}.{name}", value.contiguous())
