"""The small trained examples do what their README says, and still do at eight bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vdqc.compiled import CompiledModel, load
from vdqc.compiler import compile
from vdqc.ir.source import Source, load_source

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> tuple[Source, Any]:
    """The source, and the functions of its model.py."""
    pytest.importorskip("sklearn")
    source = load_source(EXAMPLES / name / "model.py")
    assert source.generate is not None
    return source, source.generate.__globals__


def compiled(source: Source, folder: Path) -> CompiledModel:
    artifact = compile(
        source.model,
        source.samples[:2],
        "quant",
        ["w8a8"],
        target="cpu",
        out=folder / "out",
        verify=False,
    )
    return load(artifact.path)


def test_digits_unet_draws_the_digit_that_is_asked_for(tmp_path: Path) -> None:
    source, own = example("digits_unet")
    digits = torch.arange(10)
    images = own["sample"](source.model, digits, 0, steps=10)
    assert (own["read"](images) == digits).sum() >= 9
    assert images.shape == (10, 1, 16, 16)

    model = compiled(source, tmp_path)
    again = own["sample"](model, digits, 0, steps=10)
    assert (own["read"](again) == digits).sum() >= 9
    assert 0 < (again - images).abs().mean() < 0.01

    wrong = own["sample"](source.model, digits.roll(1), 0, steps=10)
    assert (own["read"](wrong) == digits).sum() <= 1  # the label decides, not the noise
