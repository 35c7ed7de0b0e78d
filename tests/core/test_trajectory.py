"""The calibration pool: what is recorded, what is stored, what is refused."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base.diagnostics import ArtifactError, InputError
from vdqc.engine import trajectory
from vdqc.engine.pool import INDEX, Subset, candidates, encode, open_pool, sample_keys
from vdqc.engine.trajectory import record, timestep_of
from vdqc.ir.sample import Sample

STEPS = (900.0, 500.0, 100.0)


class Model(nn.Module):
    """Takes nested arguments; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.calls = 0

    def forward(
        self, x: Tensor, timestep: Tensor, text: Any = None, return_dict: bool = True
    ) -> Tensor:
        self.calls += 1
        return x * self.weight


def generate(model: Any, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, generator=random), torch.randn(2, 3, generator=random)
    for t in STEPS:
        x -= 0.1 * model(x, torch.full((2,), t), text={"tokens": (text, None), "n": [3]})
    return x


def expected(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, generator=random)
    return [x * 0.9**step for step in range(3)]


def test_records_every_call_as_it_was_made(tmp_path: Path) -> None:
    pool = record(Model(), generate, [3, 1], tmp_path / "pool")
    assert len(pool) == 6
    assert [(c.seed, c.step, c.timestep) for c in pool.candidates] == [
        (seed, step, t) for seed in (3, 1) for step, t in enumerate(STEPS)
    ]
    for sample, x in zip(pool, expected(3) + expected(1), strict=True):
        assert torch.allclose(sample.inputs["x"], x)  # as it was before the sampler wrote on it
        assert sample.timestep == float(sample.inputs["timestep"][0])
        tokens, nothing = sample.inputs["text"]["tokens"]
        assert tokens.shape == (2, 3)
        assert nothing is None
        assert sample.inputs["text"]["n"] == [3]
    assert not Model()._forward_pre_hooks


def test_calls_of_one_timestep_are_branches_of_a_step(tmp_path: Path) -> None:
    def guided(model: Any, seed: int) -> Tensor:
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        text = {"tokens": (torch.ones(2, 3), None), "n": [3]}
        for t in STEPS:
            x = x - sum(0.1 * model(x, torch.full((2,), t), text=text) for _ in range(2))
        return x

    pool = record(Model(), guided, [2], tmp_path / "pool")
    places = [(step, branch) for step in range(len(STEPS)) for branch in range(2)]
    assert [(c.step, c.branch) for c in pool.candidates] == places
    assert [(sample.step, sample.branch) for sample in pool] == places
    assert len(set(sample_keys(pool))) == len(pool)


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    pool = record(Model(), generate, [0], tmp_path / "pool")
    stored = (tmp_path / "pool" / "seed00000-00.safetensors").read_bytes()
    text = pool[0].inputs["text"]["tokens"][0]
    assert stored.count(text.numpy().tobytes()) == 1


def test_a_pool_opens_again_with_the_same_hash(tmp_path: Path) -> None:
    pool = record(Model(), generate, [0, 1], tmp_path / "pool")
    again = open_pool(tmp_path / "pool")
    assert again.hash == pool.hash == record(Model(), generate, [0, 1], tmp_path / "other").hash
    assert open_pool(tmp_path / "pool", [1]).hash != pool.hash
    assert again[-1].inputs["x"].equal(pool[5].inputs["x"])


def test_one_candidate_of_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(model: Any, seed: int) -> Tensor:
        for rows in (2, 2 + seed % 2):
            model(torch.randn(rows, 4), torch.rand(rows))
        return torch.zeros(1)

    monkeypatch.setattr(trajectory, "SHARD_BYTES", 40)
    pool = record(Model(), sizes, [0, 1, 2, 3], tmp_path / "pool")
    assert [list(pool[i].inputs["x"].shape) for i in pool.one_of_each_size()] == [[2, 4], [3, 4]]
    assert pool.one_of_each_size() == [0, 3]


def test_recording_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "SHARD_BYTES", 40)
    pool = record(Model(), generate, [0], tmp_path / "pool")
    assert len(pool.trajectories[0]["files"]) > 2
    assert torch.allclose(pool[2].inputs["x"], expected(0)[2])


def test_an_interrupted_recording_goes_on(tmp_path: Path) -> None:
    calls: list[int] = []

    def killed(model: Any, seed: int) -> Tensor:
        if seed == 2 and calls == [0, 1]:
            model(torch.ones(2, 4), torch.zeros(2))
            raise KeyboardInterrupt
        calls.append(seed)
        return generate(model, seed)

    model, folder = Model(), tmp_path / "pool"
    with pytest.raises(KeyboardInterrupt):
        record(model, killed, [0, 1, 2, 3], folder)
    assert not model._forward_pre_hooks
    with pytest.raises(ArtifactError, match=r"expected 4 trajectories in .*, got 2") as caught:
        open_pool(folder)
    assert caught.value.diagnostic.code == "pool-unfinished"
    for left in ("seed00002-00.safetensors", "seed00002-07.safetensors"):  # behind by the kill
        (folder / left).write_bytes(b"half")
    calls.append(-1)
    pool = record(model, killed, [0, 1, 2, 3], folder)
    assert calls == [0, 1, -1, 2, 3]
    assert not (folder / "seed00002-07.safetensors").exists()
    assert pool.hash == record(Model(), killed, [0, 1, 2, 3], tmp_path / "whole").hash


