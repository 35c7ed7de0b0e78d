"""Block-sparse attention on Triton against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdqc.base.block_mask import BlockMask, blocks, compress, full_mask
from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.kernels.attention import ATTENTION
from vdqc.kernels.gpu import attention
from vdqc.kernels.gpu.attention import sparse_attention
from vdqc.kernels.gpu.launch_config import Config
from vdqc.kernels.sparse_attention import sparse_attention as truth
from vdqc.kernels.sparse_attention import sparse_attention_int8 as truth_int8

BF16 = torch.bfloat16
WIDE = Config(block_n=128, warps=8, stages=2)
PLAIN, SPECIALISED = Config(block_n=64, warps=4), Config(block_n=128, variant="ws")


def operands(
    b: int, h: int, s: int, t: int, d: int, device: str, dtype: torch.dtype = BF16
) -> list[torch.Tensor]:
    # strided as models give them: [B, S, H, D] seen as [B, H, S, D]
    return [torch.randn(b, n, h, d).to(device, dtype).transpose(1, 2) for n in (s, t, t)]


def random_mask(h: int, s: int, t: int, block: int, density: float, device: str) -> BlockMask:
    kept = torch.rand(1, h, blocks(s, block), blocks(t, block), device=device) < density
    return BlockMask(*compress(kept), s, t, block, block)


def arguments(mask: BlockMask, scale: float = 0.2) -> tuple[object, ...]:
    return (mask.starts, mask.counts, mask.ids, scale, mask.block_q, mask.block_k)


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale).round().to(torch.int8), scale


@pytest.mark.parametrize("config", [PLAIN, SPECIALISED], ids=["plain", "ws"])
@pytest.mark.parametrize(
    ("h", "s", "t", "width"), [(2, 300, 300, 64), (1, 129, 257, 128), (2, 128, 256, 64)]
)
def test_equals_the_reference(
    config: Config, h: int, s: int, t: int, width: int, poison: None, device: str
) -> None:
    q, k, v = operands(1, h, s, t, width, device)
    args = arguments(random_mask(h, s, t, 128, 0.6, device))
    found = sparse_attention(q, k, v, *args, config=config)
    assert found.is_contiguous()
    assert relative_error(found, truth(q.double(), k.double(), v.double(), *args)) < TOLERANCE[BF16]


@pytest.mark.parametrize("config", [PLAIN, SPECIALISED], ids=["plain", "ws"])
def test_keys_that_do_not_exist(config: Config, poison: None, device: str) -> None:
    q, k, v = operands(2, 1, 129, 257, 64, device)
    mask = random_mask(1, 129, 257, 128, 0.8, device)
    for lengths in ([100, 257], [256, 0]):
        length = torch.tensor(lengths, dtype=torch.int32, device=device)
        args = (*arguments(mask), None, None, length)
        found = sparse_attention(q, k, v, *args, config=config)
        expected = truth(q.double(), k.double(), v.double(), *args)
        assert relative_error(found, expected) < TOLERANCE[BF16]


@settings(max_examples=6)
@given(
    s=st.sampled_from([1, 63, 80, 129]),
    t=st.sampled_from([1, 63, 80, 200]),
    width=st.sampled_from([16, 64]),
    block=st.sampled_from([32, 64, 128]),
    tile=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([BF16, torch.float16]),
    residual=st.sampled_from(["none", "float", "int8"]),
    seed=st.integers(0, 99),
)
def test_every_shape_of_the_plain_kernel(
    s: int,
    t: int,
    width: int,
    block: int,
    tile: int,
    dtype: torch.dtype,
    residual: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = operands(1, 2, s, t, width, device, dtype)
    mask = random_mask(2, s, t, block, 0.6, device)
    added = torch.randn(1, 2, s, width, device=device).to(dtype)
    pair = {"none": (None, None), "float": (added, None), "int8": int8_rows(added)}[residual]
    args = (*arguments(mask), *pair)
    found = sparse_attention(q, k, v, *args, config=Config(block_n=tile, warps=4, stages=2))
    expected = truth(q.double(), k.double(), v.double(), *args)
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
def test_queries_through_a_descriptor_of_the_host(
    strided: bool, bits: int, poison: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "host_queries", lambda: True)
    q, k, v = operands(2, 2, 140, 140, 64, device)
    mask = random_mask(2, 140, 140, 128, 0.7, device)
    if not strided:
        q = q.contiguous()
    scales = {}
    if bits == 8:
        (q, scales["q_scale"]), (k, scales["k_scale"]) = int8_rows(q), int8_rows(k)
        if strided:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = sparse_attention(q, k, v, *arguments(mask), **scales, config=SPECIALISED)
    expected = sparse_attention(q, k, v, *arguments(mask), **scales, config=WIDE)
    assert relative_error(found, expected) < TOLERANCE[BF16]


@pytest.mark.parametrize("config", [PLAIN, SPECIALISED], ids=["plain", "ws"])
def test_int8_scores(config: Config, poison: None, device: str) -> None:
    q, k, v = operands(1, 2, 200, 260, 64, device)
    mask = random_mask(2, 200, 260, 128, 0.6, device)
    (qc, qs), (kc, ks) = int8_rows(q), int8_rows(k)
    residual = int8_rows(torch.randn(1, 2, 200, 64, device=device))
    args = (*arguments(mask), *residual)
    found = sparse_attention(qc, kc, v, *args, q_scale=qs, k_scale=ks, config=config)
    expected = truth_int8(qc, qs, kc, ks, v.float(), *args)
    assert relative_error(found, expected) < TOLERANCE[BF16]


@pytest.mark.parametrize("config", [PLAIN, SPECIALISED], ids=["plain", "ws"])
def test_order_of_programs_and_of_blocks_changes_little(
    config: Config, poison: None, device: str
) -> None:
    q, k, v = operands(1, 2, 256, 384, 64, device)
    mask = random_mask(2, 256, 384, 128, 0.7, device)
    args = arguments(mask)
    sorted_rows = sparse_attention(q, k, v, *args, config=config)
    assert torch.equal(sorted_rows, sparse_attention(q, k, v, *args, config=config, sort=False))
    ids = mask.ids.reshape(1, 2, 2, -1).clone()
    for h in range(2):
        for row in range(2):
            own = ids[0, h, row, : int(mask.counts[0, h, row])]
            own.copy_(own.flip(0))
    turned = sparse_attention(q, k, v, *args[:2], ids.flatten(), *args[3:], config=config)
    assert relative_error(turned, sorted_rows) < TOLERANCE[BF16]


@pytest.mark.parametrize("config", [PLAIN, SPECIALISED], ids=["plain", "ws"])
def test_full_mask_is_dense_attention(config: Config, poison: None, device: str) -> None:
    q, k, v = operands(1, 1, 200, 130, 64, device)
    mask = full_mask(200, 130, device=device)
    found = sparse_attention(q, k, v, *arguments(mask), config=config)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), scale=0.2
    )
    assert relative_error(found, dense) < TOLERANCE[BF16]


@pytest.mark.parametrize("config", [PLAIN, SPECIALISED], ids=["plain", "ws"])
def test_rows_without_keys_give_their_residual(config: Config, poison: None, device: str) -> None:
    q, k, v = operands(1, 1, 256, 130, 64, device)
    kept = torch.tensor([[True, True], [False, False]], device=device)[None, None]
    mask = BlockMask(*compress(kept), 256, 130)
    residual = torch.randn(1, 1, 256, 64, device=device).to(BF16)
    found = sparse_attention(q, k, v, *arguments(mask), config=config)
    assert found[:, :, 128:].eq(0).all()
    assert found.isfinite().all()
    found = sparse_attention(q, k, v, *arguments(mask), residual, config=config)
    assert torch.equal(found[:, :, 128:], residual[:, :, 128:])
    # no key exists at all
    none = torch.zeros(1, dtype=torch.int32, device=device)
    found = sparse_attention(q, k, v, *arguments(mask), residual, None, none, config=config)
    assert torch.equal(found, residual)


@pytest.mark.parametrize("config", [PLAIN, SPECIALISED], ids=["plain", "ws"])
def test_nothing_to_attend_to(config: Config, poison: None, device: str) -> None:
    q, k, v = operands(1, 2, 5, 0, 64, device)
    mask = full_mask(5, 0, device=device)
    assert sparse_attention(q, k, v, *arguments(mask), config=config).eq(0).all()
    found = sparse_attention(q[:, :, :0], k, v, *arguments(full_mask(0, 0, device=device)))
    assert found.shape == (1, 2, 0, 64)


def test_scores_far_below_zero_are_kept(poison: None, device: str) -> None:
    q = torch.full((1, 1, 4, 16), -8.0, device=device).to(BF16)
    k = torch.full((1, 1, 20, 16), 8.0, device=device).to(BF16)
    v = torch.randn(1, 1, 20, 16, device=device).to(BF16)
    mask = full_mask(4, 20, block_q=16, block_k=16, device=device)
    found = sparse_attention(q, k, v, *arguments(mask), config=Config(block_n=16, warps=4))
    expected = v.float().mean(2, keepdim=True).expand(1, 1, 4, 16)  # all scores are equal
    assert relative_error(found, expected) < TOLERANCE[BF16]


def test_the_ops_on_this_device(device: str) -> None:
    q, k, v = operands(1, 2, 200, 200, 64, device)
    mask = random_mask(2, 200, 200, 128, 0.7, device)
    wide = [x.double() for x in (q, k, v)]
    found = torch.ops.vdqc_kernels.sparse_attention(q, k, v, *arguments(mask))
    assert relative_error(found, truth(*wide, *arguments(mask))) < TOLERANCE[BF16]
    (qc, qs), (kc, ks) = int8_rows(q), int8_rows(k)
    found = torch.ops.vdqc_kernels.sparse_attention_int8(qc, qs, kc, ks, v, *arguments(mask))
    expected = truth_int8(qc, qs, kc, ks, v.float(), *arguments(mask))
    assert relative_error(found, expected) < TOLERANCE[BF16]
    for chosen in (None, torch.rand(200, 200, device=device) > 0.3):
        found = ATTENTION.op(q, k, v, chosen, 0.2)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *wide, attn_mask=chosen, scale=0.2
        )
        assert relative_error(found, expected) < TOLERANCE[BF16]


def test_operands_that_descriptors_refuse_are_copied(device: str) -> None:
    heads = torch.randn(2, 40, 3, 64, device=device, dtype=torch.bfloat16).transpose(1, 2)
    shared = heads[:, :1].expand(2, 3, 40, 64)
    odd = heads.contiguous()[:1].as_strided((1, 3, 40, 64), (7, 40 * 64, 64, 1))
    assert attention._strided("q", heads, (torch.bfloat16,)) is heads
    for refused in (shared, odd):
        found = attention._strided("q", refused, (torch.bfloat16,))
        assert torch.equal(found, refused)
        assert all(step > 0 and step % 8 == 0 for step in found.stride()[:-1])


def test_what_no_kernel_takes(device: str) -> None:
    q, k, v = operands(1, 1, 64, 64, 64, device)
    mask = full_mask(64, 64, device=device)
    with pytest.raises(InputError, match="positive scale"):
        sparse_attention(q, k, v, *arguments(mask, 0.0))
    with pytest.raises(InputError, match="query: expected bfloat16 or float16, got float32"):
        sparse_attention(q.float(), k, v, *arguments(mask))
    with pytest.raises(InputError, match="got 80 and 64"):
        sparse_attention(*operands(1, 1, 64, 64, 80, device)[:2], v, *arguments(mask))
    with pytest.raises(InputError, match="block_k of 16, 32, 64 or 128, got 48"):
        sparse_attention(q, k, v, *arguments(mask)[:4], 64, 48)
