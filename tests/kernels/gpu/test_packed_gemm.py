"""The Triton GEMM of packed weights: sums equal to the reference bit for bit at every width."""

import pytest
import torch

from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.packing import pack
from vdqc.kernels.gpu import packed_gemm
from vdqc.kernels.gpu.launch_config import Config
from vdqc.kernels.integer import int8_matmul, packed_matmul
from vdqc.kernels.packed_linear import packed_linear

pytestmark = pytest.mark.usefixtures("poison")

SMALL = Config(32, 32, 32, group_m=2)
SHAPES = [(1, 8, 1), (5, 63, 17), (33, 80, 63), (17, 256, 70)]


def codes(*shape: int, bits: int = 8, device: str = "cpu") -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.randint(-top - 1, top + 1, shape, dtype=torch.int8).to(device)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_equal_the_reference(bits: int, shape: tuple[int, int, int], device: str) -> None:
    m, k, n = shape
    a, packed = codes(m, k, device=device), pack(codes(n, k, bits=bits), bits).to(device)
    expected = packed_matmul(a, packed, bits, None)
    assert torch.equal(packed_gemm.packed_matmul(a, packed, bits, None, config=SMALL), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("groups", [1, 2, 6, 24])
def test_multipliers_of_every_group_size(bits: int, groups: int, device: str) -> None:
    top = 127 // 2 ** (bits - 1)
    a, packed = codes(9, 768, device=device), pack(codes(20, 768, bits=bits), bits).to(device)
    multiplier = torch.randint(-top, top + 1, (20, groups), dtype=torch.int8, device=device)
    expected = packed_matmul(a, packed, bits, multiplier)
    assert torch.equal(
        packed_gemm.packed_matmul(a, packed, bits, multiplier, config=SMALL), expected
    )


@pytest.mark.parametrize(
    ("bits", "width", "groups"), [(2, 24, 3), (4, 40, 4), (3, 24, 3), (2, 96, 16), (4, 48, 8)]
)
def test_groups_that_end_between_lanes(bits: int, width: int, groups: int, device: str) -> None:
    """Four lanes are multiplied as one: planes of 6 and 3, groups of 10 and 6."""
    top = 127 // 2 ** (bits - 1)
    a, packed = codes(9, width, device=device), pack(codes(20, width, bits=bits), bits).to(device)
    multiplier = torch.randint(-top, top + 1, (20, groups), dtype=torch.int8, device=device)
    expected = packed_matmul(a, packed, bits, multiplier)
    found = packed_gemm.packed_matmul(a, packed, bits, multiplier, config=SMALL)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [96, 84])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_plane_of_residual_signs(groups: int, width: int, device: str) -> None:
    q4 = torch.randint(-7, 8, (20, width), dtype=torch.int8)
    sign = torch.randint(0, 2, (20, width), dtype=torch.int8)
    c = torch.randint(1, 16, (20, groups), dtype=torch.int8)
    wide = 16 * q4 + (2 * sign - 1) * c.repeat_interleave(width // groups, dim=1)
    a, packed = codes(9, width, device=device), pack(2 * q4 + sign, 5).to(device)
    expected = int8_matmul(a, wide.to(device))
    assert torch.equal(packed_matmul(a, packed, 5, c.to(device), True), expected)
    found = packed_gemm.packed_matmul(a, packed, 5, c.to(device), True, config=SMALL)
    assert torch.equal(found, expected)


def test_extreme_products_do_not_leak_into_the_next_lane(device: str) -> None:
    w = torch.tensor([-8, 7, -7, 0, -8, -8, 7, 7], dtype=torch.int8).repeat(8, 12)
    factor = torch.tensor([[15], [-15], [16], [-15], [1], [0], [-1], [14]], dtype=torch.int8)
    a, packed = codes(16, 96, device=device), pack(w, 4).to(device)
    expected = packed_matmul(a, packed, 4, factor.to(device))
    assert torch.equal(
        packed_gemm.packed_matmul(a, packed, 4, factor.to(device), config=SMALL), expected
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7])
@pytest.mark.parametrize("groups", [None, 3])
def test_packed_activations(bits: int, groups: int | None, device: str) -> None:
    a, packed = codes(19, 96, bits=4), pack(codes(40, 96, bits=bits), bits).to(device)
    multiplier = None
    if groups is not None:
        multiplier = torch.ones(40, groups, dtype=torch.int8, device=device)
    scale, weight_scale = torch.rand(19, 1, device=device), torch.rand(40, device=device)
    zero = torch.randint(-9, 9, (40,), dtype=torch.int32, device=device)
    rest = (packed, bits, multiplier, weight_scale, zero, None, None, torch.float32)
    expected = packed_linear(a.to(device), scale, None, *rest)
    a4 = pack(a, 4).to(device)
    assert torch.equal(packed_linear(a4, scale, None, *rest, code_bits=4), expected)
    found = packed_gemm.packed_linear(a4, scale, None, *rest, code_bits=4, config=SMALL)
    assert relative_error(found, expected) < TOLERANCE[torch.float32]


def test_the_longest_sums_do_not_saturate(device: str) -> None:
    a = torch.full((2, 32768), -8, dtype=torch.int8, device=device)
    wide = torch.full((2, 32768), -128, dtype=torch.int8, device=device)
    packed, config = pack(a.cpu(), 4).to(device), Config(16, 16, 128)
    found = packed_gemm.packed_matmul(wide, packed, 4, None, config=config)
    assert found.eq(8 * 128 * 32768).all()
    one = torch.ones(2, device=device)
    args = (one[:, None], None, packed, 4, None, one, None, None, None, torch.float32)
    found = packed_gemm.packed_linear(packed, *args, code_bits=4, config=config)
    assert found.eq(64 * 32768).all()


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_epilogue_is_that_of_the_reference(slices: int, device: str) -> None:
    a, w = codes(3, 17, 80), codes(70, 80, bits=4)
    args = (
        a,
        torch.rand(3, 17, 1) / 50,
        torch.randint(-9, 9, (3, 17, 1), dtype=torch.int32),
        pack(w, 4),
        4,
        None,
        torch.rand(70) / 50,
        torch.randint(-9, 9, (70,), dtype=torch.int32),
        w.sum(-1, dtype=torch.int32),
        torch.randn(70),
        torch.float32,
        None,
        "gelu_tanh",
        torch.randn(3, 1, 70),
        torch.randn(3, 17, 70),
        torch.randn(3, 17, 32),
        torch.randn(70, 32),
    )
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
    found = packed_gemm.packed_linear(*moved, config=Config(64, 32, 32, slices=slices))
    assert relative_error(found, packed_linear(*moved)) < TOLERANCE[torch.float32]


def test_wrong_operands_are_named(device: str) -> None:
    a, packed = codes(4, 64, device=device), pack(codes(8, 64, bits=4), 4).to(device)
    groups = torch.ones(8, 5, dtype=torch.int8, device=device)
    with pytest.raises(InputError, match=r"packed: expected shape \[any, 24\], got \[8, 32\]"):
        packed_gemm.packed_matmul(a, packed, 3, None)
    with pytest.raises(InputError, match="divisor of K = 64 groups, got 5"):
        packed_gemm.packed_matmul(a, packed, 4, groups)
    with pytest.raises(InputError, match="got 9 and 8"):
        packed_gemm.packed_matmul(a, packed, 9, None)
    with pytest.raises(InputError, match="codes: expected int8, got uint8"):
        packed_gemm.packed_matmul(a.view(torch.uint8), packed, 4, None)
