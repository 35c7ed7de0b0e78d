import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import hadamard
from vdqc.base.diagnostics import ConfigError
from vdqc.engine.pass_manager import Pass
from vdqc.engine.recipe import parse_passes
from vdqc.ir.site import set_note
from vdqc.passes.quant import Quant
from vdqc.passes.rotate import Rotate
from vdqc.passes.smooth import Form, Smooth, representable, smoothing_scale
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
)


class Peers(nn.Module):
    """Two linears that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        return self.left(h) + self.right(h)


def test_peers_share_one_scale() -> None:
    model, x = Peers(), torch.randn(3, 16)
    graph = annotated(model, x)
    ctx = context(x, model=model)
    (record,) = run(graph, Smooth(), ctx=ctx)
    assert_ir(
        graph,
        """
        graph (%x: f32[s0, 16]) @annotated {
          %0 = aten.relu(%x) : f32[s0, 16]
          %1 = aten.mul(%0, @left.smooth_inverse) : f32[s0, 16]
          %2 = aten.mul(@left.weight, @left.smooth) : f32[8, 16]
          %3 = aten.linear(%1, %2, @left.bias) : f32[s0, 8]  # site left w8a8
          %4 = aten.mul(@right.weight, @left.smooth) : f32[8, 16]
          %5 = aten.linear(%1, %4) : f32[s0, 8]  # site right w8a8
          %6 = aten.add(%3, %5) : f32[s0, 8]
          return [%6]
        }
        """,
    )
    activation = torch.relu(x).abs().amax(0)
    weight = torch.cat([model.left.weight, model.right.weight]).detach().abs().amax(0)
    expected = (activation / weight).sqrt()
    expected[activation == 0] = 1.0
    torch.testing.assert_close(graph.param("left.smooth"), expected)
    before, after = record.facts["spread"]["left"]
    assert after < before


def test_statistics_are_of_what_the_linear_reads_now() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(5, 16)
    graph = annotated(model, x)
    run(graph, Rotate(block=16), Smooth(alpha=1.0), ctx=context(x, model=model))
    mul = graph.site("0").input
    rotated: list[Tensor] = []
    graph.run_inputs([x], lambda node, value: rotated.append(value) if node is mul else None)
    torch.testing.assert_close(rotated[0].abs().amax(0), torch.ones(16))


@pytest.mark.parametrize("weights", ["rotated", "plain"])
def test_a_balanced_scale_looks_at_the_weights_it_is_told(weights: str) -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(32, 16)
    graph = annotated(model, x)
    passes = parse_passes(f"rotate{{block=16}},smooth{{weights={weights}}}", PASSES)
    run(graph, *passes, ctx=context(x, model=model))
    signs, plain = graph.param("0.rotation_signs"), model[0].weight.detach()
    weight = plain if weights == "plain" else hadamard.rotate(plain, signs, 16)
    activation = hadamard.rotate(x, signs, 16).abs().amax(0)
    expected = (activation / weight.abs().amax(0)).sqrt()
    torch.testing.assert_close(graph.param("0.smooth"), expected)


def test_leaves_alone_what_it_need_not_smooth() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    x = torch.randn(3, 16)
    graph = annotated(model, x)
    set_note(graph.site("2").node, scheme="w4a16")
    set_note(graph.site("3").node, scheme="none")
    ctx = context(x, model=model)
    run(graph, Smooth(), ctx=ctx)
    smoothed = str(graph)
    assert smoothed.count("aten.mul") == 2
    run(graph, Smooth(), ctx=ctx)
    assert str(graph) == smoothed
    assert remarks(ctx) == [
        ("2", "not-smoothed"),
        ("0", "already-smoothed"),
        ("2", "not-smoothed"),
    ]


@settings(max_examples=6)
@given(models(), st.floats(0.0, 1.0), st.sampled_from(["rs", "sr", "srs"]))
def test_smoothing_keeps_the_function_in_any_order(
    case: tuple[nn.Module, list[Tensor]], alpha: float, order: str
) -> None:
    model, inputs = case
    passes = [Rotate(block=8) if letter == "r" else Smooth(alpha) for letter in order]
    graph = assert_equivalent(model, inputs, *passes)
    assert "smooth_inverse" in str(graph)
    assert ("smooth_behind_inverse" in str(graph)) == (order == "srs")


def test_a_group_is_smoothed_once_on_either_side_of_its_rotation() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(5, 16)
    graph = annotated(model, x)
    ctx = context(x, model=model)
    run(graph, Smooth(), Rotate(block=16), Smooth(), Smooth(), ctx=ctx)
    assert remarks(ctx) == [("0", "already-smoothed")]
    for name in ("0.smooth", "0.smooth_behind"):
        assert not torch.equal(graph.param(name), torch.ones(16))


def test_half_precision_is_exact() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).to(torch.bfloat16)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    x[:, 3] *= 50
    graph = annotated(model, x)
    before = graph.run(x)[0]
    run(graph, Smooth(), ctx=context(x, model=model))
    scale = graph.param("0.smooth").float()
    assert torch.equal(scale.log2(), scale.log2().round())
    assert int((scale != 1).sum()) > 4
    # products carry the same digits; only the order of a GEMM's sum may round another way
    torch.testing.assert_close(graph.run(x)[0], before, rtol=2**-7, atol=2**-7)


def test_a_learned_scale_is_one_free_parameter_a_group() -> None:
    model, x = Peers(), torch.randn(3, 16)
    graph = annotated(model, x)
    run(graph, Smooth(learn=True), ctx=context(x, model=model))
    assert_ir(
        graph,
        """
        graph (%x: f32[s0, 16]) @annotated {
          %0 = aten.relu(%x) : f32[s0, 16]
          %1 = aten.neg(@left.smooth) : f32[16]
          %2 = aten.exp(%1) : f32[16]
          %3 = aten.reciprocal(%2) : f32[16]
          %4 = aten.mul(%0, %2) : f32[s0, 16]
          %5 = aten.mul(@left.weight, %3) : f32[8, 16]
          %6 = aten.linear(%4, %5, @left.bias) : f32[s0, 8]  # site left w8a8
          %7 = aten.mul(@right.weight, %3) : f32[8, 16]
          %8 = aten.linear(%4, %7) : f32[s0, 8]  # site right w8a8
          %9 = aten.add(%6, %8) : f32[s0, 8]
          return [%9]
        }
        """,
    )
    assert graph.free == {"left.smooth"}
    fixed = annotated(model, x)
    run(fixed, Smooth(), ctx=context(x, model=model))
    torch.testing.assert_close(graph.param("left.smooth").exp(), fixed.param("left.smooth"))


@settings(max_examples=4)
@given(models(), st.integers(0, 99), st.sampled_from([0.1, 3.0]))
def test_a_learned_scale_keeps_the_function_at_any_value(
    case: tuple[nn.Module, list[Tensor]], seed: int, spread: float
) -> None:
    model, inputs = case
    passes = parse_passes("rotate{block=8},smooth{learn=true}", PASSES)
    graph = assert_equivalent(model, inputs, *passes)
    doubles = [value.double() for value in inputs]
    before = graph.run(*doubles)[0]
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(graph.free):
            value = graph.param(name)
            value.add_(spread * torch.randn(value.shape, generator=random).double())
    assert_close(graph.run(*doubles)[0], before)


def test_a_learned_scale_in_half_precision_rounds_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).to(torch.bfloat16)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    x[:, 3] *= 50
    graph = annotated(model, x)
    before = graph.run(x)[0]
    run(graph, Smooth(learn=True), ctx=context(x, model=model))
    assert graph.param("0.smooth").dtype == torch.float32
    assert_close(graph.run(x)[0], before)


@given(
    st.lists(st.floats(0, 1e30), min_size=4, max_size=4),
    st.lists(st.floats(0, 1e30), min_size=4, max_size=4),
    st.floats(0.0, 1.0),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_scales_are_positive_and_finite(
    activation: list[float], weight: list[float], alpha: float, dtype: torch.dtype
) -> None:
    a, w = torch.tensor(activation), torch.tensor(weight)
    scale = representable(smoothing_scale(a, w, alpha), dtype)
    assert scale.dtype == dtype
    for factor in (scale, 1 / scale):
        assert bool((factor > 0).all())
        assert bool(factor.isfinite().all())
    assert bool((scale[(a == 0) | (w == 0)] == 1).all())


@given(st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4), st.floats(0.0, 1.0))
def test_alpha_divides_the_spread(activation: list[float], alpha: float) -> None:
    a, w = torch.tensor(activation).double(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    scale = smoothing_scale(a, w, alpha)
    torch.testing.assert_close(a / scale, (a * w) ** (1 - alpha), rtol=1e-9, atol=0)
    torch.testing.assert_close(w * scale, (a * w) ** alpha, rtol=1e-9, atol=0)


def test_options() -> None:
    assert str(parse_passes("smooth{alpha=0.6}", PASSES)[0]) == "smooth{alpha=0.6}"
    with pytest.raises(ConfigError, match=r"smooth.alpha: expected 0 \.\.\. 1, got 2"):
        parse_passes("smooth{alpha=2}", PASSES)


def test_the_activation_form_takes_mean_magnitudes() -> None:
    model, x = Peers(), torch.randn(7, 16)
    graph = annotated(model, x, scheme="w4a16")
    run(graph, Smooth(alpha=0.25, form=Form.ACTIVATION), ctx=context(x, model=model))
    mean = torch.relu(x).abs().mean(0)
    expected = torch.where(mean > 0, mean**0.25, 1.0)
    expected = expected / (expected.amax() * expected.amin()).sqrt()
    torch.testing.assert_close(graph.param("left.smooth"), expected)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["w3a16", "w4a16-g8", "w4a8", "w4a4-asym"]),
    st.sampled_from(list(Form)),
)
def test_a_searched_scale_loses_no_more_than_none(seed: int, scheme: str, form: Form) -> None:
    # the rows that the search weighs are all there are, so its choice holds for them exactly
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(16, 12, bias=False)), torch.randn(20, 16)
    x[:, seed % 16] *= 30
    expected = model(x).detach()

    def error(*passes: Pass) -> float:
        graph = annotated(model, x, scheme=scheme)
        run(graph, *passes, Quant(), ctx=context(x, model=model, scheme=scheme))
        found = graph.run(x)[0].detach()
        return float((found - expected).square().sum() / expected.square().sum())

    searched = error(Smooth(form=form, search=20))
    # alpha 0 of the activation form is no smoothing at all; of the balanced one it is a candidate
    assert searched <= error(Smooth(alpha=0.0, form=form)) * (1 + 1e-4)
    assert searched <= error(Smooth(alpha=0.5, form=form)) * (1 + 1e-4)
    if form is Form.ACTIVATION:
        assert searched <= error() * (1 + 1e-4)


def test_a_search_of_no_points_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"smooth\.search: expected 0 or more, got -1"):
        Smooth(search=-1)
