"""The GPU benchmark without a GPU: what it checks, what it writes, what it survives."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import blocks, cases, measure, peers, results, runner, targets, timing, worker
from benchmarks.gpu.env import Env
from benchmarks.gpu.peers import Peer
from benchmarks.gpu.runner import Job, Plan, schedule
from benchmarks.gpu.trial import Case, Trial, Work
from benchmarks.gpu.worker_process import LostError, Worker
from benchmarks.run import passes
from vdqc.base.numerics import relative_error
from vdqc.base.target import TARGETS

ROOT = Path(__file__).resolve().parents[2]
DRY = Env("cpu", True, TARGETS["sm90"])
HEADER = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}


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


# wrong results ------------------------------------------------------------------------------------


class FakeSession(runner.Session):
    """Answers from a list instead of a worker; None crashes a peer, a word hangs in that step."""

    def __init__(self, plan: Plan, answers: list[Any]) -> None:
        super().__init__(plan)
        self.answers, self.environments = answers, list[dict[str, str]]()
        self.asked: list[dict[str, Any]] = []
        self.device = HEADER
        self.worker = self  # type: ignore[assignment]

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if answer is None:
            raise LostError("the process ended with code -11", hung=False, step="peer x y")
        if isinstance(answer, str):
            raise LostError("no answer", hung=True, step=answer)
        return dict(answer)

    def again(self) -> bool:
        self.environments.append(self.environment())
        return True


ROW = {
    **dict.fromkeys(results.KEYS), "op": "w8a8", "case": "a/up", "variant": "auto", "p50_ms": 1.0,
    "p20_ms": 1.0, "p80_ms": 1.0, "rate": 1.0, "unit": "TOPS", "peer": "cublas bf16",
    "peer_p50_ms": 1.7, "ratio": 1.7,
}  # fmt: skip
GOOD = {"rows": [ROW], "absent": {}, "seconds": 1.0}
JOB = Job("w8a8", "a/up", 60.0)


def session(tmp_path: Path, *answers: Any) -> FakeSession:
    return FakeSession(Plan(out=tmp_path), list(answers))


def test_an_op_whose_check_fails_has_no_speeds_and_is_not_asked_again(tmp_path: Path) -> None:
    fake = session(tmp_path, {"wrong": "relative error 0.5"})
    runner._do(fake, JOB)
    runner._do(fake, JOB)
    assert len(fake.asked) == 1
    assert fake.found["w8a8"].rows == []
    assert runner._finish(fake) == 1


def test_a_case_that_is_wrong_takes_the_speeds_of_its_op_back(tmp_path: Path) -> None:
    fake = session(tmp_path, {"check": "passed"}, GOOD, {"wrong": "sampled rows"})
    runner._do(fake, JOB)
    runner._do(fake, Job("w8a8", "b/up", 60.0))
    assert fake.found["w8a8"].rows == []
    assert fake.found["w8a8"].red


def test_a_crash_is_tried_again_without_the_peer_it_came_with(tmp_path: Path) -> None:
    fake = session(tmp_path, {"check": "passed"}, None, GOOD)
    runner._do(fake, JOB)
    assert [request.get("without") for request in fake.asked] == [None, [], ["x y"]]
    assert len(fake.environments) == 1
    assert "VDQC_PLAIN" not in fake.environments[0]
    assert fake.found["w8a8"].rows == [ROW]
    assert fake.found["w8a8"].absent == {"x y (a/up)": "the process ended with code -11"}


def test_a_third_crash_fails_the_case_and_the_rest_goes_on(tmp_path: Path) -> None:
    fake = session(tmp_path, {"check": "passed"}, None, None, None, GOOD)
    runner._do(fake, JOB)
    runner._do(fake, Job("w8a8", "b/up", 60.0))
    assert [request.get("without") for request in fake.asked[2:4]] == [["x y"], ["x y", "*"]]
    assert list(fake.found["w8a8"].failed) == ["a/up"]
    assert fake.found["w8a8"].rows == [ROW]
    assert runner._finish(fake) == 1


def test_a_check_that_hangs_is_asked_again_with_plain_kernels(tmp_path: Path) -> None:
    fake = session(tmp_path, "start", {"check": "passed"}, GOOD)
    runner._do(fake, JOB)
    assert [request["do"] for request in fake.asked] == ["check", "check", "time"]
    assert [found.get("VDQC_PLAIN") for found in fake.environments] == ["1"]
    assert (fake.found["w8a8"].check, fake.found["w8a8"].rows) == ("passed", [ROW])


def test_a_case_that_hangs_in_ours_keeps_its_peers_with_plain_kernels(tmp_path: Path) -> None:
    fake = session(tmp_path, {"check": "passed"}, "verify", GOOD)
    runner._do(fake, JOB)
    assert [request.get("without") for request in fake.asked] == [None, [], []]
    assert [found.get("VDQC_PLAIN") for found in fake.environments] == ["1"]
    assert fake.found["w8a8"].rows == [ROW]


def test_ours_that_hangs_with_plain_kernels_too_is_not_asked_a_third_time(tmp_path: Path) -> None:
    fake = session(tmp_path, "start", "start", {"check": "passed"}, "verify")
    runner._do(fake, JOB)
    runner._do(fake, Job("fp8", "a/up", 60.0))
    assert [request["do"] for request in fake.asked] == ["check", "check", "check", "time"]
    assert len(fake.environments) == 3  # what follows has a worker
    assert list(fake.found["fp8"].failed) == ["a/up"]


def test_a_hang_in_a_peer_or_at_the_end_of_the_budget_is_not_blamed_on_ours(tmp_path: Path) -> None:
    fake = session(tmp_path, {"check": "passed"}, "peer x y", GOOD)
    runner._do(fake, JOB)
    assert fake.asked[-1]["without"] == ["x y"]
    assert not fake.plain
    late = FakeSession(Plan(budget=30.0, out=tmp_path), [{"check": "passed"}, "verify"])
    runner._do(late, JOB)
    assert late.found["w8a8"].not_run == ["a/up"]
    assert not late.plain


def test_rows_of_plain_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial({"auto": lambda: None}, {}, Work(1.0, "int8"), lambda: None)
    case = Case("c", lambda env: trial)
    for value, note in (("", None), ("1", "plain kernels only")):
        monkeypatch.setenv("VDQC_PLAIN", value)
        rows, _ = measure.run_case(DRY, "op", case, [], lambda name: None)
        assert rows[0].get("note") == note


def test_what_does_not_fit_the_budget_is_said(tmp_path: Path) -> None:
    fake = FakeSession(Plan(budget=10.0, out=tmp_path), [])
    runner._do(fake, JOB)
    assert fake.found["w8a8"].not_run == ["a/up"]
    assert runner._finish(fake) == 0


#: Stands in for the worker; what it does at ``ceilings`` is filled in.
CHILD = """
import json, os, sys
for line in sys.stdin:
    do, answer = json.loads(line)["do"], {"check": "passed"}
    if do == "ceilings":
        DIE
        answer = {"error": "an illegal memory access", "lost": True}
    if do == "hello":
        answer = {"device": {"gpu": "x", "plain": os.environ.get("VDQC_PLAIN")}, "ops": []}
    print("@@" + json.dumps(answer), flush=True)
