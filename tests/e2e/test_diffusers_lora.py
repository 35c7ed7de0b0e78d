"""Adapters of a compiled model through the methods of diffusers."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vdqc
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]
HELP = runpy.run_path(str(Path(__file__).with_name("wan.py")))
same, wan_pipeline = HELP["same"], HELP["wan_pipeline"]


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


def test_a_pipeline_loads_and_weighs_adapters(
    wan_artifact: Path, wan_output: Tensor, peft: None
) -> None:
    """Every state equals that of ``load_lora``; which ones are active is as with peft 0.21."""
    model, own = vdqc.load(wan_artifact), vdqc.load(wan_artifact)
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
    assert not same(model, wan_output)
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
    assert same(model, wan_output)


def test_alphas_and_metadata_scale_an_adapter(wan_artifact: Path) -> None:
    model, state = vdqc.load(wan_artifact), adapter(1)
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


def test_what_adapters_cannot_do_here_is_refused(wan_artifact: Path) -> None:
    model = vdqc.load(wan_artifact)
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
