"""The residual cache: what is kept, when it is refreshed, what is said about it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base import residual
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.residual import (
    CachePolicy,
    Extrapolation,
    Reference,
    Residual,
    Store,
    low_rank,
)
from vdqc.ir.signature import Signature, TensorInput
from vdqc.residual_cache import ResidualCache

SHAPE = (2, 3, 24, 8)
SIGNATURE = Signature(
    ("x", "timestep", "text"),
    {},
    (
        TensorInput("x", "float64", ("s0", 3)),
        TensorInput("timestep", "float64", ("s0",)),
        TensorInput("text", "float64", ("s0", 2)),
    ),
    {},
    {},
)
LINEAR = Extrapolation.LINEAR


class Drift:
    """A model of one attention: dense is sparse plus a residual that moves with the step."""

    def __init__(self, rank: int = 3, period: float = 0.0) -> None:
        random = torch.Generator().manual_seed(0)
        self.start = torch.randn(SHAPE, generator=random, dtype=torch.float64)
        left = torch.randn(*SHAPE[:3], rank, generator=random, dtype=torch.float64)
        right = torch.randn(*SHAPE[:2], rank, SHAPE[3], generator=random, dtype=torch.float64)
        self.slope, self.period, self.calls = left @ right, period, []

    def residual(self, time: Tensor, text: Tensor) -> Tensor:
        step = (1000 - time[0]) / 10
        move = torch.sin(step * 2 * torch.pi / self.period) if self.period else 0.1 * step
        return self.start * (1 + text.sum()) + self.slope * move

    def refresh(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append("refresh")
        return x.sum() + self.residual(time, text), self.residual(time, text)

    def reuse(self, x: Tensor, time: Tensor, text: Tensor, *parts: Tensor) -> tuple[Tensor]:
        self.calls.append("reuse")
        value = parts[0] @ parts[1] if parts[0].shape[-1] != SHAPE[-1] else parts[0]
        if parts[0].dtype == torch.int8:
            value = parts[0].double() * parts[1]
        return (x.sum() + value,)


def cache(drift: Drift, **options: Any) -> ResidualCache:
    return ResidualCache(CachePolicy(**options), 1, SIGNATURE)


def call(
    kept: ResidualCache,
    drift: Drift,
    time: float,
    text: float = 0.0,
    batch: int = 2,
    name: str = "",
) -> float:
    """Relative error of one call against dense attention."""
    x = torch.zeros(batch, 3, dtype=torch.float64)
    inputs = [x, torch.full((batch,), time, dtype=torch.float64)]
    inputs.append(torch.full((batch, 2), text, dtype=torch.float64))
    kept.name = name
    (out,) = kept.run(inputs, drift.refresh, drift.reuse)
    return relative_error(out, drift.residual(inputs[1], inputs[2]))


def video(kept: ResidualCache, drift: Drift, steps: int = 15, **options: Any) -> list[float]:
    return [call(kept, drift, 1000.0 - 10 * i, **options) for i in range(steps)]


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_linear_drift_is_reproduced_exactly() -> None:
    drift = Drift()
    errors = video(cache(drift, extrapolation=LINEAR, rank=3), drift)
    assert drift.calls == (["refresh"] + ["reuse"] * 4) * 3
    assert max(errors[5:]) <= TOLERANCE[torch.float64]  # from the second refresh on
    adjacent = Drift()
    kept = cache(adjacent, extrapolation=LINEAR, rank=3, reference=Reference.ADJACENT)
    errors = video(kept, adjacent)
    assert adjacent.calls == (["refresh"] * 2 + ["reuse"] * 3) * 3
    assert max(errors) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("extrapolation", list(Extrapolation))
def test_a_constant_residual_is_exact(order: int, extrapolation: Extrapolation) -> None:
    drift = Drift()
    drift.slope = torch.zeros_like(drift.slope)
    kept = cache(drift, order=order, extrapolation=extrapolation, interval=4)
    assert max(video(kept, drift)) <= TOLERANCE[torch.float64]


def test_a_periodic_drift_stays_near_and_refreshes_are_exact() -> None:
    drift = Drift(period=40.0)
    for options in ({"order": 1}, {"order": 2}, {"order": 2, "extrapolation": LINEAR}):
        kept = cache(drift, rank=8, **options)
        errors = video(kept, drift, 40)
        assert max(errors[::5]) == 0  # a refresh is dense, bit for bit
        assert max(errors) < 0.9


def test_the_first_interval_has_no_second_order() -> None:
    first, second = Drift(), Drift()
    one = video(cache(first, order=1), first, 5)
    two = video(cache(second, order=2), second, 5)
    assert one == two
    zero = Drift()
    assert video(cache(zero, rank=0), zero, 15) == video(cache(first, order=1), first, 15)


def test_the_paper_holds_its_second_order_term() -> None:
    drift = Drift()
    errors = video(cache(drift, rank=3), drift, 10)
    # D + D2 is D as it will be at the next refresh: the error falls towards it
    assert errors[6] > errors[7] > errors[8] > errors[9] > 0


@given(seed=st.integers(0, 99), rank=st.integers(1, 8))
def test_factors_are_the_best_of_their_rank(seed: int, rank: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    left, right = low_rank(x, rank)
    assert (left.shape[-1], right.shape[-2]) == (rank, rank)
    tail = torch.linalg.svdvals(x)[..., rank:]
    error = (x - left @ right).square().sum((-1, -2)).sqrt()
    assert torch.allclose(error, tail.square().sum(-1).sqrt(), atol=1e-7)


@given(
    store=st.sampled_from(list(Store)),
    order=st.sampled_from([1, 2]),
    extrapolation=st.sampled_from(list(Extrapolation)),
    seed=st.integers(0, 50),
)
def test_stores_keep_what_they_promise(
    store: Store, order: int, extrapolation: Extrapolation, seed: int
) -> None:
    torch.manual_seed(seed)
    policy = CachePolicy(order=order, rank=3, store=store, extrapolation=extrapolation)
    base = torch.randn(2, 3, 24, 3) @ torch.randn(2, 3, 3, 8)  # lowrank can hold it
    before = Residual.of(policy, base, None, 0)
    now = Residual.of(policy, base * 1.5, before, 5)
    reach = 0.0 if order == 1 else 1.0 if extrapolation is Extrapolation.HOLD else 0.4
    wanted = base * (1.5 + 0.5 * reach)
    moved = now.ahead(policy, 2)
    limit = 0.02 if store is Store.INT8 else 1e-4
    assert relative_error(moved.value(policy), wanted) < limit
    assert relative_error(moved.at_refresh(policy), base * 1.5) < limit
    assert [t.shape for t in before.inputs(policy)] == [t.shape for t in moved.inputs(policy)]
    counted = policy.nbytes(base.numel(), 24, 8, 4)
    assert now.nbytes <= counted
    assert before.nbytes <= now.nbytes


def test_what_is_on_the_host_is_compared_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand for a GPU's: they too refuse an operand on the CPU."""
    monkeypatch.setattr(residual, "_on_host", lambda value: torch.zeros(value.shape))
    policy = CachePolicy(store=Store.HOST)
    before = Residual.of(policy, torch.empty(SHAPE, device="meta"), None, 0)
    now = Residual.of(policy, torch.empty(SHAPE, device="meta"), before, 5)
    assert now.left is not None
    assert [now.kept[0].device.type, now.left.device.type] == ["cpu", "meta"]


