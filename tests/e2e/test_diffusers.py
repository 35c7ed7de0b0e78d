"""An artifact in diffusers: loaded, saved and uploaded as a diffusers model is."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import (
    AutoModel,
    ContextParallelConfig,
    ModelMixin,
    ParallelConfig,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.quantizers import auto
from torch import Tensor

import vdqc
from vdqc.base.diagnostics import ArtifactError, ConfigError, InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.compiled import CompiledModel
from vdqc.hub import register
from vdqc.hub.facade import ADVICE, facade
from vdqc.ir import artifact
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan, compiled to eight bits."""
    folder = tmp_path_factory.mktemp("hub") / "wan"
    vdqc.compile(WAN.build(), WAN.samples(), "quant", "w8a8", "cpu", folder, verify=False)
    return folder


@pytest.fixture(scope="module")
def expected(out: Path) -> Tensor:
    with torch.no_grad():
        value: Tensor = vdqc.load(out)(**WAN.inputs(seed=5)).sample
    return value


def same(model: Any, expected: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model(**WAN.inputs(seed=5)).sample, expected)


# -- from_pretrained ------------------------------------------------------------------------------


def test_from_pretrained_of_an_artifact(out: Path, expected: Tensor) -> None:
    model = WanTransformer3DModel.from_pretrained(out)
    assert isinstance(model, CompiledModel)
    assert isinstance(model, WanTransformer3DModel)
    assert same(model, expected)
    assert model.config.quantization_config.quant_method == "vdqc"
    assert model.quantization_method == "vdqc"
    assert not model.training
    for options in ({"torch_dtype": torch.float32}, {"device_map": "cpu"}, {"device_map": "auto"}):
        assert same(AutoModel.from_pretrained(str(out), **options), expected)


def test_the_method_is_known_as_soon_as_diffusers_is_imported() -> None:
    code = (
        "import sys, vdqc; assert 'torch' not in sys.modules;"
        "import diffusers.quantizers.auto as auto; import inspect;"
        "print('vdqc' in auto.AUTO_QUANTIZER_MAPPING, 'bfl' in inspect.getsource(auto),"
        " [f for f in sys.meta_path if 'vdqc.hub' in type(f).__module__])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True True []"


def test_registering_by_hand_and_again() -> None:
    vdqc.register_diffusers()
    vdqc.register_diffusers()
    register.watch()
    assert {"vdqc", "torchao"} <= auto.AUTO_QUANTIZER_MAPPING.keys()


def test_a_diffusers_without_the_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    older = types.ModuleType(register.MODULE)
    with pytest.raises(ConfigError, match="has no table"):
        register.add_to(older)
    with pytest.warns(UserWarning, match=r"transformer=vdqc\.load"):
        register._add_or_warn(older)
    monkeypatch.delattr("diffusers.quantizers.base.DiffusersQuantizer.maybe_update_state_dict")
    with pytest.raises(ConfigError, match="maybe_update_state_dict"):
        register.add_to(auto)
    monkeypatch.setitem(sys.modules, register.MODULE, None)
    with pytest.raises(ConfigError, match="pip install"):
        register.register_diffusers()


def test_what_cannot_be_had_is_refused_before_loading(out: Path) -> None:
    for options, error, message in [
        ({"torch_dtype": torch.bfloat16}, ArtifactError, "compile the model again"),
        ({"device_map": {"blocks": "cpu", "head": "meta"}}, InputError, "one device"),
        ({"device_map": {"": "disk"}}, InputError, "one device"),
    ]:
        with pytest.raises(error, match=message):
            WanTransformer3DModel.from_pretrained(out, **options)
    with pytest.raises(InputError, match="does not compile"):
        WanTransformer3DModel.from_pretrained(
            float_folder(out.parent),
            quantization_config=auto.AUTO_QUANTIZATION_CONFIG_MAPPING["vdqc"](),
        )


def float_folder(folder: Path) -> Path:
    place = folder / "float"
    if not place.exists():
        WAN.build().save_pretrained(place)
    return place


# -- save_pretrained and push_to_hub --------------------------------------------------------------


@pytest.mark.parametrize("size", ["2GB", "100KB", 50_000])
def test_saved_and_loaded_again(out: Path, expected: Tensor, tmp_path: Path, size: Any) -> None:
    model = vdqc.load(out)
    model.save_pretrained(tmp_path / "saved", max_shard_size=size)
    names = {path.name for path in (tmp_path / "saved").glob("diffusion_pytorch_model*")}
    assert ("diffusion_pytorch_model.safetensors" in names) == (size == "2GB")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert same(loaded, expected)
    assert same(vdqc.load(tmp_path / "saved"), expected)
    loaded.save_pretrained(tmp_path / "saved")  # over itself
    assert same(vdqc.load(tmp_path / "saved"), expected)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["_class_name"] == "WanTransformer3DModel"
    assert config["quantization_config"]["quant_method"] == "vdqc"
    assert not [key for key in config if key in ("_name_or_path", "_use_default_values")]


def test_weights_are_saved_as_they_are_now(out: Path, tmp_path: Path) -> None:
    model = vdqc.load(out)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    name = next(key for key, value in state.items() if value.is_floating_point())
    model.load_state_dict({**state, name: state[name] + 1})
    model.save_pretrained(tmp_path / "changed")
    assert torch.equal(vdqc.load(tmp_path / "changed").state_dict()[name], state[name] + 1)


def test_saving_over_what_is_no_artifact_or_without_one(out: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="did not write it"):
        vdqc.load(out).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="max_shard_size"):
        vdqc.load(out).save_pretrained(tmp_path / "new", max_shard_size="large")
    model = vdqc.load(out)
    model._folder = None
    with pytest.raises(InputError, match="made in memory"):
        model.save_pretrained(tmp_path / "new")


