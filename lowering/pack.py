"""Weights of one site, from the expression that passes built to the tensors a kernel reads.

The expression is evaluated once, quantised, packed and dropped; what stays are the parameters
``<site>.kernel.*``. Rows can be permuted on the way (see ``lowering/fuse.py``). A streamed
model finishes the work on each site once (``vdqc.ir.resume``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from vdqc.base.numerics import by_rows, plane_parts, quantize
from vdqc.base.packing import pack, unpack
from vdqc.base.scheme import GranularityKind, QuantSpec
from vdqc.ir.finished import Piece, tensor_hash
from vdqc.ir.graph import Graph
from vdqc.ir.resume import WeightWork, codes_key, finish
from vdqc.ir.weights import StoredTensor
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
    known = known_codes(graph, weight)
    if known is not None:
        width = int(weight.value.meta["val"].shape[-1])
        codes = unpack(known, weight.spec.dtype.bits, width)
    else:
        codes = by_rows(quantize, graph.evaluate(weight.value), scale, zero_point, weight.spec)
    return codes, scale, zero_point


def known_codes(graph: Graph, weight: Operand) -> Tensor | None:
    """The packed codes of a streamed weight, where ``quant`` made them and nothing changed since.

    Rotating 14B weights twice took a fifth of a compilation.
    """
    if graph.finished is None or not graph.finished.codes or weight.scale is None:
        return None
    assert weight.spec is not None
    found = graph.finished.codes.get(codes_key(graph, weight.value, weight.scale, weight.spec))
    return found.read() if isinstance(found, StoredTensor) else found


#: What kernels read of a weight; None where it has no such part.
_PARTS = ("weight", "multiplier", "scale", "zero_point", "sum")


def pack_weight(graph: Graph, linear: LinearSite, work: WeightWork) -> dict[str, fx.Node | None]:
    """The parameters of the weight of ``linear``, made by ``integer_work`` or ``grouped_work``."""
    return _bound(graph, parameter_prefix(linear.site.name), finish(graph, work), _PARTS)


def integer_work(
    graph: Graph, linear: LinearSite, *, packed: bool, rows: Tensor | None = None
) -> WeightWork:
    """What makes the parameters of ``int8_linear`` or, if ``packed``, of ``packed_linear``."""
    asymmetric_input = linear.input.spec is not None and not linear.input.spec.symmetric

    def compute() -> Piece:
        spec = linear.weight.spec
        assert spec is not None
        if packed and rows is None and not asymmetric_input:
            known = known_codes(graph, linear.weight)
            if known is not None:
                return _packed_piece(graph, linear, known)
        codes, scale, zero_point = _permuted(weight_codes(graph, linear.weight), rows)
        codes, zero_point = _signed(codes, zero_point, spec)
        scale, multiplier = _factors(linear, scale, len(codes))
        wide = codes if multiplier is None else _multiplied(codes, multiplier)
        zero = None if zero_point is None else zero_point.reshape(-1).expand(codes.shape[0])
        return _piece(
            weight=pack(codes, spec.dtype.bits) if packed else codes,
            multiplier=multiplier,
            scale=scale,
            zero_point=None if zero is None else zero.to(torch.int32),
            sum=wide.sum(-1, dtype=torch.int32) if asymmetric_input else None,
        )

    return _work(f"integer {packed} {asymmetric_input}", linear, rows, compute)


def _factors(linear: LinearSite, scale: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
    """(scale float[N], whole multiplier int8[N, G] of groups)."""
    spec = linear.weight.spec
    assert spec is not None
    if spec.granularity.kind is not GranularityKind.GROUP:
        return (scale.expand(rows, 1) if scale.ndim == 0 else scale).squeeze(-1), None
    factors = factor_scales(scale, 127 // spec.qmax)
    assert factors is not None, f"{linear.site}: group scales are not whole multiples"
    return factors


def _packed_piece(graph: Graph, linear: LinearSite, packed: Tensor) -> Piece:
    """The parameters of ``packed_linear`` around codes that are packed already."""
    assert linear.weight.scale is not None
    scale, multiplier = _factors(linear, graph.evaluate(linear.weight.scale), len(packed))
    return _piece(weight=packed, multiplier=multiplier, scale=scale)


def grouped_work(graph: Graph, linear: LinearSite, rows: Tensor | None = None) -> WeightWork:
    """What makes those of ``group_linear`` and ``weight_only_linear``: a float scale per group."""

    def compute() -> Piece:
        spec = linear.weight.spec
        assert spec is not None
        codes, scale, zero_point = _permuted(weight_codes(graph, linear.weight), rows)
        codes, zero_point = _signed(codes, zero_point, spec)
        n = codes.shape[0]
        zero = None if zero_point is None else zero_point.to(scale.dtype).expand_as(scale)
        return _piece(
            weight=pack(codes, spec.dtype.bits),
            scale=scale.reshape(-1, max(1, scale.numel() // n)).expand(n, -1),
            zero_point=None if zero is None else _columns(zero, n),
        )

    return _work("grouped", linear, rows, compute)


def pack_planes(
    graph: Graph, linear: LinearSite, *, integer: bool, rows: Tensor | None = None
) -> list[dict[str, fx.Node | None]]:
    """Parameters of one linear of one-bit weights for each binary plane.

    The code of -1 is -1 and that of +1 is 0: a plane is 2 a (code + 1/2). Kernels with float zero
    points are given -1/2; for ``integer`` ones ``offset`` float[N, 1] of the first plane is what
    all planes add to a sum of inputs, the amplitudes together.
    """
    parts = finish(graph, plane_work(graph, linear, integer=integer, rows=rows))
    planes = len({name.partition(".")[0] for name in parts.tensors})
    names = ("weight", "scale", "sum", "offset") if integer else ("weight", "scale", "zero_point")
    made = []
    for index in range(planes):
        start = f"plane{index}."
        own = {k.removeprefix(start): v for k, v in parts.tensors.items() if k.startswith(start)}
        prefix = f"{parameter_prefix(linear.site.name)}.plane{index}"
        made.append(_bound(graph, prefix, Piece(own), names))
    return made


def plane_work(
    graph: Graph, linear: LinearSite, *, integer: bool, rows: Tensor | None = None
) -> WeightWork:
    """What makes the tensors that ``pack_planes`` binds, as ``plane<i>.<name>``."""
    asymmetric_input = linear.input.spec is not None and not linear.input.spec.symmetric

    def compute() -> Piece:
        source, spec = linear.weight, linear.weight.spec
        assert spec is not None
        assert source.scale is not None
        weight = graph.evaluate(source.value)
        zero = None if source.zero_point is None else graph.evaluate(source.zero_point)
        scale = graph.evaluate(source.scale)
        _, amplitudes, signs = plane_parts(weight, scale, zero, spec)
        n = len(weight)
        factors = [amplitude.reshape(n, -1) for amplitude in amplitudes]
        codes = [((sign.reshape(n, -1) - 1) / 2).to(torch.int8) for sign in signs]
        if rows is not None:
            factors, codes = [f[rows] for f in factors], [c[rows] for c in codes]
        parts: dict[str, Tensor | None] = {}
        for index, (factor, code) in enumerate(zip(factors, codes, strict=True)):
            start = f"plane{index}"
            parts[f"{start}.weight"] = pack(code, 1)
            if integer:
                total = code.sum(-1, dtype=torch.int32) if asymmetric_input else None
                parts[f"{start}.scale"] = 2 * factor.squeeze(-1)
                parts[f"{start}.sum"] = total
                parts[f"{start}.offset"] = torch.stack(factors).sum(0) if index == 0 else None
            else:
                parts[f"{start}.scale"] = 2 * factor
                parts[f"{start}.zero_point"] = torch.full_like(factor, -0.5)
        return _piece(**parts)

    return _work(f"planes {integer} {asymmetric_input}", linear, rows, compute)


def _work(
    what: str, linear: LinearSite, rows: Tensor | None, compute: Callable[[], Piece]
) -> WeightWork:
    weight = linear.weight
    order = "in order" if rows is None else tensor_hash(rows)
    what = f"pack {linear.site.name} {what} {weight.spec} {order}"
    return WeightWork(what, (weight.value, weight.scale, weight.zero_point), compute)


def _piece(**parts: Tensor | None) -> Piece:
    return Piece({key: value.contiguous() for key, value in parts.items() if value is not None})


def _bound(
    graph: Graph, prefix: str, parts: Piece, names: Sequence[str]
) -> dict[str, fx.Node | None]:
    """``names`` as parameters ``<prefix>.<name>``; None for those that ``parts`` lacks."""
    return {
        name: graph.set_param(f"{prefix}.{name}", parts.tensors[name])
        if name in parts.tensors
        else None
        for name in names
    }


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
