"""Norm, rotary embedding, codes and block means as a Triton kernel, against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import REDRAWN_NOISE, TOLERANCE, relative_error
from vdqc.kernels.gpu import rope as gpu
from vdqc.kernels.gpu.rope import Rope
from vdqc.kernels.rope_quantize import rope, rope_quantize

BF16, F32 = torch.bfloat16, torch.float32
NORMS = ["none", "rms", "layer", "rms_across"]

pytestmark = pytest.mark.usefixtures("poison")


def given(
    x: Tensor, norm: str, interleaved: bool, start: int = 0, turned: int = 0, whole: bool = False
) -> list[Any]:
    """The arguments between x and the last ones, weights in other dtypes than x."""
    size = x.shape[2] * x.shape[3] if norm == "rms_across" else x.shape[3]
    table = torch.rand(turned or x.shape[1], x.shape[3] // (1 if whole else 2)) * 6
    weight = None if norm == "none" else (torch.rand(size) + 0.5).to(BF16)
    bias = torch.randn(size) / 4 if norm == "layer" else None
    return [norm, weight, bias, 1e-6, table.cos(), table.sin(), start, interleaved]


def on(device: str, arguments: list[Any]) -> Rope:
    return Rope(*(a.to(device) if isinstance(a, Tensor) else a for a in arguments))


def compare(x: Tensor, arguments: list[Any], smooth: bool, block: int, device: str) -> None:
    codes, scale, means = gpu.quantised(x.to(device), on(device, arguments), smooth, block)
    expected = rope_quantize(x, *arguments, smooth, block)
    value, _ = rope(x.float(), *arguments, block)
    if smooth:
        value = value - value.mean(2, keepdim=True)
    assert relative_error(means.cpu(), expected[2]) < TOLERANCE[F32]
    assert relative_error(scale.cpu(), expected[1]) < TOLERANCE[F32]
    if arguments[0] == "none" and not smooth:
        assert torch.equal(codes.cpu(), expected[0])
        assert torch.equal(scale.cpu(), expected[1])
    apart = (codes.cpu().int() - expected[0].int()).abs()
    assert int(apart.max()) <= 1
    assert float(apart.float().mean()) < 2e-3
    noise = relative_error(expected[0] * expected[1], value)
    assert relative_error(codes.cpu() * scale.cpu(), value) < REDRAWN_NOISE * noise


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_all_norms_and_pairs(norm: str, interleaved: bool, smooth: bool, device: str) -> None:
    x = (torch.randn(2, 80, 3, 32) + 2).to(BF16)
    compare(x, given(x, norm, interleaved), smooth, 64, device)


@pytest.mark.parametrize(("tokens", "block"), [(1, 16), (63, 16), (80, 32), (130, 128)])
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (9, 12), (2, 96)])
def test_shapes(tokens: int, block: int, heads: int, width: int, device: str) -> None:
    """Ragged blocks, more heads than a program takes, widths that are no powers of two."""
    x = torch.randn(1, tokens, heads, width)
    for interleaved in (False, True):
        compare(x, given(x, "none", interleaved), False, block, device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [12, 32])
def test_tables_as_wide_as_heads(width: int, interleaved: bool, device: str) -> None:
    """Each channel has factors of its own, with text behind and a table for each sequence."""
    x = torch.randn(2, 47, 3, width)
    arguments = given(x, "rms", interleaved, 3, 40, whole=True)
    compare(x, arguments, False, 16, device)
    arguments[4], arguments[5] = (torch.stack((t, t.flip(0))) for t in arguments[4:6])
    compare(x, arguments, True, 16, device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("start", "turned"), [(0, 40), (7, 40), (7, 33)])
def test_text_is_not_turned(start: int, turned: int, interleaved: bool, device: str) -> None:
    x = torch.randn(2, 47, 2, 16).to(BF16)
    arguments = given(x, "rms", interleaved, start, turned)
    compare(x, arguments, False, 16, device)
    arguments[4], arguments[5] = (
        torch.stack((t, t.flip(0))) for t in arguments[4:6]
    )  # a table for each sequence
    compare(x, arguments, True, 16, device)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
@pytest.mark.parametrize("norm", NORMS)
def test_values_without_codes(norm: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(2, 50, 3, 16).to(dtype)
    arguments = given(x, norm, True)
    out, means = gpu.rotated(x.to(device), on(device, arguments), 16)
    expected = rope(x, *arguments, 16)
    assert out.dtype == dtype
    assert relative_error(out.cpu(), expected[0]) < TOLERANCE[dtype] / 4
    assert relative_error(means.cpu(), expected[1]) < TOLERANCE[F32]


def test_a_third_of_a_joint_projection_is_not_copied(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = torch.randn(2, 33, 3, 4, 16).to(BF16)
    monkeypatch.setattr(gpu, "operand", lambda *_: pytest.fail("copied"))
    for third in joint.unbind(2):
        compare(third, given(third, "rms", False), False, 16, device)


def test_no_table_and_neighbours_of_nan(device: str) -> None:
    x = torch.randn(1, 40, 2, 16)
    x[0, 7, 1, 3], x[0, 9, 0, 2], x[0, 5, 0] = float("nan"), float("inf"), 0
    arguments = ["rms", None, None, 1e-6, None, None, 0, False]
    codes, scale, means = gpu.quantised(x.to(device), on(device, arguments), False, 16)
    expected = rope_quantize(x, *arguments, False, 16)
    assert torch.equal(scale.cpu().isfinite(), expected[1].isfinite())
    assert int(scale.isfinite().sum()) == 78
    assert codes.cpu()[~expected[1].isfinite().expand_as(codes)].eq(0).all()
    assert torch.equal(means.cpu().isnan(), expected[2].isnan())
    codes, scale, _ = gpu.quantised(x.to(device), on(device, arguments), True, 16)
    assert not scale.isfinite().any()
    assert codes.eq(0).all()


def test_what_the_kernel_does_not_take(device: str) -> None:
    x = torch.randn(1, 40, 2, 16)
    assert gpu.takes(x, 64)
    assert not gpu.takes(x, 60)
    assert not gpu.takes(x.double(), 64)
    assert not gpu.takes(x[:, :0], 64)
    arguments = given(x, "rms", False)
    arguments[1] = torch.ones(8)
    with pytest.raises(InputError, match=r"weight: expected shape \[16\], got \[8\]"):
        gpu.quantised(x.to(device), on(device, arguments), False, 16)
