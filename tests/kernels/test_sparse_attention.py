"""Block-sparse attention on the CPU against its reference, and the compressed mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdqc.base.block_mask import BlockMask, block_means, blocks, compress, full_mask
from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.target import TARGETS
from vdqc.kernels.attention import ATTENTION
from vdqc.kernels.base import AttentionProblem
from vdqc.kernels.block_mask import BLOCK_MASK_TOPK  # noqa: F401 (registers the op)
from vdqc.kernels.sparse_attention import (
    SPARSE_ATTENTION,
    SPARSE_ATTENTION_INT8,
    SparseAttentionProblem,
    sparse_attention,
    sparse_attention_int8,
)

BF16 = torch.bfloat16
OPS = torch.ops.vdqc_kernels


def operands(
    b: int, h: int, s: int, t: int, d: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    # strided as models give them: [B, S, H, D] seen as [B, H, S, D]
    return [torch.randn(b, n, h, d).to(dtype).transpose(1, 2) for n in (s, t, t)]


def random_mask(b: int, h: int, s: int, t: int, bq: int, bk: int, density: float) -> BlockMask:
    kept = torch.rand(b, h, blocks(s, bq), blocks(t, bk)) < density
    return BlockMask(*compress(kept), s, t, bq, bk)


def arguments(mask: BlockMask, scale: float) -> tuple[object, ...]:
    return (mask.starts, mask.counts, mask.ids, scale, mask.block_q, mask.block_k)


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale).round().to(torch.int8), scale


@given(
    b=st.integers(1, 2),
    h=st.integers(1, 3),
    s=st.sampled_from([1, 63, 80, 129, 200]),
    t=st.sampled_from([1, 63, 80, 129, 300]),
    d=st.sampled_from([8, 64]),
    bq=st.sampled_from([32, 64, 128]),
    bk=st.sampled_from([16, 64, 128]),
    shared=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from([torch.float32, BF16, torch.float16, torch.float64]),
    residual=st.sampled_from(["none", "float", "int8"]),
    lengths=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cpu_route_equals_the_reference(
    b: int,
    h: int,
    s: int,
    t: int,
    d: int,
    bq: int,
    bk: int,
    shared: bool,
    density: float,
    dtype: torch.dtype,
    residual: str,
    lengths: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    q, k, v = operands(b, h, s, t, d, dtype)
    mask = random_mask(1 if shared else b, 1 if shared else h, s, t, bq, bk, density)
    added, scale = None, None
    if residual == "float":
        added = torch.randn(b, h, s, d).to(dtype)
    elif residual == "int8":
        added, scale = int8_rows(torch.randn(b, h, s, d))
    length = torch.randint(0, t + 1, (b,), dtype=torch.int32) if lengths else None
    args = (*arguments(mask, 0.2), added, scale, length)
    found = OPS.sparse_attention(q, k, v, *args)
    expected = sparse_attention(q.double(), k.double(), v.double(), *args)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert relative_error(found, expected) < TOLERANCE[dtype]


def test_full_mask_is_dense_attention() -> None:
    q, k, v = operands(1, 2, 200, 129, 32)
    mask = full_mask(200, 129, block_q=64, block_k=64)
    dense = torch.softmax((q @ k.mT) * 0.2, -1) @ v
    assert torch.equal(sparse_attention(q, k, v, *arguments(mask, 0.2)), dense)
    found = OPS.sparse_attention(q, k, v, *arguments(mask, 0.2))
    expected = OPS.attention(q, k, v, None, 0.2)
    assert relative_error(found, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("factor", [1.0, 30.0, 1000.0])
def test_any_range_of_scores_is_right(factor: float) -> None:
    """Scores of up to 4, 120 and 4000: powers of two fit everywhere, here and there, nowhere."""
    q, k, v = operands(1, 2, 256, 256, 16)
    mask = arguments(random_mask(1, 2, 256, 256, 64, 64, 0.6), 0.25 * factor)
    expected = sparse_attention(q.double(), k.double(), v.double(), *mask)
    assert relative_error(OPS.sparse_attention(q, k, v, *mask), expected) < 2e-4


def test_where_the_row_lies_and_how_it_is_padded_change_nothing() -> None:
    q, k, v = operands(1, 2, 256, 512, 16)
    kept = torch.rand(1, 2, 4, 8) < 0.5
    tight, loose = compress(kept, int(kept.sum(-1).max())), compress(kept)
    moved = torch.cat([torch.zeros(5, dtype=torch.int32), loose[2]])
    outs = [
        OPS.sparse_attention(q, k, v, *mask, 0.2, 64, 64)
        for mask in (tight, loose, (loose[0] + 5, loose[1], moved))
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_order_of_the_blocks_of_a_row_changes_nothing() -> None:
    q, k, v = operands(1, 1, 64, 512, 16)
    ids = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    row = (torch.zeros(1, 1, 1, dtype=torch.int32), torch.full((1, 1, 1), 4, dtype=torch.int32))
    outs = [
        OPS.sparse_attention(q, k, v, *row, ids[order], 0.2, 64, 64)
        for order in (torch.arange(4), torch.tensor([2, 0, 3, 1]))
    ]
    assert relative_error(*outs) < TOLERANCE[torch.float32]


def test_rows_without_keys_give_zeros_and_their_residual() -> None:
    q, k, v = operands(1, 1, 130, 130, 16, BF16)
    kept = torch.tensor([[True, True], [False, False]])[None, None]
    mask = BlockMask(*compress(kept), 130, 130)
    args = arguments(mask, 0.2)
    for out in (OPS.sparse_attention(q, k, v, *args), sparse_attention(q, k, v, *args)):
        assert out[:, :, 128:].eq(0).all()
        assert out[:, :, :128].ne(0).any()
    residual = torch.randn(1, 1, 130, 16).to(BF16)
    out = OPS.sparse_attention(q, k, v, *args, residual)
    assert torch.equal(out[:, :, 128:], residual[:, :, 128:])


@given(
    h=st.integers(1, 2),
    s=st.sampled_from([63, 129, 200]),
    dtype=st.sampled_from([torch.float32, BF16]),
    seed=st.integers(0, 99),
)
def test_int8_scores(h: int, s: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = operands(1, h, s, s, 32)
    k = k + 5 * torch.randn(1, h, 1, 32)  # a common offset: what smoothing takes away
    mask = random_mask(1, h, s, s, 64, 64, 0.6)
    smooth = k - k.mean(-2, keepdim=True)
    (qc, qs), (kc, ks) = int8_rows(q), int8_rows(smooth)
    args = (qc, qs, kc, ks, v.to(dtype), *arguments(mask, 32**-0.5))
    found = OPS.sparse_attention_int8(*args)
    assert found.dtype == dtype
    assert relative_error(found, sparse_attention_int8(*args).double()) < TOLERANCE[dtype]
    exact = sparse_attention(q.double(), k.double(), v.double(), *arguments(mask, 32**-0.5))
    assert relative_error(found, exact) < 2e-2  # the noise of 8-bit codes


def test_operands_that_do_not_fit() -> None:
    q, k, v = operands(1, 2, 200, 200, 16)
    mask = full_mask(200, 200)
    good = list(arguments(mask, 0.2))
    codes = torch.zeros(1, 2, 200, 16, dtype=torch.int8)
    for change, message in (
        ({0: mask.starts[..., :1]}, r"expected int32 \[1 or 1, 2 or 1, 2\] for 200 queries"),
        ({2: mask.ids.long()}, "ids: expected torch.int32, got torch.int64"),
        ({6: codes}, "int8 residual needs a residual_scale"),
        ({6: codes[:, :, :7].float()}, r"residual: expected \[1, 2, 200, 16\]"),
        ({8: torch.zeros(3, dtype=torch.int32)}, r"key_length: expected \[1\], got \[3\]"),
    ):
        args = [*good, None, None, None]
        for place, value in change.items():
            args[place] = value
        if 0 in change:
            args[1] = mask.counts[..., :1]
        with pytest.raises(InputError, match=message):
            OPS.sparse_attention(q, k, v, *args)


def test_opcheck() -> None:
    q, k, v = operands(1, 2, 130, 150, 16, BF16)
    mask = random_mask(1, 1, 130, 150, 64, 64, 0.6)
    codes, scale = int8_rows(torch.randn(1, 2, 130, 16))
    (qc, qs), (kc, ks) = int8_rows(q), int8_rows(k)
    checks = ("test_schema", "test_faketensor")
    for tail in ((), (codes, scale), (q.contiguous(), None, torch.tensor([99], dtype=torch.int32))):
        args = (q, k, v, *arguments(mask, 0.25), *tail)
        torch.library.opcheck(SPARSE_ATTENTION.op, args, test_utils=checks)
        args = (qc, qs, kc, ks, v, *arguments(mask, 0.25), *tail)
        torch.library.opcheck(SPARSE_ATTENTION_INT8.op, args, test_utils=checks)


def test_a_program_that_builds_its_mask_is_exported() -> None:
    class Sparse(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            means = [block_means(x, 64) for x in (q, k)]
            mask = OPS.block_mask_topk(*means, 0.25, 2, 0.0, [0, 1], [0, 1], 64, 64)
            return OPS.sparse_attention(q, k, v, *mask, 0.25, 64, 64)

    sample = [x.contiguous() for x in operands(1, 2, 200, 200, 16)]
    exported = torch.export.export(Sparse(), tuple(sample), strict=False)
    other = [x.contiguous() for x in operands(1, 2, 200, 200, 16)]
    expected = Sparse()(*other)
    assert torch.equal(exported.module()(*other), expected)
    dense = OPS.attention(*other, None, 0.25)
    assert relative_error(expected, dense) > 0.01
    # text attends to everything
    assert relative_error(expected[:, :, 192:], dense[:, :, 192:]) < TOLERANCE[torch.float32]


def test_price_is_proportional_to_density() -> None:
    def price(density: float, **changes: object) -> float:
        args = (1, 12, 4096, 4096, 128, BF16, density)
        problem = SparseAttentionProblem(*args, **changes)  # type: ignore[arg-type]
        return SPARSE_ATTENTION.cost(problem).us(TARGETS["cpu"])

    fixed = price(0.0)
    assert (price(0.5) - fixed) / (price(0.25) - fixed) == pytest.approx(2, rel=0.02)
    dense = ATTENTION.cost(AttentionProblem(1, 12, 4096, 4096, 128, BF16)).us(TARGETS["cpu"])
    assert price(1.0) == pytest.approx(dense, rel=0.05)
    assert price(0.25, int8=True) < price(0.25)


def test_refusals() -> None:
    def problem(**changes: object) -> SparseAttentionProblem:
        sizes = {"batch": 1, "heads": 2, "queries": 256, "keys": 256, "width": 128}
        fields = {**sizes, "dtype": BF16, "density": 0.5, **changes}
        return SparseAttentionProblem(**fields)  # type: ignore[arg-type]

    gpu, supports = TARGETS["sm90"], SPARSE_ATTENTION.supports
    assert supports(problem(), gpu) is None
    assert "64 or 128 channels, got 80" in str(supports(problem(width=80), gpu))
    assert "float32" in str(supports(problem(dtype=torch.float32), gpu))
    assert "blocks of 64 or 128" in str(supports(problem(block_k=32), gpu))
    assert supports(problem(width=80, block_k=32), TARGETS["cpu"]) is None
