"""The Triton GEMMs: integers equal to the reference bit for bit, epilogues within the tolerance."""

from typing import Any

import pytest
import torch

from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.kernels.fp8_linear import fp8_linear
from vdqc.kernels.gpu import gemm, guard, tma_gemm
from vdqc.kernels.gpu.epilogue import epilogue
from vdqc.kernels.gpu.launch_config import Config
from vdqc.kernels.int8_linear import int8_linear
from vdqc.kernels.integer import int8_matmul

pytestmark = pytest.mark.usefixtures("poison")

SMALL = Config(32, 64, 32, group_m=2)
SHAPES = [(1, 1, 1), (1, 16, 24), (5, 63, 17), (63, 80, 63), (80, 100, 129), (130, 256, 70)]


def codes(*shape: int, bits: int = 8, device: str = "cpu") -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.randint(-top - 1, top + 1, shape, dtype=torch.int8).to(device)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_sums_equal_the_reference(shape: tuple[int, int, int], device: str) -> None:
    m, k, n = shape
    a, w = codes(m, k, device=device), codes(n, k, device=device)
    assert torch.equal(gemm.int8_matmul(a, w, SMALL), int8_matmul(a, w))
    assert torch.equal(gemm.int8_matmul(a, w), int8_matmul(a, w))


def test_the_largest_sums_do_not_saturate(device: str) -> None:
    a = torch.full((3, 32768), -128, dtype=torch.int8, device=device)
    found = gemm.int8_matmul(a, a[:2], Config(16, 16, 128))
    assert torch.equal(found, torch.full((3, 2), 128 * 128 * 32768, dtype=torch.int32).to(device))


def test_empty_operands(device: str) -> None:
    assert gemm.int8_matmul(codes(0, 8, device=device), codes(4, 8, device=device)).shape == (0, 4)
    assert gemm.int8_matmul(codes(4, 8, device=device), codes(0, 8, device=device)).shape == (4, 0)
    nothing = gemm.int8_matmul(codes(2, 0, device=device), codes(4, 0, device=device))
    assert nothing.eq(0).all()


def test_strided_operands_give_the_same(device: str) -> None:
    a, w = codes(48, 40, device=device), codes(48, 30, device=device)
    expected = int8_matmul(a.T.contiguous(), w.T.contiguous())
    assert torch.equal(gemm.int8_matmul(a.T, w.T, SMALL), expected)
    shifted = codes(40 * 48 + 3, device=device)[3:].reshape(40, 48)
    expected = int8_matmul(shifted, w.T.contiguous())
    assert torch.equal(gemm.int8_matmul(shifted, w.T, SMALL), expected)


