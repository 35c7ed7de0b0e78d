import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.target import TARGETS
from vdqc.kernels.attention import ATTENTION, torch_attention_cost
from vdqc.kernels.base import AttentionProblem, Cost
from vdqc.kernels.exp2_attention import attend_exp2
from vdqc.kernels.sparse_attention import SPARSE_ATTENTION, SparseAttentionProblem

BF16 = torch.bfloat16


def operands(b: int, h: int, s: int, t: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    # strided as models give them: [B, S, H, D] seen as [B, H, S, D]
    return [torch.randn(b, n, h, d).to(dtype).transpose(1, 2) for n in (s, t, t)]


@pytest.mark.parametrize(
    ("b", "h", "s", "t", "d"),
    [(1, 2, 300, 300, 32), (2, 1, 1, 7, 16), (2, 2, 257, 80, 24), (1, 1, 63, 1024, 64)],
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("mask", ["none", "bool", "rows", "additive"])
def test_equals_exact_attention(
    b: int, h: int, s: int, t: int, d: int, dtype: torch.dtype, mask: str
) -> None:
    q, k, v = operands(b, h, s, t, d, dtype)
    masks = {
        "none": None,
        "bool": torch.rand(b, 1, 1, t) > 0.3,
        "rows": torch.rand(s, t) > 0.3,
        "additive": torch.randn(b, h, s, t).to(dtype),
    }
    chosen = masks[mask]
    if chosen is not None and chosen.dtype == torch.bool:
        chosen[..., 0] = True
    scale = 0.3
    found = torch.ops.vdqc_kernels.attention(q, k, v, chosen, scale)
    wide = chosen if chosen is None or chosen.dtype == torch.bool else chosen.double()
    expected = functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=wide, scale=scale
    )
    assert found.is_contiguous()
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("shift", [-300.0, -41.0, 0.0, 40.0, 60.0, 300.0])
@pytest.mark.parametrize("masked", [False, True])
def test_any_range_of_scores_is_right(shift: float, masked: bool) -> None:
    """Powers of two fit up to about 41; beyond that the softmax does, and only the rows decide."""
    q, k, v = operands(1, 2, 192, 256, 16, BF16)
    moved = torch.zeros(1, 2, 192, 1, dtype=BF16)
    moved[:, 1, 128:] = shift  # scores of some queries of one head
    q = torch.cat([q, moved], -1)
    k = torch.cat([k, torch.ones(1, 2, 256, 1, dtype=BF16)], -1)
    mask = torch.rand(192, 256) > 0.3 if masked else None
    scale = 1.0
    found = torch.ops.vdqc_kernels.attention(q, k, v, mask, scale)
    scores = (q @ k.mT).double()  # rounded, as documented
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    expected = torch.softmax(scores, -1) @ v.double()
    assert relative_error(found, expected) < TOLERANCE[BF16]


@given(
    st.sampled_from([BF16, torch.float32]),
    st.floats(-80, 80),
    st.floats(0, 30),
    st.integers(0, 2**31),
)
def test_powers_give_the_softmax_or_refuse(
    dtype: torch.dtype, shift: float, spread: float, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    scores = (torch.randn(3, 5, 64, generator=source) * spread + shift).to(dtype)
    value = torch.randn(3, 64, 8, generator=source).to(dtype)
    expected = torch.softmax(scores.double() * math.log(2), -1) @ value.double()
    sums = torch.exp2(scores.double()).sum(-1)
    found = attend_exp2(scores.clone(), value)
    if found is None:
        assert sums.min() < 2.0**-59 or sums.max() > 2.0**59
    else:
        assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_powers_of_what_is_not_finite_are_refused(bad: float) -> None:
    scores = torch.zeros(4, 8, dtype=BF16)
    scores[2] = bad
    assert attend_exp2(scores, torch.ones(8, 2, dtype=BF16)) is None


def test_a_query_that_may_attend_to_nothing_gets_zeros() -> None:
    q, k, v = operands(1, 1, 200, 200, 16, BF16)
    mask = torch.ones(200, 200, dtype=torch.bool)
    mask[3] = False
    found = torch.ops.vdqc_kernels.attention(q, k, v, mask, 0.25)
    assert found[0, 0, 3].eq(0).all()
    assert torch.isfinite(found).all()


def test_opcheck() -> None:
    q, k, v = operands(1, 2, 40, 50, 16, BF16)
    torch.library.opcheck(
        ATTENTION.op, (q, k, v, None, 0.25), test_utils=("test_schema", "test_faketensor")
    )


def test_chosen_for_bfloat16_only() -> None:
    def problem(dtype: torch.dtype) -> AttentionProblem:
        return AttentionProblem(1, 12, 4096, 4096, 128, dtype)

    cpu = TARGETS["cpu"]
    assert ATTENTION.supports(problem(BF16), cpu) is None
    assert "float32" in str(ATTENTION.supports(problem(torch.float32), cpu))
    ours, torchs = ATTENTION.cost(problem(BF16)), torch_attention_cost(problem(BF16))
    assert ours.us(cpu) < torchs.us(cpu)


@pytest.mark.parametrize(("width", "reported"), [(128, 648), (64, 497)])
def test_on_a_gpu_attention_is_priced_by_its_units(width: int, reported: float) -> None:
    """FlashAttention-3 at 16k tokens; the constants of a CPU have no part in it."""
    problem = AttentionProblem(1, 16, 16384, 16384, width, torch.bfloat16)
    work = 4.0 * 16 * 16384**2 * width
    costs = [ATTENTION.cost(problem), torch_attention_cost(problem), ATTENTION.cost(problem) * 1.0]
    for cost in costs:
        assert work / cost.us(TARGETS["sm90"]) * 1e-6 == pytest.approx(reported, rel=0.1)
    both = costs[0] + Cost({}, 0.0, calls=0.0)
    assert both.us(TARGETS["sm90"]) == pytest.approx(costs[0].us(TARGETS["sm90"]))


@pytest.mark.parametrize("int8", [False, True])
def test_on_a_gpu_sparse_attention_takes_its_share_of_the_scores(int8: bool) -> None:
    sizes = (1, 24, 32768, 32768, 128, torch.bfloat16)
    dense = torch_attention_cost(AttentionProblem(*sizes)).us(TARGETS["sm90"])
    sparse = SparseAttentionProblem(*sizes, density=0.25, int8=int8)
    gain = dense / SPARSE_ATTENTION.cost(sparse).us(TARGETS["sm90"])
    assert gain == pytest.approx(4.1 if int8 else 3.4, rel=0.02)
