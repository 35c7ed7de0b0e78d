"""Whole pass lists on a real architecture, and how their error behaves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.engine.pass_manager import Context, PassManager, PassRecord
from vdqc.engine.recipe import Recipe
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.site import SiteKind, set_note
from vdqc.passes.table import PASSES
from vdqc.testing.architectures import ARCHITECTURES
from vdqc.testing.harness import annotated, assert_close, context, models, run

DTYPE = torch.float32  # Wan's norms and modulation compute in float32 whatever its weights are


@pytest.fixture(scope="module")
def wan() -> Graph:
    architecture = ARCHITECTURES["wan-t2v"]
    return capture(architecture.build(dtype=DTYPE), architecture.samples(DTYPE))


def compiled(graph: Graph, passes: str, scheme: str) -> tuple[Graph, list[PassRecord]]:
    twin = graph.clone()
    samples = ARCHITECTURES["wan-t2v"].samples(DTYPE)
    recipe = Recipe.parse(passes, PASSES, [scheme])
    ctx = Context(samples=samples, rules=recipe.rules)
    return twin, PassManager(recipe.passes).run(twin, ctx)


RECIPES = [
    ("canonicalize,annotate,rotate,smooth,quant,fold", "w8a8", 30.0),
    ("canonicalize,annotate,smooth,fold,rotate{block=16},quant,fold", "w4a8-g16", 18.0),
    ("canonicalize,annotate,rotate{block=full},smooth,fold,quant,fold", "w3a6-asym", 8.0),
    ("canonicalize,annotate,rotate,quant,calibrate,fold", "w8a8-static", 28.0),
]


@pytest.mark.parametrize(("passes", "scheme", "least"), RECIPES)
def test_recipes_on_wan(wan: Graph, passes: str, scheme: str, least: float) -> None:
    graph, records = compiled(wan, passes, scheme)
    assert graph.stage is Stage.COMPRESSED
    for record in records:
        if record.exact:
            assert record.error is not None
            assert record.error < 2e-6, record.text
    sqnr = records[-1].sqnr_db
    assert sqnr is not None
    assert sqnr > least
    quantised = [record.facts["sites"] for record in records if "sites" in record.facts]
    weights = [name for name in graph.param_names() if name.endswith("weight_scale")]
    assert len(weights) == len(quantised[0])


def test_exact_passes_hold_at_another_size(wan: Graph) -> None:
    graph, _ = compiled(wan, "canonicalize,annotate,smooth,rotate{block=8},fold", "w8a8")
    for inputs in ARCHITECTURES["wan-t2v"].variants(DTYPE).values():
        for after, before in zip(graph.run(**inputs), wan.run(**inputs), strict=True):
            assert_close(after, before)


def sqnr_of(graph: Graph, ctx: Context, passes: str, scheme: str) -> float:
    twin = graph.clone()
    for site in twin.sites(kind=SiteKind.LINEAR):
        set_note(site.node, scheme=scheme)
    records = run(twin, *Recipe.parse(passes, PASSES).passes, ctx=ctx)
    sqnr = records[-1].sqnr_db
    assert sqnr is not None
    return sqnr


@settings(max_examples=2)
@given(models(), st.sampled_from(["rotate,smooth,quant,fold", "smooth,fold,rotate,quant"]))
def test_fidelity_rises_with_bits(case: tuple[nn.Module, list[Tensor]], passes: str) -> None:
    model, inputs = case
    graph, ctx = annotated(model, *inputs), context(*inputs, model=model)
    by_bits = [
        sqnr_of(graph, ctx, passes, f"w{w}a{a}") for w, a in ((2, 4), (4, 4), (4, 8), (8, 8))
    ]
    assert by_bits == sorted(by_bits)
    assert by_bits[-1] > 30


def test_rotation_and_smoothing_pay_on_outliers() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(32, 64)
    x[:, 7] *= 80
    with torch.no_grad():  # as in trained models: the channel is loud, what reads it is calm
        model[0].weight[:, 7] /= 80
    graph, ctx = annotated(model, x), context(x, model=model)
    plain = sqnr_of(graph, ctx, "quant", "w8a4")
    assert sqnr_of(graph, ctx, "rotate,quant", "w8a4") > plain + 3
    assert sqnr_of(graph, ctx, "smooth,quant", "w8a4") > plain + 3
