import warnings

import pytest
import torch

from vdqc.kernels.gpu import guard


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_VERDICTS", {})


def test_a_variant_that_agrees_serves(verdicts: None) -> None:
    calls: list[str] = []

    def run(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.ones(2)

    for _ in range(3):
        guard.guarded("ws", lambda: run("ws"), lambda: run("plain"))
    assert calls == ["plain", "ws", "ws", "ws"]


def test_a_variant_that_differs_is_dropped(verdicts: None) -> None:
    with pytest.warns(UserWarning, match="ws differs"):
        assert guard.guarded("ws", lambda: torch.ones(2), lambda: torch.zeros(2)).sum() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guard.guarded("ws", lambda: torch.ones(2), lambda: torch.zeros(2)).sum() == 0


def test_a_variant_that_does_not_compile_is_dropped(verdicts: None) -> None:
    def fails() -> torch.Tensor:
        raise RuntimeError("PassManager::run failed")

    with pytest.warns(UserWarning, match="does not compile"):
        assert guard.guarded("ws", fails, lambda: torch.zeros(2)).sum() == 0
    assert guard.guarded("ws", fails, lambda: torch.zeros(2)).sum() == 0


def test_only_the_plain_variant_serves_where_that_is_asked(
    verdicts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs() -> torch.Tensor:
        raise AssertionError("called")

    monkeypatch.setenv("VDQC_PLAIN", "1")
    monkeypatch.setitem(guard._VERDICTS, "proven", True)
    for key in ("ws", "proven"):
        assert guard.guarded(key, hangs, lambda: torch.zeros(2)).sum() == 0
    monkeypatch.setenv("VDQC_PLAIN", "0")
    assert guard.guarded("ws", lambda: torch.zeros(2), lambda: torch.zeros(2)).sum() == 0
    assert guard._VERDICTS["ws"]


def test_running_out_of_memory_is_no_compile_error(verdicts: None) -> None:
    def fails() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        guard.compile_or_fallback("ws", fails, lambda: torch.zeros(2))


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("Triton Error [CUDA]: out of memory", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("Triton Error [CUDA]: invalid argument", False),
        ("CUDA error: an illegal memory access was encountered", True),
        ("PassManager::run failed", False),
    ],
)
def test_what_another_kernel_would_meet_too_is_raised(
    verdicts: None, text: str, fatal: bool
) -> None:
    def fails() -> torch.Tensor:
        raise RuntimeError(text)

    caught = pytest.raises(RuntimeError) if fatal else pytest.warns(UserWarning, match="serves")
    with caught:
        guard.guarded("ws", fails, lambda: torch.zeros(2))


def test_agreement_is_by_norm_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_PIECE", 64)
    expected = torch.randn(1000)
    expected[3], expected[4], expected[5] = float("nan"), float("inf"), 0.0
    found = expected * (1 + 1e-6)
    found[5] = 1e-6  # a sum that cancels, off by a rounding
    assert guard.agrees(found, expected)
    assert guard.agrees(expected[:0], expected[:0])
    assert not guard.agrees(found.nan_to_num(), expected)
    found[-1] += 0.01  # one value of the last piece
    assert not guard.agrees(found, expected)
    assert not guard.agrees(torch.tensor([1, 2]), torch.tensor([1, 3]))
