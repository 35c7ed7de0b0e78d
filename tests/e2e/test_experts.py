"""Components of a pipeline folder, compiled from calls that the pipeline itself makes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import vdqc
from vdqc.base.diagnostics import ArtifactError, ConfigError, InputError
from vdqc.base.numerics import sqnr_db
from vdqc.cli import main
from vdqc.compiled import CompiledModel
from vdqc.engine.pool import open_pool
from vdqc.hub.experts import compile_pipeline, components, examples
from vdqc.hub.sampler import Sampler, load_float, read_embeddings, read_prompts
from vdqc.ir.sample import Sample
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]
WORDS = ("<pad>", "</s>", "<unk>", "a", "cat", "dog", "runs")
CALL = {
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 4,
    "max_sequence_length": 9,
}


def text_encoder() -> tuple[Any, Any]:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(WORDS), d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return tokenizer, UMT5EncoderModel(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.2: two experts, a text encoder, no decoder."""
    place = tmp_path_factory.mktemp("experts") / "wan22"
    scheduler = UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True)
    experts = {"transformer": WAN.build(), "transformer_2": WAN.build(1)}
    pipe = WanPipeline(*text_encoder(), None, scheduler, **experts, boundary_ratio=0.8)
    pipe.save_pretrained(place)
    return place


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat runs\n\na dog\n")
    return file


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    file = tmp_path / "embeddings.safetensors"
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(3, 9, 24, generator=generator)
    save_file({"prompt_embeds": both[:2].clone(), "negative_prompt_embeds": both[2:].clone()}, file)
    return file


