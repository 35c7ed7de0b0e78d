"""Which blocks sparse attentions compute, as pictures: from their policies, or as a check saw them.

A picture is float[1, S, S]: queries downwards, keys to the right, both in the order of the video's
own tokens, whatever order the blocks are made in; white is computed. Every pixel is the share of
the pairs of tokens under it, of up to 1024 x 1024 that are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import VdqcError
from vdqc.base.mask_policies import POLICIES, inverse
from vdqc.base.sparsity import MaskPolicy
from vdqc.base.video_mask import as_layout
from vdqc.ir.artifact import Artifact
from vdqc.loading import register_kernels
from vdqc.lowering.sparse import layout_hint
from vdqc.site_errors import SeenMask, sparse_masks

#: Pixels of a picture's side, at most, and tokens of a side that are looked at.
SIDE, LOOKED_AT = 96, 1024


@final
@dataclass(frozen=True)
class MaskRow:
    """One sparse attention, at the sizes of the probe.

    Attributes:
        layout: frames, tokens of a frame, text tokens, 1 if text comes first, width of a frame.
        heads: text of every head's mask, as ``spatial_band@0.25``; None where each call decides.
    """

    site: str
    policy: str
    density: float
    layout: tuple[int, ...]
    heads: tuple[str, ...] | None


def mask_rows(artifact: Artifact) -> tuple[MaskRow, ...]:
    """The sparse attentions of an artifact, in program order."""
    facts: dict[str, Mapping[str, Any]] = {}
    for record in artifact.records:
        facts.update(record.facts.get("sparsity", {}))
    if not facts:
        return ()
    register_kernels()
    graph = artifact.graph(stored=True)
    found = []
    for node, site in sparse_masks(graph.nodes).items():
        plan = facts.get(site)
        if plan is None:
            continue
        layout = tuple(layout_hint(node))
        heads = None if plan["heads"] is None else tuple(map(str, plan["heads"]))
        found.append(MaskRow(site, str(plan["policy"]), float(plan["density"]), layout, heads))
    return tuple(found)


def policy_pictures(row: MaskRow) -> dict[str, Tensor]:
    """A picture of every mask that the policy has; none for policies that look at the data."""
    policy = MaskPolicy.parse(row.policy)
    layout = as_layout(row.layout, policy)
    found = {}
    for name, density in policy.masks:
        try:
            mask = POLICIES[name].mask(layout, density, policy.block, policy.block, "cpu")
        except VdqcError:  # too few blocks at these sizes: the call attends to everything
            continue
        order = POLICIES[name].order(layout, "cpu")
        found[f"{name}@{density:g}"] = picture(mask.kept()[0, 0], order, policy.block)
    return found


def seen_pictures(mask: SeenMask) -> list[Tensor]:
    """A picture of every head's mask in the call that a check saw."""
    return [
        picture(kept, order, mask.block) for kept, order in zip(mask.kept, mask.order, strict=True)
    ]


def picture(kept: Tensor, order: Tensor, block: int) -> Tensor:
    """float[1, S, S] of ``kept`` bool[R, C], blocks of tokens in the order int64[T]."""
    tokens = len(order)
    place = inverse(order)
    side = min(SIDE, tokens)
    each = max(1, min(LOOKED_AT, tokens) // side)
    looked = (torch.arange(side * each) * tokens) // (side * each)
    rows = place[looked] // block
    pairs = kept[rows][:, rows].float()
    return torch.nn.functional.avg_pool2d(pairs[None], each)
