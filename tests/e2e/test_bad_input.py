"""Every way a user can be wrong: one clear error, exit code 2, nothing written and nothing lost.

All of it through the command line's entry point, in process.
"""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vdqc.cli import main
from vdqc.ir.artifact import seal
from vdqc.testing.architectures import ARCHITECTURES


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def refused(capsys, *words) -> str:
    """Stderr of a command that must exit 2, print nothing, and leave the folder as it was."""
    before = files(Path.cwd())
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert "note: " in err or "expected" in err
    assert files(Path.cwd()) == before
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith(".")]
    return err


def edited(model_file: Path, old: str, new: str) -> Path:
    text = model_file.read_text()
    assert old in text
    model_file.write_text(text.replace(old, new))
    return model_file


# -- words: refused before the model is loaded -------------------------------------------------


@pytest.fixture
def explosive(tmp_path) -> Path:
    """A model file that must not be imported."""
    file = tmp_path / "explosive.py"
    file.write_text("raise AssertionError('the model was loaded')\n")
    return file


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--passes", "rotate,smoth"], "unknown pass 'smoth'"),
        (["--passes", "rotate,smoth"], "did you mean 'smooth'?"),
        (["--passes", "smooth{alfa=0.6}"], "pass 'smooth' has no option 'alfa'"),
        (["--passes", "smooth{alfa=0.6}"], "did you mean 'alpha'?"),
        (["--passes", "smooth{alpha=much}"], "smooth.alpha: expected float, got 'much'"),
        (["--passes", "smooth{alpha=7}"], "smooth.alpha: expected 0 ... 1, got 7"),
        (["--passes", "rotate;quant"], "cannot read the pass list at"),
        (["--passes", ""], "the pass list is empty"),
        (["--scheme", "w9a8"], "unknown scheme 'w9a8'"),
        (["--scheme", "blocks.*=int8"], "unknown scheme 'int8'"),
        (["--target", "sm9"], "did you mean 'sm90'?"),
        (["--passes", "quant,rotate"], "'rotate' runs at annotated"),
        (["--passes", "quant,rotate"], "put 'rotate' earlier"),
        (["--passes", "rotate,canonicalize"], "'canonicalize' runs at captured"),
        (["--seed", "9" * 23], "seed: expected a seed of at most 62 bits, got 999"),
        (["--passes", f"rotate{{seed={2**62}}}"], "rotate.seed: expected a seed of at most 62"),
    ],
)
def test_words_are_checked_before_the_model_is_loaded(capsys, explosive, options, expected):
    assert expected in refused(capsys, "compile", explosive, *options)


@pytest.mark.parametrize("command", ["compile", "explain"])
def test_explain_checks_the_same_words(capsys, explosive, command):
    assert "did you mean 'quant'?" in refused(capsys, command, explosive, "--passes", "quannt")


def test_existing_output_is_refused_before_any_work(capsys, explosive):
    Path("out").mkdir()
    Path("out/precious.txt").write_text("keep me")
    err = refused(capsys, "compile", explosive, "-o", "out")
    assert "out" in err
    assert "--force" in err
    assert "the model was loaded" not in err


def test_force_does_not_replace_a_folder_that_is_not_an_artifact(capsys, explosive):
    Path("out").mkdir()
    Path("out/precious.txt").write_text("keep me")
    refused(capsys, "compile", explosive, "-o", "out", "--force")


# -- the model file ----------------------------------------------------------------------------


def test_a_model_that_is_not_there(capsys):
    assert "found nothing" in refused(capsys, "compile", "nowhere.py")


def test_a_model_that_is_neither_python_nor_a_folder(capsys):
    Path("model.onnx").write_text("x")
    assert "expected a python file or a folder" in refused(capsys, "compile", "model.onnx")


