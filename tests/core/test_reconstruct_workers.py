"""Training in other processes: a kill, two workers, a lost worker."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vdqc.base.diagnostics import VdqcError
from vdqc.engine.pass_manager import Context
from vdqc.engine.reconstruct import reconstruct
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.testing.harness import assert_close

HERE = Path(__file__)
HELP = runpy.run_path(str(Path(__file__).with_name("reconstruct_stack.py")))
compressed, fresh, training = HELP["compressed"], HELP["fresh"], HELP["training"]


@pytest.fixture(scope="module")
def stack() -> tuple[Graph, list[Sample]]:
    return compressed()


def child(folder: Path, out: Path, batch: int, die: str, loss: str) -> None:
    """One worker, or the process that is killed; ``die`` names the last block that it finishes."""
    graph, samples = compressed()
    ctx = Context(samples)
    if die:
        ctx.progress = lambda items, description: _deadly(items, folder, die)
    diagnostics = ctx.diagnostics
    reconstruct(graph, ctx, training(folder, loss, batch=batch, epochs=3))
    values = {name: graph.param(name).tolist() for name in sorted(graph.free)}
    rank = os.environ.get("RANK", "0")
    (out / f"{rank}.json").write_text(json.dumps(values))
    assert not [entry for entry in diagnostics if entry.severity == "warning"]


def _deadly(items: object, folder: Path, block: str) -> object:
    """Progress that kills the process two steps after ``block`` was saved."""
    saved = f"???-{block}.safetensors"
    steps = 0
    for item in items:  # type: ignore[attr-defined]
        steps += bool(list(folder.rglob(saved)))
        if steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item


def start(arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    code = (
        "import importlib.util as u, sys; from pathlib import Path;"
        f"s = u.spec_from_file_location('child', {str(HERE)!r}); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); a = sys.argv[1:];"
        "m.child(Path(a[0]), Path(a[1]), int(a[2]), a[3], a[4])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def alone(stack: tuple[Graph, list[Sample]]) -> dict[str, Tensor]:
    """What one process makes with a batch of two."""
    graph, samples = fresh(stack)
    reconstruct(graph, Context(samples), training(batch=2, epochs=3))
    return {name: graph.param(name).detach() for name in graph.free}


def test_a_killed_run_goes_on_without_training_a_block_again(
    tmp_path: Path, stack: tuple[Graph, list[Sample]], alone: dict[str, Tensor]
) -> None:
    checkpoints, out = tmp_path / "checkpoints", tmp_path / "out"
    out.mkdir()
    process = start([str(checkpoints), str(out), "2", "blocks.0", "block"])
    output = process.communicate(timeout=120)[0]
    assert process.returncode == -signal.SIGKILL, output
    finished = sorted(checkpoints.rglob("*.safetensors"))
    assert [file.name[4:] for file in finished] == [
        "before-blocks.0.safetensors",
        "blocks.0.safetensors",
    ]
    times = [file.stat().st_mtime_ns for file in finished]
    graph, samples = fresh(stack)
    results = reconstruct(graph, Context(samples), training(checkpoints, batch=2, epochs=3))
    assert [result.resumed for result in results] == [True, True, False]
    assert [file.stat().st_mtime_ns for file in finished] == times
    assert not list(checkpoints.rglob("*.partial"))
    for name, value in alone.items():
        assert torch.equal(graph.param(name), value), name


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@contextmanager
def other_worker(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], die: str = "", loss: str = "block"
) -> Iterator["subprocess.Popen[str]"]:
    """This process is worker 0 of 2, as torchrun would tell it; the other one is a child."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    process = start([*arguments, die, loss], RANK="1", **common)
    for name, value in {**common, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.parametrize("loss", ["block", "block+10*trd+0.1*mtrd+auto*std"])
def test_two_workers_make_what_one_process_makes(
    tmp_path: Path,
    stack: tuple[Graph, list[Sample]],
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
) -> None:
    checkpoints = tmp_path / "checkpoints"
    alone, samples = fresh(stack)
    expected = reconstruct(alone, Context(samples), training(None, loss, batch=2, epochs=3))
    graph, samples = fresh(stack)
    ctx = Context(samples)
    with other_worker(monkeypatch, [str(checkpoints), str(tmp_path), "1"], loss=loss) as process:
        found = reconstruct(graph, ctx, training(checkpoints, loss, batch=1, epochs=3))
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    other = json.loads((tmp_path / "1.json").read_text())
    assert [entry.code for entry in ctx.diagnostics if entry.code == "batch"]
    for one, two in zip(expected, found, strict=True):
        assert two.terms == pytest.approx(one.terms)
    assert all(value > 0 for value in expected[-1].terms.values())  # each term had its say
    for name in alone.free:
        value = graph.param(name).detach()
        assert value.tolist() == other[name], name  # every worker holds the same
        # sums in another order: equal to rounding, of which Adam makes a little more
        assert_close(value, alone.param(name).detach())


def test_a_lost_worker_is_named_and_its_run_goes_on(
    tmp_path: Path, stack: tuple[Graph, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = tmp_path / "checkpoints"
    graph, samples = fresh(stack)
    arguments = [str(checkpoints), str(tmp_path), "2"]
    with other_worker(monkeypatch, arguments, die="blocks.0") as process:
        with pytest.raises(VdqcError, match="worker 0 of 2 lost another one") as caught:
            reconstruct(graph, Context(samples), training(checkpoints, batch=2, epochs=3))
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert caught.value.diagnostic.code == "worker-lost"
    assert "finished blocks are not trained again" in str(caught.value.diagnostic)
    monkeypatch.delenv("WORLD_SIZE")
    graph, samples = fresh(stack)
    results = reconstruct(graph, Context(samples), training(checkpoints, batch=2, epochs=3))
    assert [result.resumed for result in results] == [True, True, False]
