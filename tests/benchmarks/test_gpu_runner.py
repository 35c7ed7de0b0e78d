"""What a run of the GPU benchmark survives: wrong results, crashes, hangs, the end of its time."""

import json
import os
import runpy
import select
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import measure, runner, worker
from benchmarks.gpu.env import Env
from benchmarks.gpu.peers import Peer
from benchmarks.gpu.runner import Job, Plan, schedule
from benchmarks.gpu.trial import Case, Trial, Work
from benchmarks.gpu.worker_process import LostError, Worker
from benchmarks.run import passes
from vdqc.base.target import TARGETS

ROOT = Path(__file__).resolve().parents[2]
DRY = Env("cpu", True, TARGETS["sm90"])
HELP = runpy.run_path(str(Path(__file__).with_name("gpu_rows.py")))
HEADER, ROW = HELP["HEADER"], HELP["ROW"]


class FakeSession(runner.Session):
    """Answers from a list instead of a worker; None crashes a peer, a word hangs in that step, and
    a pair of words is how and where ours crashes.
    """

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
        if isinstance(answer, tuple):
            raise LostError(answer[0], hung=False, step=answer[1])
        return dict(answer)

    def again(self) -> bool:
        self.environments.append(self.environment())
        return True


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


@pytest.mark.parametrize(
    "lost",
    [
        ("the process ended with code -11", "verify"),
        {"error": "an illegal memory access", "lost": True, "step": "verify"},
    ],
)
def test_a_case_in_which_ours_crashes_goes_on_with_plain_kernels(tmp_path: Path, lost: Any) -> None:
    fake = session(tmp_path, {"check": "passed"}, lost, GOOD)
    runner._do(fake, JOB)
    assert [request.get("without") for request in fake.asked] == [None, [], []]
    assert [found.get("VDQC_PLAIN") for found in fake.environments] == ["1"]
    content = json.loads((tmp_path / "w8a8.json").read_text())
    assert content["rows"] == [ROW]
    assert content["header"]["why_plain"].startswith("w8a8: ")
    assert {"-11", "illegal"} & set(content["header"]["why_plain"].split())


def test_a_check_that_crashes_is_asked_again_with_plain_kernels(tmp_path: Path) -> None:
    fake = session(tmp_path, ("the process ended with code -6", "start"), {"check": "passed"}, GOOD)
    runner._do(fake, JOB)
    assert [found.get("VDQC_PLAIN") for found in fake.environments] == ["1"]
    assert (fake.found["w8a8"].check, fake.found["w8a8"].rows) == ("passed", [ROW])


def test_a_context_that_a_peer_lost_is_not_blamed_on_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    steps: list[str] = []
    trial = Trial({"auto": lambda: None}, {"x": Peer(fails)}, Work(1.0, "int8"), lambda: None)
    case = Case("c", lambda env: trial)
    _, absent = measure.run_case(DRY, "op", case, [], steps.append)  # the context lives
    assert list(absent) == ["x"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        measure.run_case(DRY, "op", case, [], steps.append)
    lost = {"error": "an illegal memory access", "lost": True, "step": steps[-1]}
    fake = session(tmp_path, {"check": "passed"}, lost, GOOD)
    runner._do(fake, JOB)
    assert fake.asked[-1]["without"] == ["x"]
    assert not fake.plain


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


def test_an_answer_without_a_context_says_in_which_step_it_was_lost() -> None:
    code = (
        "import sys\n"
        "for line in sys.stdin:\n"
        '    print(\'@@{"step": "verify"}\')\n'
        '    print(\'@@{"error": "e", "lost": true}\', flush=True)'
    )
    worker = Worker([sys.executable, "-c", code], {})
    try:
        assert worker.ask({}, 30.0) == {"error": "e", "lost": True, "step": "verify"}
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


def listed(op: str, *ranks: int) -> dict[str, Any]:
    cases = [{"case": f"{op}{i}", "rank": rank, "key": ""} for i, rank in enumerate(ranks)]
    return {"op": op, "seconds": 60.0, "cases": cases}


def test_the_most_telling_cases_of_all_ops_come_first() -> None:
    both = [listed("a", 1, 0, 2), listed("b", 0, 1)]
    assert [job.case for job in schedule(both, Plan())] == ["a1", "b0", "a0", "b1", "a2"]
    assert [job.case for job in schedule(both, Plan(only=("b",), rank=0))] == ["b0"]
    assert [job.case for job in schedule(both, Plan(dry=True))] == ["b0", "a0"]
