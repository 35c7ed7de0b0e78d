import pytest
import torch
from torch import nn

from vdqc.base.diagnostics import InputError
from vdqc.engine.calibrate import activation_stats, observe
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.testing.harness import captured


class Net(nn.Module):
    """A convolution, then two linears that share an input."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv1d(8, 8, 1)
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.patch(x.transpose(1, 2)).transpose(1, 2) * 2
        return self.left(h) + self.right(h)


@pytest.fixture
def model() -> Net:
    return Net().eval()


@pytest.fixture
def graph(model: Net) -> Graph:
    return captured(model, torch.randn(2, 5, 8))


def entering(model: Net, x: torch.Tensor) -> torch.Tensor:
    return (model.patch(x.transpose(1, 2)).transpose(1, 2) * 2).detach()


def test_ranges_are_those_of_all_samples_together(model: Net, graph: Graph) -> None:
    inputs = [torch.randn(2, 5, 8), torch.randn(4, 5, 8) * 3]
    stats = activation_stats(graph, [Sample({"x": x}) for x in inputs])
    rows = torch.cat([entering(model, x).reshape(-1, 8) for x in inputs])
    assert set(stats.sites) == {"left", "right"}  # convolutions are not observed
    for seen in stats.sites.values():
        assert torch.equal(seen.low, rows.amin(0))
        assert torch.equal(seen.high, rows.amax(0))
        assert torch.equal(seen.absmax, rows.abs().amax(0))
        assert seen.tokens == 30
        assert seen.values.numel() == 0


def test_the_reservoir_is_bounded_and_even(graph: Graph) -> None:
    site = graph.site("left")
    # 63 calm calls and one that is loud: it must fill a 64th of the reservoir, first or last
    for loud in (0, 63):
        samples = [
            Sample({"x": torch.randn(4, 5, 8) + (1000 if i == loud else 0)}) for i in range(64)
        ]
        seen = observe(graph, samples, {site.input: ["left"]}, reservoir=1024).sites["left"]
        assert seen.values.numel() == 1024
        calm = seen.absmax.max() / 10
        assert 2 <= int((seen.values.abs() > calm).sum()) <= 40


def test_few_values_are_all_kept(model: Net, graph: Graph) -> None:
    x = torch.randn(2, 5, 8)
    nodes = {graph.site("left").input: ["left"]}
    values = observe(graph, [Sample({"x": x})], nodes, reservoir=4096).sites["left"].values
    assert torch.equal(values, entering(model, x).flatten())


def test_what_is_not_finite_names_the_site(graph: Graph) -> None:
    bad = torch.randn(2, 5, 8)
    bad[1, 2, 3] = float("nan")
    with pytest.raises(InputError, match=r"left: the input holds NaN or infinity  \[not-finite\]"):
        activation_stats(graph, [Sample({"x": bad})])


def test_no_samples_are_refused(graph: Graph) -> None:
    with pytest.raises(InputError, match="expected at least one sample"):
        activation_stats(graph, [])