def test_a_folder_that_holds_no_model(capsys):
    Path("folder").mkdir()
    assert "folder" in refused(capsys, "compile", "folder")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nothing_like_this\n", "No module named 'nothing_like_this'"),
        ("def model(:\n", "SyntaxError"),
        ("x = 1\n", "expected bad.py to define model()"),
        ("def model(): ...\n", "expected bad.py to define samples()"),
        ("def model(): return 3\ndef samples(): return []\n", "to return an nn.Module, got int"),
        ("def model(): 1 / 0\ndef samples(): return []\n", "ZeroDivisionError"),
    ],
)
def test_a_model_file_that_cannot_be_used(capsys, text, expected):
    Path("bad.py").write_text(text)
    err = refused(capsys, "compile", "bad.py")
    assert expected in err


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("        yield Sample(", "        return\n        yield Sample(", "at least one sample"),
        ('"timestep": torch.full', '"time": torch.full', "'time', which forward does not take"),
        (', "timestep": torch.full((batch,), t)}', "}", "a sample lacks 'timestep'"),
        ("torch.randn(batch, tokens, 32", "torch.randn(batch, tokens, 31", "31"),
        ('{"x": x,', '{"x": x.double(),', "dtype"),
    ],
)
def test_samples_that_do_not_fit(capsys, model_file, old, new, expected):
    assert expected in refused(capsys, "compile", edited(model_file, old, new))


# -- folders of weights ------------------------------------------------------------------------

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny DiT as diffusers saves it, in several shards."""
    place = tmp_path_factory.mktemp("saved") / "dit"
    ARCHITECTURES["dit"].build().save_pretrained(place, max_shard_size="100KB")
    return place


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "dit"))


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    assert len(found) > 1
    return found


def test_a_name_of_the_hub_says_how_to_fetch_a_gated_model(capsys):
    err = refused(capsys, "compile", "black-forest-labs/FLUX.1-dev")
    assert "hf download black-forest-labs/FLUX.1-dev --local-dir" in err
    assert "hf auth login" in err


@pytest.mark.parametrize("command", ["compile", "explain"])
def test_shards_that_are_missing_or_cut_short(capsys, folder, command):
    shard = shards(folder)[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-64])
    err = refused(capsys, command, folder)
    assert f"{shard.name} is not a readable safetensors file" in err
    assert "fetch or export it again" in err
    shard.unlink()
    assert f"lacks {shard.name}, which its index names" in refused(capsys, command, folder)


@pytest.mark.parametrize("mapped", [[], ["--mapped"]])
def test_a_shard_without_a_weight_of_the_index(capsys, folder, mapped):
    shard = shards(folder)[1]
    weights = load_file(shard)
    name = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != name}, shard)
    err = refused(capsys, "compile", folder, *mapped)
    assert f"{shard.name} lacks the weight '{name}'" in err
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    assert f"lacks the weight '{name}' of DiT" in refused(capsys, "compile", folder, *mapped)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(capsys, folder, text):
    (folder / INDEX).write_text(text)
    assert f"{INDEX} is not an index of weight files" in refused(capsys, "compile", folder)


@pytest.mark.parametrize("mapped", [[], ["--mapped"]])
def test_weights_of_another_size_than_the_configuration(capsys, folder, mapped):
    edited(folder / "config.json", '"num_attention_heads": 4', '"num_attention_heads": 8')
    assert "of different models" in refused(capsys, "compile", folder, *mapped)


def test_a_component_of_custom_code(capsys, folder, tmp_path):
    """Without prompts nothing but the component is read; its class decides."""
    (tmp_path / "pipe").mkdir()
    shutil.move(folder, tmp_path / "pipe" / "transformer")
    entries = {"_class_name": "DiTPipeline", "transformer": ["mine", "MyTransformer"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(entries))
    config = tmp_path / "pipe" / "transformer" / "config.json"
    (config.parent / "mine.py").write_text("raise AssertionError('it was run')\n")
    edited(config, "DiTTransformer2DModel", "MyTransformer")
    err = refused(capsys, "compile", "pipe")
    assert "no inputs are known for the class MyTransformer" in err
    assert "write a model.py" in err


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_not_finite(capsys, model_file, value):
    edited(
        model_file,
        "    return Tiny().eval()",
        "    tiny = Tiny().eval()\n"
        f"    tiny.blocks[1].up.weight.data[3, 5] = float('{value}')\n"
        "    return tiny",
    )
    err = refused(capsys, "compile", model_file)
    assert "blocks.1.up.weight: the weight holds NaN or infinity in 1 of 2048 places" in err


@pytest.mark.parametrize("options", [[], ["--no-verify"]])
def test_activations_that_are_not_finite(capsys, model_file, options):
    edited(model_file, "        x = x + self.time", "        x = (-x.abs()).sqrt() + self.time")
    err = refused(capsys, "compile", model_file, *options)
    assert "NaN or infinity" in err
    assert "While executing" not in err  # what torch.fx adds to errors on their way out


# -- the disk and the artifact -----------------------------------------------------------------


@pytest.fixture
def small_files_only():
    """Writing more than 8 KiB into one file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_writing(capsys, model_file, small_files_only):
    err = refused(capsys, "compile", model_file)
    assert "File too large" in err
    assert "space on its disk" in err


