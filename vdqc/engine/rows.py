"""Single rows of what linears read: enough to weigh one form of a linear against another.

``count`` rows of K channels for each group of peers, drawn evenly from the samples: with them an
error of outputs is measured as it is, quantised activations included, which moments cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import InputError
from vdqc.engine.calibrate import Progress
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import Site


@torch.no_grad()
def input_rows(
    graph: Graph,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[Site]],
    count: int,
    *,
    seed: int = 0,
    progress: Progress = lambda items, description: items,
) -> dict[str, Tensor]:
    """float32[<= count, K] for each group, under the name of its first site.

    As many rows of every sample, up to one, as there are, and ``count`` of those, evenly; float64
    in a float64 graph. Raises InputError without samples, or where an input is NaN or infinite.
    """
    if not samples:
        raise InputError("expected at least one sample to see inputs on, got none")
    generator = torch.Generator().manual_seed(seed)
    names: dict[fx.Node, str] = {group[0].input: group[0].name for group in groups}
    share = -(-count // len(samples))
    found: dict[str, list[Tensor]] = {name: [] for name in names.values()}
    for sample in progress(samples, "input rows"):
        graph.run_inputs(
            graph.signature.bind((), sample.inputs), _drawing(names, share, generator, found)
        )
    return {name: _evenly(torch.cat(rows), count) for name, rows in found.items() if rows}


def _evenly(rows: Tensor, count: int) -> Tensor:
    """``count`` of ``rows``, spread over all of them, so that no sample is left out."""
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count) * len(rows) // count]


def _drawing(
    names: dict[fx.Node, str],
    share: int,
    generator: torch.Generator,
    found: dict[str, list[Tensor]],
) -> Callable[[fx.Node, Any], None]:
    def look(node: fx.Node, value: Any) -> None:
        if node not in names or value.numel() == 0:
            return
        rows = value.reshape(-1, value.shape[-1])
        picked = torch.randperm(len(rows), generator=generator)[:share].to(rows.device)
        kept = rows[picked].to("cpu", torch.promote_types(rows.dtype, torch.float32))
        if not bool(kept.isfinite().all()):
            raise InputError("the input holds NaN or infinity", code="not-finite", site=names[node])
        found[names[node]].append(kept)

    return look