class FakeHub:
    """The network edge of huggingface_hub: repositories are folders."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls = root, []
        for name in ("create_repo", "file_exists", "upload_folder", "hf_hub_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, name: str, **options: Any) -> bool:
        return (self.root / repo_id / name).exists()

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, path_in_repo: str | None, **options: Any
    ) -> str:
        self.calls.append(options)
        place = self.root / repo_id / (path_in_repo or "")
        shutil.copytree(folder_path, place, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/0"

    def hf_hub_download(self, repo_id: str, name: str, *, revision: str, cache_dir: Path) -> str:
        folder = cache_dir / f"models--{repo_id.replace('/', '--')}" / "snapshots" / revision
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.root / repo_id / name, folder / name)
        return str(folder / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(tmp_path / "hub", monkeypatch)


def test_pushed_and_loaded_from_the_upload(
    hub: FakeHub, out: Path, expected: Tensor, tmp_path: Path
) -> None:
    model = vdqc.load(out)
    address = model.push_to_hub("org/tiny-wan", commit_message="first", private=True, token="t")
    assert address == "https://hub/org/tiny-wan/commit/0"
    assert hub.calls == [{"commit_message": "first", "token": "t", "create_pr": False}]
    assert same(WanTransformer3DModel.from_pretrained(hub.root / "org/tiny-wan"), expected)
    card = hub.root / "org/tiny-wan/README.md"
    assert "WanTransformer3DModel.from_pretrained" in card.read_text()
    card.write_text("my own words")
    model.push_to_hub("org/tiny-wan")
    assert card.read_text() == "my own words"
    model.push_to_hub("org/pipeline", subfolder="transformer")
    assert same(vdqc.load(hub.root / "org/pipeline/transformer"), expected)
    model.save_pretrained(tmp_path / "named", push_to_hub=True, repo_id="org/other")
    assert same(vdqc.load(hub.root / "org/other"), expected)
    with pytest.raises(InputError, match="did you mean 'private'"):
        model.push_to_hub("org/x", privat=True)
    with pytest.raises(InputError, match="one form"):
        model.push_to_hub("org/x", safe_serialization=False)


def test_a_snapshot_of_the_cache_is_completed(
    hub: FakeHub, out: Path, expected: Tensor, tmp_path: Path
) -> None:
    """diffusers fetches config and weights into a cache of links; the rest comes on loading."""
    vdqc.load(out).push_to_hub("org/wan", subfolder="transformer")
    repo = tmp_path / "cache" / "models--org--wan"
    snapshot = repo / "snapshots" / "abc" / "transformer"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copyfile(hub.root / "org/wan/transformer" / name, repo / "blobs" / name)
        (snapshot / name).symlink_to(repo / "blobs" / name)
    assert same(WanTransformer3DModel.from_pretrained(snapshot), expected)
    (hub.root / "org/wan/transformer/program.json").unlink()
    (snapshot / "program.json").unlink()
    with pytest.raises(ArtifactError, match="cannot be fetched"):
        WanTransformer3DModel.from_pretrained(snapshot)


# -- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "copy"))


def edited(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_an_artifact_edited_by_hand(copy: Path) -> None:
    edited(copy / "config.json", '"num_layers": 2', '"num_layers": 3')
    for load in (vdqc.load, WanTransformer3DModel.from_pretrained):
        with pytest.raises(ArtifactError, match=r"config\.json.*hash differs"):
            load(copy)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"dtype": "float32"', '"dtype": "float31"', "a dtype of torch"),
        ('"WanTransformer3DModel"', '"SkyReelsV2Transformer3DModel"', "config.json"),
    ],
)
def test_a_configuration_that_contradicts(copy: Path, old: str, new: str, message: str) -> None:
    edited(copy / "config.json", old, new)
    artifact.seal(copy)
    with pytest.raises(ArtifactError, match=message):
        AutoModel.from_pretrained(str(copy))


def test_missing_files_are_named(copy: Path) -> None:
    (copy / "program.json").unlink()
    with pytest.raises(ArtifactError, match=r"program\.json is missing"):
        WanTransformer3DModel.from_pretrained(copy)


# -- what a stand-in refuses ----------------------------------------------------------------------


def test_what_acts_on_submodules_is_refused_by_name(out: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(out)
    for name in ADVICE:
        with pytest.raises(InputError, match=f"{name} acts on submodules"):
            getattr(model, name)()


# -- adapters -------------------------------------------------------------------------------------


def adapter(seed: int) -> dict[str, Tensor]:
    """Factors of two layers, named as diffusers saves them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"transformer.blocks.{block}.attn1.to_q.lora_{side}.weight": torch.randn(
            size, generator=generator
        )
        for block in (0, 1)
        for side, size in (("A", (2, 64)), ("B", (64, 2)))
    }


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks for peft before it calls a component's own methods, which need none."""
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", True)
    monkeypatch.setattr("diffusers.loaders.lora_base.USE_PEFT_BACKEND", True)


