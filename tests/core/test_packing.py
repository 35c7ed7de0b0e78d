import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdqc.base.diagnostics import InputError
from vdqc.base.packing import pack, packed_bytes, unpack


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 5), st.booleans(), st.integers(0, 99))
def test_unpack_inverts_pack(bits: int, width: int, rows: int, signed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.randint(low, high, (rows, width), generator=generator)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_bytes(bits, width))
    unpacked = unpack(packed, bits, width, signed)
    assert unpacked.dtype == codes.dtype
    assert torch.equal(unpacked, codes)


def test_nibbles_are_split_in_halves() -> None:
    codes = torch.tensor([[1, 2, 3, 4, -5, -6, -7, 7]], dtype=torch.int8)
    packed = pack(codes, 4).view(torch.int8)
    assert torch.equal((packed << 4) >> 4, codes[:, :4])
    assert torch.equal(packed >> 4, codes[:, 4:])


def test_two_bits_are_split_in_quarters() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 3, 2, 1, 0]], dtype=torch.uint8)
    packed = pack(codes, 2)
    for quarter in range(4):
        assert torch.equal((packed >> 2 * quarter) & 3, codes[:, 2 * quarter : 2 * quarter + 2])


@pytest.mark.parametrize(("bits", "width", "size"), [(3, 64, 24), (5, 9, 6), (6, 4, 3), (7, 8, 7)])
def test_packed_rows_are_dense(bits: int, width: int, size: int) -> None:
    assert packed_bytes(bits, width) == size


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"-8 \.\.\. 7, got 0 \.\.\. 8"):
        pack(torch.tensor([[0, 8]], dtype=torch.int8), 4)
    with pytest.raises(InputError, match="expected int8 or uint8"):
        pack(torch.zeros(1, 8), 4)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="expected uint8 rows of 4 bytes"):
        unpack(torch.zeros(2, 5, dtype=torch.uint8), 4, 8)
