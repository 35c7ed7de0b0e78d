"""What a compiled model will take, before it is made, and its predicted times once it is.

======== ==========================================================================================
time     of one call like the first sample under ``torch.compile``: sites and what runs between
         them, at the rates of this machine if the target is its CPU
weights  bytes of the compiled model, exact but for what is learned: rows of several widths,
         clips of dynamic inputs (4 bytes each)
memory   weights, stored values alive at one time, sums and codes of the largest linear
compile  seconds: capture as measured now, weights at the rate of ``benchmarks/compile_time.py``,
         every pass's forward passes of the float model over the samples
======== ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from vdqc.base.target import Target
from vdqc.footprint import kernel_bytes, range_bytes, stored_bytes, weight_bytes
from vdqc.ir.graph import Graph
from vdqc.ir.site import SiteKind
from vdqc.kernels.base import Cost
from vdqc.lowering.between import between_sites, live_bytes
from vdqc.lowering.machine import measured
from vdqc.lowering.rules import linear_site
from vdqc.lowering.select import KernelChoice

#: Weights that one core rotates, quantises, packs and writes in a second (``compile_time.json``).
COMPILED_BYTES_PER_SECOND = 60e6


@final
@dataclass(frozen=True)
class Forecast:
    """What a compiled model is expected to take; see the module."""

    sites_us: float
    between_us: float
    weight_bytes: int
    memory_bytes: int
    compile_seconds: float


def forecast_of(
    graph: Graph,
    choices: Sequence[KernelChoice],
    machine: Target,
    known_seconds: float,
    extra_bytes: int = 0,
) -> Forecast:
    """The forecast for a planned graph; ``known_seconds`` of compiling are added to the rest, and
    ``extra_bytes`` that passes will store beside the weights.
    """
    kernels = {choice.site: choice.kernel for choice in choices if choice.kernel != "aten"}
    sites = [site for site in graph.sites(kind=SiteKind.LINEAR) if site.name in kernels]
    weights, working = extra_bytes + range_bytes(graph), 0
    weights += weight_bytes(graph, {site.name for site in sites})
    for site in sites:
        problem = linear_site(graph, site).problem
        assert site.scheme is not None
        weights += kernel_bytes(kernels[site.name], problem.n, problem.k, site.scheme)
        working = max(working, problem.m * (4 * problem.n + problem.k))
    read = stored_bytes(graph)
    rate = COMPILED_BYTES_PER_SECOND * torch.get_num_threads()
    return Forecast(
        sites_us=sum(choice.predicted_us for choice in choices),
        between_us=between_sites(graph).us(machine),
        weight_bytes=weights,
        memory_bytes=weights + live_bytes(graph) + working,
        compile_seconds=known_seconds + read / rate,
    )


def total_cost(choices: Iterable[KernelChoice], graph: Graph) -> Cost:
    """What all sites and everything between them cost together."""
    return sum((choice.cost for choice in choices), start=between_sites(graph))


def predicted_seconds(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of every site of an artifact, under "" those between, for a call like its first
    sample; at the rates of this machine if the target is its CPU.
    """
    machine = measured(Target.parse(str(manifest["target"])))
    costs = {entry["site"]: entry["cost"] for entry in manifest["kernels"]}
    costs[""] = manifest["facts"]["between"]
    return {name: Cost.of(cost).us(machine) * 1e-6 for name, cost in costs.items()}