def linear_case(
    lead: tuple[int, ...], k: int, n: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Every operand of the op; a test takes away what it is not about."""
    a, w = codes(*lead, k), codes(n, k)
    case = {
        "codes": a,
        "scale": torch.rand(*lead, 1) / 50,
        "zero_point": torch.randint(-9, 9, (*lead, 1), dtype=torch.int32),
        "weight": w,
        "weight_scale": torch.rand(n) / 50,
        "weight_zero_point": torch.randint(-9, 9, (n,), dtype=torch.int32),
        "weight_sum": w.sum(-1, dtype=torch.int32),
        "bias": torch.randn(n).to(dtype),
        "row_sum": a.sum(-1, keepdim=True, dtype=torch.int32),
        "gate": torch.randn(*lead[:1], *[1] * (len(lead) - 1), n).to(dtype),
        "residual": torch.randn(*lead, n).to(dtype),
        "down": torch.randn(*lead, 16).to(dtype),
        "up": torch.randn(n, 16).to(dtype),
    }
    moved: dict[str, Any] = {name: value.to(device) for name, value in case.items()}
    return moved | {"dtype": dtype, "activation": "gelu_tanh"}


ABSENT: dict[str, dict[str, Any]] = {
    "zero points": {"zero_point": None, "weight_zero_point": None, "weight_sum": None},
    "activation zero": {"zero_point": None, "weight_sum": None},
    "weight zero": {"weight_zero_point": None, "row_sum": None},
    "row sum": {"row_sum": None},
    "bias": {"bias": None},
    "gate": {"gate": None},
    "residual": {"residual": None},
    "branch": {"down": None, "up": None},
    "activation": {"activation": "none"},
    "nothing": {},
}


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("absent", ABSENT)
def test_epilogue_is_that_of_the_reference(absent: str, slices: int, device: str) -> None:
    case = linear_case((3, 17), 48, 70, torch.float32, device) | ABSENT[absent]
    found = gemm.int8_linear(**case, config=Config(32, 64, 32, slices=slices))
    assert relative_error(found, int8_linear(**case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 16, 32])
def test_results_of_half_precision(dtype: torch.dtype, rank: int, device: str) -> None:
    case = linear_case((2, 9), 33, 40, dtype, device)
    case["down"] = torch.randn(2, 9, rank).to(device, dtype)
    case["up"] = torch.randn(40, rank).to(device, dtype)
    found = gemm.int8_linear(**case)
    assert found.dtype == dtype
    assert relative_error(found, int8_linear(**case)) < TOLERANCE[dtype]


@pytest.mark.parametrize("gate", [(70,), (1, 1, 70), (3, 1, 70), (1, 17, 70), (3, 17, 70), (17, 1)])
def test_gates_of_every_shape(gate: tuple[int, ...], device: str) -> None:
    case = linear_case((3, 17), 48, 70, torch.float32, device)
    case["gate"] = torch.randn(gate, device=device)
    found = gemm.int8_linear(**case, config=SMALL)
    assert relative_error(found, int8_linear(**case)) < TOLERANCE[torch.float32]


def test_one_scale_for_all_rows(device: str) -> None:
    case = linear_case((2, 9), 33, 40, torch.float32, device)
    case["scale"] = torch.tensor([[[0.03]]], device=device)
    case["zero_point"] = torch.tensor([[[-5]]], dtype=torch.int32, device=device)
    found = gemm.int8_linear(**case)
    assert relative_error(found, int8_linear(**case)) < TOLERANCE[torch.float32]


def test_scales_of_zero_and_nan_follow_ieee(device: str) -> None:
    case = linear_case((4,), 32, 8, torch.float32, device)
    case |= {"activation": "none", "gate": None, "residual": None, "down": None, "up": None}
    case["scale"][0], case["scale"][1] = 0.0, float("nan")
    case["weight_scale"][3] = float("inf")
    found, expected = gemm.int8_linear(**case), int8_linear(**case)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[0, :3], case["bias"][:3])
    assert found[1].isnan().all()


def test_wrong_operands_are_named(device: str) -> None:
    case = linear_case((2, 9), 33, 40, torch.float32, device)
    wrong = {
        "codes": case["codes"].float(),
        "weight": case["weight"][:, :5],
        "scale": torch.rand(7, device=device),
        "zero_point": torch.zeros(1, dtype=torch.int32, device=device),
        "weight_scale": torch.rand(39, device=device),
        "weight_sum": None,
        "bias": torch.zeros(41, device=device),
        "row_sum": torch.zeros(3, dtype=torch.int32, device=device),
        "activation": "relu",
        "gate": torch.rand(5, 40, device=device),
        "residual": torch.rand(2, 9, 41, device=device),
        "down": torch.rand(2, 9, 8, device=device),
        "up": None,
    }
    for name, value in wrong.items():
        with pytest.raises(InputError, match="codes" if name == "weight" else name):
            gemm.int8_linear(**case | {name: value})


@pytest.mark.parametrize("absent", ["branch", "zero points", "nothing"])
@pytest.mark.parametrize("shape", [(5, 48, 17), (80, 112, 70)])
def test_operands_by_descriptor(absent: str, shape: tuple[int, int, int], device: str) -> None:
    m, k, n = shape
    case = linear_case((m,), k, n, torch.float32, device) | ABSENT[absent]
    # a GPU specialises no warps around a branch of rank 16: ``tma_gemm.fits``
    config = Config(64, 32, 64, variant="ws" if absent == "branch" else "tma")
    end = {name: value for name, value in case.items() if name not in ("codes", "weight", "dtype")}
    pointers, constants = epilogue(case["codes"], n, **end)
    out = torch.empty(m, n, device=device)
    args = (case["codes"], case["weight"], out, pointers, constants, config)
    tma_gemm.launch(*args, in_kernel=False)
    assert relative_error(out, int8_linear(**case)) < TOLERANCE[torch.float32]
    out.fill_(float("nan"))
    tma_gemm.launch(*args, in_kernel=True)
    assert relative_error(out, int8_linear(**case)) < TOLERANCE[torch.float32]


def test_the_first_result_by_descriptor_is_checked(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_VERDICTS", {})
    ws = Config(64, 32, 64, variant="ws")
    monkeypatch.setattr(
        gemm, "configuration", lambda op, *sizes: ws if "tma" in op else Config(32, 32, 32)
    )
    case = linear_case((20,), 64, 40, torch.float32, device) | ABSENT["branch"]
    expected = int8_linear(**case)
    for _ in range(2):
        assert relative_error(gemm.int8_linear(**case), expected) < TOLERANCE[torch.float32]
    assert list(guard._VERDICTS.values()) == [True]
    monkeypatch.setattr(guard, "_VERDICTS", {})
    monkeypatch.setattr(tma_gemm, "launch", lambda *args: args[2].zero_())
    with pytest.warns(UserWarning, match="differs from the plain variant"):
        assert relative_error(gemm.int8_linear(**case), expected) < TOLERANCE[torch.float32]
    assert relative_error(gemm.int8_linear(**case), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", [(1, 16, 24), (5, 63, 17), (80, 100, 70)])
@pytest.mark.parametrize("rank", [None, 16])
def test_fp8(shape: tuple[int, int, int], rank: int | None, device: str) -> None:
    m, k, n = shape
    a = torch.randn(m, k).to(device, torch.float8_e4m3fn)
    w = torch.randn(n, k).to(device, torch.float8_e4m3fn)
    scales = torch.rand(m, 1, device=device), torch.rand(n, device=device)
    bias = torch.randn(n, device=device)
    fused = [torch.randn(n), torch.randn(m, n)]
    fused += [] if rank is None else [torch.randn(m, rank), torch.randn(n, rank)]
    more = ("gelu_tanh", *(tensor.to(device) for tensor in fused))
    args = (a, scales[0], w, scales[1], bias, torch.float32, *more)
    found = gemm.fp8_linear(*args, config=SMALL)
    assert relative_error(found, fp8_linear(*args)) < TOLERANCE[torch.float32]
