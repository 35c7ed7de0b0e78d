"""Runs samples through a graph and keeps what passes need to know of its activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import InputError
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import Site, SiteKind

Progress = Callable[[Any, str], Any]


@final
@dataclass(frozen=True)
class SiteStats:
    """What was seen at the input of one linear site with K input channels.

    Attributes:
        low, high: float32[K] (float64 in a float64 graph), least and greatest value per channel
            over all samples.
        tokens: how many rows were seen.
        values: float32[<= reservoir], single values drawn evenly from all that were seen; empty
            unless asked for.
    """

    low: Tensor
    high: Tensor
    tokens: int
    values: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def absmax(self) -> Tensor:
        """float[K], greatest magnitude per channel."""
        return torch.maximum(self.low.abs(), self.high.abs())


@final
@dataclass(frozen=True)
class ActivationStats:
    """Statistics per site, over all samples."""

    sites: Mapping[str, SiteStats]

    def absmax(self, group: Sequence[Site]) -> Tensor:
        """float[K]: greatest magnitude per input channel of peers."""
        return self.sites[group[0].name].absmax


def activation_stats(
    graph: Graph,
    samples: Sequence[Sample],
    progress: Progress = lambda items, description: items,
) -> ActivationStats:
    """What the linear sites of ``graph`` read, per input channel; see ``observe``."""
    readers: dict[fx.Node, list[str]] = {}
    for site in graph.sites(kind=SiteKind.LINEAR):
        readers.setdefault(site.input, []).append(site.name)
    return observe(graph, samples, readers, progress=progress)


@torch.no_grad()
def observe(
    graph: Graph,
    samples: Sequence[Sample],
    nodes: Mapping[fx.Node, Sequence[str]],
    *,
    reservoir: int = 0,
    progress: Progress = lambda items, description: items,
) -> ActivationStats:
    """Run every sample once, node by node, and keep statistics of ``nodes`` under their names.

    Memory is one forward pass plus, per node, 2·K floats and ``reservoir`` values, however many
    samples there are. Raises InputError if there are no samples or if a value is NaN or infinite,
    naming the site.
    """
    if not samples:
        raise InputError("expected at least one sample to calibrate on, got none")
    generator = torch.Generator().manual_seed(0)
    whole: dict[fx.Node, SiteStats] = {}

    def look(node: fx.Node, value: Any) -> None:
        if node in nodes and value.numel() > 0:
            seen = _stats(value, nodes[node][0], reservoir, generator)
            whole[node] = _merge(whole.get(node), seen, reservoir, generator)

    for sample in progress(samples, "calibrate"):
        graph.run_inputs(graph.signature.bind((), sample.inputs), look)
    return ActivationStats({name: stats for node, stats in whole.items() for name in nodes[node]})


def _stats(value: Tensor, name: str, reservoir: int, generator: torch.Generator) -> SiteStats:
    rows = value.reshape(-1, value.shape[-1])
    dtype = torch.promote_types(value.dtype, torch.float32)
    low, high = rows.amin(0).to("cpu", dtype), rows.amax(0).to("cpu", dtype)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise InputError("the input holds NaN or infinity", code="not-finite", site=name)
    values = torch.empty(0)
    if reservoir:
        flat = rows.flatten()
        # as many draws as there is room: they compete with what is kept in _merge
        picked = torch.randint(0, flat.numel(), (reservoir,), generator=generator)
        values = (flat if flat.numel() <= reservoir else flat[picked.to(flat.device)]).float().cpu()
    return SiteStats(low, high, rows.shape[0], values)


def _merge(
    a: SiteStats | None, b: SiteStats, reservoir: int, generator: torch.Generator
) -> SiteStats:
    if a is None:
        return b
    values = torch.cat((a.values, b.values))
    if values.numel() > reservoir:
        # each side keeps a share as large as the number of rows it stands for
        kept = round(reservoir * a.tokens / (a.tokens + b.tokens))
        kept = min(max(kept, reservoir - b.values.numel()), a.values.numel())
        values = torch.cat(
            (_draw(a.values, kept, generator), _draw(b.values, reservoir - kept, generator))
        )
    return SiteStats(
        torch.minimum(a.low, b.low), torch.maximum(a.high, b.high), a.tokens + b.tokens, values
    )


def _draw(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(values.numel(), generator=generator)[:count]]