def test_a_pipeline_loads_and_weighs_adapters(out: Path, expected: Tensor, peft: None) -> None:
    """Every state equals that of ``load_lora``; which ones are active is as with peft 0.21."""
    model, own = vdqc.load(out), vdqc.load(out)
    own.load_lora(adapter(1), 0.0, "first")
    own.load_lora(adapter(2), 0.0, "second")

    def is_at(first: float, second: float) -> bool:
        own.set_lora_weight("first", first)
        own.set_lora_weight("second", second)
        with torch.no_grad():
            return same(model, own(**WAN.inputs(seed=5)).sample)

    pipe = wan_pipeline(transformer=model)
    pipe.load_lora_weights(adapter(1), adapter_name="first")
    assert is_at(1.0, 0.0)
    assert not same(model, expected)
    pipe.load_lora_weights(adapter(2), adapter_name="second")
    assert is_at(0.0, 1.0)
    assert pipe.get_list_adapters() == {"transformer": ["first", "second"]}
    pipe.set_adapters(["first", "second"], [0.5, 0.25])
    assert is_at(0.5, 0.25)
    pipe.disable_lora()
    pipe.set_adapters("second")
    assert is_at(0.0, 0.0)
    assert model.active_adapters() == ["second"]
    pipe.enable_lora()
    assert is_at(0.0, 1.0)
    pipe.delete_adapters("second")
    assert model.lora_weights == {"first": 0.0}
    model.load_lora_adapter(adapter(2))
    assert model.active_adapters() == ["default_0"]
    pipe.unload_lora_weights()
    assert same(model, expected)


