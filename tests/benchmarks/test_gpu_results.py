"""What becomes of the rows of the GPU benchmark: verdicts, files, bundles."""

import json
import runpy
from pathlib import Path

import pytest

from benchmarks.gpu import results, targets

HELP = runpy.run_path(str(Path(__file__).with_name("gpu_rows.py")))
HEADER, ROW = HELP["HEADER"], HELP["ROW"]


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
