"""Noise-Filtered Diverse Sampling: leave out what is unlike the pool, spread over the rest.

N candidates, J monitored layers, F frames::

    score_i = sum_j ((m_ij - mu_j) / sigma_j)² + ((s_ij - nu_j) / theta_j)²     m, s: mean, variance
    the ``drop`` share of greatest score is left out
    c_i[t] = cos(a_0, a_t), t = 1 ... F - 1                    a_t: all features of frame t
    k-means on c_i; from each cluster a quota, uniformly at random

Source: Feng et al., QuantVGGT, arXiv 2509.21302, section 3.3: 40 of 400, 8 clusters, p = 0.2 (read
as the share left out; as the share kept it would leave hardly more than are chosen). The released
code filters by 1.5 interquartile ranges (``iqr``), does not apply it (``none``), averages cosines
token by token on features pooled by two (``token``), and chooses 20 from 5 clusters.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from vdqc.base.diagnostics import InputError
from vdqc.engine.selection import Choice, draw, key_order, require_enough


class Filter(enum.StrEnum):
    """What counts as noise."""

    ZSCORE = "zscore"
    IQR = "iqr"
    NONE = "none"


class Reference(enum.StrEnum):
    """What each frame is compared with: the ``first``, their ``mean``, or the one before."""

    FIRST = "first"
    MEAN = "mean"
    PREVIOUS = "prev"


class Similarity(enum.StrEnum):
    """``frame``: one cosine a frame; ``token``: the mean of its tokens' cosines, pooled by two."""

    FRAME = "frame"
    TOKEN = "token"


class Quota(enum.StrEnum):
    """Equally many from each cluster, or in proportion to its size."""

    EQUAL = "equal"
    PROPORTIONAL = "proportional"


@final
@dataclass(frozen=True)
class Features:
    """What is known of N candidates: means and variances [N, J], similarities [N, F - 1]."""

    means: Tensor
    variances: Tensor
    similarities: Tensor

    def ordered(self, order: Sequence[int]) -> Features:
        """The candidates in another order."""
        return Features(*(v[list(order)] for v in (self.means, self.variances, self.similarities)))


def noise_score(features: Features) -> Tensor:
    """float64[N]; unchanged by any scale and offset of a layer."""
    score = torch.zeros(len(features.means), dtype=torch.float64)
    for values in (features.means.double(), features.variances.double()):
        deviation = values - values.mean(0)
        spread = deviation.square().mean(0).sqrt()
        alike = spread <= 1e-12 * values.abs().amax(0)  # a layer that all candidates agree on
        z = deviation / torch.where(alike, torch.ones_like(spread), spread)
        score += torch.where(alike, torch.zeros_like(z), z).square().sum(1)
    return score


def noisy(features: Features, rule: Filter, drop: float) -> Tensor:
    """bool[N]: what is left out."""
    count = len(features.means)
    if rule is Filter.IQR:
        out = torch.zeros(count, dtype=torch.bool)
        for values in (features.means.double(), features.variances.double().sqrt()):
            low, high = values.quantile(0.25, 0), values.quantile(0.75, 0)
            reach = 1.5 * (high - low)
            out |= ((values < low - reach) | (values > high + reach)).any(1)
        return out
    dropped = int(drop * count + 1e-9) if rule is Filter.ZSCORE else 0
    worst = noise_score(features).argsort(descending=True, stable=True)[:dropped]
    return torch.zeros(count, dtype=torch.bool).index_fill(0, worst, True)


def left_out(features: Features, keys: Sequence[str], drop: float, rule: Filter) -> list[int]:
    """Indices of what ``nfds`` leaves out, whatever the order of the candidates."""
    order = key_order(keys)
    out = noisy(features.ordered(order), rule, drop)
    return sorted(index for at, index in enumerate(order) if out[at])


def frame_similarity(
    frames: Tensor,
    reference: Reference = Reference.FIRST,
    similarity: Similarity = Similarity.FRAME,
) -> Tensor:
    """float64: how alike the frames [B, F, S, C] of one candidate are, averaged over B.

    F - 1 values, or F where the reference is the mean.
    """
    x = frames.double()
    by_token = similarity is Similarity.TOKEN
    x = _pooled(_pooled(x).mT).mT if by_token else x.flatten(2).unsqueeze(2)
    match reference:
        case Reference.FIRST:
            pairs = x[:, :1].expand_as(x[:, 1:]), x[:, 1:]
        case Reference.PREVIOUS:
            pairs = x[:, :-1], x[:, 1:]
        case Reference.MEAN:
            pairs = x.mean(1, keepdim=True).expand_as(x), x
    return F.cosine_similarity(*pairs, dim=-1).mean((0, 2))