def test_a_disk_that_has_no_room(capsys, model_file, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "free some space" in refused(capsys, "compile", model_file)


@pytest.fixture
def artifact(tiny_artifact, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "copy"))


COMMANDS = [["inspect"], ["run"], ["check", "--model", "model.py"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_damaged_artifact(capsys, artifact, model_file, command):
    weights = artifact / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    err = refused(capsys, command[0], artifact, *command[1:])
    assert "its hash differs" in err
    assert "copy it again" in err


def test_a_truncated_artifact(capsys, artifact):
    weights = artifact / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "bytes, it has" in refused(capsys, "run", artifact)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_artifact_from_a_newer_version(capsys, artifact, model_file, command):
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["format"]["version"] = 999
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    err = refused(capsys, command[0], artifact, *command[1:])
    assert "format version 999" in err
    assert "upgrade vdqc" in err


@pytest.mark.parametrize("file", ["manifest.json", "program.json", "lora/transforms.safetensors"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_artifact_edited_by_hand(capsys, artifact, model_file, command, file):
    data = (artifact / file).read_bytes()
    assert b"blocks.0.up" in data
    (artifact / file).write_bytes(data.replace(b"blocks.0.up", b"blocks.1.up", 1))
    err = refused(capsys, command[0], artifact, *command[1:])
    assert ("is not the one that was written" if file == "manifest.json" else file) in err
    assert "copy it again" in err


def retarget(artifact: Path, target: str) -> None:
    """Make it one that was compiled for ``target``; its program runs anywhere."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps({**manifest, "target": target}))
    seal(artifact)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have the right GPU")
def test_an_artifact_for_another_target(capsys, artifact):
    retarget(artifact, "sm130")
    assert "was compiled for sm130: expected one of cpu, sm80" in refused(capsys, "run", artifact)
    retarget(artifact, "sm90")
    err = refused(capsys, "run", artifact)
    assert "was compiled for sm90: expected a GPU of sm90 or later, found none" in err
    assert "--target auto" in err
    assert "--reference" in err
    with pytest.warns(UserWarning, match="through the references"):
        assert main(["run", str(artifact), "--reference"]) == 0


def test_a_folder_that_is_no_artifact(capsys):
    Path("folder").mkdir()
    assert "is not a vdqc artifact" in refused(capsys, "run", "folder")
    assert "found nothing" in refused(capsys, "inspect", "missing")


# -- check and run -----------------------------------------------------------------------------


def test_a_threshold_that_cannot_be_measured(capsys, artifact, model_file):
    edited(model_file, "def accuracy(", "def other(")
    err = refused(capsys, "check", artifact, "--model", model_file, "--min-accuracy", "0.5")
    assert "accuracy(video, seed)" in err
    arguments = ["check", str(artifact), "--model", str(model_file), "--min-accuracy", "0.5"]
    assert main([*arguments, "-o", "found.json"]) == 2
    assert json.loads(Path("found.json").read_text())["sqnr_db"] > 0  # what was measured is kept


def test_another_model_than_the_one_compiled(capsys, artifact, model_file):
    edited(model_file, "x: torch.Tensor, timestep: torch.Tensor", "x: torch.Tensor, timestep=None")
    edited(model_file, '{"x": x, ', '{"x": x.double(), ')
    edited(model_file, "return Tiny().eval()", "return Tiny().double().eval()")
    refused(capsys, "check", artifact, "--model", model_file, "--no-generate")


def test_run_without_generate(capsys, artifact, model_file):
    edited(model_file, "def generate(", "def other(")
    err = refused(capsys, "run", artifact, "--model", model_file)
    assert "to have generate(model, seed)" in err