def latents(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    value: Tensor = pipe("a dog runs", generator=generator, output_type="latent", **CALL).frames
    return value


def test_both_experts_learn_from_their_own_calls(
    folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out, pool = tmp_path / "out", tmp_path / "pool"
    made = compile_pipeline(
        folder,
        out=out,
        conditions=read_prompts(prompts),
        sampling=CALL,
        pool=pool,
        passes="smooth,quant",
        target="cpu",
        verify=False,
    )
    assert {name: found.path for name, found in made.items()} == {
        "transformer": out / "transformer",
        "transformer_2": out / "transformer_2",
    }
    early, late = (open_pool(pool / name) for name in made)
    times = [[entry.timestep for entry in each.candidates] for each in (early, late)]
    assert min(times[0]) >= 800 > max(times[1])
    assert len(times[0]) + len(times[1]) == 2 * 2 * CALL["num_inference_steps"]
    assert {entry.seed for entry in early.candidates} == {0, 1}
    assert [found.manifest["facts"]["seed"] for found in made.values()] == [0, 0]
    compiled = vdqc.load_pipeline(folder, out)
    assert isinstance(compiled.transformer_2, CompiledModel)
    expected = latents(WanPipeline.from_pretrained(folder, vae=None))
    assert sqnr_db(latents(compiled), expected) > 15


def test_one_component_from_embeddings_on_the_command_line(
    folder: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = [f"{name}={value}" for name, value in CALL.items() if name != "max_sequence_length"]
    words = ["compile", str(folder), "--component", "transformer_2", "--passes", "smooth,quant"]
    words += ["--embeddings", str(embeddings), "--target", "cpu", "--no-verify"]
    words += [word for item in sampling for word in ("--sampling", item)]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert f"next: vdqc check {tmp_path / 'out'}" in capsys.readouterr().out
    assert vdqc.load(tmp_path / "out").config.num_layers == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embeddings.safetensors", "out"]


def test_components_by_name(folder: Path) -> None:
    assert components(folder, None) == ["transformer"]
    assert components(folder, "all") == ["transformer", "transformer_2"]
    assert components(folder, "transformer_2, transformer") == ["transformer_2", "transformer"]
    with pytest.raises(ConfigError, match="did you mean 'transformer_2'"):
        components(folder, "transformer_3")


def test_recording_goes_on_where_it_stopped(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = read_prompts(prompts)
    sampler = Sampler(load_float(folder, conditions), conditions, CALL)
    names = ["transformer", "transformer_2"]
    whole = sampler.record(names, tmp_path / "whole")
    generate = Sampler.generate

    def interrupted(self: Sampler, seed: int) -> None:
        if seed == 1:
            raise KeyboardInterrupt
        generate(self, seed)

    monkeypatch.setattr(Sampler, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler.record(names, tmp_path / "pool")
    monkeypatch.setattr(Sampler, "generate", generate)
    again = sampler.record(names, tmp_path / "pool")
    assert [again[name].hash for name in names] == [whole[name].hash for name in names]
    other = Sampler(sampler.pipeline, conditions, {**CALL, "guidance_scale": 2.0})
    with pytest.raises(ArtifactError, match="another sampler"):
        other.record(names, tmp_path / "pool")


def test_an_expert_that_is_never_called(folder: Path, prompts: Path, tmp_path: Path) -> None:
    conditions = read_prompts(prompts)
    pipe = load_float(folder, conditions)
    pipe.register_to_config(boundary_ratio=0.0001)
    with pytest.raises(InputError, match="'transformer_2', it never did"):
        Sampler(pipe, conditions, CALL).record(["transformer", "transformer_2"], tmp_path)


def test_examples_take_over_what_the_pipeline_gives() -> None:
    model = WAN.build()
    call = WAN.inputs(L=9)
    call["timestep"] = call["timestep"].float()
    found = examples(model, Sample({**call, "attention_kwargs": None, "return_dict": False}))
    assert [set(sample.inputs) for sample in found] == [set(WAN.inputs())] * 2
    extra = Sample({**call, "encoder_hidden_states_image": torch.randn(2, 3, 28)})
    assert len(examples(model, extra)) == 1  # of another kind: itself the example
    ltx = ARCHITECTURES["ltx"]
    scale = (0.32, 32, 32)
    found = examples(ltx.build(), Sample({**ltx.inputs(), "rope_interpolation_scale": scale}))
    assert [sample.inputs["rope_interpolation_scale"] for sample in found] == [scale, scale]
    assert len(found) == 2


# -- what cannot be used --------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["compile", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    return str(err)


@pytest.fixture
def copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(folder, tmp_path / "pipe"))


def test_words_that_do_not_fit(
    copy: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, expected in [
        (["--component", "tranformer"], "did you mean 'transformer'?"),
        (["--component", "transformer,vea"], "no component 'vea'"),
        (["--prompts", "nowhere.txt"], "cannot read the prompts"),
        (["--embeddings", "nowhere.safetensors"], "found nothing"),
        (["--sampling", "height=32"], "expected prompts or embeddings"),
        (["--prompts", prompts, "--sampling", "height"], "expected NAME=VALUE"),
        (["--prompts", prompts, "--sampling", "heigth=32"], "did you mean 'height'?"),
        (["--prompts", prompts, "--embeddings", "x"], "not allowed with"),
        (["--component", "all", "--passes", "quannt"], "did you mean 'quant'?"),
    ]:
        assert expected in refused(capsys, copy, *words)
    assert "expected a pipeline folder" in refused(capsys, copy / "transformer", "--prompts", "x")
    (copy.parent / "empty.txt").write_text("\n\n")
    assert "found none" in refused(capsys, copy, "--prompts", "empty.txt")
    Path("pipe.vdqc/transformer_2").mkdir(parents=True)
    assert "transformer_2 exists" in refused(capsys, copy, "--component", "all")


def test_embeddings_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.safetensors"
    save_file({"prompt_embeds": torch.ones(2, 9, 24), "other": torch.ones(3, 1)}, file)
    with pytest.raises(InputError, match="expected 1 or 3 rows in 'prompt_embeds'"):
        read_embeddings(file)
    save_file({"prompt_embedds": torch.ones(2, 9, 24)}, file)
    conditions = read_embeddings(file)
    with pytest.raises(ConfigError, match="did you mean 'prompt_embeds'"):
        Sampler(load_float(folder, conditions), conditions)
    file.write_bytes(b"no safetensors at all")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_embeddings(file)


def index(folder: Path, **entries: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_components_of_custom_code_are_not_run(
    copy: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "transformer" / "mine.py").write_text("raise AssertionError('it was run')\n")
    index(copy, transformer=["mine", "MyTransformer"])
    err = refused(capsys, copy, "--prompts", prompts)
    assert "the component 'transformer'" in err
    assert "is custom code: MyTransformer of mine" in err
    index(copy, _class_name=["mine", "MyPipeline"])
    assert "is not one of diffusers" in refused(capsys, copy, "--prompts", prompts)


def test_a_pipeline_without_its_text_encoder(
    copy: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index(copy, text_encoder=[None, None])
    err = refused(capsys, copy, "--prompts", prompts)
    assert "expected a text_encoder" in err
    assert "--embeddings" in err


@pytest.mark.parametrize("component", ["transformer_2", "all"])
def test_missing_and_corrupt_weights(
    copy: Path, prompts: Path, capsys: pytest.CaptureFixture[str], component: str
) -> None:
    weights = copy / "transformer_2" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for words in ([], ["--prompts", prompts]):
        given = [copy, "--component", component, "--no-verify", *words]
        weights.write_bytes(whole[: len(whole) // 2])
        assert "not a readable safetensors file" in refused(capsys, *given)
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert "git lfs pull" in refused(capsys, *given)
        weights.unlink()
        err = refused(capsys, *given)
        assert "expected safetensors files in" in err
    (copy / "transformer_2" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}})
    )
    assert "lacks diffusion_pytorch_model-00001-of-00002" in refused(
        capsys, copy, "--component", "transformer_2"
    )


def test_a_name_of_the_hub_is_not_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    err = refused(capsys, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert "found nothing" in err
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir" in err


def test_an_artifact_is_compiled_already(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vdqc.compile(
        WAN.build(), WAN.samples(), "quant", out=tmp_path / "w", target="cpu", verify=False
    )
    assert "is compiled already" in refused(capsys, tmp_path / "w", "-o", tmp_path / "again")
