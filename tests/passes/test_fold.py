from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from vdqc.base import hadamard
from vdqc.engine.pass_manager import Pass
from vdqc.ir.graph import Graph
from vdqc.ir.site import set_note
from vdqc.ir.weights import stored_tensors
from vdqc.passes.fold import Fold
from vdqc.passes.quant import Quant
from vdqc.passes.rotate import Rotate
from vdqc.passes.smooth import Smooth
from vdqc.testing.harness import (
    AdaLNBlock,
    annotated,
    assert_close,
    assert_equivalent,
    assert_ir,
    context,
    models,
    remarks,
    run,
)


class NormLinear(nn.Module):
    """A norm and what reads it."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16, elementwise_affine=affine)
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))


class InARow(nn.Module):
    """Two linears with nothing between; ``also`` reads the value between them as well."""

    def __init__(self, also: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8)
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.second(h)
        return y + h[..., :8] if self.also else y


def test_a_norm_carries_the_scale() -> None:
    model, x = NormLinear().double(), torch.randn(3, 16).double()
    graph = annotated(model, x)
    before = graph.run(x)[0]
    _, record = run(graph, Smooth(), Fold(), ctx=context(x, model=model))
    assert_ir(
        graph,
        """
        graph (%x: f64[s0, 16]) @annotated {
          %0 = aten.layer_norm(%x, [16], @norm.weight, @norm.bias, 1e-05) : f64[s0, 16]
          %1 = aten.linear(%0, @fc.weight, @fc.bias) : f64[s0, 8]  # site fc w8a8
          return [%1]
        }
        """,
    )
    assert_close(graph.run(x)[0], before)
    assert record.facts["scales"] == 1
    assert record.facts["online_scales"] == 0
    assert not torch.equal(graph.param("fc.weight"), model.fc.weight)


def test_a_producer_carries_the_rotation() -> None:
    model, x = InARow().double(), torch.randn(3, 16).double()
    graph = annotated(model, x)
    before = graph.run(x)[0]
    run(graph, Rotate(block=8, select="second"), Fold(), ctx=context(x, model=model))
    assert_ir(
        graph,
        """
        graph (%x: f64[s0, 16]) @annotated {
          %0 = aten.linear(%x, @first.weight, @first.bias) : f64[s0, 24]  # site first w8a8
          %1 = aten.linear(%0, @second.weight, @second.bias) : f64[s0, 8]  # site second w8a8
          return [%1]
        }
        """,
    )
    assert_close(graph.run(x)[0], before)


def test_two_scales_become_one() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)).double(), torch.randn(3, 16).double()
    graph = annotated(model, x)
    before = graph.run(x)[0]
    run(graph, Smooth(alpha=0.3), ctx=context(x, model=model))
    first = graph.param("0.smooth_inverse")
    node = graph.site("0").node
    with graph.edited_by("author"):
        extra = graph.set_param("extra", torch.full((16,), 2.0).double())
        scaled = graph.call(torch.ops.aten.mul.Tensor, node.args[0], extra, before=node)
    graph.set_operand(node, 0, scaled)
    (record,) = run(graph, Fold(), ctx=context(x, model=model))
    assert record.facts["merged"] == 1
    assert str(graph).count("aten.mul") == 1
    torch.testing.assert_close(graph.param("extra"), first * 2)
    assert_close(graph.run(x)[0], 2 * before - model[0].bias.detach())


@pytest.mark.parametrize("gate", [Rotate(block=8, select="second"), Smooth(select="second")])
def test_leaves_alone_a_value_with_other_readers(gate: Pass) -> None:
    model, x = InARow(also=True), torch.randn(3, 16)
    graph = annotated(model, x)
    ctx = context(x, model=model)
    run(graph, gate, ctx=ctx)
    before = str(graph)
    (record,) = run(graph, Fold(), ctx=ctx)
    assert record.facts["online_rotations"] + record.facts["online_scales"] == 1
    assert record.facts["weights"] == 1  # the weight that undoes it
    assert {code for _, code in remarks(ctx)} <= {"online-rotation", "online-scale"}
    assert remarks(ctx)[0][0] == "second"
    assert ("vdqc.rotate(%0" in str(graph)) == ("vdqc.rotate(%0" in before)


def test_leaves_alone_the_codes_of_a_quantised_producer() -> None:
    model, x = InARow(), torch.randn(3, 16)
    graph = annotated(model, x)
    ctx = context(x, model=model)
    run(graph, Rotate(block=8, select="second"), Quant(), ctx=ctx)
    codes = graph.evaluate(graph.site("first").weight)
    run(graph, Fold(), ctx=ctx)
    assert ("second", "online-rotation") in remarks(ctx)
    assert "first could carry it but is quantised already: fold before quant" in str(
        [str(d) for d in ctx.diagnostics]
    )
    assert torch.equal(graph.evaluate(graph.site("first").weight), codes)


def test_a_quantised_weight_keeps_its_quantiser_and_its_codes() -> None:
    model, x = InARow(also=True), torch.randn(3, 16)
    graph = annotated(model, x)
    ctx = context(x, model=model)
    run(graph, Rotate(block=8), Smooth(), Quant(), ctx=ctx)
    before = {site.name: graph.evaluate(site.weight) for site in graph.sites()}
    run(graph, Fold(), ctx=ctx)
    text = str(graph)
    assert "vdqc.fake_quantize(@second.weight, @second.weight_scale" in text
    assert all(torch.equal(graph.evaluate(s.weight), before[s.name]) for s in graph.sites())


def test_a_weight_that_others_read_is_kept() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    model, x = Tied().double(), torch.randn(3, 16).double()
    graph = annotated(model, x)
    for site in graph.sites():
        set_note(site.node, scheme="w8a8")
    before = graph.run(x)[0]
    run(graph, Rotate(block=8, select="fc#2"), Fold(), ctx=context(x, model=model))
    assert_close(graph.run(x)[0], before)
    assert torch.equal(graph.param("fc.weight"), model.fc.weight)
    assert "@fc.weight_folded" in str(graph)


def test_weights_on_disk_and_free_ones_stay_expressions(tmp_path: Path) -> None:
    model, x = InARow(also=True), torch.randn(3, 16)
    graph = annotated(model, x)
    save_file({"first.weight": model.first.weight.detach()}, tmp_path / "w.safetensors")
    for stored in stored_tensors(tmp_path / "w.safetensors"):
        graph.set_param(stored.key, stored)
    graph.set_param("second.weight", model.second.weight.detach(), free=True)
    before = graph.run(x)[0]
    run(graph, Rotate(block=8), Fold(), ctx=context(x, model=model))
    assert str(graph).count("vdqc.rotate(@") == 2
    assert_close(graph.run(x)[0], before)
    assert set(graph.stored) == {"first.weight"}


@settings(max_examples=4)
@given(
    models(),
    st.permutations(["rotate", "smooth"]),
    st.sampled_from([4, 8, "full"]),
    st.booleans(),
)
def test_folding_keeps_the_function_and_is_idempotent(
    case: tuple[nn.Module, list[Tensor]], order: list[str], block: int | str, half_way: bool
) -> None:
    model, inputs = case
    by_name: dict[str, Pass] = {"rotate": Rotate(block=block), "smooth": Smooth()}
    between = [Fold()] if half_way else []
    passes = [by_name[order[0]], *between, by_name[order[1]], Fold()]
    graph = assert_equivalent(model, inputs, *passes)
    text = str(graph)
    ctx = context(*[value.double() for value in inputs], model=model)
    (record,) = run(graph, Fold(), ctx=ctx)
    assert record.rewrites == 0
    assert str(graph) == text


def test_adaln_carries_the_scales_of_its_readers() -> None:
    model = AdaLNBlock(24, 2)
    graph = assert_equivalent(model, [torch.randn(2, 6, 24), torch.randn(2, 24)], Smooth(), Fold())
    online = [line for line in str(graph).splitlines() if "smooth_inverse" in line]
    assert len(online) == 2  # behind silu and gelu; the norms' and the values' are gone


def test_rotated_rows_are_the_rotated_output() -> None:
    model, x = InARow().double(), torch.randn(5, 16).double()
    graph: Graph = annotated(model, x)
    run(graph, Rotate(block=12, select="second"), ctx=context(x, model=model))
    signs = graph.param("second.rotation_signs")
    run(graph, Fold(), ctx=context(x, model=model))
    weight, bias = graph.param("first.weight"), graph.param("first.bias")
    wanted = hadamard.rotate(model.first(x).detach(), signs, 12)
    assert_close(nn.functional.linear(x, weight, bias), wanted)


class HalfModulated(nn.Module):
    """A norm modulated by a linear of the conditioning, as adaLN does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16, elementwise_affine=False)
        self.cond, self.fc = nn.Linear(16, 32), nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale, shift = self.cond(y).unsqueeze(1).chunk(2, dim=-1)
        return self.fc(self.norm(x) * (1 + scale) + shift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_modulation_in_half_precision_does_not_cancel(dtype: torch.dtype) -> None:
    model = HalfModulated().to(dtype)
    x, y = torch.randn(2, 6, 16, dtype=dtype), torch.randn(2, 16, dtype=dtype)
    with torch.no_grad():  # scales far from 1
        model.fc.weight[:, ::4] /= 1000
    graph = annotated(model, x, y)
    set_note(graph.site("cond").node, scheme="none")
    before = graph.run(x, y)[0].double()
    run(graph, Smooth(), Fold(), ctx=context(x, y, model=model))
    assert "smooth_inverse)" not in str(graph)  # what is left multiplies [B, 1, D]
    # the products keep their digits: only the last rounding and the order of the sum may differ
    assert_close(graph.run(x, y)[0].double(), before, dtype)


def test_a_narrower_norm_does_not_round_the_scale() -> None:
    class Narrow(NormLinear):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(x.float()).to(x.dtype))

    model, x = Narrow(affine=False), torch.randn(3, 16).double()
    model.fc.double()
    graph = annotated(model, x)
    before = graph.run(x)[0]
    ctx = context(x, model=model)
    run(graph, Smooth(), Fold(), ctx=ctx)
    assert remarks(ctx) == [("fc", "online-scale")]
    assert_close(graph.run(x)[0], before)


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_behind_quantisers_only_powers_of_two_move(dtype: torch.dtype, scales: int) -> None:
    model, x = NormLinear().to(dtype), torch.randn(5, 16, dtype=dtype)
    graph = annotated(model, x)
    ctx = context(x, model=model)
    run(graph, Smooth(), Quant(), ctx=ctx)
    before = graph.run(x)[0]
    (record,) = run(graph, Fold(), ctx=ctx)
    assert record.facts["scales"] == scales
    assert torch.equal(graph.run(x)[0], before)
