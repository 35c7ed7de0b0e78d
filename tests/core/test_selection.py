"""Selectors: what is drawn, what is left out, what order and seed may change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.engine.diverse import (
    Features,
    Filter,
    Quota,
    Reference,
    Similarity,
    frame_similarity,
    kmeans,
    nfds,
    noise_score,
    noisy,
    quotas,
    stacked,
)
from vdqc.engine.selection import (
    Choice,
    MatrixNorm,
    diffusion_salience,
    greatest_eigenvalue,
    minmax,
    quantisation_salience,
    random_choice,
    salient,
    stability,
    timestep_spread,
    uniform,
)

seeds = st.integers(0, 2**31)


def keys(count: int) -> list[str]:
    return [f"{index:04d}" for index in range(count)]


def features(count: int, seed: int = 0, layers: int = 4, frames: int = 5) -> Features:
    random = torch.Generator().manual_seed(seed)
    means = torch.randn(count, layers, generator=random)
    variances = 1 + torch.rand(count, layers, generator=random)
    return Features(means, variances, torch.rand(count, frames, generator=random))


def indices(choices: Sequence[Choice]) -> list[int]:
    return [choice.index for choice in choices]


Selector = Callable[[list[str], list[int], int], list[Choice]]


def selectors(count: int, seed: int) -> dict[str, Selector]:
    """Every selector over ``count`` candidates given in some order, choosing ``n``."""
    known = features(count, seed)
    random = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, count, generator=random).tolist()
    return {
        "uniform": lambda k, order, n: uniform(k, n),
        "random": lambda k, order, n: random_choice(k, n, seed),
        "timestep": lambda k, order, n: timestep_spread(k, [a[i] for i in order], n, seed),
        "nfds": lambda k, order, n: nfds(known.ordered(order), k, n, seed, clusters=3),
        "salient": lambda k, order, n: salient([a[i] for i in order], [b[i] for i in order], k, n),
    }


# -- all of them ------------------------------------------------------------------------------


@given(seeds, st.integers(5, 40), st.data())
def test_choices_are_different_candidates_whatever_their_order(
    seed: int, count: int, data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, count - count // 5))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    for name, select in selectors(count, seed).items():
        plain = select(keys(count), list(range(count)), wanted)
        assert len(set(indices(plain))) == len(plain) == wanted, name
        assert all(choice.why for choice in plain)
        assert plain == select(keys(count), list(range(count)), wanted), name
        moved = select([keys(count)[i] for i in order], order, wanted)
        assert [(order[c.index], c.why) for c in moved] == [(c.index, c.why) for c in plain], name


@pytest.mark.parametrize("name", ["uniform", "random", "timestep", "nfds", "salient"])
def test_more_than_there_is_is_one_clear_error(name: str) -> None:
    select = selectors(10, 0)[name]
    with pytest.raises(InputError, match=r"expected at least 11 samples to select from") as caught:
        select(keys(10), list(range(10)), 11)
    assert caught.value.diagnostic.code == "too-few-samples"
    with pytest.raises(InputError, match=r"at least 1 sample, got 0"):
        select(keys(10), list(range(10)), 0)


def test_what_was_filtered_is_no_candidate() -> None:
    with pytest.raises(InputError, match=r"at least 9 .* got 8") as caught:
        nfds(features(10), keys(10), 9, 0)
    assert "2 of 10 candidates were left out as noise" in caught.value.diagnostic.notes[0]


# -- plain draws ------------------------------------------------------------------------------


@given(st.integers(1, 60), st.data())
def test_uniform_is_evenly_spaced(count: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, count))
    places = indices(uniform(keys(count), wanted))
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert places[0] <= count // wanted
    assert all(count // wanted <= gap <= -(-count // wanted) for gap in gaps)


def test_random_reaches_every_candidate_equally_often() -> None:
    counts = torch.zeros(10)
    for seed in range(500):
        counts[indices(random_choice(keys(10), 3, seed))] += 1
    assert float((counts - 150).abs().max()) < 4 * (500 * 0.3 * 0.7) ** 0.5


def test_timestep_spread_takes_each_share_once() -> None:
    timesteps = [900.0, 500.0, 100.0] * 8
    chosen = timestep_spread(keys(24), timesteps, 6, 0)
    assert [timesteps[choice.index] for choice in chosen] == [900.0] * 2 + [500.0] * 2 + [100.0] * 2
    assert chosen[0].why == "timesteps 900 to 900"
    with pytest.raises(InputError, match="expected a timestep for every sample"):
        timestep_spread(keys(2), [1.0, None], 1, 0)


# -- noise filter -----------------------------------------------------------------------------


@given(seeds, st.integers(8, 60), st.floats(1e3, 1e6))
def test_an_offset_outlier_never_survives(seed: int, count: int, offset: float) -> None:
    known = features(count, seed)
    place = seed % count
    known.means[place] += offset
    assert bool(noisy(known, Filter.ZSCORE, 1 / count)[place])
    assert bool(noisy(known, Filter.IQR, 0)[place])
    assert not bool(noisy(known, Filter.NONE, 0.5).any())


@given(seeds, st.floats(0.01, 100), st.floats(-10, 10))
def test_score_ignores_scale_and_offset_of_a_layer(seed: int, scale: float, offset: float) -> None:
    known = features(20, seed)
    means, variances = known.means.double(), known.variances.double()
    before = noise_score(Features(means, variances, known.similarities))
    means[:, 1] = means[:, 1] * scale + offset
    variances[:, 1] *= scale**2
    after = noise_score(Features(means, variances, known.similarities))
    assert torch.allclose(after, before, rtol=1e-8)
    assert float(before.sum()) == pytest.approx(20 * 8)  # z-scores of 8 columns over 20 candidates


def test_a_layer_that_never_varies_counts_nothing() -> None:
    known = features(20)
    known.means[:, 0] = 7.0
    assert float(noise_score(known).sum()) == pytest.approx(20 * 7)


@given(st.integers(1, 200), st.floats(0, 0.99))
def test_the_filter_drops_its_share(count: int, share: float) -> None:
    dropped = int(noisy(features(count), Filter.ZSCORE, share).sum())
    assert dropped == int(share * count + 1e-9)


# -- frame similarity -------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", Similarity)
@pytest.mark.parametrize("reference", Reference)
def test_identical_frames_are_alike(reference: Reference, similarity: Similarity) -> None:
    frames = torch.randn(2, 1, 7, 5).expand(2, 4, 7, 5)
    found = frame_similarity(frames, reference, similarity)
    assert torch.allclose(found, torch.ones_like(found))
    assert len(found) == (4 if reference is Reference.MEAN else 3)


@given(seeds)
def test_frame_similarity_is_the_cosine_of_whole_frames(seed: int) -> None:
    x = torch.randn(1, 3, 4, 2, generator=torch.Generator().manual_seed(seed)).double()
    a, b, c = (frame.flatten() for frame in x[0])

    def cosine(u: Tensor, v: Tensor) -> Tensor:
        return u @ v / (u.norm() * v.norm())

    wanted = torch.stack([cosine(a, b), cosine(a, c)])
    assert torch.allclose(frame_similarity(x), wanted)
    wanted = torch.stack([cosine(a, b), cosine(b, c)])
    assert torch.allclose(frame_similarity(x, Reference.PREVIOUS), wanted)
    pooled = x.unflatten(2, (2, 2)).mean(3).mean(-1, keepdim=True)  # by two, both ways
    by_token = torch.cosine_similarity(pooled[:, :1], pooled[:, 1:], dim=-1).mean((0, 2))
    assert torch.allclose(frame_similarity(x, similarity=Similarity.TOKEN), by_token)


def test_candidates_of_other_lengths_are_resampled() -> None:
    short, long = torch.tensor([0.0, 1.0]), torch.linspace(0, 1, 5)
    assert torch.allclose(stacked([short, long]), torch.tensor([[0.0, 1.0]] * 2))
    with pytest.raises(InputError, match="at least two frames"):
        stacked([short, torch.empty(0)])


# -- clusters ---------------------------------------------------------------------------------


@given(seeds, st.integers(1, 6))
def test_kmeans_is_as_good_as_another(seed: int, clusters: int) -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)).double()
    labels, inertia = kmeans(points, clusters, seed)
    other = sklearn.KMeans(clusters, n_init=10, random_state=0).fit(points.numpy())
    assert inertia <= other.inertia_ * 1.03
    centres = torch.stack([points[labels == c].mean(0) for c in range(clusters)])
    assert inertia == pytest.approx(float((points - centres[labels]).square().sum()))
    assert torch.equal(torch.cdist(points, centres).argmin(1), labels)


def test_kmeans_finds_what_is_apart() -> None:
    truth = torch.arange(30) % 3
    points = torch.randn(30, 4) * 0.1 + truth[:, None] * 10.0
    labels, _ = kmeans(points, 3, 0)
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 3


def test_kmeans_of_fewer_points_than_clusters() -> None:
    labels, inertia = kmeans(torch.ones(5, 2), 4, 0)
    assert labels.tolist() == [0] * 5
    assert inertia == 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_quotas(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(1, sum(sizes)))
    for rule in Quota:
        found = quotas(sizes, total, rule)
        assert sum(found) <= total
        assert all(0 <= quota <= size for quota, size in zip(found, sizes, strict=True))
    equal = quotas([50] * len(sizes), total, Quota.EQUAL) if total <= 50 else []
    assert not equal or max(equal) - min(equal) <= 1
    shares = quotas(sizes, total, Quota.PROPORTIONAL)
    assert sum(shares) == total
    for quota, size in zip(shares, sizes, strict=True):
        assert abs(quota - total * size / sum(sizes)) < 1


def test_remainders_go_to_the_largest_fractions() -> None:
    assert quotas([10, 26, 64], 10, Quota.PROPORTIONAL) == [1, 3, 6]
    assert quotas([5, 9, 7], 7, Quota.EQUAL) == [2, 3, 2]


@given(seeds)
def test_quotas_of_clusters_are_met(seed: int) -> None:
    truth = torch.arange(60) % 3
    random = torch.Generator().manual_seed(seed)
    known = features(60, seed)
    spread = torch.randn(60, 5, generator=random) * 0.01 + truth[:, None] * 10.0
    known = Features(known.means, known.variances, spread)
    chosen = nfds(known, keys(60), 12, seed, clusters=3)
    assert torch.bincount(truth[indices(chosen)]).tolist() == [4, 4, 4]
    dropped = noisy(known, Filter.ZSCORE, 0.2)
    assert not bool(dropped[indices(chosen)].any())


def test_short_clusters_are_topped_up() -> None:
    truth = torch.tensor([0] * 28 + [1] * 2)
    known = features(30)
    known = Features(known.means, known.variances, truth[:, None] * torch.ones(30, 4) * 9)
    chosen = nfds(known, keys(30), 10, 0, clusters=2, rule=Filter.NONE)
    assert torch.bincount(truth[indices(chosen)]).tolist() == [8, 2]
    assert sum("too small" in choice.why for choice in chosen) == 3


@given(seeds, st.integers(1, 30))
def test_one_cluster_and_no_filter_is_the_random_draw(seed: int, count: int) -> None:
    known = features(30, seed)
    chosen = nfds(known, keys(30), count, seed, clusters=1, drop=0.0)
    assert indices(chosen) == indices(random_choice(keys(30), count, seed))


# -- salience ---------------------------------------------------------------------------------


@given(seeds, st.floats(1e-3, 1e3))
def test_diffusion_salience_ignores_the_scale_of_latents(seed: int, scale: float) -> None:
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed)).double()
    plain = diffusion_salience(a, b)
    assert diffusion_salience(a * scale, b * scale) == pytest.approx(plain, rel=1e-12)
    assert plain == pytest.approx(float((a - b).norm() ** 2 / a.norm() ** 2))
    with pytest.raises(InputError, match="latents of one shape"):
        diffusion_salience(a, b[:3])


@given(seeds, st.integers(1, 20), st.integers(1, 20))
def test_power_iteration_is_the_greatest_eigenvalue(seed: int, n: int, d: int) -> None:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()
    exact = float(torch.linalg.eigvalsh(x.T @ x)[-1])
    assert greatest_eigenvalue(x) == pytest.approx(exact, rel=1e-6)
    assert quantisation_salience(x[None]) == pytest.approx(exact, rel=1e-12)
    frobenius = quantisation_salience(x[None], MatrixNorm.FROBENIUS)
    assert frobenius == pytest.approx(float((x.T @ x).norm()))
    assert frobenius >= exact * (1 - 1e-12)


def test_wide_latents_go_by_power_iteration() -> None:
    x = torch.randn(4, 700).double()
    exact = float(torch.linalg.eigvalsh(x @ x.T)[-1])  # the same spectrum, and small
    assert quantisation_salience(x[None]) == pytest.approx(exact, rel=1e-6)
    assert greatest_eigenvalue(torch.zeros(3, 3)) == 0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), seeds)
def test_scores_lie_in_the_unit_interval(values: list[float], seed: int) -> None:
    scaled = minmax(torch.tensor(values, dtype=torch.float64))
    assert bool(((scaled >= 0) & (scaled <= 1)).all())
    assert float(scaled[values.index(min(values))]) == 0
    other = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = salient(values, other, keys(len(values)), len(values))
    scores = [float(choice.why.split()[1]) for choice in chosen]
    assert scores == sorted(scores, reverse=True)
    for least in (values.index(min(values)), other.index(min(other))):
        (choice,) = (choice for choice in chosen if choice.index == least)
        assert choice.why.startswith("salience 0.0000")


@given(seeds, st.floats(0, 3), st.floats(0, 3), st.integers(0, 9))
def test_more_salience_never_ranks_lower(seed: int, more: float, other: float, which: int) -> None:
    a, b = torch.rand(2, 10, generator=torch.Generator().manual_seed(seed)).tolist()
    rank = indices(salient(a, b, keys(10), 10)).index(which)
    a[which], b[which] = a[which] + more, b[which] + other
    assert indices(salient(a, b, keys(10), 10)).index(which) <= rank


def test_no_prompt_takes_more_than_it_may() -> None:
    a, b = [9.0, 8.0, 7.0, 2.0, 1.0], [9.0, 8.0, 7.0, 2.0, 1.0]
    prompts = [0, 0, 0, 1, 1]
    assert indices(salient(a, b, keys(5), 3, prompts=prompts)) == [0, 1, 2]
    assert indices(salient(a, b, keys(5), 3, prompts=prompts, per_prompt=2)) == [0, 1, 3]
    with pytest.raises(InputError, match=r"at least 3 .* got 2") as caught:
        salient(a, b, keys(5), 3, prompts=prompts, per_prompt=1)
    assert "at most 1 of each prompt" in caught.value.diagnostic.notes[0]


# -- stability --------------------------------------------------------------------------------


def test_stability_is_the_overlap_of_choices() -> None:
    fixed = stability(lambda seed: uniform(keys(20), 5), range(4))
    assert fixed == {"seeds": 4, "overlap": 1.0, "ever": 5}
    apart = stability(lambda seed: [Choice(seed, "")], range(3))
    assert apart == {"seeds": 3, "overlap": 0.0, "ever": 3}
    some = stability(lambda seed: random_choice(keys(20), 10, seed), range(5))
    assert 0.1 < some["overlap"] < 0.6
    assert stability(lambda seed: uniform(keys(3), 1), [0])["overlap"] == 1.0