def _pooled(x: Tensor) -> Tensor:
    """Pairs along the last axis averaged, an odd end alone."""
    return F.avg_pool1d(x.flatten(0, 1), 2, ceil_mode=True).unflatten(0, x.shape[:2])


def stacked(similarities: Sequence[Tensor]) -> Tensor:
    """[N, n]: candidates with more frames are resampled to as many values as the shortest has."""
    length = min(len(value) for value in similarities)
    if length < 1:
        raise InputError("expected candidates of at least two frames", code="no-frames")
    return torch.stack(
        [
            value
            if len(value) == length
            else F.interpolate(value[None, None], length, mode="linear", align_corners=True)[0, 0]
            for value in similarities
        ]
    )


def kmeans(points: Tensor, clusters: int, seed: int, restarts: int = 10) -> tuple[Tensor, float]:
    """int64[N] labels and the inertia of the best of ``restarts`` runs from k-means++ starts.

    Points float[N, n]. Source: Arthur and Vassilvitskii, k-means++, SODA 2007.
    """
    generator = torch.Generator().manual_seed(seed)
    x = points.double()
    best: tuple[Tensor, float] | None = None
    for _ in range(restarts):
        labels, inertia = _lloyd(x, _start(x, min(clusters, len(x)), generator))
        if best is None or inertia < best[1]:
            best = labels, inertia
    assert best is not None, "at least one run"
    return best


def _start(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centres: the first at random, each further one with odds of its squared distance."""
    picked = [int(torch.randint(len(x), (), generator=generator))]
    while len(picked) < clusters:
        distance = torch.cdist(x, x[picked]).square().amin(1)
        if float(distance.sum()) == 0:  # fewer different points than clusters
            break
        picked.append(int(torch.multinomial(distance, 1, generator=generator)))
    return x[picked].clone()


def _lloyd(x: Tensor, centres: Tensor, rounds: int = 300) -> tuple[Tensor, float]:
    labels = torch.full((len(x),), -1)
    for _ in range(rounds):
        distance = torch.cdist(x, centres).square()
        nearest = distance.argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        for cluster in labels.unique().tolist():
            centres[cluster] = x[labels == cluster].mean(0)
    return labels, float((x - centres[labels]).square().sum())


def quotas(sizes: Sequence[int], total: int, rule: Quota) -> list[int]:
    """How many of each cluster; no more than it has. What is short is drawn from the rest later."""
    if rule is Quota.EQUAL:
        shares = [total / len(sizes)] * len(sizes)
    else:
        shares = [total * size / sum(sizes) for size in sizes]
    found = [int(share) for share in shares]
    # the remainder goes to the largest fractions, among equals to the largest clusters
    order = sorted(range(len(sizes)), key=lambda c: (found[c] - shares[c], -sizes[c], c))
    for cluster in order[: total - sum(found)]:
        found[cluster] += 1
    return [min(quota, size) for quota, size in zip(found, sizes, strict=True)]


def nfds(
    features: Features,
    keys: Sequence[str],
    count: int,
    seed: int,
    *,
    clusters: int = 8,
    drop: float = 0.2,
    rule: Filter = Filter.ZSCORE,
    quota: Quota = Quota.EQUAL,
) -> list[Choice]:
    """``count`` candidates; see the module."""
    order = key_order(keys)
    ordered = features.ordered(order)
    noise = set(left_out(features, keys, drop, rule))
    kept = [at for at, index in enumerate(order) if index not in noise]
    note = f"{len(noise)} of {len(order)} candidates were left out as noise"
    require_enough(count, len(kept), note)
    labels, _ = kmeans(ordered.similarities[kept], clusters, seed)
    groups = [
        [at for at, label in zip(kept, labels.tolist(), strict=True) if label == cluster]
        for cluster in labels.unique().tolist()
    ]
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Choice] = []
    sizes = [len(group) for group in groups]
    for number, (group, share) in enumerate(zip(groups, quotas(sizes, count, quota), strict=True)):
        why = f"one of {share} from cluster {number + 1} of {len(groups)}, which has {len(group)}"
        chosen += [Choice(at, why) for at in draw(group, share, generator)]
    taken = {choice.index for choice in chosen}
    rest = draw([at for at in kept if at not in taken], count - len(chosen), generator)
    chosen += [Choice(at, "at random, for clusters that were too small") for at in rest]
    return [Choice(order[choice.index], choice.why) for choice in chosen]
