"""The GPU benchmark without a GPU: what it checks, what it times, what it writes of a case."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import blocks, cases, measure, peers, results, timing
from benchmarks.gpu.env import Env
from benchmarks.gpu.peers import Peer
from benchmarks.gpu.trial import Case, Trial, Work
from vdqc.base.numerics import relative_error
from vdqc.base.target import TARGETS

ROOT = Path(__file__).resolve().parents[2]
DRY = Env("cpu", True, TARGETS["sm90"])


def test_a_dry_run_checks_ops_and_writes_files_without_speeds(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/run.py", "--device", "cuda", "--dry", "--seed", "0"]
    command += ["--only", "w8a8,mask", "--rank", "0", "--most", "1"]
    command += ["--out", str(tmp_path), "--bundle", str(tmp_path / "all.json")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    for op in ("w8a8", "mask"):
        content = json.loads((tmp_path / f"{op}.json").read_text())
        assert content["check"] == "passed"
        assert content["rows"], op
        for row in content["rows"]:
            assert set(results.KEYS) <= set(row)
            assert row["p50_ms"] is None
            assert row["ratio"] is None
    assert set(json.loads((tmp_path / "all.json").read_text())) == {"w8a8", "mask"}


@pytest.mark.parametrize("model", [cases.WAN_33K, cases.HUNYUAN_33K])
def test_quantised_blocks_are_the_float_blocks_up_to_their_noise(model: cases.Model) -> None:
    trial = blocks.trial(DRY, model, 1.0)
    trial.verify()
    names = {"w8a8 dense", "w8a8 15 %", "w8a8 15 %, 20 % dense steps"}
    assert names <= {*trial.ours, *trial.derived}
    assert trial.resident["w8a8 dense"] < trial.resident["peer bf16 compiled"]
    sparse, dense = trial.ours["w8a8 15 %"](), trial.ours["w8a8 dense"]()
    assert not torch.equal(sparse, dense)


@pytest.mark.slow
def test_the_compiler_makes_the_same_block() -> None:
    trial = blocks.trial(DRY, cases.WAN_33K, 1.0)
    trial.extra["w8a8 dense, lowered"].build()()  # raises if it is off


def test_rows_of_plain_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial({"auto": lambda: None}, {}, Work(1.0, "int8"), lambda: None)
    case = Case("c", lambda env: trial)
    for value, note in (("", None), ("1", "plain kernels only")):
        monkeypatch.setenv("VDQC_PLAIN", value)
        rows, _ = measure.run_case(DRY, "op", case, [], lambda name: None)
        assert rows[0].get("note") == note


def test_a_peer_that_fails_leaves_its_reason_and_the_rest_its_rows() -> None:
    def broken() -> Any:
        raise ImportError("no such wheel")

    trial = Trial(
        {"auto": lambda: None, "plain": lambda: None},
        {
            "good": Peer(lambda: lambda: None),
            "bad": Peer(broken),
            "slow": Peer(broken, costly=True),
        },
        Work(1.0, "int8"),
        lambda: None,
        notes={"auto": "plain 128x128x64"},
    )
    case = Case("c", lambda env: trial, rank=1)
    rows, absent = measure.run_case(DRY, "op", case, [], lambda name: None)
    assert [(row["variant"], row["peer"]) for row in rows] == [("auto", "good")]
    assert absent == {"bad": "ImportError: no such wheel"}


def test_the_fp8_peer_accumulates_as_fast_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fast = torch._scaled_mm, []

    def scaled_mm(*args: Any, use_fast_accum: bool = False, **named: Any) -> torch.Tensor:
        fast.append(use_fast_accum)
        return real(*args, use_fast_accum=use_fast_accum, **named)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x, weight = (torch.randn(rows, 64, dtype=torch.bfloat16) for rows in (32, 48))
    found = peers.scaled_mm(x, weight)()
    assert fast == [True]
    assert relative_error(found, x.float() @ weight.float().T) < 0.1


def test_functions_take_turns_until_each_was_timed_often_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, order = [0.0], ""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    def call(name: str, ms: float) -> Any:
        def run() -> None:
            nonlocal order
            order += name
            now[0] += ms

        return run

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(timing, "_flush_buffer", lambda: torch.empty(1))
    found = timing.time_together({"a": call("a", 2.0), "b": call("b", 700.0)})
    assert (found["a"].p50, found["b"].p50) == (2.0, 700.0)
    assert (found["a"].count, found["b"].count) == (60, 3)
    assert order.startswith("aabb" + "ababab" + "aaa")


def test_percentiles() -> None:
    found = timing.summarise([float(i) for i in range(11)])
    assert (found.p20, found.p50, found.p80) == (2.0, 5.0, 8.0)
