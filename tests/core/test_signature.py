"""Calls are bound or refused; relations are evaluated without python's eval."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdqc.base.diagnostics import InputError
from vdqc.ir.signature import IntInput, Signature, TensorInput, call_leaves, evaluate, output_type

SIGNATURE = Signature(
    parameters=("x", "timestep", "grid", "mode", "return_dict"),
    defaults={"mode": None, "return_dict": True},
    inputs=(
        TensorInput("x", "float32", ("s0", "s1*s2", 8)),
        TensorInput("timestep", "float32", ("s0",)),
        IntInput("grid[0]", "s1"),
        IntInput("grid[1]", "s2"),
    ),
    statics={"mode": None},
    ranges={"s1": (1, 64)},
    guards=("s1 % 2 == 0",),
    promoted=("timestep",),
)


def bind(**changes: object) -> list[object]:
    call = {"x": torch.zeros(2, 12, 8), "timestep": torch.zeros(2), "grid": (4, 3)}
    return SIGNATURE.bind((), {**call, **changes})


def test_binds_positional_and_named_arguments_alike() -> None:
    x, t = torch.zeros(2, 12, 8), torch.zeros(2)
    assert SIGNATURE.bind((x, t, (4, 3)), {"return_dict": False})[2:] == [4, 3]
    assert bind()[2:] == [4, 3]


@pytest.mark.parametrize("value", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.full((2,), 7)])
def test_promoted_numbers_become_float_tensors_over_the_batch(value: object) -> None:
    bound = bind(timestep=value)[1]
    assert torch.equal(bound, torch.full((2,), 7.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 12, 7)}, "axis 2 of 'x' must be 8"),
        ({"x": torch.zeros(2, 11, 8)}, r"axis 1 of 'x' must be s1\*s2 = 12, got 11"),
        ({"x": torch.zeros(2, 12, 8, dtype=torch.float64)}, "expected float32"),
        ({"x": None}, "got None"),
        ({"x": 3}, "expected a tensor for 'x'"),
        ({"mode": "fast"}, "'mode' was None at capture, got 'fast'"),
        ({"mode": torch.zeros(2)}, r"'mode' was None at capture, got float32\[2\]"),
        ({"grid": (3, 4)}, "s1 % 2 == 0"),
        ({"grid": (66, 3), "x": torch.zeros(2, 198, 8)}, r"s1 must be in \[1, 64\]"),
        ({"timestep": torch.zeros(3)}, "axis 0 of 'timestep'"),
        ({"unknown": 1}, "unknown argument 'unknown'"),
    ],
)
def test_refuses_what_the_graph_does_not_hold_for(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bind(**changes)


def test_one_one_point_zero_and_true_are_three_baked_values() -> None:
    signature = Signature(("a",), {}, (), {"a": 1}, {})
    signature.bind((1,), {})
    for other in (1.0, True):
        with pytest.raises(InputError):
            signature.bind((other,), {})


def test_survives_json() -> None:
    text = json.dumps(SIGNATURE.to_json())
    assert Signature.from_json(json.loads(text)) == SIGNATURE


def test_leaves_of_nested_arguments_have_paths() -> None:
    leaves = call_leaves({"a": [1, (2, 3)], "b": {"c": None}})
    assert leaves == {"a[0]": 1, "a[1][0]": 2, "a[1][1]": 3, "b['c']": None}


@given(st.integers(1, 99), st.integers(1, 99))
def test_evaluate_is_pythons_arithmetic(a: int, b: int) -> None:
    text = "Max(a // 2, b) * 3 - a % b == 1 or not (a / b <= 0.5 and b ** 2 > a)"
    expected = max(a // 2, b) * 3 - a % b == 1 or not (a / b <= 0.5 and b**2 > a)
    assert evaluate(text, {"a": a, "b": b}) == expected


@given(st.integers(1, 99), st.integers(1, 99))
def test_evaluate_knows_the_functions_that_relations_are_printed_with(a: int, b: int) -> None:
    text = "math.trunc(torch.sym_float(a*(b // 2)) ** 0.5) == math.ceil(b / 3) + math.floor(a / 2)"
    expected = int((a * (b // 2)) ** 0.5) == math.ceil(b / 3) + math.floor(a / 2)
    assert evaluate(text, {"a": a, "b": b}) == expected


@pytest.mark.parametrize(
    "text", ["__import__('os')", "math.exp(a)", "torch.sym_float.real", "a.real", "c + 1", "[a]"]
)
def test_evaluate_refuses_everything_else(text: str) -> None:
    with pytest.raises(InputError):
        evaluate(text, {"a": 1})


def test_output_classes_come_from_two_packages_only() -> None:
    with pytest.raises(InputError, match="not from diffusers or transformers"):
        output_type("os.system")
