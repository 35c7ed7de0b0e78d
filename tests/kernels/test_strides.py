"""Results lie in memory as the fakes of the ops say, however operands lie: Inductor asserts it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vdqc.base.block_mask import compress
from vdqc.kernels.base import Kernel
from vdqc.kernels.fused_quantize import RESIDUAL_QUANTIZE
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS, QUANTIZE_ROWS_ASYM, QUANTIZE_STATIC
from vdqc.kernels.rotation import ROTATION
from vdqc.kernels.video_mask import DENSE_MASK

HEADS = torch.randn(2, 6, 3, 32).transpose(1, 2)
RAGGED = torch.randn(1, 70, 2, 64).transpose(1, 2)
PLAIN = ["layer", None, None, 1e-6, None, None, "none", None, None, 0, None, 8, False]


@pytest.mark.parametrize(
    ("kernel", "operands"),
    [
        (QUANTIZE_ROWS, [HEADS, 127, False]),
        (QUANTIZE_ROWS_ASYM, [HEADS, 8, False]),
        (QUANTIZE_STATIC, [HEADS, torch.rand(1), None, -127, 127]),
        (ROTATION, [HEADS, torch.ones(32), 16, False]),
        (RESIDUAL_QUANTIZE, [HEADS, HEADS, None, *PLAIN]),
        (RESIDUAL_QUANTIZE, [HEADS.double(), HEADS.double(), None, *PLAIN]),
        (DENSE_MASK, [*compress(torch.rand(1, 2, 3, 3) < 0.7), 32, RAGGED, None]),
        (
            DENSE_MASK,
            [*compress(torch.rand(1, 2, 3, 3) < 0.7), 32, RAGGED, torch.tensor([50])],
        ),
    ],
)
def test_results_lie_as_the_fakes_say(kernel: Kernel, operands: list[Any]) -> None:
    found = kernel.op(*operands)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in operands]
        expected = kernel.op(*fakes)
    assert laid_out(found) == laid_out(expected)


def laid_out(found: Any) -> list[tuple[Any, ...]]:
    tensors = [found] if isinstance(found, Tensor) else found
    return [(t.shape, t.dtype, t.stride() if t.numel() else None) for t in tensors]
