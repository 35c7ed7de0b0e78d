from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import numerics
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.scheme import QuantScheme
from vdqc.engine.block_module import boundary_key
from vdqc.engine.recipe import parse_passes
from vdqc.ir.graph import Graph
from vdqc.ir.site import SiteKind
from vdqc.passes.allocate import Allocate, Choice, Method, Search
from vdqc.passes.quant import Quant
from vdqc.passes.smooth import Smooth
from vdqc.passes.table import PASSES
from vdqc.testing.harness import (
    annotated,
    assert_equivalent,
    assert_ir,
    context,
    models,
    remarks,
    run,
)

PLANES = Allocate(method=Method.PLANES)


class One(nn.Module):
    """One linear, some rows of which have heavy tails."""

    def __init__(self, width: int = 64, rows: int = 40, seed: int = 0, spikes: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(width, rows)
        nn.init.normal_(self.fc.weight)
        with torch.no_grad():
            spiked = torch.randperm(rows)[: rows // 4]
            self.fc.weight[spiked, spiked % width] += spikes

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def allocated(model: nn.Module, x: Tensor, scheme: str, *passes: Any) -> tuple[Graph, Any]:
    graph = annotated(model, x, scheme=scheme)
    records = run(graph, *passes, ctx=context(x, model=model, scheme=scheme))
    return graph, records


def mean_bits(graph: Graph) -> float:
    """Mean nominal bits over all weights."""
    bits = counts = 0
    for site in graph.sites(kind=SiteKind.LINEAR):
        assert site.scheme is not None
        assert site.scheme.weight is not None
        numel = site.weight.meta["val"].numel()
        bits += site.scheme.weight.bits * numel
        counts += numel
    return bits / counts


def test_rows_of_one_width_are_a_linear_of_their_own() -> None:
    model, x = One(4, 10, spikes=9.0), torch.randn(30, 4)
    graph, (record,) = allocated(model, x, "w3a8", Allocate(largest=1))
    assert_ir(
        graph,
        """
        graph (%x: f32[s0, 4]) @annotated {
          %0 = aten.index_select(@fc.weight, 0, @fc.w2.rows) : f32[1, 4]
          %1 = aten.index_select(@fc.bias, 0, @fc.w2.rows) : f32[1]
          %2 = aten.linear(%x, %0, %1) : f32[s0, 1]  # site fc.w2 w2a8
          %3 = aten.index_select(@fc.weight, 0, @fc.w3.rows) : f32[8, 4]
          %4 = aten.index_select(@fc.bias, 0, @fc.w3.rows) : f32[8]
          %5 = aten.linear(%x, %3, %4) : f32[s0, 8]  # site fc.w3 w3a8
          %6 = aten.index_select(@fc.weight, 0, @fc.w4.rows) : f32[1, 4]
          %7 = aten.index_select(@fc.bias, 0, @fc.w4.rows) : f32[1]
          %8 = aten.linear(%x, %6, %7) : f32[s0, 1]  # site fc.w4 w4a8
          %9 = aten.cat([%2, %5, %8], 1) : f32[s0, 10]
          %10 = aten.index_select(%9, 1, @fc.row_order) : f32[s0, 10]
          return [%10]
        }
        """,
    )
    facts = record.facts["allocated"]["fc"]
    assert facts["rows"] == {"w2a8": 1, "w3a8": 8, "w4a8": 1}
    assert (facts["mean_bits"], facts["tenths_moved"]) == (3.0, 1)
    assert facts["effective_bits"] == pytest.approx(8 * (1 + 8 * 2 + 2 + 40) / 40, abs=1e-3)
    assert boundary_key(graph.output.all_input_nodes[0]) == "fc"


@settings(max_examples=6)
@given(models(), st.sampled_from(list(Method)), st.sampled_from(list(Search)), st.booleans())
def test_allocation_is_exact(
    case: tuple[nn.Module, list[Tensor]], method: Method, search: Search, by_row: bool
) -> None:
    model, inputs = case
    if method is Method.LAYERS:
        search = Search.KURTOSIS
    by_row &= method is Method.PLANES
    item = Allocate(method, search, Choice.ROW if by_row else Choice.LAYER)
    assert_equivalent(model, inputs, Smooth(), item, scheme="w3a6")


@settings(max_examples=8)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["w2a8-asym", "w3a8", "w4a8-g16"]),
    st.sampled_from([Allocate(), *(Allocate(Method.PLANES, choice=each) for each in Choice)]),
)
def test_rows_are_a_permutation_and_the_mean_is_the_schemes(
    seed: int, scheme: str, item: Allocate
) -> None:
    model, x = One(seed=seed, spikes=6.0), torch.randn(100, 64)
    graph, (record,) = allocated(model, x, scheme, item)
    names = [name for name in graph.param_names() if name.endswith(".rows")]
    if names:
        rows = torch.cat([graph.param(name) for name in names])
        assert rows.sort().values.tolist() == list(range(40))
    expected = QuantScheme.parse(scheme).weight
    assert expected is not None
    assert mean_bits(graph) == expected.bits
    assert record.facts["allocated"]["fc"]["error_to_uniform"] <= 1


