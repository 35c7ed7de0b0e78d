"""What may follow the sums of a quantised linear: activation, gate, residual, low-rank branch."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.packing import pack
from vdqc.kernels.int8_linear import INT8_LINEAR, int8_linear
from vdqc.kernels.packed_linear import PACKED_LINEAR, packed_linear


def operands() -> tuple[dict[str, Any], dict[str, Any]]:
    a = torch.randint(-7, 8, (2, 5, 48), dtype=torch.int8)
    w = torch.randint(-7, 8, (12, 48), dtype=torch.int8)
    linear = {
        "codes": a,
        "scale": torch.rand(2, 5, 1) / 9,
        "zero_point": None,
        "weight": w,
        "weight_scale": torch.rand(12) / 9,
        "weight_zero_point": torch.randint(-5, 5, (12,), dtype=torch.int32),
        "weight_sum": None,
        "bias": torch.randn(12),
        "dtype": torch.float32,
    }
    fused = {
        "row_sum": a.sum(-1, keepdim=True, dtype=torch.int32),
        "activation": "gelu_tanh",
        "gate": torch.randn(2, 1, 12),
        "residual": torch.randn(2, 5, 12),
        "down": torch.randn(2, 5, 16),
        "up": torch.randn(12, 16),
    }
    return linear, fused


def test_the_formula() -> None:
    linear, fused = operands()
    plain = int8_linear(**linear | {"dtype": torch.float64}).double()
    branch = fused["down"].double() @ fused["up"].double().T
    inner = functional.gelu(plain + branch, approximate="tanh")
    expected = fused["residual"] + fused["gate"].double() * inner
    for found in (
        int8_linear(**linear, **fused),
        torch.ops.vdqc_kernels.int8_linear(**linear, **fused),
    ):
        assert relative_error(found, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("code_bits", [8, 4])
def test_packed_weights_and_codes_give_the_same(code_bits: int) -> None:
    linear, fused = operands()
    expected = int8_linear(**linear, **fused)
    codes, packed = linear["codes"], pack(linear["weight"], 4)
    if code_bits == 4:
        linear["codes"] = pack(codes.flatten(0, 1), 4).unflatten(0, (2, 5))
    linear = {name: value for name, value in linear.items() if name != "weight"}
    case = linear | fused | {"packed": packed, "bits": 4, "multiplier": None}
    assert torch.equal(packed_linear(**case, code_bits=code_bits), expected)
    found = torch.ops.vdqc_kernels.packed_linear(**case, code_bits=code_bits)
    assert torch.equal(found, expected)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(PACKED_LINEAR.op, (), case | {"code_bits": code_bits}, test_utils=checks)


def test_schema_and_fake_of_every_argument() -> None:
    linear, fused = operands()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(INT8_LINEAR.op, (), linear | fused, test_utils=checks)


def test_unknown_words_are_named() -> None:
    linear, fused = operands()
    with pytest.raises(InputError, match="expected none or gelu_tanh, got relu"):
        int8_linear(**linear, **fused | {"activation": "relu"})
    linear = {name: value for name, value in linear.items() if name != "weight"}
    case = linear | {"packed": pack(operands()[0]["weight"], 4), "bits": 4, "multiplier": None}
    with pytest.raises(InputError, match="expected 4 or 8, got 6"):
        packed_linear(**case, code_bits=6)
