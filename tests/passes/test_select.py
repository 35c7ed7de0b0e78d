from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.engine.diverse import Reference
from vdqc.engine.features import (
    candidate_features,
    latent_input,
    monitored,
    patch_size,
    patchify,
    saliences,
)
from vdqc.engine.pass_manager import Context
from vdqc.engine.pool import Pool, Subset
from vdqc.engine.recipe import parse_passes
from vdqc.engine.selection import Neighbour, quantisation_salience
from vdqc.engine.trajectory import record
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.sample import Sample
from vdqc.passes.select import Method, Select
from vdqc.passes.smooth import Smooth
from vdqc.passes.table import PASSES
from vdqc.testing.harness import annotated, run

STEPS = (900.0, 500.0, 100.0)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Video(nn.Module):
    """Patches of 1x2x2 of [B, C, F, H, W], two attention blocks, and back."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv3d(2, width, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        batch, channels, frames, height, wide = x.shape
        tokens = self.embed(x).flatten(2).transpose(1, 2) + timestep[:, None, None] / 1000
        for block in self.blocks:
            tokens = block(tokens)
        y = self.head(tokens).reshape(batch, frames, height // 2, wide // 2, channels, 2, 2)
        return y.permute(0, 4, 1, 2, 5, 3, 6).reshape(x.shape)


class Plain(nn.Module):
    """No blocks and no frames."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def generate(model: Any, seed: int) -> Tensor:
    x = torch.randn(2, 2, 4, 4, 6, generator=torch.Generator().manual_seed(seed))
    for t in STEPS:
        x = x - 0.3 * model(x=x, timestep=torch.full((2,), t))
    return x


