"""rope_quantize and rope on the CPU against exact numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vdqc.base.block_mask import block_means
from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.target import TARGETS
from vdqc.kernels.rope_quantize import ROPE, ROPE_QUANTIZE, RopeProblem

K = torch.ops.vdqc_kernels
BF16 = torch.bfloat16


def angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    table = torch.rand(tokens, pairs) * 6
    return table.cos(), table.sin()


def exact(x: Tensor, cos: Tensor, sin: Tensor, start: int, interleaved: bool) -> Tensor:
    """x times e^(i angle), pairs as complex numbers."""
    value = x.double()
    if not interleaved:
        value = torch.stack(value.chunk(2, -1), -1).flatten(-2)
    number = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos.double(), sin.double())[:, None]
    number = number.clone()
    number[:, start : start + len(cos)] *= turn
    value = torch.view_as_real(number)
    return (value.flatten(-2) if interleaved else torch.cat(value.unbind(-1), -1)).transpose(1, 2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("start", "count"), [(0, 9), (2, 7), (0, 5), (3, 4)])
def test_pairs_are_turned_and_text_is_not(interleaved: bool, start: int, count: int) -> None:
    x, table = torch.randn(2, 9, 3, 12), angles(count, 6)
    out, means = K.rope(x, "none", None, None, 0.0, *table, start, interleaved, 4)
    expected = exact(x, *table, start, interleaved)
    assert out.is_contiguous()
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert relative_error(means, block_means(expected, 4)) < TOLERANCE[torch.float32]
    assert torch.equal(
        out[:, :, :start],
        x.transpose(1, 2)[:, :, :start],
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_as_wide_as_heads(interleaved: bool) -> None:
    """Twice the same angle is the table of pairs; other factors are each channel's own."""
    x, table = torch.randn(2, 9, 3, 12), angles(7, 6)
    wide = [t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in table]
    narrow = K.rope(x, "none", None, None, 0.0, *table, 1, interleaved, 4)
    for found, expected in zip(
        K.rope(x, "none", None, None, 0.0, *wide, 1, interleaved, 4), narrow, strict=True
    ):
        assert torch.equal(found, expected)
    cos, sin = torch.randn(9, 12), torch.randn(9, 12)
    out, _ = K.rope(x, "none", None, None, 0.0, cos, sin, 0, interleaved, 4)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        partner = torch.stack((-b, a), -1).flatten(-2)
    else:
        partner = torch.cat((-x[..., 6:], x[..., :6]), -1)
    expected = (x * cos[:, None] + partner * sin[:, None]).transpose(1, 2)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("norm", ["rms", "layer", "rms_across"])
def test_norms(norm: str) -> None:
    x = torch.randn(2, 5, 3, 8) + 1
    size = 24 if norm == "rms_across" else 8
    weight, bias = torch.rand(size), torch.randn(size)
    out, _ = K.rope(x, norm, weight, bias, 1e-6, None, None, 0, False, 64)
    flat = x.flatten(2) if norm == "rms_across" else x
    function = torch.nn.functional.layer_norm if norm == "layer" else torch.nn.functional.rms_norm
    expected = function(flat.double(), [size], eps=1e-6) * weight + bias
    assert relative_error(out, expected.reshape(x.shape).transpose(1, 2)) < TOLERANCE[torch.float32]


def test_codes_and_smoothing() -> None:
    x, table = torch.randn(2, 70, 3, 16).to(BF16) + 4, angles(70, 8)
    value = exact(x, *table, 0, True).float()
    codes, scale, means = K.rope_quantize(x, "none", None, None, 0.0, *table, 0, True, False, 32)
    assert relative_error(codes * scale, value) < 1e-2
    assert means.shape == (2, 3, 3, 16)
    smooth, finer, same = K.rope_quantize(x, "none", None, None, 0.0, *table, 0, True, True, 32)
    centred = value - value.mean(2, keepdim=True)
    assert relative_error(smooth * finer, centred) < 1e-2
    assert torch.equal(means, same)
    # softmax of q (k - mean) is that of q k
    query = torch.randn(2, 3, 5, 16)
    assert torch.allclose(
        (query @ centred.mT).softmax(-1), (query @ value.mT).softmax(-1), atol=1e-4
    )


def test_batched_angles() -> None:
    x, first, second = torch.randn(2, 9, 3, 12), angles(9, 6), angles(9, 6)
    both = [torch.stack(pair) for pair in zip(first, second, strict=True)]
    out, _ = K.rope(x, "none", None, None, 0.0, *both, 0, True, 64)
    for index, table in enumerate((first, second)):
        one = x[index : index + 1]
        expected, _ = K.rope(one, "none", None, None, 0.0, *table, 0, True, 64)
        assert torch.equal(out[index : index + 1], expected)


def test_tokens_that_are_not_finite() -> None:
    x = torch.randn(1, 6, 2, 8)
    x[0, 2, 1, 3] = float("nan")
    x[0, 4, 0] = 0
    codes, scale, _ = K.rope_quantize(x, "none", None, None, 0.0, None, None, 0, False, False, 64)
    assert codes[0, 1, 2].eq(0).all()
    assert not scale[0, 1, 2].isfinite().any()
    assert codes[0, 0, 4].eq(0).all()
    assert int(scale.isfinite().sum()) == 11


@pytest.mark.parametrize("smooth", [False, True])
def test_opcheck(smooth: bool) -> None:
    x, table = torch.randn(2, 9, 3, 12).to(BF16), angles(9, 6)
    steps: tuple[Any, ...] = ("rms", torch.rand(12), None, 1e-6, *table, 0, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ROPE_QUANTIZE.op, (x, *steps, smooth, 4), test_utils=checks)
    torch.library.opcheck(ROPE.op, (x, *steps, 4), test_utils=checks)


def test_refusals() -> None:
    x, table = torch.randn(1, 6, 2, 8), angles(6, 4)
    for arguments, message in (
        (("group", None, None, 0.0, *table, 0), "got 'group'"),
        (("none", None, None, 0.0, *table, 1), "6 tokens from 1 on to be among 6"),
        (("none", None, None, 0.0, table[0], None, 0), "both cos and sin"),
        (("none", None, None, 0.0, *angles(6, 6), 0), r"expected \[.., 4\] or \[.., 8\] alike"),
    ):
        with pytest.raises(InputError, match=message):
            K.rope(x, *arguments, False, 4)
    with pytest.raises(InputError, match="even D"):
        K.rope(torch.randn(1, 6, 2, 7), "none", None, None, 0.0, None, None, 0, False, 4)


def test_supports_and_cost() -> None:
    def problem(**more: Any) -> RopeProblem:
        return RopeProblem(1, 118_800, 24, 128, BF16, **more)

    gpu = TARGETS["sm90"]
    assert ROPE_QUANTIZE.supports(problem(), gpu) is None
    assert "127" in str(ROPE_QUANTIZE.supports(RopeProblem(1, 8, 2, 127, BF16), gpu))
    once, twice = ROPE_QUANTIZE.cost(problem()), ROPE_QUANTIZE.cost(problem(smooth=True))
    assert twice.bytes - once.bytes == 118_800 * 3072 * 2
    assert once.us(gpu) < ROPE.cost(problem(codes=False)).us(gpu)
