import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base import hadamard, kronecker, numerics
from vdqc.base.scheme import GranularityKind, QuantSpec
from vdqc.ir.ops import CAYLEY, FAKE_QUANTIZE, KRONECKER, ROTATE
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


def dynamic_surrogate(x: Tensor, clip: Tensor | float, spec: QuantSpec) -> Tensor:
    """As ``surrogate``, with the scale computed from x and differentiated through."""
    low, high = numerics.value_range(x, spec)
    scale, zero_point = numerics.scale_from_range(low * clip, high * clip, spec)
    zero = None if zero_point is None else zero_point.detach()
    z = 0 if zero is None else zero
    position = x / scale + z
    rounded = position + (position.round() - position).detach()
    inside = (position >= spec.qmin) & (position <= spec.qmax)
    return (torch.where(inside, rounded, position.clamp(spec.qmin, spec.qmax).detach()) - z) * scale


@pytest.mark.parametrize("text", DYNAMIC)
@pytest.mark.parametrize("clip", [None, 0.6, 1.0])
def test_gradients_reach_the_ends_of_a_dynamic_range(text: str, clip: float | None) -> None:
    spec = QuantSpec.parse(text)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    ratio = None if clip is None else torch.tensor(clip, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 16, dtype=torch.float64)
    leaves = [x] if ratio is None else [x, ratio]
    got = torch.autograd.grad((FAKE_QUANTIZE(x, ratio, None, text) * weights).sum(), leaves)
    expected = dynamic_surrogate(x, 1.0 if ratio is None else ratio, spec)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    for actual, gradient in zip(got, wanted, strict=True):
        assert_close(actual, gradient)


@pytest.mark.parametrize("text", DYNAMIC)
def test_a_clip_ratio_scales_the_dynamic_range(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = torch.randn(5, 16)
    clipped = FAKE_QUANTIZE(x, torch.tensor(0.5), None, text)
    whole = spec.granularity.kind is GranularityKind.TENSOR
    low, high = (x.min(), x.max()) if whole else (x.amin(-1, True), x.amax(-1, True))
    step = numerics.scale_from_range(low * 0.5, high * 0.5, spec)[0]
    reach = torch.maximum(low.abs(), high.abs()) * 0.5 + step  # one step: the zero point is rounded
    assert bool((clipped.abs() <= reach).all())
    inside = x.clamp(low * 0.5, high * 0.5) if not spec.symmetric else x.clamp(-reach, reach)
    assert bool(((clipped - inside).abs() <= 1.5 * step).all())
    assert torch.equal(
        FAKE_QUANTIZE(x, torch.tensor(1.0), None, text), FAKE_QUANTIZE(x, None, None, text)
    )


@pytest.mark.parametrize("text", DYNAMIC)
def test_a_clipped_dynamic_range_is_a_proper_op(text: str) -> None:
    x, clip = torch.randn(6, 16, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    torch.library.opcheck(FAKE_QUANTIZE, (x, clip, None, text))


def test_learned_rotations_are_proper_ops() -> None:
    raw = torch.randn(4, 4, requires_grad=True)
    right = torch.randn(6, 6, requires_grad=True)
    x = torch.randn(3, 24, requires_grad=True)
    torch.library.opcheck(CAYLEY, (raw,))
    torch.library.opcheck(KRONECKER, (x, raw, right))


def test_gradients_of_learned_rotations_are_exact() -> None:
    raw = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    left = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(CAYLEY, (raw,))
    assert torch.autograd.gradcheck(KRONECKER, (x, left, raw))


@given(st.integers(1, 12), st.floats(0.0, 1e3), st.integers(0, 99))
def test_the_cayley_transform_is_orthogonal(order: int, size: float, seed: int) -> None:
    raw = torch.randn(order, order, generator=torch.Generator().manual_seed(seed)).double() * size
    q = kronecker.cayley(raw)
    torch.testing.assert_close(q @ q.T, torch.eye(order).double(), rtol=0, atol=1e-11)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_a_kronecker_product_is_that_of_the_dense_matrices(a: int, b: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, n, generator=random).double() for n in (a, b))
    x = torch.randn(2, 3, a * b, generator=random).double()
    assert_close(kronecker.kronecker(x, left, right), x @ torch.kron(left, right))


@pytest.mark.parametrize("width", [1152, 1536, 1920, 3072, 4608, 5120, 7680, 8960, 12288, 13824])
def test_widths_of_real_models_have_hadamard_factors(width: int) -> None:
    pair = kronecker.hadamard_factors(width)
    assert pair is not None
    assert pair[0] * pair[1] == width
    assert sum(pair) <= 2.5 * sum(kronecker.square_factors(width))


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
