import pytest
import torch

from vdqc.base.numerics import quantize, scale_from_range, value_range
from vdqc.base.scheme import QuantSpec
from vdqc.kernels.quantize_rows import (
    QUANTIZE_ROWS,
    QUANTIZE_ROWS_ASYM,
    QUANTIZE_STATIC,
    quantize_rows,
    quantize_rows_asym,
)

SHAPES = [(1, 1), (3, 63), (2, 5, 80), (17, 256)]


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., 0] *= 50
    x[0] = 0  # a row without a range
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "text", ["int8/token/dynamic", "int4/token/dynamic", "int6/tensor/dynamic"]
)
def test_symmetric_codes_are_those_of_the_numerics(
    shape: tuple[int, ...], dtype: torch.dtype, text: str
) -> None:
    spec, x = QuantSpec.parse(text), sample(shape, dtype)
    scale, _ = scale_from_range(*value_range(x, spec), spec)
    codes, found = torch.ops.vdqc_kernels.quantize_rows(x, spec.qmax, "tensor" in text)
    assert torch.equal(codes, quantize(x, scale, None, spec))
    assert torch.equal(found.flatten(), scale.flatten())
    assert found.ndim == x.ndim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ["int8/token/asym/dynamic", "int5/tensor/asym/dynamic"])
def test_asymmetric_codes_are_shifted_by_half_the_range(
    shape: tuple[int, ...], dtype: torch.dtype, text: str
) -> None:
    spec, x = QuantSpec.parse(text), sample(shape, dtype) + 3
    scale, zero = scale_from_range(*value_range(x, spec), spec)
    codes, found, moved = torch.ops.vdqc_kernels.quantize_rows_asym(
        x, spec.dtype.bits, "tensor" in text
    )
    half = 2 ** (spec.dtype.bits - 1)
    assert torch.equal(codes.int() + half, quantize(x, scale, zero, spec).int())
    assert torch.equal(found.flatten(), scale.flatten())
    assert zero is not None
    assert torch.equal(moved.flatten() + half, zero.flatten().int())


@pytest.mark.parametrize(
    "text", ["int4/token", "int8/tensor", "int4/token/asym", "int3/tensor/asym"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_narrows_the_range_and_holds_codes_in_it(text: str, dtype: torch.dtype) -> None:
    spec, x = QuantSpec.parse(f"{text}/dynamic"), sample((5, 80), dtype)
    clip = torch.tensor(0.3)
    low, high = (end * clip for end in value_range(x.float(), spec))
    scale, zero = scale_from_range(low, high, spec)
    kernel, limit = (
        (QUANTIZE_ROWS, spec.qmax) if spec.symmetric else (QUANTIZE_ROWS_ASYM, spec.dtype.bits)
    )
    codes, found, *moved = kernel.op(x, limit, "tensor" in text, clip)
    half = 0 if spec.symmetric else 2 ** (spec.dtype.bits - 1)
    expected = quantize(x, scale, zero, spec)
    assert torch.equal(codes.int() + half, expected.int())
    assert torch.equal(found.flatten(), scale.flatten())
    assert int(expected.max()) == spec.qmax
    if zero is not None:
        assert torch.equal(moved[0].flatten() + half, zero.flatten().int())


def test_static_codes() -> None:
    x, scale = sample((4, 33), torch.bfloat16), torch.tensor(0.05)
    codes = torch.ops.vdqc_kernels.quantize_static(x, scale, None, -127, 127)
    assert torch.equal(codes, quantize(x, scale, None, QuantSpec.parse("int8/tensor")))
    zero = torch.tensor(5, dtype=torch.int32)
    moved = torch.ops.vdqc_kernels.quantize_static(x, scale, zero, -128, 127)
    assert torch.equal(
        moved.int() + 128,
        quantize(x, scale, torch.tensor(133.0), QuantSpec.parse("int8/tensor/asym")).int(),
    )


def test_opcheck() -> None:
    x = sample((2, 5, 16), torch.bfloat16)
    for kernel, args in (
        (QUANTIZE_ROWS, (x, 127, False)),
        (QUANTIZE_ROWS, (x, 7, True)),
        (QUANTIZE_ROWS_ASYM, (x, 4, False)),
        (QUANTIZE_ROWS, (x, 7, False, torch.tensor(0.9))),
        (QUANTIZE_ROWS_ASYM, (x, 4, True, torch.tensor(0.9))),
        (QUANTIZE_STATIC, (x, torch.tensor(0.1), None, -127, 127)),
    ):
        torch.library.opcheck(kernel.op, args, test_utils=("test_schema", "test_faketensor"))


def test_compiled_codes_are_the_same() -> None:
    x = sample((64, 320), torch.bfloat16)

    def both(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*quantize_rows(value, 127, False), *quantize_rows_asym(value, 4, False))

    for found, expected in zip(torch.compile(both)(x), both(x), strict=True):
        assert torch.equal(found, expected)
