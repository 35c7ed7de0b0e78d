import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base import branches, numerics
from vdqc.base.branches import alternating_factors, frame_gain, leading_factors
from vdqc.base.scheme import QuantSpec

SEEDS = st.integers(0, 2**31)


def matrix(seed: int, rows: int = 12, width: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


@given(SEEDS, st.integers(0, 12), st.booleans())
def test_factors_are_the_nearest_of_their_rank(seed: int, rank: int, turned: bool) -> None:
    m = matrix(seed).T if turned else matrix(seed)
    up, down = leading_factors(m, rank)
    s = torch.linalg.svdvals(m)
    error, least = (m - up @ down).square().sum(), s[rank:].square().sum()
    assert float((error - least).abs() / m.square().sum()) < 1e-10
    gram = s[:rank].diag()
    torch.testing.assert_close(up.T @ up, gram, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(down @ down.T, gram, rtol=1e-10, atol=1e-10)


def test_the_error_does_not_rise_with_the_rank() -> None:
    m = matrix(1)
    errors = [
        float((m - up @ down).norm())
        for up, down in (leading_factors(m, rank) for rank in range(13))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_wide_matrices_are_nearly_as_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "EXACT", 8)
    for seed in range(3):
        m = matrix(seed, 96, 160)
        up, down = leading_factors(m, 8)
        least = torch.linalg.svdvals(m)[8:].square().sum()
        assert float((m - up @ down).square().sum() / least) < 1.01
        assert torch.equal(up, leading_factors(m, 8)[0])


@pytest.mark.parametrize("seed", range(3))
def test_rounds_lower_the_error(seed: int) -> None:
    weight = matrix(seed, 48, 64)
    weight[:, ::9] *= 12
    spec = QuantSpec.parse("int3/group16")

    def quantised(value: Tensor) -> Tensor:
        scale = numerics.scale_from_range(*numerics.value_range(value, spec), spec)
        return numerics.fake_quantize(value, *scale, spec)

    def error(difference: Tensor) -> float:
        return float(difference.square().sum())

    def left(rounds: int) -> tuple[float, int]:
        up, down, used = alternating_factors(weight, 8, quantised, error, rounds)
        return error(weight - up @ down - quantised(weight - up @ down)), used

    (once, _), (often, used) = left(1), left(100)
    assert 1 < used < 100
    assert often < once < error(weight - quantised(weight))


@given(SEEDS, st.integers(1, 6))
def test_gain_is_what_was_turned_over_what_is_there(seed: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cosine = torch.rand(frames, generator=generator, dtype=torch.float64)
    size = torch.rand(frames, generator=generator, dtype=torch.float64) + 0.1
    gain = frame_gain(cosine, size)
    omega = size / size.sum()
    assert float((gain * omega).sum()) == pytest.approx(1)  # eta sums to 1
    order = torch.randperm(frames, generator=generator)
    torch.testing.assert_close(frame_gain(cosine[order], size[order]), gain[order])


def test_equal_frames_have_gain_one() -> None:
    gain = frame_gain(torch.full((5,), 0.98), torch.full((5,), 7.0))
    torch.testing.assert_close(gain, torch.ones(5, dtype=torch.float64))
    assert frame_gain(torch.tensor([0.9, 1.0]), torch.tensor([0.0, 0.0])).tolist() != []
    assert float(frame_gain(torch.tensor([0.9, 1.0]), torch.tensor([1.0, 0.0]))[1]) == 1