def test_more_seeds_extend_a_pool(tmp_path: Path) -> None:
    model, folder = Model(), tmp_path / "pool"
    record(model, generate, [0], folder)
    assert model.calls == 3
    assert len(record(model, generate, [0, 1], folder)) == 6
    assert model.calls == 6
    assert len(record(model, generate, [1], folder)) == 3
    assert model.calls == 6


def test_another_models_pool_is_refused(tmp_path: Path) -> None:
    record(Model(), generate, [0], tmp_path / "pool")
    other = Model()
    with torch.no_grad():
        other.weight[0] = 2
    with pytest.raises(ArtifactError, match="recorded with another weights") as caught:
        record(other, generate, [0], tmp_path / "pool")
    assert caught.value.diagnostic.code == "pool-foreign"

    source = "def generate(model, seed):\n    model(x=None, timestep=None)\n"
    (tmp_path / "sampler.py").write_text(source)
    spec = importlib.util.spec_from_file_location("sampler", tmp_path / "sampler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ArtifactError, match="recorded with another sampler"):
        record(Model(), module.generate, [0], tmp_path / "pool")


def test_a_damaged_pool_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    record(Model(), generate, [0], folder)
    shard = folder / "seed00000-00.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"is damaged: its hash"):
        _ = open_pool(folder)[0]
    shard.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"expected \d+ bytes in"):
        open_pool(folder)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"got no file"):
        open_pool(folder)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds notes.txt and no pool.json"):
        record(Model(), generate, [0], tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ArtifactError, match=r"expected a pool at"):
        open_pool(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ArtifactError, match=r"is not JSON"):
        open_pool(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"format": {"name": "vdqc-pool", "version": 9}}))
    with pytest.raises(ArtifactError, match=r"expected the format .* got .*9"):
        open_pool(tmp_path)


def test_one_process_records_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ArtifactError, match="another process records"):
        record(Model(), generate, [0], folder)
    os.close(lock)
    assert len(record(Model(), generate, [0], folder)) == 3


def test_a_sampler_that_cannot_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one seed"):
        record(Model(), generate, [], tmp_path / "a")
    with pytest.raises(InputError, match="it never did"):
        record(Model(), lambda model, seed: None, [0], tmp_path / "b")
    with pytest.raises(InputError, match=r"seed 0, call 0: 'x' holds NaN"):
        record(
            Model(),
            lambda model, seed: model(torch.full((2,), torch.nan), torch.zeros(2)),
            [0],
            tmp_path / "c",
        )
    with pytest.raises(InputError, match=r"'.text.f' is a function, which a pool cannot store"):
        record(
            Model(),
            lambda model, seed: model(torch.zeros(2), torch.zeros(2), text={"f": generate}),
            [0],
            tmp_path / "d",
        )
    with torch.device("meta"):
        model = Model()
    with pytest.raises(InputError, match="weights in memory"):
        record(model, generate, [0], tmp_path / "e")


leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | st.text(max_size=3)
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(nested, st.integers(0, 9))
def test_arguments_survive_the_way_through_json(value: Any, number: int) -> None:
    from vdqc.engine.pool import _decode

    tensors = [torch.tensor(number)]
    inputs = {"a": value, "b": (tensors[0], [value])}
    encoded = json.loads(json.dumps(encode(inputs, "", lambda tensor, path: 0)))
    assert _decode(encoded, lambda place: tensors[place]) == inputs


def test_a_subset_reads_from_the_pool(tmp_path: Path) -> None:
    pool = record(Model(), generate, [0, 1], tmp_path / "pool")
    subset = Subset(pool, [4, 0])
    assert len(subset) == 2
    assert subset[0].inputs["x"].equal(pool[4].inputs["x"])
    assert subset[1:][0].timestep == 900.0
    found = candidates(subset)
    assert found is not None
    assert [(c.seed, c.step) for c in found] == [(1, 1), (0, 0)]
    assert sample_keys(subset) == [sample_keys(pool)[4], sample_keys(pool)[0]]


def test_plain_samples_are_named_by_their_content() -> None:
    samples = [Sample({"x": torch.full((2,), float(n)), "flag": True}) for n in range(3)]
    keys = sample_keys(samples)
    assert len(set(keys)) == 3
    assert sample_keys(samples[::-1]) == keys[::-1]
    assert candidates(samples) is None


def test_samples_carry_their_place(tmp_path: Path) -> None:
    pool = record(Model(), generate, [4], tmp_path / "pool")
    assert [(sample.trajectory, sample.step) for sample in pool] == [(4, 0), (4, 1), (4, 2)]
    assert candidates(list(pool)) == pool.candidates
    assert sample_keys(list(pool)) == sample_keys(pool)


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ({"timestep": torch.tensor([7.0, 8.0])}, 7.0),
        ({"t": 3}, 3.0),
        ({"timesteps": torch.tensor(2)}, 2.0),
        ({"x": 1.0}, None),
    ],
)
def test_timestep_of_a_call(inputs: dict[str, Any], found: float | None) -> None:
    assert timestep_of(inputs) == found
