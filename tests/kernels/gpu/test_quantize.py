"""Activation quantisers as Triton kernels, against their references."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vdqc.base import hadamard
from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import REDRAWN_NOISE, TOLERANCE, relative_error
from vdqc.kernels.fused_quantize import fused_quantize, fused_quantize_asym, residual_quantize_asym
from vdqc.kernels.gpu import operands, quantize, quantize_row, quantize_steps
from vdqc.kernels.gpu.operands import Form
from vdqc.kernels.prologue import Prologue, prologue
from vdqc.kernels.quantize_rows import quantize_rows, quantize_rows_asym, quantize_static
from vdqc.kernels.rotation import rotation

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = [(1, 1), (3, 63), (2, 5, 80), (7, 256), (0, 16)]

pytestmark = pytest.mark.usefixtures("poison")


def rows(shape: tuple[int, ...], dtype: torch.dtype = BF16) -> Tensor:
    """With an outlier, a row of zeros, and rows that are not finite."""
    x = torch.randn(shape)
    x[..., 0] *= 20
    flat = x.view(-1, shape[-1])
    for row, value in enumerate((0.0, float("nan"), float("inf"), -float("inf"))):
        if len(flat) > row + 2:
            flat[row + 1, -1 if row else slice(None)] = value
    return x.to(dtype)


def same(found: Any, expected: Any) -> bool:
    """Bit for bit; NaN equals NaN."""
    return all(
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.cpu().nan_to_num(7e30), other.nan_to_num(7e30))
        if one.is_floating_point()
        else torch.equal(one.cpu(), other)
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_of_rows_equal_the_reference_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = rows(shape, dtype)
    for qmax in (127, 7, 1):
        assert same(quantize.symmetric(x.to(device), qmax, False), quantize_rows(x, qmax, False))
    for bits in (8, 3):
        found = quantize.asymmetric(x.to(device), bits, False)
        assert same(found, quantize_rows_asym(x, bits, False))
    for clip in (torch.tensor(0.4), torch.tensor([1e-9])):
        found = quantize.symmetric(x.to(device), 7, False, clip.to(device))
        assert same(found, quantize_rows(x, 7, False, clip))
        found = quantize.asymmetric(x.to(device), 4, False, clip.to(device))
        assert same(found, quantize_rows_asym(x, 4, False, clip))


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 70, 80)])
def test_codes_of_whole_tensors(shape: tuple[int, ...], value: float, device: str) -> None:
    x = torch.randn(shape).to(BF16) if value else torch.zeros(shape, dtype=BF16)
    x.view(-1)[-1] = value
    assert same(quantize.symmetric(x.to(device), 127, True), quantize_rows(x, 127, True))
    assert same(quantize.asymmetric(x.to(device), 4, True), quantize_rows_asym(x, 4, True))
    clip = torch.tensor(0.5)
    found = quantize.symmetric(x.to(device), 7, True, clip.to(device))
    assert same(found, quantize_rows(x, 7, True, clip))
    found = quantize.asymmetric(x.to(device), 4, True, clip.to(device))
    assert same(found, quantize_rows_asym(x, 4, True, clip))


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("zero", [None, 5, -128])
def test_static_codes(rowwise: bool, zero: int | None, device: str) -> None:
    x = rows((9, 80))
    scale = torch.rand(9, 1) * 0.05 if rowwise else torch.tensor(0.05)
    if rowwise:
        scale[2], scale[3] = 0.0, float("nan")
    moved = None if zero is None else torch.tensor(zero, dtype=torch.int32)
    found = quantize.static(
        x.to(device), scale.to(device), None if moved is None else moved.to(device), -128, 127
    )
    assert torch.equal(found.cpu(), quantize_static(x, scale, moved, -128, 127))


def test_static_takes_one_scale_or_one_a_row() -> None:
    x = torch.randn(2, 3, 8)
    assert quantize.per_row(x, torch.rand(()))
    assert quantize.per_row(x, torch.rand(2, 3, 1))
    assert not quantize.per_row(x, torch.rand(8))


def test_a_quotient_is_rounded_as_ieee_division(device: str) -> None:
    """Values at and around every tie, where a wrong last bit changes the code."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.uniform(-20, 20, 64)).astype(np.float32)[:, None]
    ties = (np.arange(-126, 127) + 0.5).astype(np.float32)
    tops = scale * np.float32(127)
    exact = scale.astype(np.float64) * ties
    around = [exact.astype(np.float32)]
    for _ in range(2):
        around = [np.nextafter(around[0], np.float32(np.inf)), *around]
        around.append(np.nextafter(around[-1], -np.float32(np.inf)))
    x = torch.from_numpy(np.concatenate([tops, *around], axis=1))
    found, step = quantize.symmetric(x.to(device), 127, False)
    expected = (x / step.cpu()).round()
    assert torch.equal(found.cpu(), expected.to(torch.int8))
    assert torch.equal(step.cpu(), quantize_rows(x, 127, False)[1])


