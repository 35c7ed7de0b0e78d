import pytest
import torch

from vdqc.base.packing import pack
from vdqc.base.scheme import QuantSpec
from vdqc.base.target import TARGETS
from vdqc.kernels.base import LinearProblem
from vdqc.kernels.group_linear import GROUP_LINEAR
from vdqc.kernels.int8_linear import INT8_LINEAR, int8_linear
from vdqc.kernels.integer import int8_matmul, packed_matmul
from vdqc.kernels.packed_linear import PACKED_LINEAR, packed_linear

SHAPES = [(1, 1, 1), (1, 16, 24), (5, 63, 17), (17, 80, 33), (64, 100, 48), (33, 4096, 8)]


def codes(*shape: int, bits: int = 8) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.randint(-top, top + 1, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", SHAPES)
def test_integer_matmul_equals_the_reference_bit_for_bit(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, w = codes(m, k), codes(n, k)
    assert torch.equal(torch.ops.vdqc_kernels.int8_matmul(a, w), int8_matmul(a, w))


def test_largest_sums_do_not_saturate() -> None:
    a = torch.full((3, 16384), -128, dtype=torch.int8)
    w = torch.full((5, 16384), -128, dtype=torch.int8)
    assert torch.equal(
        torch.ops.vdqc_kernels.int8_matmul(a, w), torch.full((3, 5), 128 * 128 * 16384).int()
    )


def test_no_rows_give_no_rows() -> None:
    assert torch.ops.vdqc_kernels.int8_matmul(codes(0, 8), codes(4, 8)).shape == (0, 4)
    assert torch.ops.vdqc_kernels.int8_matmul(codes(2, 0), codes(4, 0)).eq(0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("shape", [(1, 16, 24), (5, 63, 17), (33, 80, 32)])
def test_packed_matmul_equals_the_reference_bit_for_bit(
    bits: int, shape: tuple[int, int, int]
) -> None:
    m, k, n = shape
    a, w = codes(m, k), codes(n, k, bits=bits)
    packed = pack(w, bits)
    expected = int8_matmul(a, w)
    assert torch.equal(torch.ops.vdqc_kernels.packed_matmul(a, packed, bits, None), expected)
    assert torch.equal(packed_matmul(a, packed, bits, None), expected)


def test_group_multipliers_scale_runs_of_columns() -> None:
    a, w = codes(9, 96), codes(20, 96, bits=4)
    multiplier = torch.randint(1, 19, (20, 6), dtype=torch.int8)
    wide = w * multiplier.repeat_interleave(16, dim=1)
    found = torch.ops.vdqc_kernels.packed_matmul(a, pack(w, 4), 4, multiplier)
    assert torch.equal(found, int8_matmul(a, wide))


@pytest.mark.parametrize("rows", [(7,), (2, 5)])
@pytest.mark.parametrize(("za", "zw"), [(False, False), (True, False), (False, True), (True, True)])
def test_zero_points_are_exact_corrections(rows: tuple[int, ...], za: bool, zw: bool) -> None:
    a, w = codes(*rows, 63), codes(11, 63)
    scale, weight_scale = torch.rand(*rows, 1), torch.rand(11)
    zero = torch.randint(-128, 128, (*rows, 1), dtype=torch.int32) if za else None
    weight_zero = torch.randint(-128, 128, (11,), dtype=torch.int32) if zw else None
    weight_sum = w.sum(-1, dtype=torch.int32)
    args = (a, scale, zero, w, weight_scale, weight_zero, weight_sum, None, torch.float32)
    left = a.double() - (0 if zero is None else zero)
    right = w.double() - (0 if weight_zero is None else weight_zero[:, None])
    exact = (left @ right.T).float() * scale * weight_scale
    assert torch.equal(torch.ops.vdqc_kernels.int8_linear(*args), exact)
    assert torch.equal(int8_linear(*args), exact)
    packed = (a, scale, zero, pack(w, 8), 8, None, *args[4:])
    assert torch.equal(packed_linear(*packed), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routes_agree_with_bias_and_dtype(dtype: torch.dtype) -> None:
    a, w, bias = codes(2, 5, 48), codes(12, 48, bits=4), torch.randn(12, dtype=dtype)
    scale, weight_scale = torch.rand(2, 5, 1), torch.rand(12)
    whole = (a, scale, None, w, weight_scale, None, None, bias, dtype)
    found = torch.ops.vdqc_kernels.int8_linear(*whole)
    assert found.dtype == dtype
    assert found.shape == (2, 5, 12)
    assert torch.equal(found, int8_linear(*whole))
    packed = (a, scale, None, pack(w, 4), 4, None, *whole[4:])
    assert torch.equal(torch.ops.vdqc_kernels.packed_linear(*packed), found)
    for kernel, args in ((INT8_LINEAR, whole), (PACKED_LINEAR, packed)):
        torch.library.opcheck(kernel.op, args, test_utils=("test_schema", "test_faketensor"))


def test_supports_says_why_not() -> None:
    w8, w4g = QuantSpec.parse("int8/channel"), QuantSpec.parse("int4/group64")
    a8 = QuantSpec.parse("int8/token/dynamic")
    cpu, dtype = TARGETS["cpu"], torch.bfloat16
    assert INT8_LINEAR.supports(LinearProblem(1, 8, 8, dtype, w8, a8), cpu) is None
    assert "packed" in str(INT8_LINEAR.supports(LinearProblem(1, 8, 8, dtype, w4g, a8), cpu))
    assert "whole" in str(PACKED_LINEAR.supports(LinearProblem(1, 8, 64, dtype, w4g, a8), cpu))
    assert PACKED_LINEAR.supports(LinearProblem(1, 8, 64, dtype, w4g, a8, True), cpu) is None
    assert "K = 0" in str(INT8_LINEAR.supports(LinearProblem(1, 8, 0, dtype, w8, a8), cpu))
    assert "float" in str(INT8_LINEAR.supports(LinearProblem(1, 8, 8, dtype, w8, None), cpu))


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("k", [64, 640, 6144])
@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_gpu_integers_are_cheaper_than_what_has_no_kernel_there(
    target: str, k: int, bits: int
) -> None:
    specs = QuantSpec.parse(f"int{bits}/channel"), QuantSpec.parse("int8/token/dynamic")
    problem = LinearProblem(32768, 6144, k, torch.bfloat16, *specs)
    kernel = INT8_LINEAR if bits == 8 else PACKED_LINEAR
    assert kernel.cost(problem).us(TARGETS[target]) < GROUP_LINEAR.cost(problem).us(TARGETS[target])
