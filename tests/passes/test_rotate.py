import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import hadamard, numerics
from vdqc.base.diagnostics import ConfigError
from vdqc.engine.recipe import parse_passes
from vdqc.ir.site import set_note
from vdqc.passes.rotate import Form, Rotate, choose_block, start_matrix
from vdqc.passes.table import PASSES
from vdqc.testing.harness import (
    annotated,
    assert_close,
    assert_equivalent,
    assert_ir,
    context,
    models,
    remarks,
    run,
    tensors,
)


class Peers(nn.Module):
    """Two linears that read one value."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, 8), nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        return self.left(h) + self.right(h)


def test_peers_share_one_rotation() -> None:
    graph = annotated(Peers(), torch.randn(3, 16))
    ctx = context(torch.randn(3, 16))
    (record,) = run(graph, Rotate(block=8), ctx=ctx)
    assert_ir(
        graph,
        """
        graph (%x: f32[s0, 16]) @annotated {
          %0 = aten.relu(%x) : f32[s0, 16]
          %1 = vdqc.rotate(%0, @left.rotation_signs, 8) : f32[s0, 16]
          %2 = vdqc.rotate(@left.weight, @left.rotation_signs, 8) : f32[8, 16]
          %3 = aten.linear(%1, %2, @left.bias) : f32[s0, 8]  # site left w8a8
          %4 = vdqc.rotate(@right.weight, @left.rotation_signs, 8) : f32[8, 16]
          %5 = aten.linear(%1, %4) : f32[s0, 8]  # site right w8a8
          %6 = aten.add(%3, %5) : f32[s0, 8]
          return [%6]
        }
        """,
    )
    assert record.facts == {"blocks": {8: 1}, "values_per_token": 16}


def test_a_peer_that_stays_in_float_reads_the_value_itself() -> None:
    graph = annotated(Peers(), torch.randn(3, 16))
    set_note(graph.site("right").node, scheme="none")
    run(graph, Rotate(block=8))
    assert "aten.linear(%0, @right.weight)" in str(graph)
    assert "aten.linear(%1, %2, @left.bias)" in str(graph)


def test_leaves_alone_what_it_cannot_or_need_not_rotate() -> None:
    model = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 4), nn.Linear(4, 2))
    graph = annotated(model, torch.randn(3, 7))
    set_note(graph.site("3").node, scheme="none")
    ctx = context(torch.randn(3, 7), model=model)
    run(graph, Rotate(block=8), ctx=ctx)
    rotated = str(graph)
    run(graph, Rotate(block=8), ctx=ctx)
    assert str(graph) == rotated
    assert remarks(ctx) == [
        ("0", "no-rotation"),
        ("2", "rotation-block"),
        ("0", "no-rotation"),
        ("2", "already-rotated"),
    ]
    assert "block 4 instead of 8, which does not divide 12 channels" in str(
        list(ctx.diagnostics)[1]
    )


def test_only_selected_groups_are_rotated() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    graph = annotated(model, torch.randn(3, 16))
    run(graph, Rotate(select="2"))
    assert str(graph).count("vdqc.rotate") == 2
    assert "@0.rotation_signs" not in str(graph)


def test_signs_do_not_depend_on_what_else_is_rotated() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    x = torch.randn(3, 16)
    some, every, other = (annotated(model, x) for _ in range(3))
    run(some, Rotate(select="2"))
    run(every, Rotate())
    run(other, Rotate(seed=1))
    signs = [graph.param("2.rotation_signs") for graph in (some, every, other)]
    assert torch.equal(signs[0], signs[1])
    assert not torch.equal(signs[0], signs[2])
    assert not torch.equal(signs[1], every.param("0.rotation_signs"))


@settings(max_examples=4)
@given(models(), st.sampled_from([4, 8, 12, 64, "full"]), st.integers(0, 9))
def test_rotation_keeps_the_function(
    case: tuple[nn.Module, list[Tensor]], block: int | str, seed: int
) -> None:
    model, inputs = case
    graph = assert_equivalent(model, inputs, Rotate(block=block, seed=seed))
    assert "vdqc.rotate" in str(graph)


def test_a_learned_rotation_is_free_and_shared_by_peers() -> None:
    graph = annotated(Peers(), torch.randn(3, 16))
    (record,) = run(
        graph, Rotate(learn=True, form=Form.ORTHOGONAL), ctx=context(torch.randn(3, 16))
    )
    assert_ir(
        graph,
        """
        graph (%x: f32[s0, 16]) @annotated {
          %0 = aten.relu(%x) : f32[s0, 16]
          %1 = vdqc.cayley(@left.rotation_left) : f32[4, 4]
          %2 = aten.matmul(%1, @left.rotation_left_start) : f32[4, 4]
          %3 = vdqc.cayley(@left.rotation_right) : f32[4, 4]
          %4 = aten.matmul(%3, @left.rotation_right_start) : f32[4, 4]
          %5 = vdqc.kronecker(%0, %2, %4) : f32[s0, 16]
          %6 = vdqc.kronecker(@left.weight, %2, %4) : f32[8, 16]
          %7 = aten.linear(%5, %6, @left.bias) : f32[s0, 8]  # site left w8a8
          %8 = vdqc.kronecker(@right.weight, %2, %4) : f32[8, 16]
          %9 = aten.linear(%5, %8) : f32[s0, 8]  # site right w8a8
          %10 = aten.add(%7, %9) : f32[s0, 8]
          return [%10]
        }
        """,
    )
    assert graph.free == {"left.rotation_left", "left.rotation_right"}
    assert record.facts == {"blocks": {"4x4": 1}, "values_per_token": 16}


@settings(max_examples=6)
@given(models(), st.sampled_from(list(Form)), st.integers(0, 99), st.sampled_from([0.1, 2.0]))
def test_a_learned_rotation_keeps_the_function_at_any_value(
    case: tuple[nn.Module, list[Tensor]], form: Form, seed: int, spread: float
) -> None:
    model, inputs = case
    graph = assert_equivalent(model, inputs, Rotate(learn=True, form=form))
    doubles = [value.double() for value in inputs]
    before = graph.run(*doubles)[0]
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(graph.free):
            value = graph.param(name)
            value.add_(spread * torch.randn(value.shape, generator=random).double())
    assert_close(graph.run(*doubles)[0], before)


@given(st.integers(1, 96), st.integers(0, 9))
def test_a_learned_rotation_starts_orthogonal(order: int, seed: int) -> None:
    start = start_matrix(order, seed)
    torch.testing.assert_close(start @ start.T, torch.eye(order).double(), rtol=0, atol=1e-12)
    if hadamard.is_order(order):
        torch.testing.assert_close(start.abs(), torch.full_like(start, order**-0.5))


def test_a_width_without_small_factors_is_not_learned() -> None:
    model = nn.Sequential(nn.Linear(1031, 4))
    graph, ctx = annotated(model, torch.randn(3, 1031)), context(torch.randn(3, 1031), model=model)
    run(graph, Rotate(learn=True), ctx=ctx)
    assert remarks(ctx) == [("0", "no-rotation")]


@given(st.integers(1, 400), st.integers(4, 256))
def test_blocks_tile_the_width(width: int, wanted: int) -> None:
    block = choose_block(width, wanted)
    if block is None:
        assert all(width % order for order in (4, 8, 12, 20, 24, 28) if order <= wanted)
        return
    assert width % block == 0
    assert 4 <= block <= wanted
    assert hadamard.is_order(block)
    if width % wanted == 0 and hadamard.is_order(wanted):
        assert block == wanted


@given(tensors(4, 64, dtype=torch.float64))
def test_a_rotated_value_quantises_no_worse_on_outliers(x: Tensor) -> None:
    x[:, 5] *= 100
    rotated = hadamard.rotate(x, hadamard.random_signs(64, 0), 64)
    assert numerics.relative_error(rotated.norm(dim=-1), x.norm(dim=-1)) < 1e-10
    peak = (x.abs().amax(-1) / x.norm(dim=-1)).mean()
    assert (rotated.abs().amax(-1) / rotated.norm(dim=-1)).mean() < peak


def test_options_round_trip_as_text() -> None:
    for text in ("rotate", "rotate{block=128}", "rotate{block=full,seed=3}", "rotate{learn=true}"):
        assert str(parse_passes(text, PASSES)[0]) == text


@pytest.mark.parametrize("text", ["rotate{block=half}", "rotate{block=2}"])
def test_a_block_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected 'full' or a number from 4"):
        parse_passes(text, PASSES)