def steps(width: int, lead: tuple[int, ...], **given: Any) -> Prologue:
    """Every step at once, unless ``given`` says otherwise."""
    everything = {
        "norm": "layer",
        "norm_weight": torch.rand(width) + 0.5,
        "norm_bias": (torch.randn(width) / 4).to(BF16),
        "mod_scale": torch.randn(lead[0], 6, width)[:, 1:2] / 4,
        "mod_shift": torch.randn(*lead, width) / 4,
        "activation": "gelu_tanh",
        "smooth": torch.rand(width) + 0.5,
        "post": torch.rand(width) + 0.5 if given.get("block") else None,
    }
    return Prologue(**(everything | given))


def compare(x: Tensor, chosen: Prologue, form: Form, device: str, *more: Tensor) -> None:
    """Codes, of values that differ by float rounding at most: equal but for ties."""
    moved = Prologue(
        **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(chosen).items()}
    )
    put = Form(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(form).items()})
    found = quantize.quantise_rows(x.to(device), moved, put, *(m.to(device) for m in more))
    *chain, post = vars(chosen).values()
    arguments = (*chain, form.down, form.bits, form.packed, post, form.clip)
    reference = fused_quantize_asym if form.asymmetric else fused_quantize
    if more:
        assert found.stream is not None
        expected = residual_quantize_asym(x, *more, *arguments)
        assert torch.equal(found.stream.cpu(), expected[0])
        x = expected[0]
    expected = reference(x, *arguments)
    # a rotation takes a bfloat16 row's values as bfloat16, where a graph of its own ops rounds too
    rounds = x.dtype == BF16 and chosen.block > 0
    assert relative_error(found.scale.cpu(), expected[1]) < TOLERANCE[BF16 if rounds else F32] / 4
    value, step = prologue(x, chosen), expected[1].float()
    unpacked = unpack(found.codes.cpu(), x.shape[-1]) if form.packed else found.codes.cpu()
    codes = unpack(expected[0], x.shape[-1]) if form.packed else expected[0]
    apart = (unpacked.int() - codes.int()).abs()
    assert int(apart.max()) <= 1
    assert float(apart.float().mean()) < (0.12 if rounds else 2e-3)
    zero = torch.zeros(()) if found.zero is None else found.zero.cpu()
    if form.clip is not None:  # what is cut off is no noise
        value = value.clamp(step * (codes.min() - zero), step * (codes.max() - zero))
    noise = relative_error((codes - zero) * step, value)
    error = relative_error((unpacked - zero) * found.scale.cpu(), value)
    assert error < REDRAWN_NOISE * noise
    assert found.sums is not None
    assert torch.equal(found.sums.cpu(), unpacked.sum(-1, keepdim=True).int())
    if form.down is not None:
        assert found.low is not None
        assert found.low.dtype == x.dtype
        assert relative_error(found.low.cpu(), expected[-1]) < TOLERANCE[x.dtype]