def test_alphas_and_metadata_scale_an_adapter(out: Path) -> None:
    model, state = vdqc.load(out), adapter(1)
    modules = {key.partition(".lora_")[0] for key in state}
    outputs = []
    for given in (
        {"network_alphas": {f"{name}.alpha": 1.0 for name in modules}},
        {"metadata": {"transformer.lora_alpha": 1.0, "transformer.r": 2}},
    ):
        model.load_lora_adapter(state, **given)
        with torch.no_grad():
            outputs.append(model(**WAN.inputs(seed=5)).sample)
        model.unload_lora()
    model.load_lora(state, 0.5)
    assert all(same(model, output) for output in outputs)


def test_what_adapters_cannot_do_here_is_refused(out: Path) -> None:
    model = vdqc.load(out)
    for name, advice in (
        ("add_adapter", "train the adapter on the float model"),
        ("fuse_lora", "load_lora"),
        ("save_lora_adapter", "the file that load_lora read"),
    ):
        with pytest.raises(InputError, match=f"(?s){name} acts on submodules.*{advice}"):
            getattr(model, name)()
    with pytest.raises(InputError, match="in place"):
        model.load_lora_adapter(adapter(1), hotswap=True)
    with pytest.raises(InputError, match="found nothing"):
        model.load_lora_adapter("org/style", weight_name="style.safetensors")
    model.load_lora_adapter(adapter(1), adapter_name="style")
    with pytest.raises(InputError, match="one for each block"):
        model.set_adapters("style", {"blocks": 0.5})
    with pytest.raises(ConfigError, match="a weight for each"):
        model.set_adapters("style", [0.5, 1.0])
    with pytest.warns(UserWarning, match="named stile, loaded are: style"):
        model.set_adapters("stile")


def test_a_class_that_diffusers_lacks_is_a_model_of_its_name() -> None:
    cls: Any = facade(CompiledModel, "diffusers.models.FutureTransformer")
    assert (cls.__name__, cls.__module__) == ("FutureTransformer", "diffusers")
    assert issubclass(cls, ModelMixin)
    assert facade(CompiledModel, "elsewhere.Model") is CompiledModel


# -- pipelines ------------------------------------------------------------------------------------


