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
from vdqc.ir.site import SiteKind, set_note
from vdqc.passes.quant import Quant
from vdqc.testing.harness import AdaLNBlock, annotated, run


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
    for group, moments in found:
        assert moments.drift is None
        for site in group:
            assert relative_error(moments.second, expected[site.name]) < 1e-12


def test_later_moments_see_earlier_weights(case: tuple[Graph, list[Sample]]) -> None:
    graph, samples = case
    walk = input_moments(graph, samples, graph.groups(), rewritten=True)
    for group, moments in walk:
        for site in group:
            name = str(site.weight.target)
            graph.set_param(name, graph.param(name) * 0.5)
        if "blocks.1" in group[0].name:
            seen = moments.second, group[0].name
            break
    assert relative_error(seen[0], observed(graph, samples)[seen[1]]) < 1e-12


def rows(graph: Graph, samples: list[Sample], name: str) -> Tensor:
    """float[tokens, K] that a site reads, of all samples."""
    found: list[Tensor] = []
    wanted = graph.site(name).input
    for sample in samples:

        def look(node: object, value: Tensor) -> None:
            if node is wanted:
                found.append(value.reshape(-1, value.shape[-1]))

        graph.run_inputs(graph.signature.bind((), sample.inputs), look)
    return torch.cat(found)


def test_the_drift_is_from_the_float_program_to_what_all_weights_before_make(
    case: tuple[Graph, list[Sample]],
) -> None:
    graph, samples = case
    meant = {
        site.name: rows(graph, samples, site.name) for site in graph.sites(kind=SiteKind.LINEAR)
    }
    for site in graph.sites(kind=SiteKind.LINEAR):
        set_note(site.node, scheme="w3a4")
    run(graph, Quant())
    told: list[str] = []
    walk = input_moments(graph, samples, graph.groups(), rewritten=True, drift=True)
    for group, moments in walk:
        x = rows(graph, samples, group[0].name)  # by the weights as they are by now
        assert moments.drift is not None
        expected = (meant[group[0].name] - x).T @ x / len(x)
        assert relative_error(moments.second, x.T @ x / len(x)) < 1e-12
        assert relative_error(moments.drift, expected) < 1e-10
        told += [site.name for site in group]
        for site in group:  # the way that gptq does it: the quantiser reads another weight
            halved = graph.set_param(f"{site.name}.halved", graph.evaluate(site.weight) * 0.5)
            graph.set_operand(site.node, 1, halved)
    assert set(told) == set(meant)


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