def unpack(packed: Tensor, width: int) -> Tensor:
    from vdqc.base.packing import unpack as both

    return both(packed.flatten(0, -2), 4, width).reshape(*packed.shape[:-1], width)


def only(walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send all rows to one kernel."""
    if walk != "line":
        monkeypatch.setattr(quantize, "takes_line", lambda *_: False)
    if walk == "steps":
        monkeypatch.setattr(quantize, "takes_row", lambda *_, **__: False)


FORMS = {
    "int8": Form(127),
    "asym": Form(0, 8, asymmetric=True),
    "packed": Form(7, 4, packed=True),
    "packed-asym": Form(0, 4, asymmetric=True, packed=True),
    "clipped": Form(7, 4, clip=torch.tensor(0.6)),
    "clipped-asym": Form(0, 4, asymmetric=True, packed=True, clip=torch.tensor([0.6])),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("walk", ["line", "row", "steps"])
@pytest.mark.parametrize("width", [63, 80, 192])
def test_all_steps_at_once(
    width: int, walk: str, form: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(walk, monkeypatch)
    x = torch.randn(2, 5, width).to(BF16)
    compare(x, steps(width, (2, 5)), FORMS[form], device)


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("walk", ["line", "row", "steps"])
def test_each_step_alone(
    norm: str, activation: str, walk: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(walk, monkeypatch)
    x = torch.randn(2, 3, 72) + 30  # far from zero: a variance must not cancel
    compare(x, Prologue(norm=norm, activation=activation), FORMS["int8"], device)


@pytest.mark.parametrize("walk", ["line", "row", "steps"])
@pytest.mark.parametrize("gate", ["none", "frame", "token", "all"])
def test_the_stream_is_that_of_the_reference_bit_for_bit(
    walk: str, gate: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(walk, monkeypatch)
    x, y = torch.randn(2, 5, 80).to(BF16), torch.randn(2, 5, 80).to(BF16)
    shapes = {"frame": (2, 1, 80), "token": (2, 5, 80), "all": (80,)}
    more = [y] if gate == "none" else [y, torch.randn(shapes[gate])]
    if gate == "none":
        found = quantize.quantise_rows(x.to(device), Prologue(), FORMS["int8"], y.to(device))
        assert found.stream is not None
        assert torch.equal(found.stream.cpu(), (x.float() + y.float()).to(BF16))
        return
    compare(x, steps(80, (2, 5), norm="rms"), FORMS["asym"], device, *more)


@pytest.mark.parametrize(
    ("width", "block"), [(128, 128), (192, 64), (96, 12), (384, 384), (264, 8)]
)
@pytest.mark.parametrize("form", ["int8", "packed-asym", "clipped"])
def test_rotations(width: int, block: int, form: str, device: str) -> None:
    """Blocks, and 384 = 16 x 24, a Kronecker product; more rows than programs."""
    signs = hadamard.random_signs(width, 0)
    x = torch.randn(2, 3, width).to(BF16)
    compare(x, steps(width, (2, 3), signs=signs, block=block), FORMS[form], device)
    compare(x, Prologue(signs=signs, block=block), FORMS[form], device)


@pytest.mark.parametrize("block", [0, 64, 12, 96, 192])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_low_rank_branch(block: int, dtype: torch.dtype, device: str) -> None:
    """With all kinds of rotation; 192 = 8 x 24 takes two kernels."""
    width, signs = 192, hadamard.random_signs(192, 0) if block else None
    assert hadamard.factors(192) is not None
    x, down = torch.randn(2, 9, width).to(dtype), torch.randn(width, 5).to(dtype)
    chosen = steps(width, (2, 9), signs=signs, block=block)
    compare(x, chosen, Form(127, 8, down=down), device)


def test_long_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 16400).to(BF16)
    compare(x, steps(16400, (2, 1), norm_bias=None, mod_scale=None, mod_shift=None),
            FORMS["packed"], device)  # fmt: skip
    x = rows((7, 16400))
    assert same(quantize.symmetric(x.to(device), 127, False), quantize_rows(x, 127, False))


def test_shapes_no_kernel_takes_run_through_memory(device: str) -> None:
    """A block of 256 is one dense factor; 200 = 10 x 20 has none of its own."""
    signs = hadamard.random_signs(512, 0)
    assert not quantize_row.takes_row(512, Prologue(signs=signs, block=256))
    assert not quantize_steps.takes_steps(512, Prologue(signs=signs, block=256))
    x = torch.randn(2, 2, 512).to(BF16)
    compare(x, steps(512, (2, 2), signs=signs, block=256), FORMS["asym"], device)


def test_rows_that_are_not_finite_stay_alone(device: str) -> None:
    x = rows((8, 64))
    chosen = Prologue(norm="rms", signs=hadamard.random_signs(64, 0), block=64)
    moved = Prologue(norm="rms", signs=chosen.signs.to(device), block=64)  # type: ignore[union-attr]
    for asymmetric in (False, True):
        form = Form(127, 8, asymmetric)
        found = quantize.quantise_rows(x.to(device), moved, form)
        good = prologue(x, chosen).isfinite().all(-1, keepdim=True)
        assert torch.equal(found.scale.cpu().isfinite(), good)
        assert found.codes.cpu()[~good.flatten()].eq(0).all()
        assert found.sums is not None
        assert found.sums.cpu()[~good].eq(0).all()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("width", "block"), [(63, 1), (128, 128), (96, 12), (384, 384), (768, 384)]
)
def test_rotation_op(
    width: int, block: int, dtype: torch.dtype, inverse: bool, device: str
) -> None:
    x, signs = torch.randn(2, 3, width).to(dtype), hadamard.random_signs(width, 0)
    found = quantize.rotate(x.to(device), signs.to(device), block, inverse)
    assert found is not None
    expected = rotation(x, signs, block, inverse)
    assert found.dtype == dtype
    assert relative_error(found.cpu(), expected) < TOLERANCE[dtype] / 4


def test_modulation_is_read_where_it_lies(device: str) -> None:
    x, six = torch.randn(2, 5, 16, device=device), torch.randn(2, 6, 16, device=device)
    given, every, stride = operands.per_group("mod_scale", six[:, 2:3], x)
    assert given is not None
    assert (given.data_ptr(), every, stride) == (six[:, 2:3].data_ptr(), 5, 96)
    assert operands.per_group("gate", torch.randn(16, device=device), x)[1:] == (10, 0)
    assert operands.per_group("gate", torch.randn(2, 5, 16, device=device), x)[1:] == (1, 16)
    across = operands.per_group("gate", torch.randn(5, 16, device=device), x)
    assert across[1:] == (1, 16)  # repeats over the batch: copied
    with pytest.raises(InputError, match=r"broadcasts to \[2, 5, 16\], got \[3, 16\]"):
        operands.per_group("gate", torch.randn(3, 16, device=device), x)


def test_refusals(device: str) -> None:
    x = torch.randn(2, 16, device=device)
    with pytest.raises(InputError, match=r"x: expected rows"):
        quantize.quantise_rows(torch.randn(2, 0, device=device), Prologue(), Form(127))
    with pytest.raises(InputError, match=r"smooth: expected shape \[16\], got \[8\]"):
        quantize.quantise_rows(x, Prologue(smooth=torch.ones(8, device=device)), Form(127))
    with pytest.raises(InputError, match=r"clip: expected one number, got shape \[16\]"):
        quantize.quantise_rows(x, Prologue(), Form(7, clip=torch.ones(16, device=device)))
    with pytest.raises(InputError, match="x: expected float32"):
        quantize.quantise_rows(x.double(), Prologue(), Form(127))
