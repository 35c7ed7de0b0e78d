"""What is predicted of a model before it is compiled, and of an artifact, against what is there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vdqc
from vdqc import summary
from vdqc.base.diagnostics import Diagnostics
from vdqc.base.target import TARGETS
from vdqc.check import weight_bytes
from vdqc.compiler import as_source, parse_recipe
from vdqc.explain import Plan, explain, learning_calls
from vdqc.forecast import predicted_seconds
from vdqc.ir.sample import Sample
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
        ("quant", "w8a8-static"),
        ("quant", "w4a8-static-asym"),
        ("smooth{learn=true},rotate{learn=true},quant", "w4a8"),
        ("rotate", "w4a8"),
        ("rotate,smooth", "w4a8"),
        ("quant{select=blocks.0.up}", "w4a8"),
        ("smooth,quant{select=blocks.0.*}", "w8a8"),
        ("quant{select=nope}", "w4a8"),
        ("split{rank=4},quant", "w4a8"),
        ("split{rank=99},quant{select=*.up}", "w4a8"),
        ("quant,split{branch=oolri,rank=4}", "w4a8"),
        ("quant,split{branch=oolri,rank=4,learn=false}", "w4a8"),
        ("quant,split{branch=oolri,rank=4,placement=inner}", "w4a8"),
        ("quant{select=*.up},split{branch=oolri,rank=4,select=*.1.*}", "w4a8"),
        ("quant,split{branch=tqe}", "w4a8"),
        ("quant,split{branch=tqe,init=svd,gain=none}", "w4a8"),
    ],
)
def test_weights_are_exact(model_file: Path, tmp_path: Path, passes: str, scheme: str) -> None:
    plan = planned(model_file, passes, scheme)
    out = vdqc.compile(model_file, None, passes, scheme, "cpu", tmp_path / "out").path
    assert plan.forecast.weight_bytes == weight_bytes(vdqc.load(out))


@pytest.mark.parametrize("name", ["svdquant", "vidit_q"])
def test_weights_of_a_recipe_are_exact(model_file: Path, tmp_path: Path, name: str) -> None:
    plan = explain(
        as_source(model_file, None, None), parse_recipe(None, None, name), CPU, Diagnostics()
    )
    out = vdqc.compile(model_file, recipe=name, target="cpu", out=tmp_path / "out").path
    assert plan.forecast.weight_bytes == weight_bytes(vdqc.load(out))


@pytest.mark.parametrize("learning", ["", ",distill{epochs=1}"], ids=["started", "learned"])
def test_weights_are_exact_with_gains_of_frames(tmp_path: Path, learning: str) -> None:
    architecture = ARCHITECTURES["wan-t2v"]
    model, samples = architecture.build(), architecture.samples()
    passes = "quant,split{branch=tqe}" + learning
    plan = explain(
        as_source(model, samples, None), parse_recipe(passes, ["w4a8"]), CPU, Diagnostics()
    )
    out = tmp_path / "out"
    vdqc.compile(model, samples, passes, "w4a8", "cpu", out, verify=False)
    assert plan.forecast.weight_bytes == weight_bytes(vdqc.load(out))


def test_weights_in_half_precision_are_exact_with_a_branch(tmp_path: Path) -> None:
    model, passes = nn.Linear(64, 32).bfloat16(), "quant,split{branch=oolri,rank=4}"
    samples = [Sample({"input": torch.randn(4, 64).bfloat16()})]
    recipe, out = parse_recipe(passes, ["*=w4a8"]), tmp_path / "out"
    plan = explain(as_source(model, samples, None), recipe, CPU, Diagnostics())
    vdqc.compile(model, samples, passes, "w4a8", "cpu", out)
    assert plan.forecast.weight_bytes == weight_bytes(vdqc.load(out))


def test_a_plan_leaves_in_float_what_nothing_quantises(model_file: Path) -> None:
    kernels = {row.name: row.kernel for row in planned(model_file, "rotate", "w4a8").sites}
    assert set(kernels.values()) == {"aten"}
    rows = planned(model_file, "quant{select=*.up}", "w4a8").sites
    quantised = {row.name for row in rows if row.kernel not in ("aten", "attention")}
    assert quantised == {"blocks.0.up", "blocks.1.up"}
    assert {row.scheme for row in rows if row.name not in quantised} <= {"none", ""}


def test_a_row_of_a_plan_counts_its_branch(model_file: Path) -> None:
    passes = "quant{select=*.up},split{branch=oolri,rank=4}"
    rows = {row.name: row.bytes or 0 for row in planned(model_file, passes, "w4a8").sites}
    plain = planned(model_file, "quant{select=*.up}", "w4a8").sites
    more = {row.name: rows[row.name] - (row.bytes or 0) for row in plain}
    branch = 4 * 4 * (32 + 64)
    assert {name: extra for name, extra in more.items() if extra} == dict.fromkeys(
        ["blocks.0.up", "blocks.1.up"], branch
    )


@pytest.mark.parametrize("options", ["heads=calibrated", "heads=online", "scores=int8"])
def test_weights_are_exact_with_masks(tmp_path: Path, options: str) -> None:
    architecture = ARCHITECTURES["wan-t2v"]
    model, samples = architecture.build(), architecture.samples()
    passes = f"quant,sparsify{{density=0.7,block=4,{options}}}"
    recipe = parse_recipe(passes, ["w8a8"], None)
    plan = explain(as_source(model, samples, None), recipe, CPU, Diagnostics())
    assert plan.masks
    out = tmp_path / "out"
    made = vdqc.compile(model, samples, passes, "w8a8", "cpu", out, verify=False)
    assert plan.forecast.weight_bytes == weight_bytes(vdqc.load(out))
    kernels = {entry["site"]: entry["kernel"] for entry in made.manifest["kernels"]}
    assert {row.name: row.kernel for row in plan.sites} == kernels


@pytest.mark.parametrize(
    ("options", "of"), [("search=error,budget=3.5", "row"), ("method=layers,budget=3.5", "linear")]
)
def test_a_plan_says_what_only_compiling_decides(model_file: Path, options: str, of: str) -> None:
    plan = planned(model_file, f"allocate{{{options}}},quant", "w4a8")
    (entry,) = plan.undecided
    assert entry[0] == f"allocate{{{options}}}"
    assert f"decided at compile time: the bits of each {of}, by the error" in summary.planned(plan)
    assert plan.to_json()["undecided"] == dict(plan.undecided)
    assert not planned(model_file, "quant", "w4a8").undecided


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


def test_an_artifact_for_a_gpu_is_priced_as_it_was_planned(
    model_file: Path, tmp_path: Path
) -> None:
    made = vdqc.compile(model_file, None, "quant", "w8a8", "sm90", tmp_path / "out")
    found = predicted_seconds(made.manifest)
    for entry in made.manifest["kernels"]:
        assert found[entry["site"]] == pytest.approx(entry["predicted_us"] * 1e-6)


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
