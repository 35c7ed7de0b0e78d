from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import relative_error
from vdqc.engine.moments import input_moments
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind
from vdqc.testing.harness import AdaLNBlock, annotated


class Stack(nn.Module):
    """Two blocks that share a condition, and a linear in front of each other's input."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(AdaLNBlock(16, 2) for _ in range(2))
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.condition(y)
        for block in self.blocks:
            x = block(x, y)
        return self.last(x) + self.last(torch.relu(x))


@pytest.fixture
def case() -> tuple[Graph, list[Sample]]:
    torch.manual_seed(0)
    model = Stack().double().eval()
    x, y = torch.randn(2, 6, 16).double(), torch.randn(2, 8).double()
    graph = annotated(model, x, y)
    return graph, [Sample({"x": x * s, "y": y}) for s in (1.0, 2.0, -1.0)]


def observed(graph: Graph, samples: list[Sample]) -> dict[str, Tensor]:
    """The moments by one plain run of everything."""
    rows: dict[str, list[Tensor]] = {}
    sites = graph.sites(kind=SiteKind.LINEAR)
    for sample in samples:

        def look(node: object, value: Tensor) -> None:
            for site in sites:
                if site.input is node:
                    rows.setdefault(site.name, []).append(value.reshape(-1, value.shape[-1]))

        graph.run_inputs(graph.signature.bind((), sample.inputs), look)
    return {name: torch.cat(r).T @ torch.cat(r) / len(torch.cat(r)) for name, r in rows.items()}


@pytest.mark.parametrize("rewritten", [False, True])
def test_moments_are_those_of_all_samples(
    case: tuple[Graph, list[Sample]], rewritten: bool
) -> None:
    graph, samples = case
    expected = observed(graph, samples)
    found = list(input_moments(graph, samples, graph.groups(), rewritten=rewritten))
    assert {site.name for group, _ in found for site in group} == set(expected)
    for group, moment in found:
        for site in group:
            assert relative_error(moment, expected[site.name]) < 1e-12


def test_later_moments_see_earlier_weights(case: tuple[Graph, list[Sample]]) -> None:
    graph, samples = case
    walk = input_moments(graph, samples, graph.groups(), rewritten=True)
    for group, moment in walk:
        for site in group:
            name = str(site.weight.target)
            graph.set_param(name, graph.param(name) * 0.5)
        if "blocks.1" in group[0].name:
            seen = moment, group[0].name
            break
    assert relative_error(seen[0], observed(graph, samples)[seen[1]]) < 1e-12


def test_every_node_runs_once_a_sample(
    case: tuple[Graph, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, samples = case
    ran: Counter[object] = Counter()

    def counted(node: Any, op: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            ran[node] += 1
            return op(*args, **kwargs)

        return call

    for node in graph.nodes:
        if node.op == "call_function":
            monkeypatch.setattr(node, "target", counted(node, node.target))
    list(input_moments(graph, samples, graph.groups()))
    assert max(ran.values()) == len(samples)


def test_a_selection_and_bad_samples(case: tuple[Graph, list[Sample]]) -> None:
    graph, samples = case
    (only,) = input_moments(graph, samples, graph.groups("last"))
    assert [site.name for site in only[0]] == ["last"]
    with pytest.raises(InputError, match="at least one sample"):
        next(input_moments(graph, [], graph.groups()))
    samples[1].inputs["x"][0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"blocks\.0\.to_q: the input holds NaN"):
        list(input_moments(graph, samples, graph.groups("blocks.*")))
