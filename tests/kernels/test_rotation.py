import pytest
import torch

from vdqc.base import hadamard
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.kernels.rotation import ROTATION, rotated


@pytest.mark.parametrize(("width", "block"), [(64, 64), (96, 12), (1536, 1536), (768, 64)])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spelled_form_equals_the_reference(
    width: int, block: int, inverse: bool, dtype: torch.dtype
) -> None:
    x, signs = torch.randn(2, 3, width).to(dtype), hadamard.random_signs(width, 0)
    pair = hadamard.factors(block)
    assert pair is not None
    left, right = (hadamard.hadamard(order).to(dtype) for order in pair)
    found = rotated(x, signs, None if pair[0] == 1 else left, right, inverse)
    expected = torch.ops.vdqc_kernels.rotation(x, signs, block, inverse)
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]
    assert torch.equal(expected, hadamard.rotate(x, signs, block, inverse))


def test_opcheck() -> None:
    args = (torch.randn(2, 64), hadamard.random_signs(64, 0), 64, False)
    torch.library.opcheck(ROTATION.op, args, test_utils=("test_schema", "test_faketensor"))
