"""How much quantisation turns the tokens of each frame: where the gains of Q-VDiT's branch start.

For a quantised value q = Q(x) of F frames, over all samples: eta is the softmax over frames of
1 - cos(x, q), omega a frame's share of sum |x|, and the gain of a frame M = eta / omega.

Source: Feng et al., Q-VDiT, arXiv 2505.22167, section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.base.branches import frame_gain
from vdqc.engine.frames import site_frames, sizes_of
from vdqc.ir.graph import Graph
from vdqc.ir.peers import unquantised
from vdqc.ir.sample import Sample

Layouts = Mapping[fx.Node, Mapping[str, Any] | None]


def observed_gains(
    graph: Graph, layouts: Layouts, samples: Sequence[Sample], *, ones: bool = False
) -> dict[fx.Node, Tensor]:
    """M float32[F] of each quantised value whose tokens are of known frames.

    ``layouts``: what ``annotate`` notes of a value's tokens, None where it knows nothing. F is that
    of the first sample; samples of other counts are left out. ``ones``: all M are 1.
    """
    if not samples:
        return {}
    calls = [graph.signature.bind((), sample.inputs) for sample in samples]
    sizes = [sizes_of(graph.signature, inputs) for inputs in calls]
    known = {node: layout for node, layout in layouts.items() if layout is not None}
    frames = {node: site_frames(layout, sizes[0]) for node, layout in known.items()}
    counts = {node: found.frames for node, found in frames.items() if found is not None}
    if ones:
        return {node: torch.ones(count) for node, count in counts.items()}
    sums = {node: torch.zeros(4, count, dtype=torch.float64) for node, count in counts.items()}
    for inputs, actual in zip(calls, sizes, strict=True):
        _add_frames(graph, inputs, actual, known, sums)
    gains = {}
    for node, (dot, before, after, magnitude) in sums.items():
        cosine = dot / (before * after).sqrt().clamp_min(1e-30)
        gains[node] = frame_gain(cosine, magnitude).float()
    return gains


def _add_frames(
    graph: Graph,
    inputs: list[Any],
    sizes: Mapping[str, int],
    layouts: Mapping[fx.Node, Mapping[str, Any]],
    sums: Mapping[fx.Node, Tensor],
) -> None:
    """Add one call's x·q, |x|², |q|² and sum |x| of each frame; rows of ``sums``."""
    floats: dict[fx.Node, Tensor] = {}
    waiting = Counter(unquantised(node) for node in sums)

    def look(node: fx.Node, value: Any) -> None:
        if node in waiting:
            floats[node] = value
        if node not in sums:
            return
        source = unquantised(node)
        q, x = value.double(), floats[source].double()
        waiting[source] -= 1
        if not waiting[source]:
            del floats[source]
        frames = site_frames(layouts[node], sizes)
        if frames is None or frames.frames != sums[node].shape[1]:
            return
        parts = [x * q, x.square(), q.square(), x.abs()]
        index = frames.index.to(x.device)
        for row, part in zip(sums[node], parts, strict=True):
            tokens = part.sum(-1).reshape(-1, part.shape[-2]).sum(0)
            row.index_add_(0, index[index >= 0], tokens[index >= 0].to(row.device))

    graph.run_inputs(inputs, look)
