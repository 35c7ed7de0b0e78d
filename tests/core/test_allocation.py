from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base.allocation import kurtosis, outlier_split, spend

SEEDS = st.integers(0, 2**31)


def test_kurtosis_of_known_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4096, generator=generator, dtype=torch.float64)
    gaussian = kurtosis(rows)
    assert float((gaussian - 3).abs().max()) < 4 * (24 / 4096) ** 0.5
    rows[:, 9] = 12
    assert bool((kurtosis(rows) > gaussian + 0.5).all())
    flat = torch.tensor([[1.0, -1.0, 1.0, -1.0], [5.0, 5.0, 5.0, 5.0]])
    assert kurtosis(flat).tolist() == [1.0, 0.0]


@given(SEEDS, st.floats(0.1, 10), st.floats(-3, 3))
def test_kurtosis_knows_neither_scale_nor_offset(seed: int, scale: float, offset: float) -> None:
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(kurtosis(rows * scale + offset), kurtosis(rows), rtol=1e-6, atol=0)


def falling(seed: int, items: int, ways: int = 3) -> Tensor:
    """Errors that fall with every way, by different factors."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(items, generator=generator, dtype=torch.float64) + 0.1
    factors = torch.rand(ways - 1, items, generator=generator, dtype=torch.float64)
    return torch.cat([first[None], first * factors.cumprod(0)])


@given(SEEDS, st.integers(5, 64), st.integers(0, 5))
def test_a_split_keeps_the_mean_and_never_loses(seed: int, rows: int, largest: int) -> None:
    errors = falling(seed, rows)
    saliency = errors[0]
    choice, moved = outlier_split(saliency, errors, largest)
    assert int((choice == 0).sum()) == int((choice == 2).sum()) == moved * (rows // 10)
    assert moved <= largest
    assert float(errors.gather(0, choice[None]).sum()) <= float(errors[1].sum())
    if moved:
        assert float(saliency[choice == 2].min()) >= float(saliency[choice == 0].max())


@given(SEEDS, st.integers(1, 5), st.floats(0, 1))
def test_spending_keeps_to_the_budget_and_is_near_the_best(
    seed: int, items: int, share: float
) -> None:
    errors = falling(seed, items)
    weights = torch.randint(1, 4, (items,), generator=torch.Generator().manual_seed(seed)).double()
    costs = torch.tensor([2.0, 3.0, 4.0]).double()[:, None] * weights
    budget = float(costs[0].sum() + share * (costs[2] - costs[0]).sum())
    choice = spend(errors, costs, budget)
    assert choice is not None
    columns = torch.arange(items)
    assert float(costs[choice, columns].sum()) <= budget + 1e-6
    found = float(errors[choice, columns].sum())
    feasible = [
        float(errors[torch.tensor(ways), columns].sum())
        for ways in product(range(3), repeat=items)
        if float(costs[torch.tensor(ways), columns].sum()) <= budget + 1e-9
    ]
    # a greedy choice misses at most one step of one item
    step = float((errors[0] - errors[2]).max())
    assert min(feasible) - 1e-12 <= found <= min(feasible) + step + 1e-12


def test_steps_past_a_flat_way_are_seen() -> None:
    errors = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.0, 0.8]])
    costs = torch.tensor([[2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
    choice = spend(errors, costs, 6.0)
    assert choice is not None
    assert choice.tolist() == [2, 0]


@pytest.mark.parametrize("budget", [3.9, 0.0])
def test_a_budget_below_the_cheapest_is_impossible(budget: float) -> None:
    assert spend(torch.ones(2, 2), torch.tensor([[2.0, 2.0], [3.0, 3.0]]), budget) is None
