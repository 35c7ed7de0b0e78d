"""A model.py or a folder becomes a model with samples; whatever does not fit says what to do."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.ir.frontend import capture
from vdqc.ir.inputs import INPUTS
from vdqc.ir.sample import Sample
from vdqc.ir.source import load_source
from vdqc.testing.architectures import ARCHITECTURES
from vdqc.testing.harness import assert_close

MODEL = """
import torch
from torch import nn
from vdqc.ir.sample import Sample
import helper

def model():
    return nn.Linear(helper.WIDTH, 4)

def samples():
    for batch in (2, 3):
        yield Sample({"input": torch.zeros(batch, helper.WIDTH)})

def generate(model, seed):
    return model(torch.full((2, helper.WIDTH), float(seed)))
"""


def write(folder: Path, text: str) -> Path:
    (folder / "helper.py").write_text("WIDTH = 8\n")
    path = folder / "model.py"
    path.write_text(text)
    return path


def test_a_sample_names_the_arguments() -> None:
    with pytest.raises(InputError, match="arguments of forward by name, got a Tensor") as caught:
        Sample(torch.zeros(2, 8))  # type: ignore[arg-type]
    assert 'Sample({"hidden_states": x' in str(caught.value)


@pytest.fixture(autouse=True)
def _forget_helper():
    yield
    sys.modules.pop("helper", None)


def test_a_class_of_the_file_has_the_files_name_wherever_it_lies(tmp_path: Path) -> None:
    text = MODEL.replace("def model():", "class Net(nn.Linear): pass\n\ndef model():")
    text = text.replace("nn.Linear(helper", "Net(helper")
    names = set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        source = load_source(write(tmp_path / place, text))
        names.add(capture(source.model, source.samples).origin.model_class)
    assert names == {"model.Net"}


def test_model_file_with_a_module_beside_it(tmp_path: Path) -> None:
    before = list(sys.path)
    source = load_source(write(tmp_path, MODEL))
    assert sys.path == before
    assert len(source.samples) == 2
    assert not source.model.training
    assert source.generate is not None
    assert source.generate(source.model, 3).shape == (2, 4)
    assert (source.accuracy, source.name) == (None, tmp_path.name)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("import no_such_module\n", ["model.py:1", "no_such_module"]),
        ("def model(:\n", ["SyntaxError", "model.py:1"]),
        ("x = 1\n\ny = 1 / 0\n", ["ZeroDivisionError", "model.py:3  y = 1 / 0"]),
        ("def samples():\n    return []\n", ["expected model.py to define model()"]),
        (MODEL.replace("def samples", "def others"), ["define samples()"]),
        (MODEL.replace("nn.Linear(helper.WIDTH, 4)", "3"), ["expected model() to return an nn"]),
        (MODEL.replace("(2, 3)", "()"), ["at least one sample"]),
        (MODEL.replace("yield Sample(", "yield ("), ["sample 0 is a dict", "Sample({"]),
        (MODEL.replace('"input"', '"inptu"'), ["'inptu'", "input"]),
        (MODEL.replace("nn.Linear(helper", "nn.Linear(wrong.helper"), ["model() of model.py"]),
    ],
)
def test_a_model_file_that_does_not_fit(tmp_path: Path, text: str, messages: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_source(write(tmp_path, text))
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["absent.py", "absent", "notes.txt"])
def test_a_path_that_cannot_be_a_source(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError):
        load_source(tmp_path / name)


def outputs(model: torch.nn.Module, call: dict[str, object]) -> list[torch.Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**call))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", ["wan-t2v", "dit", "t5"])
def test_folders_in_memory_and_mapped_give_the_same_graph_as_eager(
    tmp_path: Path, name: str
) -> None:
    architecture = ARCHITECTURES[name]
    dtype = torch.bfloat16 if name == "wan-t2v" else torch.float32
    architecture.build(dtype=dtype).save_pretrained(tmp_path, max_shard_size="200KB")
    loaded, mapped = (load_source(tmp_path, mapped=mapped) for mapped in (False, True))
    graph = capture(mapped.model, mapped.samples, stored=mapped.stored)
    assert graph.stored
    assert all(tensor.is_meta for tensor in _held(graph) if tensor.numel() > 64)
    call = architecture.variants(dtype)["values"]
    for actual, expected in zip(graph.run(**call), outputs(loaded.model, call), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(
        graph.run(**mapped.samples[1].inputs),
        outputs(loaded.model, dict(loaded.samples[1].inputs)),
        strict=True,
    ):
        assert_close(actual, expected)


def _held(graph) -> list[torch.Tensor]:
    return [
        tensor
        for name, tensor in graph.module.named_parameters()
        if tensor.ndim > 1 and tensor.dtype != torch.float32
    ]


def test_pipeline_folders_name_their_component(tmp_path: Path) -> None:
    ARCHITECTURES["dit"].build().save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "DiT"]}))
    assert type(load_source(tmp_path).model).__name__ == "DiTTransformer2DModel"
    with pytest.raises(ConfigError, match="transformer"):
        load_source(tmp_path, component="transfomer")


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected config\.json"):
        load_source(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_source(tmp_path)
    config.write_text("{}")
    with pytest.raises(InputError, match="_class_name"):
        load_source(tmp_path)
    config.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(InputError, match=r"write a model\.py"):
        load_source(tmp_path)
    config.write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(InputError, match="expected safetensors"):
        load_source(tmp_path)


def test_mapped_weights_that_are_another_models(tmp_path: Path) -> None:
    ARCHITECTURES["dit"].build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
    with pytest.raises(InputError, match="of different models"):
        load_source(tmp_path, mapped=True)


def test_every_architecture_of_a_library_has_a_factory() -> None:
    classes = {a.class_name for a in ARCHITECTURES.values() if a.library != "vdqc.testing.vggt"}
    assert classes <= set(INPUTS)