@pytest.mark.parametrize("scheme", ["w3a16-asym", "w4a16", "w4a8-g32"])
def test_outlier_rows_gain_at_equal_bits(scheme: str) -> None:
    """Output error of a mixed weight to one of N bits everywhere; N is the mean of both."""
    ratios = []
    for seed in range(4):
        model, x = One(128, 80, seed, spikes=16.0), torch.randn(300, 128)
        expected = model(x).detach()
        errors = []
        for passes in ([Quant()], [Allocate(), Quant()], [PLANES, Quant()]):
            graph, _ = allocated(model, x, scheme, *passes)
            errors.append(numerics.relative_error(graph.run(x)[0], expected))
            assert mean_bits(graph) == int(scheme[1])
        uniform, rows, planes = errors
        ratios.append(rows / uniform)
        assert planes < rows * 1.001
    assert max(ratios) < 0.9


def test_planes_win_at_two_bits_with_outliers() -> None:
    for seed in range(3):
        model, x = One(128, 80, seed), torch.randn(300, 128)
        with torch.no_grad():
            model.fc.weight[:, 7] = 12
        _, (rows,) = allocated(model, x, "w2a16-asym", Allocate())
        graph, (planes,) = allocated(model, x, "w2a16-asym", PLANES)
        _, (mixed,) = allocated(model, x, "w2a16-asym", Allocate(Method.PLANES, choice=Choice.ROW))
        ratios = [r.facts["allocated"]["fc"]["error_to_uniform"] for r in (rows, planes, mixed)]
        assert ratios[1] < 0.7 * ratios[0]
        assert any("+" in str(site.scheme) for site in graph.sites())
        assert ratios[2] <= 1


@given(st.floats(2.0, 4.0))
@settings(max_examples=6)
def test_a_budget_of_rows_is_kept(budget: float) -> None:
    model, x = One(spikes=8.0), torch.randn(100, 64)
    item = Allocate(search=Search.ERROR, budget=budget)
    graph, (record,) = allocated(model, x, "w3a8", item)
    assert budget - 1 / 40 - 1e-6 <= mean_bits(graph) <= budget + 1e-6
    assert record.facts["allocated"]["fc"]["mean_bits"] == pytest.approx(mean_bits(graph), abs=1e-4)


def test_buying_by_error_beats_the_split_by_kurtosis() -> None:
    model, x = One(128, 80, spikes=16.0), torch.randn(300, 128)
    ratios = [
        allocated(model, x, "w3a16-asym", item)[1][0].facts["allocated"]["fc"]["error_to_uniform"]
        for item in (Allocate(), Allocate(search=Search.ERROR))
    ]
    assert ratios[1] < ratios[0] < 1


class Stack(nn.Module):
    """Linears of which the second is hard to quantise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        with torch.no_grad():
            self.b.weight[:, 3] *= 6  # of an input that hardly ever is there
            self.a.weight[3] *= 0.001
            self.a.bias[3] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("budget", [None, 3.0, 4.4])
def test_layers_share_a_budget(budget: float | None) -> None:
    model, x = Stack(), torch.randn(100, 32)
    graph, (record,) = allocated(model, x, "w4a16", Allocate(Method.LAYERS, budget=budget))
    assert mean_bits(graph) <= (budget or 4) + 1e-9
    assert record.facts["mean_bits"] == pytest.approx(mean_bits(graph), abs=1e-3)
    widths = {name: facts["bits"] for name, facts in record.facts["allocated"].items()}
    assert widths["b"] == max(widths.values()) > min(widths.values())
    if budget is None:
        expected = model(x).detach()
        mixed, _ = allocated(model, x, "w4a16", Allocate(Method.LAYERS), Quant())
        uniform, _ = allocated(model, x, "w4a16", Quant())
        errors = [numerics.relative_error(g.run(x)[0], expected) for g in (mixed, uniform)]
        assert errors[0] < errors[1]


def test_bad_budgets_and_widths() -> None:
    model, x = One(), torch.randn(30, 64)
    cases: list[tuple[str, Allocate, str]] = [
        ("w3a8", Allocate(search=Search.ERROR, budget=1.5), "fc: expected a budget of at least 2"),
        ("w4a8", Allocate(Method.LAYERS, budget=1.0), "expected a budget of at least 2 bits"),
        ("w2a8", Allocate(), "fc: rows of w2a8 would get one bit, which needs a zero point"),
        ("w8a8", Allocate(), "fc: rows of w8a8 would get 9 bits"),
    ]
    for scheme, item, message in cases:
        with pytest.raises(InputError, match=message):
            allocated(model, x, scheme, item)
    for text in ("allocate{budget=3}", "allocate{largest=6}", "allocate{low=5,high=3}"):
        with pytest.raises(ConfigError, match="allocate"):
            parse_passes(text, PASSES)
    text = "allocate{method=planes,search=error,budget=3.5}"
    assert str(parse_passes(text, PASSES)[0]) == text


def test_what_is_left_alone() -> None:
    model, x = One(spikes=8.0), torch.randn(30, 64)
    graph = annotated(model, x, scheme="fp8")
    ctx = context(x, model=model)
    run(graph, Allocate(), ctx=ctx)
    assert remarks(ctx) == [("fc", "not-allocated")]
    graph = annotated(model, x, scheme="w3a8")
    ctx = context(x, model=model)
    run(graph, Allocate(), ctx=ctx)
    before = str(graph)
    run(graph, Allocate(), ctx=ctx)
    assert str(graph) == before
    assert set(remarks(ctx)) == {(f"fc.w{bits}", "already-allocated") for bits in (2, 3, 4)}
    graph = annotated(model, x, scheme="w3a8")
    ctx = context()
    run(graph, Allocate(), ctx=ctx)
    assert remarks(ctx) == [("", "no-samples")]
    assert len(graph.sites()) == 3
