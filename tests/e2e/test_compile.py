"""The main job, on a tiny model and through both front doors."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import vdqc
from vdqc.base.diagnostics import ConfigError, Diagnostics, InputError
from vdqc.base.numerics import sqnr_db
from vdqc.cli import main
from vdqc.compile_checks import check_weights
from vdqc.compiler import complete
from vdqc.engine.recipe import Recipe
from vdqc.ir.source import load_source
from vdqc.passes.table import PASSES
from vdqc.testing.architectures import ARCHITECTURES
from vdqc.testing.harness import captured


def test_the_command_as_written_works_with_no_other_option(capsys, model_file, monkeypatch):
    monkeypatch.chdir(model_file.parent)
    assert main(["compile", "model.py", "--passes", "rotate,smooth,quant"]) == 0
    out, _ = capsys.readouterr()
    folder = Path("model.vdqc")
    assert {path.name for path in folder.iterdir()} >= {
        "manifest.json",
        "program.json",
        "weights.safetensors",
        "report.html",
        "ir",
        "probe",
    }
    assert "next: vdqc check model.vdqc --model model.py" in out
    manifest = json.loads((folder / "manifest.json").read_text())
    texts = [record["text"] for record in manifest["passes"]]
    assert texts == [
        "capture",
        "canonicalize",
        "annotate",
        "rotate",
        "smooth",
        "fold",
        "quant",
        "fold",
        "lower{target=cpu}",
    ]
    assert len(list((folder / "ir").iterdir())) == len(texts)
    assert "w8a8" in manifest["rules"][0]


def test_loaded_model_equals_the_float_model_up_to_quantisation(tiny_artifact, model_file):
    source = load_source(model_file)
    compiled = vdqc.load(tiny_artifact)
    for sample in source.samples:  # the second has other sizes than the example
        with torch.no_grad():
            assert sqnr_db(compiled(**sample.inputs), source.model(**sample.inputs)) > 30
    weights = sum(t.nbytes for t in (*compiled.parameters(), *compiled.buffers()))
    assert weights < 0.5 * sum(p.nbytes for p in source.model.parameters())


def test_python_and_command_line_write_the_same_program(tiny_artifact, model_file, tmp_path):
    source = load_source(model_file)
    made = vdqc.compile(source.model, source.samples, out=tmp_path / "out", target="cpu")
    for name in ("program.json", "weights.safetensors"):
        assert (made.path / name).read_bytes() == (tiny_artifact / name).read_bytes()


def test_schemes_address_sites_by_glob_and_the_last_match_wins(model_file, tmp_path):
    made = vdqc.compile(
        model_file, scheme=["w8a8", "blocks.*=w4a8", "blocks.0.*=none"], out=tmp_path / "out"
    )
    schemes = {row["name"]: row["scheme"] for row in made.manifest["facts"]["sites"]}
    assert schemes["blocks.0.up"] == "none"
    assert schemes["blocks.1.up"] == "w4a8"


def test_force_replaces_an_artifact(model_file, tmp_path):
    first = vdqc.compile(model_file, out=tmp_path / "out", passes="quant")
    again = vdqc.compile(model_file, out=tmp_path / "out", passes="rotate,quant", force=True)
    assert first.manifest["recipe"] != again.manifest["recipe"]
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_verify_off_still_writes_a_whole_artifact(model_file, tmp_path):
    made = vdqc.compile(model_file, out=tmp_path / "out", verify=False)
    assert all(record.sqnr_db is None for record in made.records)
    assert "SQNR on the probe" not in (made.path / "report.html").read_text()


def test_exact_passes_alone_keep_the_function(model_file, tmp_path):
    made = vdqc.compile(model_file, out=tmp_path / "out", passes="rotate,smooth")
    assert all(record.exact for record in made.records)
    source = load_source(model_file)
    with torch.no_grad():
        inputs = source.samples[1].inputs
        assert sqnr_db(vdqc.load(made.path)(**inputs), source.model(**inputs)) > 90


def recipe(text):
    return str(complete(Recipe.parse(text, PASSES)))


def test_recipes_are_completed_around_what_the_user_named():
    assert recipe("quant") == "canonicalize,annotate,quant,fold"
    assert recipe("smooth,quant") == "canonicalize,annotate,smooth,fold,quant,fold"
    assert recipe("annotate,rotate,quant,fold") == "canonicalize,annotate,rotate,quant,fold"


def test_samples_belong_to_modules_and_not_to_files(model_file):
    with pytest.raises(InputError, match="expected samples"):
        vdqc.compile(torch.nn.Linear(2, 2), out="nowhere")
    with pytest.raises(InputError, match="brings its own"):
        vdqc.compile(model_file, [vdqc.Sample({})], out=model_file.parent / "out")
    with pytest.raises(ConfigError, match="unknown pass"):
        vdqc.compile(model_file, passes="qant")


class Raw(torch.nn.Module):
    """Weights that are no module's ``weight``."""

    def __init__(self):
        super().__init__()
        self.in_proj_weight = torch.nn.Parameter(torch.randn(32, 32) / 6)
        self.mix = torch.nn.Parameter(torch.randn(16, 32) / 6)

    def forward(self, input):
        hidden = torch.nn.functional.linear(input, self.in_proj_weight).relu()
        return torch.nn.functional.linear(hidden, self.mix)


