"""What a check measures per site: planted faults show where they are, looking changes nothing."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from vdqc.check import check
from vdqc.ir.site import set_note
from vdqc.ir.source import load_source
from vdqc.loading import load
from vdqc.lowering.fuse import half_split
from vdqc.observe import is_observable, observed, produced_sites, site_times
from vdqc.site_errors import LIMIT, in_halves, sampled, worst_sites

TINY = Path(__file__).parent.parent / "tiny_model.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return load_source(Path(shutil.copy(TINY, tmp_path_factory.mktemp("source") / "model.py")))


def test_every_site_is_measured_or_says_why_not(tiny_artifact, source):
    result = check(load(tiny_artifact), source, timing_runs=1)
    found = {error.name: error for error in result.sites}
    assert {"blocks.0.to_q", "blocks.1.down", "blocks.1", "out"} <= set(found)
    for error in found.values():
        assert bool(error.sqnr_db) != bool(error.why)
        assert len(error.sqnr_db) in (0, len(result.steps))
    last = [value for value in found["out"].sqnr_db if value is not None]
    assert last == pytest.approx([step.sqnr_db for step in result.steps], abs=1e-3)
    times = {time.name: time.seconds for time in result.times}
    assert times["blocks.0.to_q"] > 0


def test_what_is_in_another_basis_is_not_compared(tiny_artifact, source):
    model = load(tiny_artifact)
    nodes = {name: node for node, name in produced_sites(model.program.graph.nodes).items()}
    set_note(nodes["blocks.0.to_v"], basis="rotated and scaled")
    found = {error.name: error for error in check(model, source, timing_runs=0).sites}
    assert check(model, source, timing_runs=0, sites=False).sites == ()
    for name in ("blocks.0.to_v", "blocks.0:attention"):  # which passes values on
        assert "is rotated and scaled for what reads it" in found[name].why
    for name in ("blocks.0.to_k", "blocks.0.up", "blocks.1:attention"):
        assert found[name].sqnr_db


def test_heads_in_halves_are_the_order_of_lowering():
    value = torch.randn(5, 32)
    assert torch.equal(in_halves(value, 8), value[:, half_split(32, 8)])


def test_a_planted_fault_is_the_first_site_that_falls(tiny_artifact, source):
    model = load(tiny_artifact)
    (name,) = [n for n, _ in model.named_parameters() if "blocks.1.up" in n and "scale" in n]
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    result = check(model, source, timing_runs=0)
    low = [e.name for e in result.sites if e.sqnr_db and min(e.sqnr_db) < 15]
    assert low[0] == "blocks.1.up"
    assert worst_sites(result.sites, 3)[0][2] < 15


def test_free_running_error_begins_as_the_teacher_forced_one(tiny_artifact, source):
    steps = check(load(tiny_artifact), source, timing_runs=0).steps
    assert steps[0].free_error == pytest.approx(steps[0].relative_error, rel=1e-4)
    assert steps[-1].free_error is not None
    assert steps[-1].free_error > 0


def test_looking_changes_neither_results_nor_the_model(tiny_artifact, source):
    model, inputs = load(tiny_artifact), source.samples[0].inputs
    assert is_observable(model)
    assert not is_observable(source.model)
    seen = []
    with torch.no_grad():
        before = model(**inputs)
        with observed(model, lambda node, value, seconds: seen.append(node)):
            inside = model(**inputs)
        count = len(seen)
        after = model(**inputs)
    assert count == len(seen) > 20
    assert torch.equal(before, inside)
    assert torch.equal(before, after)
    assert site_times(model, inputs, 0, None) == ()


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 70000), (7, 200, 100, 64)])
def test_samples_are_whole_rows_within_the_limit(shape):
    value = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    found = sampled(value)
    assert found.ndim == 2
    assert found.numel() <= max(LIMIT, found.shape[1])
    assert found.shape[1] == (shape[-1] if shape else 1)
    assert len(set(found[:, 0].tolist())) == len(found)
