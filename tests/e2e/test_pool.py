"""A pool from the command line, and what is learned from it."""

import json
from pathlib import Path

import pytest

from vdqc.cli import main
from vdqc.ir import artifact

MODEL = """
import torch
from vdqc import Sample

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))

def samples():
    for rows in (3, 5):
        yield Sample({"input": torch.linspace(-2, 2, 16 * rows).reshape(rows, 16)})
"""
GENERATE = """
def generate(model, seed):
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    for _ in range(4):
        x = x - 0.1 * model(x)
    return x
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL + GENERATE)
    return path


def test_a_recorded_pool_is_what_passes_learn_from(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, out = str(tmp_path / "pool"), str(tmp_path / "out")
    assert main(["record", str(model), "-o", pool, "--trajectories", "3"]) == 0
    assert "12 calls of 3 trajectories" in capsys.readouterr().out
    chosen = "select{method=uniform,count=5},smooth,quant"
    assert main(["compile", str(model), "--passes", chosen, "--pool", pool, "-o", out, "-q"]) == 0
    records = artifact.read(Path(out)).manifest["passes"]
    facts = next(record["facts"] for record in records if record["text"].startswith("select"))
    assert len(facts["chosen"]) == 5
    assert "12" in json.dumps(facts)


def test_a_source_without_a_sampler_cannot_be_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    assert main(["record", str(path), "-o", str(tmp_path / "pool")]) == 2
    assert "expected generate(model, seed)" in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_trajectories_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: str
) -> None:
    command = ["record", str(model), "-o", str(tmp_path / "pool"), f"--trajectories={count}"]
    assert main(command) == 2
    assert "expected at least 1" in capsys.readouterr().err


def test_a_pool_that_is_none_is_refused_before_the_model_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", str(model), "--pool", str(tmp_path / "nothing")]) == 2
    assert "pool" in capsys.readouterr().err
