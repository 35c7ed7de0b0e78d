import pytest
import torch

from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.scheme import QuantSpec
from vdqc.base.target import TARGETS
from vdqc.kernels.base import LinearProblem
from vdqc.kernels.fp8_linear import FP8_LINEAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_dequantised_product(dtype: torch.dtype) -> None:
    a = torch.randn(2, 5, 48).to(torch.float8_e4m3fn)
    w = torch.randn(12, 48).to(torch.float8_e4m3fn)
    scale, weight_scale, bias = torch.rand(2, 5, 1), torch.rand(12), torch.randn(12, dtype=dtype)
    args = (a, scale, w, weight_scale, bias, dtype)
    found = torch.ops.vdqc_kernels.fp8_linear(*args)
    expected = (a.double() * scale) @ (w.double() * weight_scale[:, None]).T + bias
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]
    # opcheck's own test of the schema cannot compare fp8 tensors
    torch.library.opcheck(FP8_LINEAR.op, args, test_utils=("test_faketensor",))


def test_only_gpus_with_fp8_run_it() -> None:
    fp8, int8 = QuantSpec.parse("fp8_e4m3/channel"), QuantSpec.parse("int8/channel")
    problem = LinearProblem(1, 8, 8, torch.bfloat16, fp8, fp8)
    for name, target in TARGETS.items():
        reason = FP8_LINEAR.supports(problem, target)
        assert (reason is None) == (name in ("sm89", "sm90", "sm100", "sm120"))
    mixed = LinearProblem(1, 8, 8, torch.bfloat16, int8, fp8)
    assert "integer" in str(FP8_LINEAR.supports(mixed, TARGETS["sm90"]))
