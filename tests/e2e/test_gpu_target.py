"""Programs for a GPU, as far as a machine without one can tell."""

from pathlib import Path

import pytest
import torch

import vdqc
from vdqc.base.numerics import relative_error
from vdqc.ir import artifact
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the warning is for machines without a GPU")
def test_a_program_for_a_gpu_runs_on_its_references(tmp_path: Path) -> None:
    model, samples = WAN.build(), WAN.samples()
    for target in ("cpu", "sm90"):
        vdqc.compile(model, samples, "smooth,rotate,quant", target=target, out=tmp_path / target)
    with pytest.warns(UserWarning, match="compiled for sm90 and runs here through the references"):
        program = vdqc.load(tmp_path / "sm90")
    call = WAN.inputs(B=3, seed=5)
    expected = vdqc.load(tmp_path / "cpu")(**call).sample
    original = model(**call).sample
    noise = relative_error(expected, original)
    assert relative_error(program(**call).sample, expected) < 0.5 * noise
    assert artifact.read(tmp_path / "sm90").manifest["target"] == "sm90"
