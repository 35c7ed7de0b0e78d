import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base import numerics
from vdqc.base.packing import stored_bytes
from vdqc.base.planes import binary_planes
from vdqc.base.scheme import QuantSpec
from vdqc.testing.harness import tensors

BASES = st.sampled_from(["int1{}/channel/asym", "int2{}/channel", "int3{}/group8/asym"])


def quantised(weight: Tensor, text: str) -> Tensor:
    spec = QuantSpec.parse(text)
    scale = numerics.scale_from_range(*numerics.value_range(weight, spec), spec)
    return numerics.fake_quantize(weight, *scale, spec)


@given(tensors(6, 32, dtype=torch.float64), BASES)
def test_no_plane_adds_to_the_error_of_a_row(weight: Tensor, base: str) -> None:
    errors = [
        (quantised(weight, base.format(planes)) - weight).square().sum(-1)
        for planes in ("", "+1", "+2")
    ]
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert bool((more <= fewer * (1 + 1e-12) + 1e-20).all())


@given(tensors(6, 32, dtype=torch.float64), st.floats(-0.5, 0.5))
def test_the_mean_magnitude_is_the_best_amplitude(residual: Tensor, other: float) -> None:
    (amplitude,), (sign,) = binary_planes(residual, 1)
    assert set(sign.unique().tolist()) <= {-1.0, 1.0}
    best = (residual - amplitude * sign).square().sum(-1)
    perturbed = (residual - amplitude * (1 + other) * sign).square().sum(-1)
    assert bool((best <= perturbed + 1e-9 * best).all())


@pytest.mark.parametrize("step", [1.0, 0.25])
def test_a_uniform_residual_gives_one_more_bit(step: float) -> None:
    residual = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000 * step - step / 2
    (amplitude, second), _ = binary_planes(residual, 2)
    assert float(amplitude) == pytest.approx(step / 4)
    assert float(second) == pytest.approx(step / 8)


def test_outlier_rows_are_better_off_with_planes() -> None:
    """What a choice between the forms rests on; rows without outliers prefer uniform bits."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(64, 256, generator=generator, dtype=torch.float64)

        def error(text: str, weight: Tensor = weight) -> float:
            return float((quantised(weight, text) - weight).square().mean())

        for uniform, planes in (("int3", "int2+1"), ("int4", "int3+1")):
            assert error(f"{uniform}/channel/asym") < error(f"{planes}/channel/asym")
        weight[:, 5] = 12  # twelve standard deviations
        for uniform, planes in (("int2", "int1+1"), ("int3", "int2+1")):
            assert error(f"{planes}/channel/asym") < 0.95 * error(f"{uniform}/channel/asym")


@given(tensors(5, 16, dtype=torch.float64), st.sampled_from(["int2+2/channel", "int3+1/group8"]))
def test_parts_add_up_to_the_quantised_weight(weight: Tensor, text: str) -> None:
    spec = QuantSpec.parse(text)
    scale = numerics.scale_from_range(*numerics.value_range(weight, spec), spec)
    base, amplitudes, signs = numerics.plane_parts(weight, *scale, spec)
    total = base + sum(a * s for a, s in zip(amplitudes, signs, strict=True))
    found = numerics.fake_quantize(weight, *scale, spec)
    torch.testing.assert_close(total.reshape(5, 16), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4/channel", 3 * (8 + 4)),
        ("int4/group8", 3 * (8 + 2 * 4)),
        ("int3/channel/asym", 3 * (6 + 4 + 1)),
        ("int2+1/channel", 3 * (4 + 2 + 8)),
        ("int1+2/group8/asym", 3 * (2 + 4 + 2 * 13)),
    ],
)
def test_bytes_count_planes_and_scales(text: str, expected: int) -> None:
    assert stored_bytes(3, 16, QuantSpec.parse(text)) == expected
