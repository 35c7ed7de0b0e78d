"""Pipelines of diffusers with compiled components: saved, loaded, offloaded."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

import vdqc
from vdqc.base.diagnostics import ArtifactError, ConfigError, InputError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.compiled import CompiledModel
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]
HELP = runpy.run_path(str(Path(__file__).with_name("wan.py")))
wan_pipeline = HELP["wan_pipeline"]


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


def test_a_pipeline_with_it_is_saved_and_loaded(wan_artifact: Path, tmp_path: Path) -> None:
    pipe = wan_pipeline(transformer=vdqc.load(wan_artifact))
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    loaded = WanPipeline.from_pretrained(tmp_path / "pipe", **parts)
    assert isinstance(loaded.transformer, CompiledModel)
    assert torch.equal(latents(loaded), latents(pipe))
    assert loaded.to("cpu", torch.float32) is loaded


def test_both_experts_in_their_places(wan_artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    wan_pipeline(transformer=WAN.build(), transformer_2=WAN.build(1)).save_pretrained(folder)
    shutil.copytree(wan_artifact, tmp_path / "out" / "transformer")
    one = vdqc.load_pipeline(folder, tmp_path / "out")
    assert isinstance(one.transformer, CompiledModel)
    assert not isinstance(one.transformer_2, CompiledModel)
    shutil.copytree(wan_artifact, tmp_path / "out" / "transformer_2")
    both = vdqc.load_pipeline(folder, tmp_path / "out", torch_dtype=torch.float32)
    assert isinstance(both.transformer_2, CompiledModel)
    assert not torch.equal(latents(both), latents(one))
    with pytest.raises(ConfigError, match="2 denoisers"):
        vdqc.load_pipeline(folder, wan_artifact)
    (tmp_path / "out" / "transformer_2").rename(tmp_path / "out" / "transformer_3")
    with pytest.raises(ArtifactError, match="did you mean 'transformer_2'"):
        vdqc.load_pipeline(folder, tmp_path / "out")
    for empty in (folder, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match=r"found (none|nothing)"):
            vdqc.load_pipeline(folder, empty)


def test_one_artifact_is_the_denoiser(wan_artifact: Path, tmp_path: Path) -> None:
    wan_pipeline(transformer=WAN.build()).save_pretrained(tmp_path)
    assert isinstance(vdqc.load_pipeline(tmp_path, wan_artifact).transformer, CompiledModel)
    with pytest.raises(ConfigError, match="expected a pipeline"):
        vdqc.load_pipeline(wan_artifact, wan_artifact)


def test_model_offload_moves_it_as_a_whole(wan_artifact: Path) -> None:
    """accelerate's hooks around whole components, with the CPU as the device to move to."""
    pipe = wan_pipeline(transformer=vdqc.load(wan_artifact))
    expected = latents(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    # copies lie at other addresses than mapped files, so vector loops split elsewhere
    assert relative_error(latents(pipe), expected) <= TOLERANCE[torch.float32]
    assert relative_error(latents(pipe), expected) <= TOLERANCE[torch.float32]
    pipe.remove_all_hooks()
    assert relative_error(latents(pipe), expected) <= TOLERANCE[torch.float32]


def test_offload_by_submodule_says_that_it_cannot(wan_artifact: Path) -> None:
    pipe = wan_pipeline(transformer=vdqc.load(wan_artifact))
    with pytest.raises(InputError, match="exclude_modules"):
        pipe.enable_group_offload(onload_device=torch.device("cpu"), num_blocks_per_group=1)
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), num_blocks_per_group=1, exclude_modules=["transformer"]
    )
    expected = latents(wan_pipeline(transformer=vdqc.load(wan_artifact)))
    assert torch.equal(latents(pipe), expected)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(InputError, match="enable_model_cpu_offload"):
        latents(pipe)