@pytest.mark.parametrize(
    ("make", "names"),
    [(lambda: torch.nn.Linear(32, 16), ["model"]), (Raw, ["in_proj", "mix_linear"])],
    ids=["linear", "raw"],
)
def test_weights_that_have_no_module_of_their_own(make, names, tmp_path):
    model = make().eval()
    samples = [vdqc.Sample({"input": torch.randn(size, 32)}) for size in (3, 5)]
    made = vdqc.compile(model, samples, scheme="w8a8", target="cpu", out=tmp_path / "out")
    assert [site["name"] for site in made.manifest["facts"]["sites"]] == names
    x = torch.randn(4, 32)
    with torch.no_grad():
        assert sqnr_db(vdqc.load(made.path)(x), model(x)) > 30


def test_weights_that_are_not_finite_are_named():
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 1] = float("-inf")
    with pytest.raises(InputError, match="weight: the weight holds NaN or infinity in 1 of 4"):
        check_weights(captured(model, torch.ones(2, 2)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_aot_package_computes_the_same_at_another_size(model_file, tmp_path):
    made = vdqc.compile(model_file, out=tmp_path / "out", passes="quant", aot=True)
    compiled = vdqc.load(made.path)
    packaged = torch._inductor.aoti_load_package(str(made.path / "program.pt2"))
    inputs = load_source(model_file).samples[1].inputs
    with torch.no_grad():
        (output,) = packaged(*compiled.signature.bind((), inputs))
        assert sqnr_db(output, compiled(**inputs)) > 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "transformer"
    ARCHITECTURES["wan-t2v"].build().save_pretrained(path)
    return path


def test_a_folder_streamed_from_disk_gives_the_bits_of_one_in_memory(folder, tmp_path):
    diagnostics = Diagnostics()
    compiled = {
        mapped: vdqc.compile(
            folder,
            passes="rotate,quant",
            scheme="w4a8",
            out=tmp_path / f"mapped-{mapped}",
            mapped=mapped,
            diagnostics=diagnostics,
        )
        for mapped in (False, True)
    }
    assert [entry.code for entry in diagnostics].count("not-probed") == 1
    calls = ARCHITECTURES["wan-t2v"].variants()["values"]
    results = [vdqc.load(artifact.path)(**calls).sample for artifact in compiled.values()]
    assert torch.equal(*results)


def test_weights_on_disk_have_no_native_package(folder, tmp_path):
    with pytest.raises(InputError, match="weights in memory for --aot"):
        vdqc.compile(folder, out=tmp_path / "out", mapped=True, aot=True)
    assert not (tmp_path / "out").exists()
