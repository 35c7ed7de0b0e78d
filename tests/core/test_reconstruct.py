"""The trainer's parts: cutting, caching, dealing samples, checkpoints."""

import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base.diagnostics import ConfigError, Diagnostics
from vdqc.engine.block_cache import ActivationCache, parse_bytes
from vdqc.engine.block_module import BlockModule, Cuts, plan_blocks
from vdqc.engine.block_trainer import Schedule, train
from vdqc.engine.checkpoint import Checkpoint, Saved
from vdqc.engine.distributed import Workers
from vdqc.engine.pass_manager import Context
from vdqc.engine.reconstruct import reconstruct
from vdqc.ir.graph import Graph
from vdqc.ir.learned import frozen
from vdqc.ir.sample import Sample

HELP = runpy.run_path(str(Path(__file__).with_name("reconstruct_stack.py")))
compressed, fresh, training = HELP["compressed"], HELP["fresh"], HELP["training"]


@pytest.fixture(scope="module")
def stack() -> tuple[Graph, list[Sample]]:
    return compressed()


# cutting ----------------------------------------------------------------------------------------


def test_pieces_are_the_blocks_and_what_is_trained_before_them(
    stack: tuple[Graph, list[Sample]],
) -> None:
    graph = stack[0].clone()
    pieces = plan_blocks(graph, frozen(graph))
    trained = [piece.name for piece in pieces if piece.free]
    assert trained == ["before blocks.0", "blocks.0", "blocks.1"]
    owned = [name for piece in pieces for name in piece.free]
    assert len(owned) == len(set(owned))
    # both blocks read one modulation input: what scales and clips it is for neither alone
    shared = {"blocks.0.modulation.smooth", "blocks.0.modulation.input_clip"}
    assert set(owned) == graph.free - shared
    assert "blocks.1.modulation.weight_clip" in owned


def test_pieces_one_after_the_other_are_the_program(stack: tuple[Graph, list[Sample]]) -> None:
    graph, samples = stack
    cuts = Cuts(graph)
    inputs = graph.signature.bind((), samples[1].inputs)
    values = dict(zip([node.name for node in graph.inputs], inputs, strict=True))
    with torch.no_grad():
        for piece in plan_blocks(graph, frozen(graph)):
            made, _ = BlockModule(cuts, piece.student_reads, piece.makes, piece.free)(values)
            values.update(made)
        (expected,) = graph.run_inputs(inputs)
    assert torch.equal(values[cuts.keys[graph.output.all_input_nodes[0]]], expected)


def test_a_piece_trains_the_graphs_own_parameters(stack: tuple[Graph, list[Sample]]) -> None:
    graph = stack[0]
    piece = plan_blocks(graph, frozen(graph))[1]
    module = BlockModule(Cuts(graph), piece.student_reads, piece.makes, piece.free)
    own = {id(graph.param(name)) for name in piece.free}
    assert {id(parameter) for parameter in module.parameters()} == own
    fixed = BlockModule(Cuts(graph), piece.student_reads, piece.makes)
    assert not list(fixed.parameters())
    operators = [str(node.target) for node in fixed.program.graph.nodes]
    assert not [name for name in operators if "amax" in name]  # weights are quantised once


def test_taps_are_what_enters_an_attention(stack: tuple[Graph, list[Sample]]) -> None:
    graph, samples = stack
    piece = next(p for p in plan_blocks(graph, frozen(graph)) if p.name == "blocks.1")
    module = BlockModule(Cuts(graph), piece.student_reads, piece.makes, taps=["query", "key"])
    seen: dict[str, Tensor] = {}
    keys = Cuts(graph).keys

    def look(node: torch.fx.Node, value: object) -> None:
        if node in keys:
            seen[keys[node]] = value  # type: ignore[assignment]

    with torch.no_grad():
        graph.run_inputs(graph.signature.bind((), samples[0].inputs), look)
        _, taps = module(seen)
    assert {name.rpartition("/")[2] for name in taps} == {"query", "key"}
    assert all(value.shape == (2, 2, 6, 8) for value in taps.values())
    alone = BlockModule(
        Cuts(graph), piece.student_reads, piece.makes, taps=["query", "key"], only_taps=True
    )
    made, found = alone(seen)
    assert not made
    assert all(torch.equal(found[name], value) for name, value in taps.items())
    assert len(alone.program.graph.nodes) < len(module.program.graph.nodes)
    assert not [node for node in alone.program.graph.nodes if "attention" in str(node.target)]


