"""reparameterize: one graph, two programs that share weights, one compiled model that chooses."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base.diagnostics import ConfigError, InputError, LoweringError
from vdqc.base.residual import CachePolicy, Extrapolation, Reference, Store
from vdqc.base.target import TARGETS
from vdqc.compiled import CompiledModel, stand_in
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import parse_rule
from vdqc.ir import artifact
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.sparse_ops import REPARAMETERIZED_ATTENTION
from vdqc.loading import load
from vdqc.lowering.lower import lower
from vdqc.lowering.residual import split
from vdqc.passes.annotate import Annotate
from vdqc.passes.canonicalize import Canonicalize
from vdqc.passes.quant import Quant
from vdqc.passes.reparameterize import Reparameterize
from vdqc.passes.sparsify import Sparsify
from vdqc.testing.harness import assert_close, remarks, run

CPU = torch.device("cpu")
SPARSE = Sparsify(density=0.4, block=16)


class Video(nn.Module):
    """Two layers of self-attention over the tokens of [B, 1, F, H, W], at a timestep."""

    def __init__(self, timed: bool = True) -> None:
        super().__init__()
        self.patch, self.timed = nn.Conv3d(1, 16, (1, 2, 2), (1, 2, 2)), timed
        self.blocks = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = h * (1 + timestep[:, None, None] / 1000)
        for block in self.blocks:
            q, k, v = block(h).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(4 * q, k, v)
            h = h + attended.transpose(1, 2).flatten(2)
        return h


def sample(time: float, frames: int = 6, batch: int = 5, size: int = 8) -> Sample:
    torch.manual_seed(1)
    call = {"x": torch.randn(batch, 1, frames, size, size + 4)}
    return Sample({**call, "timestep": torch.full((batch,), time)}, timestep=time)


SAMPLES = [sample(900.0), sample(400.0, 7, 3, 12), sample(100.0)]


@functools.cache
def _sparse(scheme: str) -> Graph:
    torch.manual_seed(0)
    graph = capture(Video().eval(), SAMPLES)
    ctx = Context(SAMPLES, rules=(parse_rule(scheme),))
    PassManager([Canonicalize(), Annotate(keep="nothing")], probe=False).run(graph, ctx)
    if scheme != "none":
        run(graph, Quant(), ctx=ctx)
    run(graph, SPARSE, ctx=ctx)
    return graph


def sparse(scheme: str = "none") -> tuple[Graph, Context]:
    return _sparse(scheme).clone(), Context(SAMPLES, rules=(parse_rule(scheme),))


def lowered(option: Reparameterize, scheme: str = "none") -> Graph:
    graph, ctx = sparse(scheme)
    run(graph, option, ctx=ctx)
    lower(graph, TARGETS["cpu"], ctx.diagnostics)
    return graph


def test_rewrites_what_sparsify_made() -> None:
    graph, ctx = sparse()
    (record,) = run(graph, Reparameterize(interval=4), ctx=ctx)
    assert record.rewrites == 2
    found = [node for node in graph.nodes if node.target is REPARAMETERIZED_ATTENTION]
    assert len(found) == 2
    assert CachePolicy.parse(str(found[0].args[8])).interval == 4
    facts = record.facts["cache"]
    assert facts["bytes_per_branch"] == 2 * 4 * (5 * 2 * 144 * 8 + 10 * 16 * (144 + 8))
    share = facts["mask_density"]
    assert facts["effective_density"] == pytest.approx(0.25 + 0.75 * share)


def test_leaves_alone_what_is_dense() -> None:
    graph = capture(Video().eval(), SAMPLES)
    ctx = Context(SAMPLES)
    PassManager([Canonicalize(), Annotate()], probe=False).run(graph, ctx)
    before = str(graph)
    run(graph, Reparameterize(), ctx=ctx)
    assert str(graph) == before
    assert remarks(ctx)[-1] == ("", "nothing-sparse")


@pytest.mark.parametrize("store", list(Store))
@pytest.mark.parametrize("scheme", ["none", "w8a8"])
def test_two_programs(store: Store, scheme: str) -> None:
    graph = lowered(Reparameterize(store=store, rank=8, order=1), scheme)
    inputs = graph.signature.bind((), SAMPLES[2].inputs)
    programs = split(graph.module, CPU)
    expected, *_ = _dense(scheme, inputs)
    own, *residuals = programs.refresh(*inputs)
    assert_close(own, expected)
    assert len(residuals) == programs.count == 2
    # with the residuals of the same call, sparse attention gives what dense attention gives
    parts = [
        part
        for residual in residuals
        for part in _residual(programs.policy, residual).inputs(programs.policy)
    ]
    (again,) = programs.reuse(*inputs, *parts)
    if store is Store.INT8 or scheme != "none":
        assert (again - own).norm() < 0.05 * own.norm()
    else:
        assert_close(again, own)
    (without,) = programs.reuse(*inputs, *(0 * part for part in parts))
    assert (without - own).norm() > 0.01 * own.norm()
    calls = [node for node in programs.reuse.graph.nodes if node.op == "call_function"]
    names = {str(node.target) for node in calls}
    assert not any("scaled_dot_product" in name or "compare" in name for name in names)
    weights = dict(graph.module.named_parameters())
    for program in (programs.refresh, programs.reuse):
        for name, weight in program.named_parameters():
            assert weight.data_ptr() == weights[name].data_ptr()


def _dense(scheme: str, inputs: Any) -> Any:
    graph, ctx = sparse(scheme)
    run(graph, Reparameterize(), ctx=ctx)  # a call by itself: dense
    return graph.run_inputs(inputs)


def _residual(policy: CachePolicy, value: Tensor) -> Any:
    from vdqc.base.residual import Residual

    return Residual.of(policy, value, None, 0)


def steps(model: Any, count: int, first: float = 900.0, **shape: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(**sample(first - 10 * i, **shape).inputs) for i in range(count)]


def test_saved_and_loaded_it_chooses_without_compiling_again(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    graph = lowered(Reparameterize(interval=3, extrapolation=Extrapolation.LINEAR))
    with artifact.staging(tmp_path / "out") as folder:
        artifact.write(graph, folder, target=TARGETS["cpu"])
        artifact.seal(folder)
    model = load(tmp_path / "out")
    cache = model.residual_cache
    assert cache is not None
    expected = steps(model, 7)
    assert (cache.refreshes, cache.reuses) == (3, 4)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, dynamic=True)
    model.reset_cache()
    for found, wanted in zip(steps(model, 7), expected, strict=True):
        assert_close(found, wanted)
    pieces = counter.frame_count
    with torch.compiler.set_stance("fail_on_recompile"):
        steps(model, 7)
        steps(model, 5, frames=7, batch=3, size=12)
    assert counter.frame_count == pieces
    moved = model.to("cpu")
    assert_close(steps(moved, 1)[0], expected[0])


def test_guidance_has_a_cache_per_context() -> None:
    model = stand_in(lowered(Reparameterize(interval=3)), TARGETS["cpu"])
    assert isinstance(model, CompiledModel)
    cache = model.residual_cache
    assert cache is not None
    for i, name in itertools.product(range(6), ("cond", "uncond")):
        with model.cache_context(name):
            model(**sample(900.0 - 10 * i).inputs)
    assert (cache.refreshes, cache.reuses) == (4, 8)


def test_other_sizes_of_another_video() -> None:
    model = stand_in(lowered(Reparameterize(interval=3)), TARGETS["cpu"])
    first = steps(model, 4)
    other = steps(model, 4, frames=7, batch=3, size=12)
    assert other[0].shape != first[0].shape
    for found, wanted in zip(steps(model, 4), first, strict=True):
        assert torch.equal(found, wanted)  # nothing is left of the video between


def test_refuses() -> None:
    graph, ctx = sparse()
    with pytest.raises(ConfigError, match="memory of at least"):
        run(graph, Reparameterize(memory=1e-6), ctx=ctx)
    with pytest.raises(ConfigError, match="interval"):
        Reparameterize(interval=1, reference=Reference.ADJACENT)
    programs = lowered(Reparameterize())
    from vdqc.aot import package

    with pytest.raises(LoweringError, match="two of 'reparameterize'"):
        package(programs, TARGETS["cpu"], [], Path("none"))

    class Timeless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.flatten(2).transpose(1, 2).unflatten(-1, (2, -1)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(h, h, h)

    calls = [Sample({"x": torch.randn(2, 4, f, 4 * f, 5 * f)}) for f in (3, 4)]
    timeless = capture(Timeless().eval(), calls)
    ctx = Context(calls)
    PassManager([Canonicalize(), Annotate()], probe=False).run(timeless, ctx)
    run(timeless, Sparsify(density=0.5, block=16), ctx=ctx)
    with pytest.raises(InputError, match="holds the timestep"):
        run(timeless, Reparameterize(), ctx=ctx)


@given(
    order=st.sampled_from([1, 2]),
    interval=st.integers(2, 9),
    store=st.sampled_from(list(Store)),
    extrapolation=st.sampled_from(list(Extrapolation)),
)
def test_the_policy_of_a_pass_reads_back(
    order: int, interval: int, store: Store, extrapolation: Extrapolation
) -> None:
    option = Reparameterize(order, 8, interval, extrapolation, store=store)
    policy = option.policy("t")
    assert CachePolicy.parse(str(policy)) == policy
    assert (policy.order, policy.interval, policy.store) == (order, interval, store)
