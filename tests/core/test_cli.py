"""The commands through their real entry point: what they print, where, and how they exit."""

import json
import warnings
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

import vdqc
from vdqc.cli import main
from vdqc.cli.common import diagnostics_of
from vdqc.passes.table import PASSES


def run(capsys, *words):
    """Exit code, stdout and stderr of one command."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_and_version_exit_zero(capsys):
    assert run(capsys, "--version") == (0, f"vdqc {vdqc.__version__}\n", "")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("compile", "run", "check", "explain", "inspect", "passes"):
        assert command in out


def test_of_several_workers_the_first_one_warns_and_each_says_its_errors(capsys, monkeypatch):
    options = Namespace(verbose=True)
    said = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with warnings.catch_warnings():
            code, _, err = run(capsys, "compile", "nowhere.py")
            shown = not any(
                entry[0] == "ignore" and entry[2] is Warning for entry in warnings.filters
            )
        diagnostics_of(options).warning("up", "some-code", "something is odd")
        said.append((code, err.partition(":")[0], shown, capsys.readouterr().err))
    first, second = said
    assert first[:3] == (2, "error", True)
    assert "something is odd" in first[3]
    assert second == (2, "worker 1", False, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: command"),
        (["compil"], "did you mean 'compile'?"),
        (["compile"], "required: model"),
        (["compile", "m.py", "--pases", "quant"], "did you mean '--passes'?"),
        (["compile", "m.py", "--seed", "one"], "invalid int value: 'one'"),
        (["passes", "rotat"], "did you mean 'rotate'?"),
    ],
)
def test_bad_usage_offers_the_nearest_word(capsys, words, expected):
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert expected in err
    assert "Traceback" not in err


def test_passes_lists_every_pass(capsys):
    code, out, _ = run(capsys, "passes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(PASSES)


def test_passes_json_describes_options(capsys):
    code, out, err = run(capsys, "passes", "--json")
    assert (code, err) == (0, "")
    by_name = {entry["name"]: entry for entry in json.loads(out)}
    assert list(by_name) == list(PASSES)
    smooth = by_name["smooth"]
    assert smooth["exact"]
    assert smooth["at"] == ["annotated"]
    alpha = next(option for option in smooth["options"] if option["name"] == "alpha")
    assert (alpha["type"], alpha["default"]) == ("float", 0.5)
    assert alpha["text"]
    assert "SmoothQuant" in smooth["source"]
    assert by_name["quant"]["to"] == "compressed"
    assert not by_name["quant"]["exact"]


def test_one_pass_shows_its_options_and_source(capsys):
    code, out, _ = run(capsys, "passes", "rotate")
    assert code == 0
    for words in ("exact", "QuaRot", "block=64"):
        assert words in out


def test_explain_writes_nothing_and_names_each_kernel(capsys, model_file, monkeypatch):
    monkeypatch.chdir(model_file.parent)
    before = sorted(model_file.parent.iterdir())
    code, out, _ = run(
        capsys, "explain", "model.py", "--scheme", "w8a8", "--scheme", "out=none", "--json"
    )
    plan = json.loads(out)
    assert code == 0
    assert [step["text"] for step in plan["passes"]][:2] == ["canonicalize", "annotate"]
    sites = {row["name"]: row for row in plan["sites"]}
    assert sites["blocks.0.up"]["kernel"] == "int8_linear"
    assert sites["blocks.0.up"]["bytes"] < sites["blocks.0.up"]["bytes_float"]
    assert sites["out"]["kernel"] == "aten"
    assert sites["blocks.0.up"]["predicted_us"] > 0
    assert {p for p in model_file.parent.iterdir() if p.name != "__pycache__"} == set(before)
    code, out, _ = run(capsys, "explain", "model.py")
    assert code == 0
    assert "nothing was compiled" in out


def test_inspect_shows_passes_sites_ir_and_manifest(capsys, tiny_artifact):
    code, out, err = run(capsys, "inspect", tiny_artifact)
    assert (code, err) == (0, "")
    assert "SQNR" in out
    assert "int8_linear" in out
    _, out, _ = run(capsys, "inspect", tiny_artifact, "--sites")
    assert "blocks.1.down" in out
    _, out, _ = run(capsys, "inspect", tiny_artifact, "--ir")
    assert "@lowered" in out
    _, out, _ = run(capsys, "inspect", tiny_artifact, "--ir", "quant")
    assert "vdqc.fake_quantize" in out
    code, out, _ = run(capsys, "inspect", tiny_artifact, "--json")
    assert code == 0
    assert json.loads(out)["facts"]["seed"] == 0
    code, _, err = run(capsys, "inspect", tiny_artifact, "--ir", "quantt")
    assert code == 2
    assert "did you mean 'quant'?" in err


def test_run_needs_no_source(capsys, tiny_artifact, tmp_path):
    file = tmp_path / "out.safetensors"
    code, out, _ = run(capsys, "run", tiny_artifact, "--output", file)
    assert code == 0
    assert "one forward pass on the probe" in out
    output = load_file(file)["output_0"]
    assert output.shape == (2, 16, 32)
    assert bool(torch.isfinite(output).all())


def test_run_generates_and_writes_frames(capsys, tiny_artifact, model_file, tmp_path):
    code, out, _ = run(
        capsys, "run", tiny_artifact, "--model", model_file, "--seed", 3, "--frames", tmp_path / "f"
    )
    assert code == 0
    assert "generate, seed 3" in out
    assert len(list((tmp_path / "f").glob("video*_frame*.png"))) == 2 * 4


def test_check_reports_and_fails_below_a_threshold(capsys, tiny_artifact, model_file, tmp_path):
    report, result = tmp_path / "report.html", tmp_path / "check.json"
    words = ["check", tiny_artifact, "--model", model_file, "--runs", 1]
    before = (tiny_artifact / "manifest.json").read_bytes()
    code, out, _ = run(capsys, *words, "--json", "--min-sqnr", 20, "-o", result, "--report", report)
    data = json.loads(out)
    assert code == 0
    assert data == json.loads(result.read_text())
    assert data["sqnr_db"] > 30
    assert [step["timestep"] for step in data["steps"]] == [900.0, 500.0, 100.0]
    assert data["misses"] == []
    assert "data:image/png" in report.read_text()
    assert (tiny_artifact / "manifest.json").read_bytes() == before
    code, out, _ = run(capsys, *words, "--min-sqnr", 200, "--min-accuracy", 2)
    assert code == 1
    assert "FAILED      sqnr" in out
    assert "FAILED      accuracy" in out


def test_debug_raises_what_otherwise_is_printed(tmp_path):
    with pytest.raises(vdqc.base.diagnostics.VdqcError):
        main(["inspect", str(tmp_path), "--debug"])