def test_branches_do_not_share() -> None:
    drift = Drift()
    kept = cache(drift, extrapolation=LINEAR, rank=3)
    with silent():
        for i in range(15):
            time, errors = 1000.0 - 10 * i, []
            # told apart by their prompts, in any order, and by the name of their context
            for text in (1.0, 2.0) if i % 2 else (2.0, 1.0):
                errors.append(call(kept, drift, time, text))
            errors.append(call(kept, drift, time, 1.0, name="cond"))
            assert i < 5 or max(errors) <= TOLERANCE[torch.float64]
    assert (kept.refreshes, kept.reuses) == (9, 36)


def test_calls_that_cannot_be_told_apart_run_dense() -> None:
    drift = Drift()
    kept = cache(drift)
    call(kept, drift, 1000.0)
    with pytest.warns(UserWarning, match="repeated.*cache_context"):
        assert call(kept, drift, 1000.0) == 0
    with silent():
        assert [call(kept, drift, 1000.0 - 10 * (i // 2)) for i in range(2, 20)] == [0.0] * 18


def test_videos_follow_each_other() -> None:
    for times in ([1000.0 - 10 * i for i in range(7)], [10.0 * i for i in range(7)]):
        drift = Drift()
        kept = cache(drift)
        with silent():
            for _ in range(3):
                assert call(kept, drift, times[0]) == 0  # not from the video before
                for time in times[1:]:
                    call(kept, drift, time)
        assert drift.calls == (["refresh"] + ["reuse"] * 4 + ["refresh", "reuse"]) * 3
    kept.reset()
    assert kept.nbytes == 0


def test_steps_out_of_order_are_refreshed() -> None:
    drift = Drift()
    kept = cache(drift, interval=50)
    for time in (1000.0, 990.0, 980.0):
        call(kept, drift, time)
    with pytest.warns(UserWarning, match="steps were skipped"):
        assert call(kept, drift, 950.0) == 0
    with pytest.warns(UserWarning, match="back into a video"):
        assert call(kept, drift, 970.0) == 0
    with silent():
        assert call(kept, drift, 960.0) > 0
    call(kept, drift, 960.0, 1.0)
    call(kept, drift, 950.0)
    with pytest.warns(UserWarning, match="a branch skipped"):
        call(kept, drift, 940.0, 1.0)
    assert call(kept, drift, 930.0, 1.0) > 0
    with pytest.warns(UserWarning, match="a branch skipped"):
        assert call(kept, drift, 930.0) == 0


def test_other_sizes_in_mid_video_are_refreshed() -> None:
    drift = Drift()
    kept = cache(drift)
    call(kept, drift, 1000.0)
    with pytest.warns(UserWarning, match="sizes changed"):
        assert call(kept, drift, 990.0, batch=4) == 0


def test_memory_is_a_limit() -> None:
    drift = Drift()
    policy = CachePolicy(order=1, memory=1.5 * 2 * 3 * 24 * 8 * 8 / 2**30)
    kept = ResidualCache(policy, 1, SIGNATURE)
    call(kept, drift, 1000.0, 1.0)
    with pytest.warns(UserWarning, match="GiB.*runs dense"):
        call(kept, drift, 1000.0, 2.0)
    with silent():
        assert call(kept, drift, 990.0, 2.0) == 0
        assert call(kept, drift, 990.0, 1.0) > 0
    assert kept.nbytes <= policy.memory * 2**30


def test_policies_are_text() -> None:
    for policy in (CachePolicy(), CachePolicy(1, 4, 3, LINEAR, Reference.REFRESH, Store.INT8, 2.5)):
        assert CachePolicy.parse(str(policy)) == policy
    for options in ({"order": 3}, {"interval": 0}, {"rank": -1}, {"memory": -1.0}):
        with pytest.raises(ConfigError):
            CachePolicy(**options)
    for text in ("residual", "residual{order=x}", "residual{what=1}", "other{order=1}"):
        with pytest.raises(ConfigError, match="cannot read"):
            CachePolicy.parse(text)
    with pytest.raises(InputError, match="expected an input"):
        ResidualCache(CachePolicy(timestep="when"), 1, SIGNATURE)
