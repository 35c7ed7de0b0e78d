"""An artifact in diffusers: loaded as a diffusers model is, and what it refuses."""

import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoModel,
    ContextParallelConfig,
    ModelMixin,
    ParallelConfig,
    PyramidAttentionBroadcastConfig,
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
HELP = runpy.run_path(str(Path(__file__).with_name("wan.py")))
same = HELP["same"]


def test_from_pretrained_of_an_artifact(wan_artifact: Path, wan_output: Tensor) -> None:
    model = WanTransformer3DModel.from_pretrained(wan_artifact)
    assert isinstance(model, CompiledModel)
    assert isinstance(model, WanTransformer3DModel)
    assert same(model, wan_output)
    assert model.config.quantization_config.quant_method == "vdqc"
    assert model.quantization_method == "vdqc"
    assert not model.training
    for options in ({"torch_dtype": torch.float32}, {"device_map": "cpu"}, {"device_map": "auto"}):
        assert same(AutoModel.from_pretrained(str(wan_artifact), **options), wan_output)


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


def test_what_cannot_be_had_is_refused_before_loading(wan_artifact: Path) -> None:
    for options, error, message in [
        ({"torch_dtype": torch.bfloat16}, ArtifactError, "compile the model again"),
        ({"device_map": {"blocks": "cpu", "head": "meta"}}, InputError, "one device"),
        ({"device_map": {"": "disk"}}, InputError, "one device"),
    ]:
        with pytest.raises(error, match=message):
            WanTransformer3DModel.from_pretrained(wan_artifact, **options)
    with pytest.raises(InputError, match="does not compile"):
        WanTransformer3DModel.from_pretrained(
            float_folder(wan_artifact.parent),
            quantization_config=auto.AUTO_QUANTIZATION_CONFIG_MAPPING["vdqc"](),
        )


def float_folder(folder: Path) -> Path:
    place = folder / "float"
    if not place.exists():
        WAN.build().save_pretrained(place)
    return place


@pytest.fixture
def copy(wan_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan_artifact, tmp_path / "copy"))


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


def test_what_acts_on_submodules_is_refused_by_name(wan_artifact: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(wan_artifact)
    for name in ADVICE:
        with pytest.raises(InputError, match=f"{name} acts on submodules"):
            getattr(model, name)()


def test_a_class_that_diffusers_lacks_is_a_model_of_its_name() -> None:
    cls: Any = facade(CompiledModel, "diffusers.models.FutureTransformer")
    assert (cls.__name__, cls.__module__) == ("FutureTransformer", "diffusers")
    assert issubclass(cls, ModelMixin)
    assert facade(CompiledModel, "elsewhere.Model") is CompiledModel


def test_what_compilers_see_moves_with_the_weights(wan_artifact: Path) -> None:
    model: Any = vdqc.load(wan_artifact)

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


def test_attention_backends_caches_and_parallelism(wan_artifact: Path, wan_output: Tensor) -> None:
    model: Any = vdqc.load(wan_artifact)
    for name, arguments, advice in [
        ("set_attention_backend", ("native",), "chosen when the model was compiled"),
        ("enable_cache", (PyramidAttentionBroadcastConfig(),), "reparameterize"),
        ("enable_parallelism", (), "one process per video"),
    ]:
        with pytest.raises(InputError, match=advice):
            getattr(model, name)(*arguments)
    with model.cache_context("cond"):
        assert same(model, wan_output)
    parallel = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(InputError, match="one process per video"):
        WanTransformer3DModel.from_pretrained(wan_artifact, parallel_config=parallel)


def test_torch_compile_sees_one_graph(wan_artifact: Path, wan_output: Tensor) -> None:
    torch._dynamo.reset()
    model = WanTransformer3DModel.from_pretrained(wan_artifact)
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = whole(**WAN.inputs(seed=5)).sample
    assert relative_error(found, wan_output) <= TOLERANCE[torch.float32]
    assert model.hf_quantizer.is_compileable
    assert not model.hf_quantizer.is_trainable
