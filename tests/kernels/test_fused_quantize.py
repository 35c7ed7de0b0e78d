"""fused_quantize and its siblings on the CPU: equal to the ops they stand for, one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vdqc.base import hadamard
from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.packing import pack, unpack
from vdqc.base.target import TARGETS
from vdqc.kernels.fused_quantize import (
    FUSED_QUANTIZE,
    FUSED_QUANTIZE_ASYM,
    RESIDUAL_QUANTIZE,
    RESIDUAL_QUANTIZE_ASYM,
    QuantizeProblem,
)
from vdqc.kernels.int8_linear import int8_linear
from vdqc.kernels.prologue import Prologue, gated_residual, prologue
from vdqc.kernels.quantize_rows import quantize_rows, quantize_rows_asym

K = torch.ops.vdqc_kernels
BF16 = torch.bfloat16


def steps(**given: Any) -> tuple[Any, ...]:
    """The arguments of the prologue, by position."""
    given.pop("post", None)  # comes after the form of the codes
    s = Prologue(**given)
    return (
        s.norm, s.norm_weight, s.norm_bias, s.eps, s.mod_scale, s.mod_shift, s.activation,
        s.smooth, s.signs, s.block,
    )  # fmt: skip


def everything(width: int, block: int) -> dict[str, Any]:
    return {
        "norm": "layer",
        "norm_weight": torch.rand(width) + 0.5,
        "norm_bias": torch.randn(width) / 4,
        "mod_scale": torch.randn(2, 1, width) / 4,
        "mod_shift": torch.randn(2, 5, width) / 4,
        "activation": "gelu_tanh",
        "smooth": torch.rand(width) + 0.5,
        "signs": hadamard.random_signs(width, 0),
        "block": block,
        "post": torch.rand(width) + 0.5,
    }


def test_the_steps_are_those_of_a_block_in_their_order() -> None:
    x, given = torch.randn(2, 5, 96, dtype=torch.float64), everything(96, 12)
    value = functional.layer_norm(
        x, [96], given["norm_weight"].double(), given["norm_bias"].double()
    )
    value = value * (1 + given["mod_scale"]) + given["mod_shift"]
    value = functional.gelu(value, approximate="tanh") * given["smooth"]
    value = hadamard.rotate(value, given["signs"], 12) * given["post"]
    assert (
        relative_error(prologue(x, Prologue(**given)), value) < 1e-5
    )  # eps: 1e-6 here, 1e-5 there
    value = functional.rms_norm(x, [96], eps=1e-6) * given["norm_weight"]
    found = prologue(x, Prologue("rms", given["norm_weight"], activation="silu"))
    assert relative_error(found, functional.silu(value)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_scale_and_sums(bits: int) -> None:
    x, given, clip = torch.randn(2, 5, 96).to(BF16), everything(96, 96), torch.tensor(0.7)
    value = prologue(x, Prologue(**given))
    form = (None, bits, False, given["post"], clip)
    codes, scale, sums, low = K.fused_quantize(x, *steps(**given), *form)
    expected = quantize_rows(value, 2 ** (bits - 1) - 1, False, clip)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    assert torch.equal(sums, codes.sum(-1, keepdim=True).int())
    assert low.shape == (2, 5, 0)
    found = K.fused_quantize_asym(x, *steps(**given), *form)
    expected = (*quantize_rows_asym(value, bits, False, clip), None)
    for one, other in zip(found, expected, strict=False):
        assert other is None or torch.equal(one, other)
    assert torch.equal(found[3], found[0].sum(-1, keepdim=True).int())


@pytest.mark.parametrize("gated", [False, True])
def test_the_stream_is_rounded_and_then_read(gated: bool) -> None:
    x, y = torch.randn(2, 5, 80).to(BF16), torch.randn(2, 5, 80).to(BF16)
    gate = torch.randn(2, 1, 80) if gated else None
    rest = (*steps(norm="rms"), torch.randn(80, 3), 8, False)
    stream, *found = K.residual_quantize(x, y, gate, *rest)
    assert stream.dtype == BF16
    assert torch.equal(stream, gated_residual(x, y, gate))
    exact = x.double() + (1 if gate is None else gate.double()) * y.double()
    assert relative_error(stream, exact) < TOLERANCE[BF16]
    for one, other in zip(found, K.fused_quantize(stream, *rest), strict=True):
        assert torch.equal(one, other)
    asym = K.residual_quantize_asym(x, y, gate, *rest)
    for one, other in zip(asym, (stream, *K.fused_quantize_asym(stream, *rest)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("width", [16, 63, 80, 96])
def test_packed_codes_have_the_layout_of_packed_weights(width: int) -> None:
    x = torch.randn(2, 3, width)
    codes = K.fused_quantize_asym(x, *steps(), None, 4, False)[0]
    packed = K.fused_quantize_asym(x, *steps(), None, 4, True)[0]
    assert torch.equal(packed.flatten(0, 1), pack(codes.flatten(0, 1), 4))
    assert torch.equal(unpack(packed.flatten(0, 1), 4, width), codes.flatten(0, 1))


def test_a_linear_takes_what_comes_out() -> None:
    x, w, down = torch.randn(2, 5, 96), torch.randn(24, 96), torch.randn(96, 8)
    weight, scale = quantize_rows(w, 127, False)
    given = everything(96, 12)
    codes, s, zero, sums, low = K.fused_quantize_asym(
        x, *steps(**given), down, 8, False, given["post"]
    )
    found = int8_linear(
        codes, s, zero, weight, scale.flatten(), None, weight.sum(-1).int(), None, torch.float32
    )
    value = prologue(x, Prologue(**given)).double()
    assert relative_error(found, value @ w.double().T) < 2e-2
    assert relative_error(low, value @ down.double()) < TOLERANCE[torch.float32]
    assert sums.shape == (2, 5, 1)


def test_rows_without_a_range_and_rows_that_are_not_finite() -> None:
    x = torch.randn(5, 16)
    x[1] = 0
    x[2, 3] = float("nan")
    x[3, 4] = float("-inf")
    for op in (K.fused_quantize, K.fused_quantize_asym):
        codes, scale, *rest = op(x, *steps(), None, 8, False)
        assert codes[2:4].eq(0).all()
        assert not scale[2:4].isfinite().any()
        assert (codes[0] != 0).any()
        assert scale[:2].isfinite().all()
        if op is K.fused_quantize_asym:
            assert rest[0][2:4].eq(0).all()
            assert torch.equal(codes[1].int(), rest[0][1].expand(16))  # zero, as the model has it
        else:
            assert codes[1].eq(0).all()


def test_no_rows() -> None:
    found = K.residual_quantize_asym(
        torch.randn(0, 16), torch.randn(0, 16), None, *steps(norm="layer"), None, 8, False
    )
    assert [tuple(r.shape) for r in found] == [(0, 16), (0, 16), (0, 1), (0, 1), (0, 1), (0, 0)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck(packed: bool, down: bool, scaled: bool) -> None:
    x, y, gate = torch.randn(2, 5, 16).to(BF16), torch.randn(2, 5, 16).to(BF16), torch.randn(16)
    given = everything(16, 16) | {"mod_shift": torch.randn(2, 5, 16)}
    rest = (*steps(**given), torch.randn(16, 3) if down else None, 4, packed)
    if scaled:
        rest = (*rest, torch.rand(16), torch.tensor(0.9))
    checks = ("test_schema", "test_faketensor")
    for kernel in (FUSED_QUANTIZE, FUSED_QUANTIZE_ASYM):
        torch.library.opcheck(kernel.op, (x, *rest), test_utils=checks)
    for kernel in (RESIDUAL_QUANTIZE, RESIDUAL_QUANTIZE_ASYM):
        torch.library.opcheck(kernel.op, (x, y, gate, *rest), test_utils=checks)


def test_compiled_codes_are_the_same() -> None:
    x = torch.randn(64, 320).to(BF16)

    def both(value: Tensor) -> tuple[Tensor, ...]:
        spelled = RESIDUAL_QUANTIZE_ASYM.spelled["cpu"]
        return spelled(value, value, None, *steps(smooth=torch.arange(320.0)), None, 4, True)

    for found, expected in zip(torch.compile(both)(x), both(x), strict=True):
        assert torch.equal(found, expected)


def test_refusals() -> None:
    x = torch.randn(2, 16)
    with pytest.raises(InputError, match="2 to 8 bits, got 9"):
        K.fused_quantize(x, *steps(), None, 9, False)
    with pytest.raises(InputError, match="got 8"):
        K.fused_quantize(x, *steps(), None, 8, True)
    with pytest.raises(InputError, match="got 'group'"):
        Prologue("group")
    with pytest.raises(InputError, match="signs together with a block"):
        Prologue(block=4)
    with pytest.raises(InputError, match="post together with a block"):
        Prologue(post=torch.ones(16))


def test_supports_and_cost() -> None:
    def problem(**more: Any) -> QuantizeProblem:
        return QuantizeProblem(118_800, 3072, BF16, **more)

    gpu = TARGETS["sm90"]
    assert FUSED_QUANTIZE.supports(problem(block=128, rank=32, bits=4, packed=True), gpu) is None
    assert "rank" in str(FUSED_QUANTIZE.supports(problem(rank=64), gpu))
    assert "tile" in str(FUSED_QUANTIZE.supports(problem(block=100), gpu))
    assert "share a byte" in str(FUSED_QUANTIZE.supports(problem(packed=True), gpu))
    plain, whole = FUSED_QUANTIZE.cost(problem()), FUSED_QUANTIZE.cost(problem(residual=True))
    assert plain.bytes == pytest.approx(118_800 * 3072 * 3, rel=0.01)
    assert whole.bytes == pytest.approx(118_800 * 3072 * 7, rel=0.01)
