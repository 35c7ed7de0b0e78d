import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import numerics
from vdqc.base.diagnostics import ConfigError
from vdqc.base.scheme import QuantSpec
from vdqc.engine.calibrate import SiteStats
from vdqc.engine.pass_manager import Context
from vdqc.engine.recipe import parse_passes
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.passes.calibrate import Calibrate, Method
from vdqc.passes.quant import Quant
from vdqc.passes.table import PASSES
from vdqc.testing.harness import annotated, context, remarks, run, tensors


class Two(nn.Module):
    """Two linears in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def compressed(model: nn.Module, x: Tensor, scheme: str, seen: bool = True) -> Graph:
    graph = annotated(model, x, scheme=scheme)
    run(graph, Quant(), ctx=context(x, model=model) if seen else Context())
    return graph


def samples(*inputs: Tensor) -> Context:
    return Context(samples=[Sample({"x": x}) for x in inputs])


def test_ranges_are_those_of_the_float_values() -> None:
    model, x = Two().eval(), torch.randn(64, 16)
    graph = compressed(model, x, "w8a8-static", seen=False)  # guesses that would clip everything
    text = str(graph)
    (record,) = run(graph, Calibrate(Method.ABSMAX), ctx=samples(x, 3 * x))
    assert str(graph) == text  # parameters are rebound, no node moves
    hidden = torch.relu(nn.functional.linear(3 * x, *_quantised(graph, "up", model)))
    assert float(graph.param("up.input_scale")) == pytest.approx(float((3 * x).abs().max()) / 127)
    assert float(graph.param("down.input_scale")) == pytest.approx(
        float(hidden.max()) / 127, rel=1e-5
    )
    chosen = record.facts["inputs"]["up"]
    assert chosen["high"] == pytest.approx(float((3 * x).max()))
    assert chosen["sqnr_db"] > 30
    assert record.rewrites == 2


def _quantised(graph: Graph, site: str, model: Two) -> tuple[Tensor, Tensor]:
    return graph.evaluate(graph.site(site).weight), model.up.bias.detach()


def test_leaves_dynamic_ranges_alone() -> None:
    model, x = Two(), torch.randn(8, 16)
    graph = compressed(model, x, "w8a8")
    before = {name: graph.param(name) for name in graph.param_names()}
    ctx = samples(x)
    (record,) = run(graph, Calibrate(), ctx=ctx)
    assert record.rewrites == 0
    assert remarks(ctx) == [("", "dynamic-range")]
    assert "2 inputs find their range at run time" in str(next(iter(ctx.diagnostics)))
    assert all(torch.equal(graph.param(name), value) for name, value in before.items())


def test_only_selected_sites_are_calibrated() -> None:
    model, x = Two(), torch.randn(8, 16)
    graph = compressed(model, x, "w8a8-static", seen=False)
    run(graph, Calibrate(select="down"), ctx=samples(x))
    assert float(graph.param("up.input_scale")) == pytest.approx(1 / 127)
    assert float(graph.param("down.input_scale")) != pytest.approx(1 / 127)


def test_weights_are_searched_when_asked() -> None:
    model, x = Two(), torch.randn(8, 16)
    graph = compressed(model, x, "w3a8")
    spec = QuantSpec.parse("int3/channel")

    def error() -> float:
        quantised = graph.evaluate(graph.site("down").weight)
        return numerics.relative_error(quantised, model.down.weight)

    before, scale = error(), graph.param("down.weight_scale")
    run(graph, Calibrate(weights=True), ctx=samples(x))
    assert error() < before
    assert bool((graph.param("down.weight_scale") <= scale).all())
    assert spec.qmax == 3


def test_searched_scales_of_groups_stay_whole_multiples() -> None:
    model, x = Two(), torch.randn(8, 16)
    graph = compressed(model, x, "w4a8-g4")
    run(graph, Calibrate(weights=True), ctx=samples(x))
    for site in graph.sites():
        scale = graph.param(f"{site.name}.weight_scale")
        multiples = scale / (scale.amax(-1, keepdim=True) / 18)  # 127 // 7
        torch.testing.assert_close(multiples, multiples.round(), rtol=1e-5, atol=1e-5)


def test_asymmetric_zero_points_are_rebound() -> None:
    model, x = Two(), torch.rand(64, 16) + 1.0
    graph = compressed(model, x, "w8a8-aasym-static", seen=False)
    (record,) = run(graph, Calibrate(Method.ABSMAX), ctx=samples(x))
    assert float(graph.param("up.input_zero_point")) == 0.0
    assert float(graph.param("up.input_scale")) == pytest.approx(float(x.max()) / 255)
    assert record.facts["inputs"]["up"]["seen_low"] == pytest.approx(float(x.min()))


@given(tensors(1, 2048), st.sampled_from(["int4/tensor", "int8/tensor", "int4/tensor/asym"]))
def test_mse_is_never_worse_than_absmax(values: Tensor, text: str) -> None:
    spec = QuantSpec.parse(text)
    flat = values.flatten()
    seen = SiteStats(flat.amin()[None], flat.amax()[None], 1, flat)

    def error(method: Method) -> float:
        scale, zero_point = numerics.scale_from_range(*Calibrate(method).choose(seen, spec), spec)
        return float((numerics.fake_quantize(flat, scale, zero_point, spec) - flat).square().sum())

    # the ends count twice in the search, so that a reservoir that missed them still weighs them
    ends = float(flat.amin().square() + flat.amax().square()) / 4
    assert error(Method.MSE) <= error(Method.ABSMAX) + ends


def test_methods_order_by_how_much_they_clip() -> None:
    values = torch.randn(50_000)
    values[0] = 30.0
    seen = SiteStats(values.amin()[None], values.amax()[None], 1, values)
    spec = QuantSpec.parse("int4/tensor")
    highs = [
        float(Calibrate(method, percentile=99.99).choose(seen, spec)[1])
        for method in (Method.ABSMAX, Method.PERCENTILE, Method.MSE)
    ]
    assert highs[0] == 30.0
    assert 3.0 < highs[1] < 5.0
    assert highs[2] < 15.0


def test_options() -> None:
    text = "calibrate{method=percentile,percentile=99.9,weights=true}"
    assert str(parse_passes(text, PASSES)[0]) == text
    with pytest.raises(ConfigError, match=r"calibrate.percentile: expected above 50"):
        parse_passes("calibrate{percentile=20}", PASSES)
