"""Runs samples through a graph and keeps what passes need to know of its activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import InputError
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import Site, SiteKind


@final
@dataclass(frozen=True)
class SiteStats:
    """What was seen at the input of one linear site with K input channels.

    Attributes:
        low, high: float32[K], least and greatest value per channel over all samples.
        tokens: how many rows were seen.
    """

    low: Tensor
    high: Tensor
    tokens: int

    @property
    def absmax(self) -> Tensor:
        """float32[K], greatest magnitude per channel."""
        return torch.maximum(self.low.abs(), self.high.abs())


@final
@dataclass(frozen=True)
class ActivationStats:
    """Statistics per site, and per timestep where the samples name one."""

    sites: Mapping[str, SiteStats]
    steps: Mapping[tuple[str, float], SiteStats]

    def absmax(self, group: Sequence[Site]) -> Tensor:
        """float32[K]: greatest magnitude per input channel of peers."""
        return self.sites[group[0].name].absmax


@torch.no_grad()
def activation_stats(
    graph: Graph,
    samples: Sequence[Sample],
    progress: Callable[[Any, str], Any] = lambda items, description: items,
) -> ActivationStats:
    """Run every sample once, node by node; memory is one forward pass plus the statistics.

    Raises InputError if there are no samples or if an activation is NaN or infinite, naming the site.
    """
    if not samples:
        raise InputError("expected at least one sample to calibrate on, got none")
    readers: dict[fx.Node, list[str]] = {}
    for site in graph.sites(kind=SiteKind.LINEAR):
        readers.setdefault(site.input, []).append(site.name)
    sites: dict[str, SiteStats] = {}
    steps: dict[tuple[str, float], SiteStats] = {}
    for sample in progress(samples, "calibrate"):

        def observe(node: fx.Node, value: Any, sample: Sample = sample) -> None:
            if node not in readers:
                return
            rows = value.reshape(-1, value.shape[-1])
            seen = SiteStats(rows.amin(0).float(), rows.amax(0).float(), rows.shape[0])
            if not bool(torch.isfinite(seen.absmax).all()):
                raise InputError(
                    "the input holds NaN or infinity", code="not-finite", site=readers[node][0]
                )
            for name in readers[node]:
                sites[name] = _merge(sites.get(name), seen)
                if sample.timestep is not None:
                    key = (name, sample.timestep)
                    steps[key] = _merge(steps.get(key), seen)

        graph.run_inputs(graph.signature.bind((), sample.inputs), observe)
    return ActivationStats(sites, steps)


def _merge(a: SiteStats | None, b: SiteStats) -> SiteStats:
    if a is None:
        return b
    return SiteStats(
        torch.minimum(a.low, b.low), torch.maximum(a.high, b.high), a.tokens + b.tokens
    )
