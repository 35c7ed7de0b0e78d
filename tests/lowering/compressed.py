"""Compressed graphs of tiny models: every block linear behind ``fake_quantize``."""

from __future__ import annotations

import torch

from vdqc.base.numerics import scale_from_range, value_range, whole_multiples
from vdqc.base.scheme import QuantScheme, QuantSpec
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.ops import FAKE_QUANTIZE as QUANTIZE
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind, set_note
from vdqc.passes.canonicalize import Canonicalize
from vdqc.testing.architectures import ARCHITECTURES


def wan(dtype: torch.dtype = torch.float32) -> tuple[Graph, Sample]:
    """The canonical graph of tiny Wan, and its example."""
    architecture = ARCHITECTURES["wan-t2v"]
    samples = architecture.samples(dtype)
    graph = capture(architecture.build(0, dtype), samples)
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    return graph, samples[0]


def compress(
    graph: Graph, scheme: str, select: str = "blocks.*", *, progressive: bool = False
) -> Graph:
    """Put inputs and weights of linears behind ``fake_quantize``; peers share one."""
    parsed = QuantScheme.parse(scheme)
    shared: dict[object, object] = {}
    for site in graph.sites(kind=SiteKind.LINEAR):
        set_note(site.node, scheme="none")
    for site in graph.sites(select, SiteKind.LINEAR):
        set_note(site.node, scheme=scheme)
        if parsed.weight is not None:
            weight = graph.evaluate(site.weight)
            scale, zero = scale_from_range(*value_range(weight, parsed.weight), parsed.weight)
            if progressive:
                scale = whole_multiples(scale, parsed.weight)
            params = [
                None if value is None else graph.set_param(f"{site.name}.{name}", value)
                for name, value in (("weight_scale", scale), ("weight_zero_point", zero))
            ]
            node = graph.call(QUANTIZE, site.weight, *params, str(parsed.weight), before=site.node)
            graph.set_operand(site.node, 1, node)
        if parsed.input is not None:
            if site.input not in shared:
                shared[site.input] = _input(graph, site, parsed.input)
            graph.set_operand(site.node, 0, shared[site.input])
    graph.stage = Stage.COMPRESSED
    graph.clean()
    return graph


def _input(graph: Graph, site: object, spec: QuantSpec) -> object:
    params: list[object] = [None, None]
    if not spec.dynamic:
        scale, zero = scale_from_range(torch.tensor(-4.0), torch.tensor(5.0), spec)
        params[0] = graph.set_param(f"{site.name}.input_scale", scale)
        params[1] = None if zero is None else graph.set_param(f"{site.name}.input_zero_point", zero)
    return graph.call(QUANTIZE, site.input, *params, str(spec), before=site.node)