# caching ----------------------------------------------------------------------------------------


@given(
    st.integers(0, 400),
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_what_is_cached_comes_back(
    memory: int, entries: list[tuple[torch.dtype, list[int]]]
) -> None:
    cache = ActivationCache(memory)
    values = [(torch.randn(shape) * 3).to(dtype) for dtype, shape in entries]
    for index, value in enumerate(values):
        cache.put(index, "a", value)
        cache.put(index, "b", value)
    cache.put(0, "size", 7)
    assert cache.peak_held <= memory
    cache.keep_only({"b", "size"})
    assert cache.get(0, "size") == 7
    assert not cache.has(0, "a")
    for index, value in enumerate(values):
        found = cache.get(index, "b")
        assert found.dtype == value.dtype
        assert torch.equal(found, value)


def test_a_spilled_value_has_no_name_on_disk(tmp_path: Path) -> None:
    cache = ActivationCache(0, tmp_path)
    cache.put(0, "x", torch.ones(1000))
    assert cache.spilled == 4000
    assert not list(tmp_path.iterdir())
    assert torch.equal(cache.get(0, "x"), torch.ones(1000))


def test_a_view_does_not_keep_what_it_is_part_of() -> None:
    cache = ActivationCache(2**20)
    cache.put(0, "x", torch.zeros(1000, 100)[:, :2])
    assert cache.get(0, "x").untyped_storage().nbytes() == 8000


def test_sizes_in_words() -> None:
    assert parse_bytes("2GiB") == 2 * 2**30
    assert parse_bytes("1.5MB") == 1_500_000
    assert parse_bytes("17") == 17
    with pytest.raises(ConfigError, match="expected a size such as 2GiB or 500MB, got '2 houses'"):
        parse_bytes("2 houses")


# stepping ---------------------------------------------------------------------------------------


@given(
    st.integers(1, 20),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.integers(0, 3),
    st.booleans(),
)
def test_every_sample_is_seen_once_an_epoch_by_one_worker(
    count: int, lanes: int, size: int, epoch: int, ordered: bool
) -> None:
    schedule = Schedule(batch=lanes, ordered=ordered)
    schedule = schedule.for_workers(Workers(0, size), Diagnostics())
    batches = schedule.order(count, epoch, shuffled=not ordered)
    if ordered:  # a lane follows its trajectory
        for lane in schedule.lanes(count):
            assert lane == list(range(lane[0], lane[-1] + 1)) if lane else count < lanes * size
    assert sorted(itertools.chain(*batches)) == list(range(count))
    assert len(batches) * schedule.epochs == schedule.steps(count)
    shards = [schedule.shard(count, Workers(rank, size)) for rank in range(size)]
    assert sorted(itertools.chain(*shards)) == list(range(count))
    whole = [batch for batch in batches if len(batch) == schedule.batch]
    assert all(
        sum(sample in shards[rank] for sample in batch) == schedule.batch // size
        for batch in whole
        for rank in range(size)
    )


def test_rates_by_kind_and_cosine() -> None:
    schedule = Schedule()
    assert schedule.rate_of("blocks.0.fc1.smooth") == 5e-3
    assert schedule.rate_of("blocks.0.fc1.rotation_left_v") == 5e-3
    assert schedule.rate_of("blocks.0.fc1.weight_clip_low") == 5e-2
    assert schedule.rate_of("clip.0.fc1.input_step") == 5e-2
    assert schedule.rate_of("clip.0.fc1.branch_down") == 1e-4
    assert schedule.factor(0, 100) == 1.0
    assert schedule.factor(100, 100) == pytest.approx(1e-3)
    assert schedule.factor(50, 100) == pytest.approx(0.5, abs=1e-3)


class Bowl:
    """(p - sample)² over samples 0, 1, 2; the rate decides whether it converges."""

    def __init__(self, p: nn.Parameter) -> None:
        self.p, self.weights, self.remembers = p, {}, False  # type: ignore[var-annotated]

    def __call__(self, sample: int) -> tuple[Tensor, dict[str, float]]:
        return (self.p - sample).square().sum(), {"bowl": 0.0}

    def evaluate(self, samples: list[int]) -> tuple[float, dict[str, float], int]:
        total = sum(float(self(sample)[0].detach()) for sample in samples)
        return total, {"bowl": total}, len(samples)


@pytest.mark.parametrize("rate", [0.1, 1.0, 50.0])
def test_never_worse_than_the_start(rate: float) -> None:
    p = nn.Parameter(torch.tensor([1.2]))
    start = float((p.detach() - torch.arange(3)).square().mean())
    outcome = train({"p": p}, Bowl(p), Schedule(rate=rate), 3, Workers(), lambda: None)
    assert outcome.start == pytest.approx(start)
    assert outcome.best <= outcome.start
    assert float((p.detach() - torch.arange(3)).square().mean()) == pytest.approx(outcome.best)


def test_training_stops_early() -> None:
    p = nn.Parameter(torch.tensor([1.0]))  # the optimum
    schedule = Schedule(rate=1e-9, check=1, patience=2)
    outcome = train({"p": p}, Bowl(p), schedule, 3, Workers(), lambda: None)
    assert outcome.epochs == 2


# checkpoints ------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_and_damage_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint, diagnostics = Checkpoint(tmp_path), Diagnostics()
    saved = Saved({"a.clip": torch.randn(3)}, {"best": 0.5})
    file = checkpoint.save(3, "before blocks.0", saved)
    assert file is not None
    assert [path.name for path in tmp_path.iterdir()] == ["003-before-blocks.0.safetensors"]
    found = checkpoint.load(3, "before blocks.0", diagnostics)
    assert found is not None
    assert torch.equal(found.params["a.clip"], saved.params["a.clip"])
    assert found.facts == saved.facts
    assert checkpoint.load(4, "blocks.0", diagnostics) is None
    file.write_bytes(file.read_bytes()[:20])
    assert checkpoint.load(3, "before blocks.0", diagnostics) is None
    assert [entry.code for entry in diagnostics] == ["damaged-checkpoint"]


def test_another_scheme_is_another_checkpoint(tmp_path: Path) -> None:
    results = {}
    for scheme in ("w8a8", "w4a4", "w8a8"):
        graph, samples = compressed(scheme=scheme)
        found = reconstruct(graph, Context(samples), training(tmp_path, epochs=1))
        assert {result.resumed for result in found} == {scheme in results}
        results[scheme] = found[0].start
    assert results["w4a4"] > 2 * results["w8a8"]
    assert len(list(tmp_path.iterdir())) == 2


def test_calls_are_read_once(tmp_path: Path, stack: tuple[Graph, list[Sample]]) -> None:
    class Counted(list[Sample]):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            self.read += 1
            return super().__getitem__(index)

    samples = Counted(stack[1])
    reconstruct(fresh(stack)[0], Context(samples), training(epochs=2))
    assert samples.read <= len(samples) + 1  # the first once more, for shapes


def test_another_sample_is_another_checkpoint(
    stack: tuple[Graph, list[Sample]], tmp_path: Path
) -> None:
    samples = stack[1]
    for number, chosen in enumerate((samples, samples[:3], samples)):
        results = reconstruct(fresh(stack)[0], Context(chosen), training(tmp_path, epochs=1))
        assert {result.resumed for result in results} == {number == 2}
    assert len(list(tmp_path.iterdir())) == 2
