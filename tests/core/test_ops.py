import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base import hadamard, numerics
from vdqc.base.scheme import QuantSpec
from vdqc.ir.ops import FAKE_QUANTIZE, ROTATE
from vdqc.testing.harness import assert_close, tensors

STATIC = ["int4/channel", "int8/tensor", "int4/group8", "int4/group8/asym", "int6/tensor/asym"]
DYNAMIC = ["int8/token/dynamic", "int4/token/asym/dynamic", "int8/tensor/dynamic"]


def operands(x: Tensor, text: str, clip: float = 1.0) -> tuple[Tensor | None, Tensor | None]:
    spec = QuantSpec.parse(text)
    if spec.dynamic:
        return None, None
    low, high = numerics.value_range(x.detach(), spec)
    return numerics.scale_from_range(low * clip, high * clip, spec)


@pytest.mark.parametrize("text", [*STATIC, *DYNAMIC, "fp8_e4m3/channel"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_fake_quantize_is_a_proper_op(text: str, layout: str) -> None:
    x = torch.randn(6, 16) if layout == "contiguous" else torch.randn(16, 6).T
    scale, zero_point = operands(x, text, clip=0.7)
    x.requires_grad_()
    if scale is not None:
        scale.requires_grad_()
    torch.library.opcheck(FAKE_QUANTIZE, (x, scale, zero_point, text))


@pytest.mark.parametrize("block", [8, 16, 12])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_rotate_is_a_proper_op(block: int, layout: str) -> None:
    x = torch.randn(3, 48) if layout == "contiguous" else torch.randn(48, 3).T
    signs = hadamard.random_signs(48, 0)
    torch.library.opcheck(ROTATE, (x.requires_grad_(), signs, block))
    torch.library.opcheck(ROTATE, (x.detach().requires_grad_(), signs, block, True))


def test_gradient_of_a_rotation_is_exact() -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    signs = hadamard.random_signs(24, 0).double()
    assert torch.autograd.gradcheck(lambda v: ROTATE(v, signs, 12), (x,))
    assert torch.autograd.gradcheck(lambda v: ROTATE(v, signs, 24, True), (x,))


def surrogate(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Fake quantisation with rounding detached: its true derivative is the straight-through one."""
    view = numerics.group_view(x, spec)
    grouped = spec.granularity.size > 0
    s = scale.unsqueeze(-1) if grouped else scale
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    z = zero.unsqueeze(-1) if grouped else zero
    position = view / s + z
    rounded = position + (position.round() - position).detach()
    inside = (position >= spec.qmin) & (position <= spec.qmax)
    code = torch.where(inside, rounded, position.clamp(spec.qmin, spec.qmax).detach())
    return ((code - z) * s).reshape(x.shape)


@pytest.mark.parametrize("text", STATIC)
def test_gradients_are_the_straight_through_ones(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = torch.randn(4, 16, dtype=torch.float64)
    scale, zero_point = operands(x, text, clip=0.6)
    assert scale is not None
    leaves = [x.requires_grad_(), scale.requires_grad_()]
    if zero_point is not None:
        leaves.append(zero_point.requires_grad_())
    weights = torch.randn(4, 16, dtype=torch.float64)
    got = torch.autograd.grad((FAKE_QUANTIZE(x, scale, zero_point, text) * weights).sum(), leaves)
    wanted = torch.autograd.grad((surrogate(x, scale, zero_point, spec) * weights).sum(), leaves)
    for actual, expected in zip(got, wanted, strict=True):
        assert_close(actual, expected)
    assert float(got[0].abs().min()) == 0.0  # what is clipped has no gradient


def test_a_dynamic_range_passes_every_gradient() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    FAKE_QUANTIZE(x, None, None, "int8/token/dynamic").sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@given(tensors(3, 5, 16, dtype=torch.bfloat16), st.sampled_from(DYNAMIC))
def test_half_precision_keeps_its_dtype(x: Tensor, text: str) -> None:
    quantised = FAKE_QUANTIZE(x, None, None, text)
    assert quantised.dtype == torch.bfloat16
    bits = QuantSpec.parse(text).dtype.bits
    assert numerics.sqnr_db(quantised, x) > 4 * bits - 8


def test_each_token_has_its_own_range() -> None:
    x = torch.randn(2, 3, 16)
    alone = FAKE_QUANTIZE(x[1:, 2:], None, None, "int4/token/dynamic")
    x[0] *= 100
    together = FAKE_QUANTIZE(x, None, None, "int4/token/dynamic")
    assert torch.equal(together[1:, 2:], alone)
