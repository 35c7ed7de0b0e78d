import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base import numerics
from vdqc.base.rounding import (
    compensated,
    input_factor,
    learned_rounding,
    output_error,
    penalty_exponent,
    per_column,
    rounding_logits,
    rounding_penalty,
    soft_rounding,
)
from vdqc.base.scheme import QuantSpec

SEEDS = st.integers(0, 2**31)
SPECS = st.sampled_from(["int3/channel", "int4/channel/asym", "int4/group8", "int2/group4/asym"])


def problem(seed: int, rows: int = 6, width: int = 24) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs, some channels large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(200, width, generator=generator, dtype=torch.float64) @ mix
    x[:, ::7] *= 10
    return weight, x.T @ x / len(x)


def scales(weight: Tensor, text: str) -> tuple[QuantSpec, Tensor, Tensor | None]:
    spec = QuantSpec.parse(text)
    return spec, *numerics.scale_from_range(*numerics.value_range(weight, spec), spec)


def brute_force(
    weight: Tensor, moment: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec
) -> Tensor:
    """Optimal brain surgery, column by column, from the inverse of what is left of the moment."""
    left, result = weight.clone(), weight.clone()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    for j in range(weight.shape[1]):
        on_grid = numerics.fake_quantize(left, scale, zero, spec)[:, j]
        inverse = damped[j:, j:].inverse()
        error = (left[:, j] - on_grid) / inverse[0, 0]
        left[:, j:] -= error[:, None] * inverse[0]
        result[:, j] = on_grid
    return result


@settings(max_examples=15)
@given(SEEDS, SPECS, st.sampled_from([1, 5, 128]))
def test_compensation_is_optimal_brain_surgery(seed: int, text: str, block: int) -> None:
    weight, moment = problem(seed)
    spec, scale, zero = scales(weight, text)
    found = compensated(weight, input_factor(moment), scale, zero, spec, block)
    expected = brute_force(weight, moment, scale, zero, spec)
    assert numerics.relative_error(found, expected) < 1e-10


@settings(max_examples=15)
@given(SEEDS, SPECS, st.booleans())
def test_uncorrelated_inputs_are_rounded_to_nearest(seed: int, text: str, ordered: bool) -> None:
    weight, moment = problem(seed)
    spec, scale, zero = scales(weight, text)
    factor = input_factor(moment.diagonal().diag(), ordered=ordered)
    found = compensated(weight, factor, scale, zero, spec)
    nearest = numerics.fake_quantize(weight, scale, zero, spec)
    torch.testing.assert_close(found, nearest, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("text", ["int3/channel", "int4/group8/asym"])
def test_correlated_inputs_lose_less_than_by_rounding_to_nearest(text: str, ordered: bool) -> None:
    gains = []
    for seed in range(8):
        weight, moment = problem(seed, rows=32, width=64)
        spec, scale, zero = scales(weight, text)
        found = compensated(weight, input_factor(moment, ordered=ordered), scale, zero, spec)
        nearest = numerics.fake_quantize(weight, scale, zero, spec)
        error = output_error(weight - found, moment).sum()
        gains.append(float(error / output_error(weight - nearest, moment).sum()))
    assert max(gains) < 0.75


def test_values_stay_on_the_grid_and_survive_a_second_quantisation() -> None:
    weight, moment = problem(3)
    for text in ("int2/channel", "int8/channel", "int7/channel/asym", "int4/group8"):
        spec, scale, zero = scales(weight, text)
        found = compensated(weight, input_factor(moment), scale, zero, spec)
        again = numerics.fake_quantize(found, scale, zero, spec)
        torch.testing.assert_close(again, found, rtol=1e-12, atol=0)
        half = numerics.quantize(found.bfloat16(), scale, zero, spec)
        assert torch.equal(half, numerics.quantize(found, scale, zero, spec))


def test_a_singular_moment_and_dead_channels_are_damped() -> None:
    weight, moment = problem(0)
    moment[:, 3] = moment[3] = 0
    rank_one = moment[:1].T @ moment[:1]
    for case in (moment, rank_one, torch.zeros_like(moment)):
        factor = input_factor(case, 0.0)
        assert bool(factor.upper.isfinite().all())
        spec, scale, zero = scales(weight, "int4/channel")
        found = compensated(weight, factor, scale, zero, spec)
        assert bool(found.isfinite().all())
    nearest = numerics.fake_quantize(weight, scale, zero, spec)
    factor = input_factor(moment)
    assert torch.equal(compensated(weight, factor, scale, zero, spec)[:, 3], nearest[:, 3])


@given(SEEDS)
def test_output_error_is_that_of_the_samples(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    d = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    expected = (x @ d.T).square().mean(0)
    torch.testing.assert_close(output_error(d, x.T @ x / 40), expected, rtol=1e-10, atol=0)


@given(SEEDS, SPECS)
def test_learned_rounding_starts_at_the_weight_and_ends_on_the_grid(seed: int, text: str) -> None:
    weight, _ = problem(seed)
    spec, scale, _ = scales(weight, text)
    steps = weight / per_column(scale, spec, weight.shape[1])
    start = learned_rounding(weight, rounding_logits(steps - steps.floor()), scale, spec)
    torch.testing.assert_close(start, weight, rtol=1e-9, atol=1e-9)
    up = learned_rounding(weight, torch.full_like(weight, 9.0), scale, spec)
    down = learned_rounding(weight, torch.full_like(weight, -9.0), scale, spec)
    assert bool((down <= weight + 1e-12).all() & (weight <= up + 1e-12).all())
    assert numerics.relative_error(up - down, per_column(scale, spec, weight.shape[1])) < 1e-12
    assert float(rounding_penalty(torch.full_like(weight, 9.0), 2.0)) == 0


def test_the_penalty_pulls_away_from_the_middle() -> None:
    logits = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    values = soft_rounding(logits)
    assert float(values.detach().min()) == 0
    assert float(values.detach().max()) == 1
    rounding_penalty(logits, 2.0).backward()
    assert logits.grad is not None
    inside = (values > 0.02) & (values < 0.98) & ((values - 0.5).abs() > 0.02)
    downhill = -logits.grad[inside]
    assert bool((downhill.sign() == (values[inside] - 0.5).sign()).all())
    assert [penalty_exponent(p) for p in (0.0, 0.5, 1.0, 2.0)] == [20, 11, 2, 2]
