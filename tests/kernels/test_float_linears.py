"""group_linear and weight_only_linear: packed weights that meet floats."""

import pytest
import torch

from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.packing import pack
from vdqc.kernels.group_linear import GROUP_LINEAR
from vdqc.kernels.weight_only_linear import WEIGHT_ONLY_LINEAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "groups", "asym"), [(4, 6, False), (3, 2, True), (8, 1, True)])
def test_equal_the_dequantised_product(
    dtype: torch.dtype, bits: int, groups: int, asym: bool
) -> None:
    top = 2 ** (bits - 1) - 1
    w = torch.randint(-top, top + 1, (10, 96), dtype=torch.int8)
    scale = torch.rand(10, groups) + 0.1
    zero = torch.randint(-top, top + 1, (10, groups)).float() if asym else None
    wide = w.unflatten(-1, (groups, -1)).double()
    wide = (wide - (0 if zero is None else zero[..., None])) * scale[..., None]
    bias = torch.randn(10, dtype=dtype)
    x = torch.randn(2, 5, 96, dtype=dtype)
    found = torch.ops.vdqc_kernels.weight_only_linear(x, pack(w, bits), bits, scale, zero, bias)
    expected = x.double() @ wide.flatten(1).T + bias
    assert found.dtype == dtype
    assert relative_error(found, expected) < max(TOLERANCE[dtype], 2e-7)

    a = torch.randint(-127, 128, (2, 5, 96), dtype=torch.int8)
    row, moved = torch.rand(2, 5, 1) / 100, torch.full((2, 5, 1), 3, dtype=torch.int32)
    args = (a, row, moved, pack(w, bits), bits, scale, zero, bias, dtype)
    found = torch.ops.vdqc_kernels.group_linear(*args)
    expected = (a.double() - 3) * row @ wide.flatten(1).T + bias
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(GROUP_LINEAR.op, args, test_utils=checks)
    torch.library.opcheck(
        WEIGHT_ONLY_LINEAR.op, (x, pack(w, bits), bits, scale, zero, bias), test_utils=checks
    )
