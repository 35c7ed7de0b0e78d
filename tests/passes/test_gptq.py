import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import numerics
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.rounding import compensated, input_factor
from vdqc.base.scheme import QuantSpec
from vdqc.engine.pass_manager import Context
from vdqc.engine.recipe import parse_passes
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.site import set_note
from vdqc.ir.weight_quantiser import WeightRange
from vdqc.passes.gptq import Gptq
from vdqc.passes.quant import Clip, Quant
from vdqc.passes.table import PASSES
from vdqc.testing.harness import AdaLNBlock, annotated, assert_ir, context, remarks, run


class One(nn.Module):
    """One linear."""

    def __init__(self, width: int = 16, rows: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(width, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Two(nn.Module):
    """A linear in front of another: the second reads what the first rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Rows with as few directions as a trained model's: each channel is a mix of the others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / torch.arange(1, width + 1).sqrt()
    return torch.randn(tokens, width, generator=generator) @ mix


def test_the_weight_is_rounded_and_its_quantiser_stays() -> None:
    model, x = One(), correlated(40, 16)
    graph = annotated(model, x, scheme="w4a8")
    run(graph, Quant(), Gptq(), ctx=context(x, model=model))
    assert_ir(
        graph,
        """
        graph (%x: f32[s0, 16]) @compressed {
          %0 = vdqc.fake_quantize(%x, None, None, 'int8/token/dynamic') : f32[s0, 16]
          %1 = vdqc.fake_quantize(@fc.weight_rounded, @fc.weight_scale, None, 'int4/channel') : f32[8, 16]
          %2 = aten.linear(%0, %1, @fc.bias) : f32[s0, 8]  # site fc w4a8
          return [%2]
        }
        """,  # noqa: E501
    )


def test_sites_in_float_are_left_alone() -> None:
    model, x = Two(), correlated(40, 16)
    graph = annotated(model, x)
    for name in ("up", "down"):
        set_note(graph.site(name).node, scheme="none")
    run(graph, Quant())
    before = str(graph)
    (record,) = run(graph, Gptq(), ctx=Context())
    assert (str(graph), record.rewrites) == (before, 0)


def test_binary_planes_are_left_alone_with_a_remark() -> None:
    model, x = Two(), correlated(40, 16)
    graph = annotated(model, x, scheme="w2+1a8")
    ctx = context(x, model=model)
    run(graph, Quant(), ctx=ctx)
    before = str(graph)
    run(graph, Gptq(), ctx=ctx)
    assert str(graph) == before
    assert remarks(ctx) == [("up", "not-rounded"), ("down", "not-rounded")]


@torch.no_grad()
def test_each_block_is_rounded_for_the_inputs_that_rounding_leaves() -> None:
    torch.manual_seed(0)
    model, x = Two().double(), correlated(60, 16).double()
    graph = annotated(model, x, scheme="w3a16")
    run(graph, Quant(), ctx=context(x, model=model))
    weights = {name: graph.param(f"{name}.weight") for name in ("up", "down")}
    scales = {name: graph.param(f"{name}.weight_scale") for name in ("up", "down")}
    whole = graph.clone()
    run(graph, Gptq(), ctx=context(x, model=model))
    run(whole, Gptq(sequential=False), ctx=context(x, model=model))
    spec = QuantSpec.parse("int3/channel")

    def rounded(name: str, rows: Tensor) -> Tensor:
        factor = input_factor(rows.T @ rows / len(rows))
        return compensated(weights[name], factor, scales[name], None, spec)

    # both linears are outside of blocks, so one segment: the second saw the first to nearest
    nearest = numerics.fake_quantize(weights["up"], scales["up"], None, spec)
    hidden = torch.relu(nn.functional.linear(x, nearest, model.up.bias))
    for found in (graph, whole):
        assert numerics.relative_error(found.param("up.weight_rounded"), rounded("up", x)) < 1e-10
        expected = rounded("down", hidden)
        assert numerics.relative_error(found.param("down.weight_rounded"), expected) < 1e-10


class Blocks(nn.Module):
    """Two blocks, a linear each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        return x


@torch.no_grad()
def test_later_blocks_see_earlier_rounding() -> None:
    torch.manual_seed(1)
    model, x = Blocks().double(), correlated(60, 16).double()
    graph = annotated(model, x, scheme="w3a16")
    run(graph, Quant(), Gptq(), ctx=context(x, model=model))
    first = graph.param("blocks.0.weight_rounded")
    hidden = torch.relu(nn.functional.linear(x, first, model.blocks[0].bias))
    factor = input_factor(hidden.T @ hidden / len(hidden))
    scale = graph.param("blocks.1.weight_scale")
    weight = model.blocks[1].weight.detach()
    expected = compensated(weight, factor, scale, None, QuantSpec.parse("int3/channel"))
    assert numerics.relative_error(graph.param("blocks.1.weight_rounded"), expected) < 1e-10


def error(graph: Graph, model: nn.Module, x: Tensor) -> float:
    """Squared error of the model's output to that of the float model, over its energy."""
    (out,) = graph.run_inputs([x])
    return float((out - model(x)).square().mean() / model(x).square().mean())


class Deep(nn.Module):
    """Eight linears, a residual add around each pair: what the first lose, the last inherit."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(32, 64) for _ in range(4))
        self.downs = nn.ModuleList(nn.Linear(64, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w3a16", "w4a4", "w8a4"])
def test_what_earlier_weights_lost_is_taken_up(scheme: str) -> None:
    tokens = 4096  # of 512, eight a channel, whole steps fit more noise than they mend
    for seed in range(2):
        torch.manual_seed(seed)
        model, x = Deep(), correlated(tokens + 512, 32, seed)
        found = []
        for propagate in (0.0, 0.5, 1.0):
            graph = annotated(model, x[:tokens], scheme=scheme)
            run(graph, Quant(), Gptq(propagate=propagate), ctx=context(x[:tokens], model=model))
            found.append(error(graph, model, x[tokens:]))  # on what nothing was fitted to
        assert found[1] < 0.93 * found[0]
        assert found[2] < 0.93 * found[0]


@torch.no_grad()
def test_a_weight_takes_up_the_quantised_input_by_least_squares() -> None:
    torch.manual_seed(0)
    model, x = One(16, 8).double(), correlated(200, 16).double()
    graph = annotated(model, x, scheme="w8a4")
    for share in (0.5, 1.0):
        copy = graph.clone()
        run(copy, Quant(), Gptq(propagate=share, damping=1e-9), ctx=context(x, model=model))
        read = FAKE_QUANTIZE(x, None, None, "int4/token/dynamic")
        best = torch.linalg.lstsq(read, x @ model.fc.weight.T).solution.T
        expected = model.fc.weight + share * (best - model.fc.weight)
        # eight bits of the weight are far less than what four of the input cost
        moved = float((expected - model.fc.weight).norm())
        assert float((copy.param("fc.weight_rounded") - expected).norm()) < 0.2 * moved


def test_where_nothing_was_lost_nothing_is_taken_up() -> None:
    torch.manual_seed(0)
    model, x = One(), correlated(40, 16)
    graph = annotated(model, x, scheme="w3a16")
    found = []
    for share in (0.0, 1.0):
        copy = graph.clone()
        run(copy, Quant(), Gptq(propagate=share), ctx=context(x, model=model))
        found.append(copy.param("fc.weight_rounded"))
    assert torch.equal(*found)


@settings(max_examples=4)
@given(st.integers(0, 2**31), st.sampled_from(["w3a16", "w4a8-g8", "w4a6-asym", "w2a8"]))
def test_codes_fit_and_scales_stay(seed: int, scheme: str) -> None:
    torch.manual_seed(seed)
    model = AdaLNBlock(16, heads=2)
    inputs = torch.randn(2, 12, 16), torch.randn(2, 16)
    graph = annotated(model, *inputs, scheme=scheme)
    run(graph, Quant(), ctx=context(*inputs, model=model))
    before = {name: graph.param(name) for name in graph.param_names() if "scale" in name}
    gptq = Gptq(order=bool(seed % 2), propagate=seed % 3 / 2)
    run(graph, gptq, ctx=context(*inputs, model=model))
    for name, value in before.items():
        assert torch.equal(graph.param(name), value)
    for site in graph.sites("to_*"):
        value, scale, zero, text = site.weight.args
        weight, spec = graph.evaluate(value), QuantSpec.parse(text)
        zero = None if zero is None else graph.evaluate(zero)
        found = numerics.fake_quantize(weight, graph.evaluate(scale), zero, spec)
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8", "w3a8-g8-asym"])
def test_the_output_is_closer_than_to_nearest(scheme: str) -> None:
    gains = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = One(64, 32)
        x = correlated(512, 64, seed)
        graph = annotated(model, x, scheme=scheme)
        ctx = context(x, model=model)
        rtn, gptq = run(graph, Quant(WeightRange.MSE), Gptq(), ctx=ctx)
        assert rtn.sqnr_db is not None
        assert gptq.sqnr_db is not None
        gains.append(gptq.sqnr_db - rtn.sqnr_db)
        assert gptq.facts["error_to_nearest"]["fc"] < 1
        assert gptq.facts["sites"]["fc"]["sqnr_db"] < rtn.facts["sites"]["fc"]["sqnr_db"]
    assert min(gains) > (0.5 if scheme == "w4a8" else 1.0)


def test_learned_scales_are_settled() -> None:
    model, x = One(), correlated(40, 16)
    graph = annotated(model, x, scheme="w4a16-asym")
    run(graph, Quant(clip=Clip.WEIGHT), ctx=context(x, model=model))
    _, scale, zero, _ = graph.site("fc").weight.args
    before = graph.evaluate(scale).detach(), graph.evaluate(zero).detach()
    run(graph, Gptq(), ctx=context(x, model=model))
    assert not graph.free
    assert torch.equal(graph.param("fc.rounded_scale"), before[0])
    assert torch.equal(graph.param("fc.rounded_zero_point"), before[1])


def test_bad_input() -> None:
    graph = annotated(Two(), correlated(40, 16))
    run(graph, Quant())
    with pytest.raises(InputError, match="rounds for the inputs that samples show"):
        run(graph, Gptq())
    for text in (
        "gptq{block=0}",
        "gptq{damping=2}",
        "gptq{propagate=1.5}",
        "gptq{propagate=0.5,sequential=false}",
    ):
        with pytest.raises(ConfigError, match="expected"):
            parse_passes(text, PASSES)
    assert str(parse_passes("gptq{order=true}", PASSES)[0]) == "gptq{order=true}"
    assert graph.stage is Stage.COMPRESSED


def test_dependent_inputs_are_damped_with_a_remark() -> None:
    model, x = One(), torch.ones(40, 16)
    graph = annotated(model, x, scheme="w4a16")
    ctx = context(x, model=model)
    run(graph, Quant(), Gptq(damping=0.0), ctx=ctx)
    assert [entry.code for entry in ctx.diagnostics] == ["moment-damped"]
    assert bool(graph.param("fc.weight_rounded").isfinite().all())


@pytest.mark.parametrize(("tokens", "codes"), [(127, ["few-tokens"]), (128, [])])
def test_few_tokens_for_what_weights_take_up_are_remarked(tokens: int, codes: list[str]) -> None:
    model, x = One(), correlated(tokens, 16)
    graph, ctx = annotated(model, x, scheme="w4a4"), context(x, model=model)
    run(graph, Quant(), Gptq(propagate=0.5), ctx=ctx)
    assert [entry.code for entry in ctx.diagnostics] == codes
    assert "127 tokens to learn from for 16 channels" in str([*ctx.diagnostics]) or not codes
