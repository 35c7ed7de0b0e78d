"""Which mask each head gets: what masks cost a head, and the best choice within a density.

    errors, shares = head_errors(query, key, value, scale, layout, policy)   # site by site
    plans = assign(policy, errors, shares, density, masks)                   # over all of them

Source: ours; masks for single heads as in Xi et al., Sparse VideoGen, arXiv 2502.01776.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base import video_mask
from vdqc.base.block_mask import full_mask
from vdqc.base.mask_policies import POLICIES, classify_heads, sampled_rows
from vdqc.base.sparsity import MaskPolicy


@final
@dataclass(frozen=True)
class SitePlan:
    """What one site gets: a policy, the mask of each head (None: decided online), its density."""

    policy: MaskPolicy
    heads: Tensor | None
    density: float

    def facts(self) -> dict[str, Any]:
        """For the report."""
        names = [f"{mask}@{density:g}" for mask, density in self.policy.masks]
        chosen = None if self.heads is None else [names[int(i)] for i in self.heads]
        return {"policy": str(self.policy), "density": self.density, "heads": chosen}


def head_errors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    layout: list[int],
    policy: MaskPolicy,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(float64[masks, H] relative squared error, float64[masks] density) for one call."""
    shape = video_mask.as_layout(layout, policy)
    size, device = policy.block, query.device
    candidates, shares = [], []
    for name, density in policy.masks:
        mask = POLICIES[name].mask(shape, density, size, size, device) if density < 1 else None
        if mask is None:
            mask = full_mask(shape.tokens, shape.tokens, block_q=size, block_k=size)
        candidates.append((POLICIES[name].order(shape, device), mask))
        shares.append(mask.density())
    rows = sampled_rows(shape, video_mask.SAMPLED, device)
    errors = classify_heads(query, key, value, scale, candidates, rows, valid)[1]
    found = errors.double().mean(1)
    scores = query[:, :, rows].float() @ key.float().mT * scale
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], float("-inf"))
    power = (torch.softmax(scores, -1) @ value.float()).double().square().mean()
    return (found / power.clamp_min(1e-30)).cpu(), torch.tensor(shares, dtype=torch.float64)


def assign(
    policy: MaskPolicy,
    errors: Mapping[str, Tensor],
    shares: Mapping[str, Tensor],
    density: float,
    masks: int,
) -> dict[str, SitePlan]:
    """One mask for every head of every site: the best, within a density over all of them.

    From the lowest level upwards, whichever head saves most error per block is raised, while the
    mean density stays within ``density``.
    """
    best, at_level, cost = {}, {}, {}
    for name, error in errors.items():
        levels = error.unflatten(0, (-1, masks))  # [level, mask, H]
        at_level[name], best[name] = levels.min(1)
        cost[name] = shares[name].unflatten(0, (-1, masks)).mean(1)
    heads = {(name, h): 0 for name in errors for h in range(errors[name].shape[1])}
    room = density * len(heads) - sum(float(cost[name][0]) for name, _ in heads) + 1e-9
    waiting: list[tuple[float, str, int, int, int, float]] = []

    def offer(name: str, head: int, now: int) -> None:
        """Every raise of a head from level ``now``, by error saved per block."""
        for to in range(now + 1, len(cost[name])):
            extra = float(cost[name][to] - cost[name][now])
            saved = float(at_level[name][now, head] - at_level[name][to, head])
            if extra > 0 and saved > 0:
                heapq.heappush(waiting, (-saved / extra, name, head, now, to, extra))

    for name, head in heads:
        offer(name, head, 0)
    while waiting:
        _, name, head, now, level, extra = heapq.heappop(waiting)
        if heads[name, head] != now or extra > room:  # raised since, or no longer affordable
            continue
        heads[name, head] = level
        room -= extra
        offer(name, head, level)
    plans = {}
    for name in errors:
        count = errors[name].shape[1]
        chosen = [heads[name, h] * masks + int(best[name][heads[name, h], h]) for h in range(count)]
        share = float(sum(shares[name][i] for i in chosen)) / count
        plans[name] = SitePlan(*narrowed(policy, torch.tensor(chosen)), share)
    return plans


def narrowed(policy: MaskPolicy, heads: Tensor) -> tuple[MaskPolicy, Tensor]:
    """The same masks by a policy of one kind, where all heads have that kind: no reordering."""
    if policy.name != "svg" or bool((heads % 2 != heads[0] % 2).any()):
        return policy, heads
    kind = "temporal" if heads[0] % 2 else "spatial"
    return replace(policy, name=kind), heads // 2
