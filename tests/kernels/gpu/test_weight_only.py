"""Packed weights and float activations on Triton, for few rows."""

import pytest
import torch

from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.packing import pack
from vdqc.kernels.gpu.launch_config import Config
from vdqc.kernels.gpu.weight_only import serves, weight_only_linear
from vdqc.kernels.weight_only_linear import weight_only_linear as reference

pytestmark = pytest.mark.usefixtures("poison")

SMALL = Config(16, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "groups", "asym", "split"),
    [(4, 1, False, 1), (4, 6, True, 3), (3, 2, True, 1), (2, 12, False, 2), (7, 3, True, 1)],
)
def test_equals_the_reference(
    dtype: torch.dtype, bits: int, groups: int, asym: bool, split: int, device: str
) -> None:
    top = 2 ** (bits - 1) - 1
    packed = pack(torch.randint(-top, top + 1, (70, 384), dtype=torch.int8), bits).to(device)
    scale = (torch.rand(70, groups) + 0.1).to(device)
    zero = torch.randint(-top, top + 1, (70, groups)).float().to(device) if asym else None
    bias = torch.randn(70, dtype=dtype).to(device)
    x = torch.randn(2, 9, 384, dtype=dtype).to(device)
    found = weight_only_linear(x, packed, bits, scale, zero, bias, SMALL, split)
    assert found.dtype == dtype
    expected = reference(x.float(), packed, bits, scale, zero, bias.float())
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, 8, 1), (5, 80, 63), (0, 16, 4)])
def test_every_shape(shape: tuple[int, int, int], device: str) -> None:
    m, k, n = shape
    packed = pack(torch.randint(-8, 8, (n, k), dtype=torch.int8), 4).to(device)
    scale, x = torch.rand(n, 1, device=device), torch.randn(m, k, device=device)
    found = weight_only_linear(x, packed, 4, scale, None, None)
    expected = reference(x, packed, 4, scale, None, None)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < TOLERANCE[torch.float32]


def test_what_it_does_not_serve_goes_to_the_reference(device: str) -> None:
    x = torch.zeros(65, 64, device=device)
    assert serves(x[:64], 4)
    assert not serves(x, 4)
    assert not serves(x[:1], 8)
    assert not serves(x[:1, :63], 4)
    assert not serves(x[:1].double(), 4)
    packed, scale = torch.zeros(4, 32, device=device), torch.rand(4, 1, device=device)
    with pytest.raises(InputError, match="weight_scale: expected float32, got float64"):
        weight_only_linear(x, packed.byte(), 4, scale.double(), None, None)