"""


@pytest.mark.parametrize(
    ("last", "reason"), [("os.abort()", "code -6"), ("pass", "an illegal memory access")]
)
def test_a_worker_lost_with_the_ceilings_is_replaced_and_not_asked_for_them_again(
    last: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "_CHILD", CHILD.replace("DIE", last))
    real = runner.Session(Plan(out=tmp_path))
    try:
        assert real.begin() is None
        assert real.device["plain"] is None
        runner._do(real, JOB)
        real.plain = True
        assert real.again()
        assert real.device["plain"] == "1"
    finally:
        real.end()
    content = json.loads((tmp_path / "w8a8.json").read_text())
    assert content["check"] == "passed"
    assert reason in content["header"]["no_ceilings"]


@pytest.mark.parametrize(
    ("code", "hung"),
    [("import time; time.sleep(60)", True), ("import os; os.abort()", False), ("", False)],
)
def test_a_worker_that_hangs_or_dies_is_noticed(code: str, hung: bool) -> None:
    worker = Worker([sys.executable, "-c", code], {})
    try:
        with pytest.raises(LostError) as caught:
            worker.ask({"do": "hello"}, 1.5 if hung else 30.0)
        assert caught.value.hung is hung
    finally:
        worker.stop()


def test_a_worker_may_print_other_things_and_name_its_steps() -> None:
    code = (
        "import sys\n"
        "for line in sys.stdin:\n"
        "    print('noise')\n"
        '    print(\'@@{"step": "build"}\')\n'
        "    print('@@{\"rows\": []}', flush=True)"
    )
    worker = Worker([sys.executable, "-c", code], {})
    try:
        assert worker.ask({}, 30.0) == {"rows": []}
        assert worker._step == "build"
    finally:
        worker.stop()


def test_an_answer_is_found_behind_a_line_that_a_library_did_not_end() -> None:
    code = (
        "from benchmarks.gpu.worker import say\n"
        "print('noise', end='')\n"
        "say({'check': 'passed'})\n"
        "input()"
    )
    worker = Worker([sys.executable, "-c", code], {"PYTHONPATH": str(ROOT)})
    try:
        assert worker.ask({}, 30.0) == {"check": "passed"}
    finally:
        worker.stop()


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: unspecified launch failure", True),
        ("Triton Error [CUDA]: device kernel image is invalid", True),
        ("Triton Error [CUDA]: out of memory", False),
        ("Triton Error [CUDA]: invalid argument", False),
        ("CUDA error: an illegal instruction was encountered", True),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
    ],
)
def test_errors_after_which_a_process_is_of_no_use(text: str, lost: bool) -> None:
    assert worker._is_lost(RuntimeError(text)) is lost


def test_a_lost_context_is_answered_even_if_nothing_can_be_given_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr("benchmarks.gpu.env.make", lambda dry: DRY)
    monkeypatch.setattr("benchmarks.gpu.ceilings.measure", fails)
    monkeypatch.setattr(measure, "release", fails)
    monkeypatch.setattr(sys, "stdin", ['{"do": "ceilings"}'])
    # not by monkeypatch: undoing hides an option of torch's configuration for good
    limit = torch._dynamo.config.patch(recompile_limit=8)
    with limit, torch.random.fork_rng(), torch.no_grad():
        assert worker.main(True, 0) == 0
    answer = json.loads(capsys.readouterr().out.strip().removeprefix(worker.MARK))
    assert answer["lost"] is True


def test_tests_that_are_stopped_leave_nothing_running(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    try:
        command = ["sh", "-c", f"(echo begun; exec sleep 300) > {alive} & wait"]
        assert not passes(command, 2.0)
        read = b""
        while select.select([reader], [], [], 30.0)[0]:
            part = os.read(reader, 100)
            read += part
            if not part:  # its end: whoever could write is gone
                break
        else:
            pytest.fail("the child of a child is still there")
        assert read == b"begun\n"
    finally:
        os.close(reader)


# order, rows, files -------------------------------------------------------------------------------


def listed(op: str, *ranks: int) -> dict[str, Any]:
    cases = [{"case": f"{op}{i}", "rank": rank, "key": ""} for i, rank in enumerate(ranks)]
    return {"op": op, "seconds": 60.0, "cases": cases}


def test_the_most_telling_cases_of_all_ops_come_first() -> None:
    both = [listed("a", 1, 0, 2), listed("b", 0, 1)]
    assert [job.case for job in schedule(both, Plan())] == ["a1", "b0", "a0", "b1", "a2"]
    assert [job.case for job in schedule(both, Plan(only=("b",), rank=0))] == ["b0"]
    assert [job.case for job in schedule(both, Plan(dry=True))] == ["b0", "a0"]


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


def test_a_line_is_judged_by_its_worst_case() -> None:
    rows = [{**ROW, "case": "a/up", "ratio": 1.7}, {**ROW, "case": "b/up", "ratio": 1.5}]
    few = {**ROW, "case": "rows-1", "ratio": 0.1}
    line = targets.judge("w8a8", [*rows, few])[0]
    assert (line["verdict"], line["worst"], line["met_in"], line["cases"]) == ("missed", 1.5, 1, 2)
    assert targets.judge("w8a8", rows[:1])[0]["verdict"] == "met"
    assert targets.judge("w8a8", [])[0]["verdict"] == "unmeasured"


def test_every_line_speaks_of_an_op_that_exists() -> None:
    from benchmarks.gpu.ops import table

    assert {line.op for line in targets.LINES} <= set(table())


def test_rows_of_another_commit_are_not_kept(tmp_path: Path) -> None:
    first = results.OpResults("w8a8", "passed", [{**ROW, "case": "old"}])
    second = results.OpResults("w8a8", "passed", [{**ROW, "case": "new"}], not_run=["old"])
    results.write(first, HEADER, tmp_path)
    file = results.write(second, HEADER, tmp_path)
    content = json.loads(file.read_text())
    assert [row["case"] for row in content["rows"]] == ["old", "new"]
    assert content["not_run"] == []
    results.write(second, {**HEADER, "commit": "other"}, tmp_path)
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == ["new"]


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(file: Path, text: str) -> None:
        with file.open("w") as opened:
            opened.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    op = results.OpResults("w8a8", "passed", [ROW])
    file, bundle = results.write(op, HEADER, tmp_path), tmp_path / "b.json"
    results.bundle({"w8a8": op}, HEADER, bundle)
    before = file.read_text(), bundle.read_text()
    monkeypatch.setattr(Path, "write_text", half)
    for write in (
        lambda: results.write(op, HEADER, tmp_path),
        lambda: results.bundle({"w8a8": op}, HEADER, bundle),
        lambda: results.unpack(bundle, tmp_path),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert (file.read_text(), bundle.read_text()) == before


def test_a_bundle_unpacks_into_a_folder_by_gpu(tmp_path: Path) -> None:
    found = {"w8a8": results.OpResults("w8a8", "passed", [ROW])}
    results.bundle(found, HEADER, tmp_path / "b.json")
    assert results.unpack(tmp_path / "b.json", tmp_path) == [tmp_path / "h200" / "w8a8.json"]
    assert json.loads((tmp_path / "h200" / "w8a8.json").read_text())["rows"] == [ROW]