def wan_pipeline(**experts: Any) -> WanPipeline:
    """A Wan pipeline without text encoder and decoder; two experts divide the steps."""
    scheduler = UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True)
    ratio = 0.8 if "transformer_2" in experts else None
    pipe = WanPipeline(None, None, None, scheduler, **experts, boundary_ratio=ratio)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, seed: int = 5) -> Tensor:
    """What one guided sampling run of four steps ends with."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randn(2, 1, 9, 24, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        num_inference_steps=4,
        generator=generator,
        output_type="latent",
        height=32,
        width=48,
        num_frames=5,
    )
    value: Tensor = found.frames
    return value


def test_a_pipeline_with_it_is_saved_and_loaded(out: Path, tmp_path: Path) -> None:
    pipe = wan_pipeline(transformer=vdqc.load(out))
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    loaded = WanPipeline.from_pretrained(tmp_path / "pipe", **parts)
    assert isinstance(loaded.transformer, CompiledModel)
    assert torch.equal(latents(loaded), latents(pipe))
    assert loaded.to("cpu", torch.float32) is loaded


def test_both_experts_in_their_places(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    wan_pipeline(transformer=WAN.build(), transformer_2=WAN.build(1)).save_pretrained(folder)
    shutil.copytree(out, tmp_path / "out" / "transformer")
    one = vdqc.load_pipeline(folder, tmp_path / "out")
    assert isinstance(one.transformer, CompiledModel)
    assert not isinstance(one.transformer_2, CompiledModel)
    shutil.copytree(out, tmp_path / "out" / "transformer_2")
    both = vdqc.load_pipeline(folder, tmp_path / "out", torch_dtype=torch.float32)
    assert isinstance(both.transformer_2, CompiledModel)
    assert not torch.equal(latents(both), latents(one))
    with pytest.raises(ConfigError, match="2 denoisers"):
        vdqc.load_pipeline(folder, out)
    (tmp_path / "out" / "transformer_2").rename(tmp_path / "out" / "transformer_3")
    with pytest.raises(ArtifactError, match="did you mean 'transformer_2'"):
        vdqc.load_pipeline(folder, tmp_path / "out")
    for empty in (folder, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match=r"found (none|nothing)"):
            vdqc.load_pipeline(folder, empty)


def test_one_artifact_is_the_denoiser(out: Path, tmp_path: Path) -> None:
    wan_pipeline(transformer=WAN.build()).save_pretrained(tmp_path)
    assert isinstance(vdqc.load_pipeline(tmp_path, out).transformer, CompiledModel)
    with pytest.raises(ConfigError, match="expected a pipeline"):
        vdqc.load_pipeline(out, out)


# -- offload, compilation, parallelism ------------------------------------------------------------


def test_model_offload_moves_it_as_a_whole(out: Path) -> None:
    """accelerate's hooks around whole components, with the CPU as the device to move to."""
    pipe = wan_pipeline(transformer=vdqc.load(out))
    expected = latents(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    # copies lie at other addresses than mapped files, so vector loops split elsewhere
    assert relative_error(latents(pipe), expected) <= TOLERANCE[torch.float32]
    assert relative_error(latents(pipe), expected) <= TOLERANCE[torch.float32]
    pipe.remove_all_hooks()
    assert relative_error(latents(pipe), expected) <= TOLERANCE[torch.float32]


def test_what_compilers_see_moves_with_the_weights(out: Path) -> None:
    model: Any = vdqc.load(out)

    def shared() -> list[bool]:
        places = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        seen = [*model.prepared.parameters(), *model.prepared.buffers()]
        return [t.untyped_storage()._cdata in places for t in seen]

    before, pieces = shared(), list(model.prepared.parameters())
    assert sum(before) > 10  # not those that spelling out added
    model._apply(lambda tensor: tensor.clone())
    assert shared() == before
    assert list(map(id, model.prepared.parameters())) == list(map(id, pieces))
    model.to("meta")
    assert shared() == before


def test_offload_by_submodule_says_that_it_cannot(out: Path) -> None:
    pipe = wan_pipeline(transformer=vdqc.load(out))
    with pytest.raises(InputError, match="exclude_modules"):
        pipe.enable_group_offload(onload_device=torch.device("cpu"), num_blocks_per_group=1)
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), num_blocks_per_group=1, exclude_modules=["transformer"]
    )
    expected = latents(wan_pipeline(transformer=vdqc.load(out)))
    assert torch.equal(latents(pipe), expected)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(InputError, match="enable_model_cpu_offload"):
        latents(pipe)


def test_attention_backends_caches_and_parallelism(out: Path, expected: Tensor) -> None:
    model: Any = vdqc.load(out)
    for name, arguments, advice in [
        ("set_attention_backend", ("native",), "chosen when the model was compiled"),
        ("enable_cache", (PyramidAttentionBroadcastConfig(),), "reparameterize"),
        ("enable_parallelism", (), "one process per video"),
    ]:
        with pytest.raises(InputError, match=advice):
            getattr(model, name)(*arguments)
    with model.cache_context("cond"):
        assert same(model, expected)
    parallel = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(InputError, match="one process per video"):
        WanTransformer3DModel.from_pretrained(out, parallel_config=parallel)


def test_torch_compile_sees_one_graph(out: Path, expected: Tensor) -> None:
    torch._dynamo.reset()
    model = WanTransformer3DModel.from_pretrained(out)
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = whole(**WAN.inputs(seed=5)).sample
    assert relative_error(found, expected) <= TOLERANCE[torch.float32]
    assert model.hf_quantizer.is_compileable
    assert not model.hf_quantizer.is_trainable