def videos(count: int, seed: int = 0) -> list[Sample]:
    random = torch.Generator().manual_seed(seed)
    return [
        Sample(
            {
                "x": torch.randn(2, 2, 4, 4, 6, generator=random),
                "timestep": torch.full((2,), STEPS[n % 3]),
            },
            timestep=STEPS[n % 3],
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Video().eval()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> Graph:
    larger = {"x": torch.randn(3, 2, 5, 8, 10), "timestep": torch.ones(3)}
    return capture(model, [videos(1)[0], Sample(larger)])


@pytest.fixture(scope="module")
def pool(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return record(model, generate, range(8), tmp_path_factory.mktemp("pool"))


def chosen(graph: Graph, samples: Sequence[Sample], text: str) -> tuple[Context, dict[str, Any]]:
    ctx = Context(samples=samples)
    (record,) = run(graph, *parse_passes(text, PASSES), ctx=ctx)
    assert record.rewrites == 0
    return ctx, record.facts


@pytest.mark.parametrize("method", Method)
def test_replaces_the_samples_and_says_which_and_why(
    graph: Graph, pool: Pool, method: Method
) -> None:
    text = str(graph)
    clusters = ",clusters=3" if method is Method.NFDS else ""
    ctx, facts = chosen(graph, pool, f"select{{method={method},count=6{clusters}}}")
    assert str(graph) == text
    assert isinstance(ctx.samples, Subset)
    assert len(ctx.samples) == 6
    assert facts["method"] == method
    assert facts["candidates"] == 24
    assert facts["pool"] == pool.hash
    assert [row["index"] for row in facts["chosen"]] == ctx.samples.indices
    for row, sample in zip(facts["chosen"], ctx.samples, strict=True):
        assert row["timestep"] == sample.timestep == STEPS[row["step"]]
        assert row["seed"] == row["index"] // 3
        assert row["why"]
    fixed = method in (Method.UNIFORM, Method.SALIENT)
    assert (facts["stability"]["overlap"] == 1) is fixed
    assert facts["stability"]["seeds"] == (1 if fixed else 5)


def test_leaves_the_probe_where_it_was(graph: Graph) -> None:
    samples = videos(12)
    ctx = Context(samples=samples)
    (record,) = run(graph, Select(count=3, seed=1), ctx=ctx)
    assert record.error == 0
    assert ctx.samples[0] is not samples[0]
    probe = ctx.probe_inputs(graph)
    assert probe[0] is samples[0].inputs["x"]
    run(graph, Select(count=2), ctx=ctx)
    assert ctx.probe_inputs(graph)[0] is probe[0]


def test_passes_behind_it_learn_from_the_choice() -> None:
    model, x = Plain().eval(), torch.randn(4, 8)
    graph = annotated(model, x)
    samples = [Sample({"x": x * scale}) for scale in (10.0, 1.0, 20.0)]
    ctx = Context(samples=samples)
    ctx.stats(graph)  # of all samples: the pass behind must not see these
    run(graph, Select(Method.UNIFORM, count=1), Smooth(), ctx=ctx)
    whole = Context(samples=samples[1:2])
    twin = annotated(model, x)
    run(twin, Smooth(), ctx=whole)
    assert torch.equal(graph.param("linear.smooth"), twin.param("linear.smooth"))


@settings(max_examples=3)
@given(st.integers(0, 2**31))
@pytest.mark.parametrize("method", ["random", "timestep", "nfds"])
def test_the_order_of_samples_does_not_matter(graph: Graph, method: str, seed: int) -> None:
    samples = videos(10, seed)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
    text = f"select{{method={method},count=4,repeats=1,seed={seed % 100}}}"
    first, _ = chosen(graph, samples, text)
    moved, _ = chosen(graph, [samples[at] for at in order], text)
    found = [{id(sample.inputs["x"]) for sample in ctx.samples} for ctx in (first, moved)]
    assert found[0] == found[1]


def test_more_than_there_is_is_one_clear_error(graph: Graph) -> None:
    with pytest.raises(InputError, match=r"at least 40 samples to select from, got 3"):
        run(graph, Select(), ctx=Context(samples=videos(3)))


# -- nfds ---------------------------------------------------------------------------------------


def test_an_odd_sample_is_left_out_and_named(graph: Graph) -> None:
    samples = videos(10)
    odd = {**samples[7].inputs, "x": samples[7].inputs["x"] + 50}
    samples[7] = Sample(odd, samples[7].timestep)
    ctx, facts = chosen(graph, samples, "select{method=nfds,count=9,drop=0.1}")
    assert [row["index"] for row in facts["noise"]] == [7]
    assert all(sample is not samples[7] for sample in ctx.samples)


def test_frames_are_those_of_the_last_block(graph: Graph, model: nn.Module) -> None:
    still = torch.randn(2, 2, 1, 4, 6).expand(2, 2, 4, 4, 6).contiguous()
    samples = [Sample({"x": still, "timestep": torch.ones(2)}), *videos(2)]
    features = candidate_features(graph, samples, layers=1)
    assert features.means.shape == features.variances.shape == (3, 1)
    assert features.similarities.shape == (3, 3)
    assert torch.allclose(features.similarities[0], torch.ones(3).double())
    tokens: list[Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda *args: tokens.append(args[2].detach()))  # type: ignore[index,union-attr]
    model(**samples[1].inputs)
    handle.remove()
    frames = tokens[0].double().unflatten(1, (4, 6)).flatten(2)
    wanted = torch.cosine_similarity(frames[:, :1], frames[:, 1:], dim=-1).mean(0)
    assert torch.allclose(features.similarities[1], wanted, atol=1e-5)
    assert float(features.means[1]) == pytest.approx(float(tokens[0].mean()), rel=1e-4)
    variance = float(tokens[0].var(correction=0))
    assert float(features.variances[1]) == pytest.approx(variance, rel=1e-4)


def test_candidates_of_other_lengths(graph: Graph) -> None:
    longer = Sample({"x": torch.randn(2, 2, 6, 4, 6), "timestep": torch.ones(2)})
    features = candidate_features(graph, [*videos(2), longer], reference=Reference.PREVIOUS)
    assert features.similarities.shape == (3, 3)


def test_a_model_without_blocks_is_monitored_at_its_output() -> None:
    graph = annotated(Plain(), torch.randn(2, 6, 8))
    assert [node.name for node in monitored(graph, 4)] == [
        node.name for node in graph.output.all_input_nodes
    ]
    with pytest.raises(InputError, match=r"expected frames in %linear.* or a video as an input"):
        candidate_features(graph, [Sample({"x": torch.randn(2, 6, 8)})])


def test_frames_fall_back_to_the_video_that_is_given() -> None:
    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    x = torch.randn(2, 3, 4, 5, 5)
    features = candidate_features(annotated(Pixels(), x), [Sample({"x": x})])
    frames = x.double().transpose(1, 2).flatten(2)
    wanted = torch.cosine_similarity(frames[:, :1], frames[:, 1:], dim=-1).mean(0)
    assert torch.allclose(features.similarities[0], wanted)


def test_a_candidate_that_is_not_finite_is_refused(graph: Graph) -> None:
    bad = Sample({"x": torch.full((2, 2, 4, 4, 6), torch.nan), "timestep": torch.ones(2)})
    with pytest.raises(InputError, match=r"candidate 1 gives NaN"):
        candidate_features(graph, [*videos(1), bad])


# -- salient ------------------------------------------------------------------------------------


def test_saliences_along_a_trajectory(graph: Graph, pool: Pool) -> None:
    for neighbour, ends in ((Neighbour.PREVIOUS, 0), (Neighbour.NEXT, 2)):
        diffusion, quantisation = saliences(graph, pool, neighbour=neighbour)
        x = [pool[index].inputs["x"].double() for index in range(3)]
        shift = -1 if neighbour is Neighbour.PREVIOUS else 1
        for step in range(3):
            other = x[1 if step == ends else step + shift]
            wanted = float((x[step] - other).square().sum() / x[step].square().sum())
            assert diffusion[step] == pytest.approx(wanted)
        tokens = F.unfold(x[0].transpose(1, 2).flatten(0, 1), 2, stride=2)  # [B F, C 4, n]
        tokens = tokens.unflatten(0, (2, 4)).transpose(1, 2).flatten(2).mT
        assert quantisation[0] == pytest.approx(quantisation_salience(tokens))


def test_salient_needs_trajectories(graph: Graph) -> None:
    with pytest.raises(InputError, match="recorded along trajectories, got single calls"):
        chosen(graph, videos(4), "select{method=salient,count=2}")


def test_latents_and_their_patches(graph: Graph) -> None:
    assert latent_input(graph) == 0
    assert patch_size(graph, graph.inputs[0]) == (1, 2, 2)
    assert patch_size(graph, graph.inputs[1]) == ()
    with pytest.raises(ConfigError, match="is 'y'"):
        latent_input(graph, "y")
    x = torch.arange(2 * 2 * 3 * 5).reshape(1, 2, 2, 3, 5).float()
    tokens = patchify(x, (1, 2, 2))
    assert tokens.shape == (1, 2 * 1 * 2, 8)
    first = x[0, :, 0, :2, :2].flatten()
    assert sorted(tokens[0, 0].tolist()) == sorted(first.tolist())
    assert patchify(x, ()).shape == (1, 30, 2)
    assert patchify(x[:, 0, 0], (2, 2)) is not None
    assert torch.equal(patchify(x[0, 0], (9,)), x[0, 0])


def test_at_most_so_many_of_one_trajectory(graph: Graph, pool: Pool) -> None:
    _, facts = chosen(graph, pool, "select{method=salient,count=8,per_prompt=1}")
    assert facts["trajectories"] == 8
    assert {row["seed"] for row in facts["chosen"]} == set(range(8))


# -- options ------------------------------------------------------------------------------------


def test_options() -> None:
    text = "select{method=nfds,count=20,clusters=5,filter=none,reference=mean,similarity=token}"
    assert str(parse_passes(text, PASSES)[0]) == text
    text = "select{method=salient,count=30,norm=frobenius,per_prompt=4}"
    assert str(parse_passes(text, PASSES)[0]) == text
    assert Select.at == {Stage.CAPTURED, Stage.ANNOTATED}
    for bad, message in (
        ("count=0", r"select.count: expected 1 or more, got 0"),
        ("drop=1", r"select.drop: expected 0 up to, not including, 1, got 1"),
        ("clusters=4", r"select.clusters belongs to method=nfds, got method=random"),
        ("method=nfds,norm=frobenius", r"select.norm belongs to method=salient"),
        ("method=best", r"select.method: got 'best'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_passes(f"select{{{bad}}}", PASSES)


def test_a_pool_is_chosen_from_twice(graph: Graph, pool: Pool, tmp_path: Path) -> None:
    ctx = Context(samples=pool)
    run(graph, Select(Method.TIMESTEP, count=12), Select(Method.SALIENT, count=3), ctx=ctx)
    assert len(ctx.samples) == 3
    assert isinstance(ctx.samples, Subset)
    assert isinstance(ctx.samples.whole, Subset)
