import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import numerics
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.scheme import QuantSpec
from vdqc.engine.pass_manager import Context
from vdqc.engine.recipe import parse_passes
from vdqc.ir.graph import Stage
from vdqc.ir.site import set_note
from vdqc.ir.weight_quantiser import WeightRange, weight_scale
from vdqc.passes.quant import Clip, Quant, Rounding, Step
from vdqc.passes.table import PASSES
from vdqc.testing.harness import (
    annotated,
    assert_ir,
    assert_stage,
    context,
    models,
    remarks,
    run,
    tensors,
)


class Peers(nn.Module):
    """Three linears that read one value."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, 8), nn.Linear(width, 8)
        self.v = nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        return self.q(h) + self.k(h) + self.v(h)


def test_peers_share_one_quantiser() -> None:
    model, x = Peers(), torch.randn(3, 16)
    graph = annotated(model, x, scheme="w4a8-g8")
    (record,) = run(graph, Quant(), ctx=context(x, model=model))
    assert_stage(graph, Stage.COMPRESSED)
    assert_ir(
        graph,
        """
        graph (%x: f32[s0, 16]) @compressed {
          %0 = aten.relu(%x) : f32[s0, 16]
          %1 = vdqc.fake_quantize(@q.weight, @q.weight_scale, None, 'int4/group8') : f32[8, 16]
          %2 = vdqc.fake_quantize(%0, None, None, 'int8/token/dynamic') : f32[s0, 16]
          %3 = aten.linear(%2, %1, @q.bias) : f32[s0, 8]  # site q w4a8-g8
          %4 = vdqc.fake_quantize(@k.weight, @k.weight_scale, None, 'int4/group8') : f32[8, 16]
          %5 = aten.linear(%2, %4, @k.bias) : f32[s0, 8]  # site k w4a8-g8
          %6 = aten.add(%3, %5) : f32[s0, 8]
          %7 = vdqc.fake_quantize(@v.weight, @v.weight_scale, None, 'int4/group8') : f32[8, 16]
          %8 = aten.linear(%2, %7) : f32[s0, 8]  # site v w4a8-g8
          %9 = aten.add(%6, %8) : f32[s0, 8]
          return [%9]
        }
        """,
    )
    # 4 bits a weight and a float32 scale for every 8 of them
    assert record.facts["bits_per_weight"] == 8.0
    assert record.facts["bytes"] == 3 * 8 * 16
    assert record.facts["sites"]["q"]["sqnr_db"] > 15


def test_asymmetric_and_static_quantisers_have_parameters() -> None:
    model, x = Peers(), torch.randn(3, 16)
    graph = annotated(model, x, scheme="w3a6-asym-static")
    run(graph, Quant(), ctx=context(x, model=model))
    text = str(graph)
    weight = "(@k.weight, @k.weight_scale, @k.weight_zero_point, 'int3/channel/asym')"
    assert f"vdqc.fake_quantize{weight} : f32[8, 16]" in text
    assert "vdqc.fake_quantize(%0, @q.input_scale, @q.input_zero_point, 'int6/tensor/asym')" in text
    scale, zero_point = graph.param("q.input_scale"), graph.param("q.input_zero_point")
    assert float(scale * (63 - zero_point)) == pytest.approx(float(x.max()), rel=1e-5)
    assert float(zero_point) == 0.0  # a relu has no negative side


def test_peers_of_two_schemes_have_a_quantiser_each() -> None:
    model, x = Peers(), torch.randn(3, 16)
    graph = annotated(model, x)
    set_note(graph.site("k").node, scheme="w8a4")
    set_note(graph.site("v").node, scheme="w4a16")
    run(graph, Quant(), ctx=context(x, model=model))
    inputs = [str(graph.site(name).input.args[3:]) for name in "qk"]
    assert inputs == ["('int8/token/dynamic',)", "('int4/token/dynamic',)"]
    assert graph.site("q").input.args[0] is graph.site("k").input.args[0]
    assert "aten.relu" in str(graph.site("v").input.target)


def test_leaves_alone_sites_in_float() -> None:
    model, x = Peers(), torch.randn(3, 16)
    graph = annotated(model, x)
    for name in "qkv":
        set_note(graph.site(name).node, scheme="none")
    before = str(graph).replace("annotated", "compressed")
    (record,) = run(graph, Quant(), ctx=context(x, model=model))
    assert record.rewrites == 0
    assert str(graph) == before


def test_what_select_leaves_out_stays_in_float() -> None:
    graph = annotated(Peers(), torch.randn(3, 16))
    run(graph, Quant(select="[qk]"))
    assert str(graph.site("v").scheme) == "none"
    assert str(graph).count("fake_quantize") == 3


def test_groups_that_do_not_divide_name_the_site() -> None:
    graph = annotated(Peers(), torch.randn(3, 16))
    set_note(graph.site("k").node, scheme="w4a8-g5")
    with pytest.raises(InputError, match="k: groups of 5 do not divide 16 input channels"):
        run(graph, Quant())


def test_a_static_range_without_samples_is_warned_about() -> None:
    graph = annotated(Peers(), torch.randn(3, 16), scheme="w8a8-static")
    ctx = Context()
    run(graph, Quant(), ctx=ctx)
    assert remarks(ctx) == [("q", "no-samples")]
    assert float(graph.param("q.input_scale")) == pytest.approx(1 / 127)


def test_an_outlier_channel_is_warned_about() -> None:
    model, x = Peers(), torch.rand(3, 16) + 0.5
    x[1, 4] = 413.0
    graph = annotated(model, x, scheme="w4a4")
    ctx = context(x, model=model)
    run(graph, Quant(), ctx=ctx)
    (warning,) = ctx.diagnostics
    assert "q: input maximum 413 is " in str(warning)
    assert "times the median channel, which falls below one step of int4" in str(warning)
    assert "test_quant.py:" in warning.notes[0]


@settings(max_examples=4)
@given(
    models(),
    st.sampled_from(["w8a8", "w6a8-asym", "w8a8-g8", "w8a16", "w8a8-static", "w8a8-aasym-tensor"]),
    st.sampled_from(list(WeightRange)),
)
def test_eight_bits_stay_close_to_the_model(
    case: tuple[nn.Module, list[Tensor]], scheme: str, weight_range: WeightRange
) -> None:
    model, inputs = case
    graph = annotated(model, *inputs, scheme=scheme)
    ctx = context(*inputs, model=model)
    (record,) = run(graph, Quant(weight_range), ctx=ctx)
    assert record.sqnr_db is not None
    assert record.sqnr_db > 30


SCHEMES = ["w4a6", "w4a8-g8", "w3a6-asym", "w8a8-asym-static", "w4a16-g8", "w4a8-g8-asym"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weight_range", list(WeightRange))
def test_a_learned_scale_at_ratio_one_is_the_fixed_one(
    scheme: str, weight_range: WeightRange
) -> None:
    model, x = Peers(), torch.randn(3, 16)
    fixed, learned = annotated(model, x, scheme=scheme), annotated(model, x, scheme=scheme)
    ctx = context(x, model=model)
    run(fixed, Quant(), ctx=ctx)
    run(learned, Quant(weight_range, Clip.LEARNED, Step.LEARNED), ctx=ctx)
    assert learned.free
    with torch.no_grad():
        for name in learned.free:
            learned.param(name).fill_(40.0 if "clip" in name else 0.0)  # sigmoid(40) = 1
        assert torch.equal(learned.run(x)[0], fixed.run(x)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_learned_ranges_start_at_sigmoid_four_and_hear_of_the_error(scheme: str) -> None:
    model, x = Peers(), torch.randn(3, 16)
    graph = annotated(model, x, scheme=scheme)
    wanted = graph.run(x)[0]
    run(graph, Quant(clip=Clip.LEARNED, step=Step.LEARNED), ctx=context(x, model=model))
    clips = [graph.param(name) for name in graph.free if "clip" in name]
    assert clips
    assert all(bool((clip == 4.0).all()) for clip in clips)
    (graph.run(x)[0] - wanted).square().sum().backward()
    for name in graph.free:
        gradient = graph.param(name).grad
        assert gradient is not None, name
        assert bool(gradient.isfinite().all())
        assert float(gradient.abs().max()) > 0, name


def test_which_side_is_clipped_is_a_choice() -> None:
    model, x = Peers(), torch.randn(3, 16)
    free = {}
    for clip in Clip:
        graph = annotated(model, x, scheme="w4a8")
        run(graph, Quant(clip=clip), ctx=context(x, model=model))
        free[clip] = {name.partition(".")[2] for name in graph.free}
    assert free == {
        Clip.NONE: set(),
        Clip.LEARNED: {"weight_clip", "input_clip"},
        Clip.WEIGHT: {"weight_clip"},
        Clip.INPUT: {"input_clip"},
    }


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-g8", "w3a16-asym"])
def test_a_learned_clip_may_start_where_the_squared_error_is_least(scheme: str) -> None:
    model, x = Peers(), torch.randn(3, 16)
    fixed, learned = annotated(model, x, scheme=scheme), annotated(model, x, scheme=scheme)
    run(fixed, Quant(WeightRange.MSE))
    run(learned, Quant(WeightRange.MSE, Clip.LEARNED))
    errors = [
        numerics.relative_error(graph.evaluate(graph.site("q").weight), model.q.weight)
        for graph in (fixed, learned)
    ]
    assert errors[1] < errors[0] * 1.02  # ratios above sigmoid(4) start there


@given(tensors(6, 32), st.sampled_from(list(WeightRange)), st.booleans(), st.booleans())
def test_weight_error_falls_with_bits(
    weight: Tensor, weight_range: WeightRange, symmetric: bool, groups: bool
) -> None:
    previous = -1.0
    for bits in range(2, 9):
        granularity = "group8" if groups else "channel"
        spec = QuantSpec.parse(f"int{bits}/{granularity}{'' if symmetric else '/asym'}")
        scale, zero_point = weight_scale(weight, spec, weight_range)
        quantised = numerics.fake_quantize(weight, scale, zero_point, spec)
        sqnr = numerics.sqnr_db(quantised, weight)
        # a tie up to rounding where one more bit still has codes for nothing but outliers
        assert sqnr > previous - numerics.TOLERANCE[torch.float32]
        previous = sqnr


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_fit_their_dtype_and_scale(bits: int) -> None:
    model, x = Peers(), torch.randn(3, 16)
    graph = annotated(model, x, scheme=f"w{bits}a8")
    run(graph, Quant())
    quantised = graph.evaluate(graph.site("q").weight)
    codes = quantised / graph.param("q.weight_scale")
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert float(codes.abs().max()) <= 2 ** (bits - 1) - 1 + 1e-4


def test_weights_are_shared_and_unchanged() -> None:
    model, x = Peers(), torch.randn(3, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = annotated(model, x)
    run(graph, Quant())
    assert graph.param("q.weight").data_ptr() == model.q.weight.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_options_round_trip_as_text() -> None:
    for text in ("quant", "quant{weight_range=mse}", "quant{clip=learned,step=learned}"):
        assert str(parse_passes(text, PASSES)[0]) == text


@settings(max_examples=10)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["w4a8", "w3a8-g8", "w2a8-asym", "w4a8-g4-asym"]),
    st.sampled_from(list(WeightRange)),
)
def test_a_learned_rounding_starts_at_nearest_and_stays_between_neighbours(
    seed: int, scheme: str, weight_range: WeightRange
) -> None:
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(16, 6)).double(), torch.randn(3, 16).double()
    plain = annotated(model, x, scheme=scheme)
    run(plain, Quant(weight_range), ctx=context(x, model=model))
    graph = annotated(model, x, scheme=scheme)
    run(graph, Quant(weight_range, rounding=Rounding.LEARNED), ctx=context(x, model=model))
    assert graph.free == {"0.rounding"}
    nearest = plain.evaluate(plain.site("0").weight)
    torch.testing.assert_close(graph.evaluate(graph.site("0").weight).detach(), nearest)
    with torch.no_grad():
        graph.param("0.rounding").add_(torch.randn(6, 16).double() * 4)
    moved = graph.evaluate(graph.site("0").weight).detach()
    step = plain.param("0.weight_scale").repeat_interleave(
        16 // plain.param("0.weight_scale").shape[-1], -1
    )
    difference = (moved - nearest) / step
    assert bool((difference.abs() < 1 + 1e-6).all())  # one code away at most
    assert bool(((difference.round() - difference).abs() < 1e-6).all())
    assert int((difference.abs() > 0.5).sum()) > 0


def test_a_learned_rounding_needs_a_grid_that_stays() -> None:
    with pytest.raises(ConfigError, match="rounding=learned chooses codes on a fixed grid"):
        Quant(clip=Clip.WEIGHT, rounding=Rounding.LEARNED)
    model, x = Peers(), torch.randn(3, 16)
    graph = annotated(model, x, scheme="w4a8")
    passes = parse_passes("smooth{learn=true},quant{rounding=learned}", PASSES)
    with pytest.raises(InputError, match="a transform of it is free"):
        run(graph, *passes, ctx=context(x, model=model))
    graph = annotated(model, x, scheme="w2+1a8")
    with pytest.raises(InputError, match="lie on no even grid"):
        run(graph, Quant(rounding=Rounding.LEARNED), ctx=context(x, model=model))
