"""``vdqc search`` through the command line: what it predicts, writes, and refuses."""

import json
from pathlib import Path

import pytest

from vdqc.base.diagnostics import Diagnostics, InputError
from vdqc.base.target import TARGETS
from vdqc.cli import main
from vdqc.compiler import capture_source, compile
from vdqc.engine.named import named
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import parse_passes
from vdqc.forecast import total_cost
from vdqc.ir.source import Source, load_source
from vdqc.lowering.machine import measured
from vdqc.lowering.select import choose
from vdqc.passes.quant import keep_others_in_float
from vdqc.passes.table import PASSES
from vdqc.search import parse_schemes
from vdqc.search.budget import Budget
from vdqc.search.density import check_attention, thin_out
from vdqc.search.job import Job
from vdqc.testing.architectures import ARCHITECTURES


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


SCHEMES = ["--schemes", "w8a8,w4a8,w4a8-g16,none", "--target", "cpu"]


def test_a_budget_becomes_a_recipe_that_compiles_to_the_predicted_bytes(capsys, model_file):
    words = ["search", model_file, "--budget", "size=0.5", *SCHEMES, "-o", "found.toml"]
    code, out, _ = run(capsys, *words, "--plot", "front.html", "--json")
    data = json.loads(out)
    assert code == 0
    predicted, front = data["predicted"], data["front"]
    assert predicted["bytes"] <= 0.5 * data["bytes_float"]
    assert predicted["bytes"] == data["measured"]["bytes"]
    # additivity holds for small errors: predicted and measured agree within a few dB
    assert abs(predicted["sqnr_db"] - data["measured"]["sqnr_db"]) < 4
    sizes = [point["bytes"] for point in front]
    errors = [point["sqnr_db"] for point in front]
    assert sizes == sorted(sizes)
    assert predicted in front
    assert errors[:-1] == sorted(errors[:-1])
    assert errors[-1] is None
    assert "size=0.5" in named("found.toml").about
    artifact = compile(model_file, recipe="found.toml", target="cpu")
    assert artifact.manifest["weights"]["bytes"] == predicted["bytes"]
    page = Path("front.html").read_text()
    assert "<svg" in page
    assert "<script" not in page


def test_a_floor_is_reached_by_what_was_measured(capsys, model_file):
    code, out, _ = run(capsys, "search", model_file, "--floor", "sqnr=35", *SCHEMES, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["measured"]["sqnr_db"] >= 35
    assert data["measured"]["bytes"] < 0.6 * data["bytes_float"]
    assert data["misses"] == []


@pytest.fixture(scope="module")
def job() -> Job:
    """The tiny model, measured once, with no way to stay in float."""
    source = load_source(Path(__file__).parents[1] / "tiny_model.py")
    graph, _ = capture_source(source, Diagnostics())
    schemes, target = parse_schemes(["w8a8", "w4a8"]), TARGETS["cpu"]
    found = Job("tiny", graph, source.samples, schemes, target, Diagnostics(), 0, lambda i, _: i)
    found.measure()
    return found


@pytest.mark.parametrize(
    ("budget", "floor", "message"),
    [
        ("size=0.01", None, "size .* cannot be reached: the least is .* kB"),
        ("time=1us", None, "time 1 µs .* cannot be reached: the least is"),
        (None, "sqnr=200", "200 dB cannot be reached: the best is predicted at 4"),
        ("size=0.2", "sqnr=41", "41 dB cannot be reached within the budget: the best .* 2"),
    ],
)
def test_what_cannot_be_reached_is_refused(job, budget, floor, message):
    with pytest.raises(InputError, match=message):
        job.choose(Budget.parse(budget, floor), False)  # which checks the budget first


def test_a_refusal_writes_nothing(capsys, model_file):
    words = ["--budget", "size=0.01", "--schemes", "w8a8", "--target", "cpu", "-o", "r.toml"]
    code, out, err = run(capsys, "search", model_file, *words)
    assert (code, out) == (2, "")
    assert err.count("error: ") == 1
    assert not Path("r.toml").exists()


def test_density_needs_frames(job):
    with pytest.raises(InputError, match="no attention spans the frames"):
        check_attention(job)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "expected --budget or --floor"),
        (["--budget", "sise=1"], "did you mean 'size'"),
        (["--budget", "size=0.5", "--schemes", "w9a8"], "unknown scheme 'w9a8'"),
        (["--budget", "size=0.5", "-o", "recipe.json"], "ends in .toml"),
        (["--budget", "size=0.5", "--density"], "--density needs --budget, --floor"),
    ],
)
def test_words_are_refused_before_the_model_is_loaded(capsys, tmp_path, words, expected):
    file = tmp_path / "explosive.py"
    file.write_text("raise AssertionError('the model was loaded')\n")
    code, out, err = run(capsys, "search", file, *words)
    assert (code, out) == (2, "")
    assert expected in err


def test_a_video_model_folds_and_thins_out(monkeypatch):
    architecture, floor = ARCHITECTURES["wan-t2v"], Budget.parse("size=0.45", "sqnr=15")
    samples, schemes = architecture.samples(), parse_schemes(["w8a8", "w4a8-g16"])
    graph, _ = capture_source(Source(architecture.build(), samples, name="wan"), Diagnostics())
    job = Job("wan", graph, samples, schemes, TARGETS["cpu"], Diagnostics(), 0, lambda i, _: i)
    check_attention(job)
    job.measure()
    point, applied = job.choose(floor, True)
    assert applied is not None
    assert applied.bytes == point.bytes
    assert any(way.rotated or way.smoothed for way in point.ways)
    text = "sparsify{{density={:g},budget=calibrated,block=16}}"  # the tiny model has 40 tokens
    monkeypatch.setattr("vdqc.search.density.sparsify_text", text.format)
    found = thin_out(job, floor, point, applied)
    assert found is not None
    density, sparse = found
    assert density < 1
    assert applied.error < sparse.error <= floor.floor_error
    assert thin_out(job, Budget.parse(None, "sqnr=90"), point, applied) is None


def test_convolutions_are_chosen_for_where_they_hold_the_weights(tmp_path):
    architecture = ARCHITECTURES["unet2d"]
    samples, schemes = architecture.samples(), parse_schemes(["w8a8", "w4a8", "none"])
    source, said = Source(architecture.build(), samples, name="unet"), Diagnostics()
    captured, _ = capture_source(source, said)
    job = Job("unet", captured, samples, schemes, TARGETS["cpu"], said, 0, lambda i, _: i)
    assert "conv-float" not in [entry.code for entry in said]
    plain = captured.clone()  # convolutions that stay in float are not made linears
    PassManager(parse_passes("canonicalize,annotate", PASSES), probe=False).run(plain, Context())
    keep_others_in_float(plain, "")
    cost = total_cost(choose(plain, TARGETS["cpu"]), plain)
    assert job.account.float_us == pytest.approx(cost.us(measured(TARGETS["cpu"])))
    job.measure()
    point, applied = job.choose(Budget.parse("size=0.4", None), True)
    assert applied is not None
    assert applied.bytes == point.bytes <= 0.4 * job.bytes_float
    assert applied.sqnr_db > point.sqnr_db - 4
    recipe = job.recipe(point)
    assert recipe.passes[0].startswith("im2col")
    (tmp_path / "found.toml").write_text(recipe.to_toml())
    artifact = compile(
        source.model,
        samples,
        recipe=str(tmp_path / "found.toml"),
        target="cpu",
        out=tmp_path / "out",
    )
    assert artifact.manifest["weights"]["bytes"] == point.bytes
