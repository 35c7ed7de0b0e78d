import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base import numerics, ranges
from vdqc.base.diagnostics import InputError
from vdqc.base.scheme import QuantSpec
from vdqc.testing.harness import tensors

INTEGER_SPECS = [
    f"int{bits}/{granularity}"
    for bits in range(2, 9)
    for granularity in ("tensor", "channel", "group8", "channel/asym", "group8/asym", "tensor/asym")
]


def scales(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    return numerics.scale_from_range(*numerics.value_range(x, spec), spec)


def steps(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """``scale`` repeated to the shape of x."""
    view = numerics.group_view(x, spec)
    wide = scale.unsqueeze(-1) if spec.granularity.size else scale
    return wide.expand(view.shape).reshape(x.shape)


@given(tensors(5, 24), st.sampled_from(INTEGER_SPECS))
def test_error_is_at_most_half_a_step(x: Tensor, text: str) -> None:
    spec = QuantSpec.parse(text)
    scale, zero_point = scales(x, spec)
    error = (numerics.fake_quantize(x, scale, zero_point, spec) - x).abs()
    # an asymmetric range is as wide as its codes, but its zero point is rounded: half a step more
    allowed = 0.5 if spec.symmetric else 1.0
    assert bool((error <= allowed * steps(x, scale, spec) * (1 + 1e-4)).all())


@given(tensors(5, 24), st.sampled_from(INTEGER_SPECS), st.floats(0.2, 1.0))
def test_fake_quantize_is_quantize_then_dequantize(x: Tensor, text: str, clip: float) -> None:
    spec = QuantSpec.parse(text)
    scale, zero_point = scales(x * clip, spec)
    codes = numerics.quantize(x, scale, zero_point, spec)
    assert int(codes.min()) >= spec.qmin
    assert int(codes.max()) <= spec.qmax
    expected = numerics.dequantize(codes, scale, zero_point, spec)
    assert torch.equal(numerics.fake_quantize(x, scale, zero_point, spec), expected)


@given(
    tensors(5, 24, dtype=torch.bfloat16) | tensors(5, 24),
    st.sampled_from([*INTEGER_SPECS, "fp8_e4m3/channel"]),
)
def test_fake_quantize_is_idempotent_for_a_fixed_scale(x: Tensor, text: str) -> None:
    spec = QuantSpec.parse(text)
    scale, zero_point = scales(x, spec)
    once = numerics.fake_quantize(x, scale, zero_point, spec)
    assert once.dtype == x.dtype
    assert torch.equal(numerics.fake_quantize(once, scale, zero_point, spec), once)


@given(tensors(4, 16, dtype=torch.float64))
def test_symmetric_quantisation_is_odd(x: Tensor) -> None:
    spec = QuantSpec.parse("int4/channel")
    scale, _ = scales(x, spec)
    negated = numerics.fake_quantize(-x, scale, None, spec)
    assert torch.equal(negated, -numerics.fake_quantize(x, scale, None, spec))


@pytest.mark.parametrize("text", ["int4/channel", "int4/channel/asym", "fp8_e4m3/channel"])
def test_zero_stays_zero(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = torch.stack((torch.zeros(16), torch.linspace(0.5, 2.0, 16)))
    x[1, 3] = 0.0
    quantised = numerics.fake_quantize(x, *scales(x, spec), spec)
    assert torch.equal(quantised[0], torch.zeros(16))
    assert float(quantised[1, 3]) == 0.0


@pytest.mark.parametrize(
    ("text", "shape"),
    [("int8/tensor", ()), ("int8/channel", (6, 1)), ("int4/group8", (6, 3))],
)
def test_scales_are_shaped_as_documented(text: str, shape: tuple[int, ...]) -> None:
    spec = QuantSpec.parse(text)
    assert scales(torch.randn(6, 24), spec)[0].shape == shape


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="groups of 16 do not divide 24"):
        scales(torch.randn(2, 24), QuantSpec.parse("int4/group16"))


def test_float64_keeps_float64_scales() -> None:
    assert scales(torch.randn(2, 8).double(), QuantSpec.parse("int8/channel"))[0].dtype == (
        torch.float64
    )


def test_errors_are_measured_over_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, actual = torch.randn(10, 7), torch.randn(10, 7)
    whole = numerics.relative_error(actual, expected)
    assert whole == pytest.approx(float((actual - expected).norm() / expected.norm()), rel=1e-6)
    monkeypatch.setattr(numerics, "_CHUNK", 16)
    assert numerics.relative_error(actual, expected) == pytest.approx(whole, rel=1e-12)


def test_sqnr() -> None:
    x = torch.ones(100)
    assert numerics.sqnr_db(x, x) == math.inf
    assert numerics.sqnr_db(x * 1.1, x) == pytest.approx(20.0, abs=1e-3)
    assert numerics.relative_error(torch.ones(4), torch.zeros(4)) == pytest.approx(2.0)


@given(tensors(4, 32), st.sampled_from(["int3/channel", "int4/group8/asym", "int4/tensor"]))
def test_clipping_never_raises_the_squared_error_of_any_scale(x: Tensor, text: str) -> None:
    spec = QuantSpec.parse(text)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = numerics.scale_from_range(low, high, spec)
        error = (numerics.fake_quantize(x, scale, zero_point, spec) - x).square()
        view = numerics.group_view(error, spec)
        return view.sum() if low.ndim == 0 else view.sum(-1).reshape(low.shape)

    full = errors(*numerics.value_range(x, spec))
    clipped = errors(*ranges.clipped_range(x, spec))
    assert bool((clipped <= full).all())


def test_clipping_gives_up_a_lone_outlier_for_the_rest() -> None:
    x = torch.randn(1, 4096)
    x[0, 0] = 12.0
    _, high = ranges.clipped_range(x, QuantSpec.parse("int4/channel"))
    assert 2.0 < float(high) < 8.0


@given(st.floats(90.0, 100.0))
def test_a_percentile_range_holds_its_share(percentile: float) -> None:
    values = torch.linspace(-1.0, 1.0, 1001)[torch.randperm(1001)]
    low, high = ranges.percentile_range(values, percentile)
    share = float(((values >= low) & (values <= high)).float().mean())
    assert share == pytest.approx(percentile / 100, abs=3 / 1001)


def test_a_percentile_outside_its_range_is_refused() -> None:
    with pytest.raises(InputError, match="expected a percentile"):
        ranges.percentile_range(torch.ones(3), 20.0)


@pytest.mark.parametrize(
    "text",
    ["int4/channel", "int4/group16", "int4/group16/asym", "int4/channel/asym", "int8/tensor"],
)
def test_pieces_of_rows_have_the_bits_of_the_whole(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, x = QuantSpec.parse(text), torch.randn(33, 64).bfloat16()
    scale, zero = numerics.scale_from_range(*numerics.value_range(x, spec), spec)
    for function in (numerics.quantize, numerics.fake_quantize):
        whole = function(x, scale, zero, spec)
        with monkeypatch.context() as patch:
            patch.setattr(numerics, "_CHUNK", 5 * 32)
            assert torch.equal(numerics.by_rows(function, x, scale, zero, spec), whole)
