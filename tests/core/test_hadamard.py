import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdqc.base import hadamard
from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import TOLERANCE, relative_error

F64 = TOLERANCE[torch.float64]

#: Sylvester, Paley I and Paley II over GF(p) and GF(p²), and doublings of them.
ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 80, 84]
ORDERS += [96, 100, 108, 112, 128, 140, 144, 160, 256, 512]

#: Widths of linears in released video models.
WIDTHS = [1152, 1536, 1920, 3072, 4608, 5120, 7680, 8960, 12288, 13824]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_in_integers(order: int) -> None:
    matrix = hadamard.hadamard(order).long()
    assert set(matrix.flatten().tolist()) <= {1, -1}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.long))


@pytest.mark.parametrize("order", ORDERS)
def test_matrices_and_signs_are_on_the_cpu_whatever_the_default_device(order: int) -> None:
    """Inductor's warm-up for CUDA graphs sets a default device."""
    hadamard.hadamard.cache_clear()
    with torch.device("meta"):
        found = hadamard.hadamard(order), hadamard.random_signs(order, 0)
    assert {tensor.device.type for tensor in found} == {"cpu"}


@pytest.mark.parametrize("inverse", [False, True])
def test_a_rotation_elsewhere_takes_kept_matrices(inverse: bool) -> None:
    x, signs = torch.empty(3, 768, device="meta"), torch.empty(768, device="meta")
    hadamard.matrix_on.cache_clear()
    for _ in range(2):
        assert hadamard.rotate(x, signs, 768, inverse).shape == x.shape
    assert hadamard.matrix_on.cache_info().misses == 2  # 768 = 24 x 32


@pytest.mark.parametrize("order", [0, 3, 6, 10, 92, 116])
def test_an_order_without_construction_is_refused(order: int) -> None:
    assert not hadamard.is_order(order)
    with pytest.raises(InputError, match="no Hadamard matrix"):
        hadamard.hadamard(order)


def test_is_order_agrees_with_hadamard() -> None:
    for order in range(1, 200):
        if hadamard.is_order(order):
            assert hadamard.hadamard(order).shape == (order, order)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_real_width_has_a_full_kronecker_form(width: int) -> None:
    left, right = hadamard.factors(width) or (0, 0)
    assert left * right == width
    assert max(left, right) <= hadamard.DENSE_LIMIT


@pytest.mark.parametrize("width", WIDTHS)
def test_full_rotation_is_orthogonal(width: int) -> None:
    x = torch.randn(2, width, dtype=torch.float64)
    signs = hadamard.random_signs(width, seed=3)
    rotated = hadamard.rotate(x, signs, width)
    assert relative_error(rotated @ rotated.T, x @ x.T) < F64
    assert relative_error(hadamard.rotate(rotated, signs, width, inverse=True), x) < F64


@given(
    st.sampled_from([(48, 48), (48, 12), (64, 16), (80, 20), (512, 512), (96, 32), (6, 2)]),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_rotation_is_the_matrix_product(shape: tuple[int, int], seed: int, inverse: bool) -> None:
    width, block = shape
    signs = hadamard.random_signs(width, seed)
    x = torch.randn(2, 3, width, dtype=torch.float64)
    dense = torch.block_diag(*[_dense(block)] * (width // block)) / block**0.5
    matrix = signs.double().diag() @ dense
    expected = x @ (matrix.T if inverse else matrix)
    assert relative_error(hadamard.rotate(x, signs, block, inverse), expected) < F64


def _dense(order: int) -> torch.Tensor:
    left, right = hadamard.factors(order) or (0, 0)
    return torch.kron(hadamard.hadamard(left), hadamard.hadamard(right)).double()


def test_a_rotation_levels_an_outlier_channel() -> None:
    x = torch.zeros(1, 128)
    x[0, 17] = 64.0
    rotated = hadamard.rotate(x, hadamard.random_signs(128, 0), 64)
    assert float(rotated.abs().max()) == pytest.approx(8.0)  # 64 / sqrt(64), in its own block
    assert int((rotated != 0).sum()) == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x, signs = torch.randn(4, 96).to(dtype), hadamard.random_signs(96, 1)
    wide = hadamard.rotate(x.double(), signs, 48).to(dtype)
    rotated = hadamard.rotate(x, signs, 48)
    assert rotated.dtype == dtype
    # equal but for the few values that a float32 sum puts on the other side of a rounding boundary
    assert (rotated != wide).float().mean() < 0.02
    assert relative_error(rotated, wide) < torch.finfo(dtype).eps


@pytest.mark.parametrize(("width", "block"), [(48, 64), (48, 5), (92, 92), (48, 0)])
def test_a_block_that_does_not_fit_is_refused(width: int, block: int) -> None:
    with pytest.raises(InputError, match=f"divides {width}"):
        hadamard.rotate(torch.zeros(width), torch.ones(width), block)


def test_signs_are_a_function_of_the_seed() -> None:
    assert torch.equal(hadamard.random_signs(64, 5), hadamard.random_signs(64, 5))
    assert not torch.equal(hadamard.random_signs(64, 5), hadamard.random_signs(64, 6))


@pytest.mark.parametrize(
    ("limit", "divides", "expected"), [(64, 48, 48), (64, 96, 48), (64, 1152, 64), (64, 7, 1)]
)
def test_largest_order(limit: int, divides: int, expected: int) -> None:
    assert hadamard.largest_order(limit, divides) == expected


@pytest.mark.parametrize("inverse", [False, True])
def test_a_weight_rotated_in_pieces_is_the_whole_one(
    inverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, signs = torch.randn(33, 96), hadamard.random_signs(96, 0)
    whole = hadamard.rotate(x, signs, 32, inverse)
    monkeypatch.setattr(hadamard, "_PIECE", 5 * 96)
    pieces = hadamard.rotate(x, signs, 32, inverse)
    assert relative_error(pieces, whole) <= TOLERANCE[torch.float32]
