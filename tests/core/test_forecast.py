"""What is predicted of a model before it is compiled, and of an artifact, against what is there."""

from pathlib import Path
from typing import Any

import pytest

import vdqc
from vdqc.base.diagnostics import Diagnostics
from vdqc.base.target import TARGETS
from vdqc.check import weight_bytes
from vdqc.compiler import as_source, parse_recipe
from vdqc.explain import Plan, explain, learning_calls
from vdqc.forecast import predicted_seconds
from vdqc.testing.architectures import ARCHITECTURES

CPU = TARGETS["cpu"]


def planned(model: Path, passes: str, scheme: str) -> Plan:
    recipe = parse_recipe(passes, [scheme], None)
    return explain(as_source(model, None, None), recipe, CPU, Diagnostics())


@pytest.mark.parametrize(
    ("passes", "scheme"),
    [
        ("quant", "w8a8"),
        ("quant", "none"),
        ("rotate,quant", "w4a8"),
        ("rotate,smooth,quant", "w4a4-asym"),
        ("smooth,quant", "w4a8-g16"),
        ("quant", "w3a16"),
    ],
)
def test_weights_are_exact(model_file: Path, tmp_path: Path, passes: str, scheme: str) -> None:
    plan = planned(model_file, passes, scheme)
    out = vdqc.compile(model_file, None, passes, scheme, "cpu", tmp_path / "out").path
    assert plan.forecast.weight_bytes == weight_bytes(vdqc.load(out))


@pytest.mark.parametrize("heads", ["calibrated", "online"])
def test_weights_are_exact_with_masks(tmp_path: Path, heads: str) -> None:
    architecture = ARCHITECTURES["wan-t2v"]
    model, samples = architecture.build(), architecture.samples()
    passes = f"quant,sparsify{{density=0.7,block=4,heads={heads}}}"
    recipe = parse_recipe(passes, ["w8a8"], None)
    plan = explain(as_source(model, samples, None), recipe, CPU, Diagnostics())
    assert plan.masks
    out = tmp_path / "out"
    vdqc.compile(model, samples, passes, "w8a8", "cpu", out, verify=False)
    assert plan.forecast.weight_bytes == weight_bytes(vdqc.load(out))


def test_a_forecast_has_all_parts(model_file: Path) -> None:
    plan = planned(model_file, "rotate,smooth,quant", "w8a8")
    forecast = plan.forecast
    assert plan.predicted_us == forecast.sites_us + forecast.between_us
    assert forecast.sites_us == pytest.approx(sum(r.predicted_us or 0.0 for r in plan.sites))
    assert forecast.between_us > 0
    assert forecast.memory_bytes > forecast.weight_bytes
    assert forecast.compile_seconds > 0


def test_an_artifact_is_priced_site_by_site(tiny_artifact: Path) -> None:
    manifest: dict[str, Any] = dict(vdqc.ir.artifact.read(tiny_artifact).manifest)
    found = predicted_seconds(manifest)
    assert found.keys() == {"", *(entry["site"] for entry in manifest["kernels"])}
    assert min(found.values()) > 0


def test_learning_takes_the_samples_that_select_leaves() -> None:
    def calls(passes: str) -> float:
        return learning_calls(parse_recipe(passes, None, None), 40)

    assert calls("quant") == 0
    assert calls("smooth,quant") == 40
    assert calls("quant,gptq{sequential=false}") == 40
    assert calls("quant,gptq") == 80
    assert calls("quant,gptq{propagate=0.5}") == 120
    assert calls("select{count=10},smooth,quant") == calls("smooth,quant") / 4
    assert calls("smooth,quant,distill{epochs=3}") > 3 * 3 * 40
