"""The mask builder on Triton against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdqc.base.block_mask import blocks, kept_blocks
from vdqc.kernels import block_mask
from vdqc.kernels.block_mask import block_mask_topk


def both(
    q: torch.Tensor, k: torch.Tensor, *args: object
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    return block_mask._cuda(q, k, *args), block_mask_topk(q, k, *args)  # type: ignore[arg-type]


@settings(max_examples=8)
@given(
    rows=st.sampled_from([1, 2, 5]),
    keep=st.sampled_from([1, 3, 20]),
    text=st.sampled_from([[0, 0], [1, 0], [0, 1]]),
    always=st.sampled_from([[0, 0], [1, 0], [0, 1]]),
    sizes=st.sampled_from([(0, 0), (128, 128), (128, 64), (64, 128)]),
    seed=st.integers(0, 99),
)
def test_the_same_blocks(
    rows: int, keep: int, text: list[int], always: list[int], sizes: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = blocks(rows * sizes[0], sizes[1]) if sizes[1] else 17
    # whole numbers: many equal scores, zeros of both signs
    q = torch.randint(-2, 3, (1, 2, rows, 4), device=device).float()
    k = torch.randint(-2, 3, (1, 2, columns, 4), device=device).float()
    found, expected = both(q, k, -0.5, keep, 0.0, text, always, *sizes)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("mass", [0.3, 0.9, 1.0])
def test_the_same_mass(mass: float, poison: None, device: str) -> None:
    q, k = torch.randn(2, 1, 3, 8, device=device), torch.randn(2, 1, 40, 8, device=device)
    k[:, :, 7] = k[:, :, 9]  # equal probabilities
    found, expected = both(q, k, 0.7, 2, mass, [0, 1], [1, 0], 0, 0)
    kept, wanted = kept_blocks(*found, 40), kept_blocks(*expected, 40)
    p = torch.softmax(0.7 * q @ k.mT, -1)
    assert ((p * kept).sum(-1) >= mass - 1e-5).all()
    assert ((kept != wanted).sum(-1) <= 1).all()


def test_scores_that_are_not_numbers(poison: None, device: str) -> None:
    q, k = torch.ones(1, 1, 2, 4, device=device), torch.randn(1, 1, 5, 4, device=device)
    k[..., 3, :] = float("nan")
    found, expected = both(q, k, 1.0, 4, 0.0, [0, 0], [0, 0], 0, 0)
    assert torch.equal(found[2], expected[2])
    q.fill_(float("nan"))
    found, expected = both(q, k, 1.0, 2, 0.5, [0, 0], [0, 0], 0, 0)
    assert torch.equal(kept_blocks(*found, 5), kept_blocks(*expected, 5))


def test_nothing_to_choose(poison: None, device: str) -> None:
    q, k = torch.ones(1, 1, 2, 4, device=device), torch.ones(1, 1, 3, 4, device=device)
    found, expected = both(q, k, 1.0, 1, 0.0, [1, 1], [0, 0], 0, 0)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
    found = block_mask._cuda(q[:0], k[:0], 1.0, 1, 0.0, [0, 0], [0, 0], 0, 0)
    assert found[0].shape == (0, 1, 2)
