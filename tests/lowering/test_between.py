"""What runs between the sites: what it costs, what is alive, and for which call."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vdqc.base.target import TARGETS
from vdqc.ir.frontend import capture
from vdqc.ir.sample import Sample
from vdqc.kernels.base import NOTHING, Cost
from vdqc.lowering.between import LOOP_US, between_sites, live_bytes
from vdqc.lowering.machine import measured
from vdqc.lowering.rules import hint, sized_like
from vdqc.testing.harness import annotated, captured

CPU, GPU = TARGETS["cpu"], TARGETS["sm90"]


class Chain(nn.Module):
    """A linear, what ``between`` does, a linear."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


def cost(between: Any, tokens: int = 64) -> Cost:
    return between_sites(annotated(Chain(between), torch.randn(2, tokens, 8)))


def test_two_linears_have_nothing_between() -> None:
    assert cost(lambda x: x) == NOTHING


def test_a_chain_of_light_ops_is_one_loop() -> None:
    one, three = cost(lambda x: x + 1), cost(lambda x: ((x + 1) * 2) - 3)
    values = 2 * 64 * 8
    assert one == Cost({"pointwise": values}, 2.0 * 4 * values, LOOP_US, 0.0)
    assert three == Cost({"pointwise": 3.0 * values}, one.bytes, LOOP_US, 0.0)


def test_views_are_free() -> None:
    assert cost(lambda x: x.unflatten(-1, (2, 4)).transpose(1, 2).transpose(1, 2).flatten(2)) == (
        NOTHING
    )


def test_heavy_ops_and_norms_count_more() -> None:
    light, heavy = cost(lambda x: x + 1), cost(F.silu)
    norm = cost(lambda x: F.layer_norm(x, (8,)))
    assert light.ops["pointwise"] < norm.ops["pointwise"] < heavy.ops["pointwise"]


@pytest.mark.parametrize(
    ("equation", "products"),
    [
        ("bnd,bmd->bnm", 2 * 64 * 64 * 8),
        ("...nd,...nd->...n", 2 * 64 * 8),
        ("bnd,bnd->", 2 * 64 * 8),
    ],
)
def test_products_of_einsum(equation: str, products: int) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum(equation, x, x)

    found = between_sites(captured(Model(), torch.randn(2, 64, 8)))
    assert found.ops["fp32"] == 2 * products


def test_a_value_with_readers_on_both_sides_of_a_site_stays_alive() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return x + self.second(F.silu(x))

    x = torch.randn(2, 64, 8)
    kept = live_bytes(annotated(Residual(), x))
    plain = live_bytes(annotated(Chain(F.silu), x))
    assert kept == plain + x.nbytes


def test_sizes_are_those_of_the_call_that_is_named() -> None:
    model, small, large = Chain(F.silu), torch.randn(1, 16, 8), torch.randn(2, 48, 8)
    graph = capture(model, [Sample({"x": small}), Sample({"x": large})])
    size = graph.inputs[0].meta["val"].shape[1]
    found = {}
    for name, x in (("small", small), ("large", large)):
        with sized_like(graph, {"x": x}):
            assert hint(size) == x.shape[1]
            found[name] = between_sites(graph).bytes
    assert found["large"] > 5 * found["small"]


def test_a_cpu_adds_what_a_gpu_overlaps() -> None:
    work = Cost({"int8": 1e9}, 1e6, 3.0)
    alone = [Cost({"int8": 1e9}, 0.0, calls=0.0), Cost({}, 1e6, calls=0.0)]
    for target, both in ((CPU, sum), (GPU, max)):
        times = both(part.us(target) for part in alone)
        assert work.us(target) == pytest.approx(target.call_us + 3.0 + times)


def test_costs_add_and_repeat() -> None:
    one, other = Cost({"int8": 1e9}, 1e6, 3.0), Cost({"int8": 2e9, "bf16": 1e8}, 5e5, 1.0)
    assert (one + other).us(CPU) == pytest.approx(one.us(CPU) + other.us(CPU))
    assert (one * 3).us(CPU) == pytest.approx(3 * one.us(CPU))


def test_this_machine_has_a_rate_for_every_format() -> None:
    machine = measured(CPU)
    assert machine.peak.keys() == CPU.peak.keys()
    assert min(*machine.peak.values(), machine.bandwidth) > 0
    assert measured(CPU) is machine
    assert measured(GPU) is GPU
