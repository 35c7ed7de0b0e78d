"""A loaded artifact inside unmodified diffusers pipelines: whole sampling loops with guidance."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import Tensor, nn

from vdqc import compiler
from vdqc.base.numerics import TOLERANCE, relative_error, sqnr_db
from vdqc.base.target import TARGETS
from vdqc.compiled import CompiledModel
from vdqc.ir import artifact
from vdqc.ir.frontend import capture
from vdqc.ir.sample import Sample
from vdqc.loading import load
from vdqc.testing.architectures import ARCHITECTURES

WAN, LTX = ARCHITECTURES["wan-t2v"], ARCHITECTURES["ltx"]
FRAME_RATE = 25


def wan_pipeline(transformer: nn.Module) -> WanPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True)
    pipe = WanPipeline(None, None, vae, scheduler, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ltx_pipeline(transformer: nn.Module) -> LTXPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.use_framewise_encoding = False
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = LTXPipeline(scheduler, vae, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_samples() -> list[Sample]:
    return WAN.samples()


def ltx_samples() -> list[Sample]:
    """The pipeline scales positions by python numbers, which are part of the graph."""
    scale = (8 / FRAME_RATE, 32, 32)
    return [
        dataclasses.replace(sample, inputs={**sample.inputs, "rope_interpolation_scale": scale})
        for sample in LTX.samples()
    ]


STEPS = 3
#: A step's rounding is in the next step's input, so the errors of the steps add up.
ALLOWED = STEPS * TOLERANCE[torch.float32]


def video(pipe: DiffusionPipeline, batch: int, size: dict[str, int], **options: Any) -> Tensor:
    """Frames of one seeded sampling run with classifier-free guidance."""
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randn(2, batch, 9, 24, generator=generator)
    if isinstance(pipe, LTXPipeline):
        masks = torch.ones(batch, 9, dtype=torch.bool)
        options |= {"prompt_attention_mask": masks, "negative_prompt_attention_mask": masks}
        options |= {"frame_rate": FRAME_RATE}
    return pipe(
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        guidance_scale=4.0,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="pt",
        **size,
        **options,
    ).frames


PIPELINES: dict[str, tuple[Callable[..., Any], Any, Callable[[], list[Sample]], list[Any]]] = {
    "wan": (
        wan_pipeline,
        WAN,
        wan_samples,
        [
            (1, {"height": 32, "width": 48, "num_frames": 9}),
            (2, {"height": 48, "width": 32, "num_frames": 5}),
            (1, {"height": 32, "width": 32, "num_frames": 1}),
        ],
    ),
    "ltx": (
        ltx_pipeline,
        LTX,
        ltx_samples,
        [
            (1, {"height": 64, "width": 96, "num_frames": 17}),
            (2, {"height": 96, "width": 64, "num_frames": 25}),
        ],
    ),
}


@pytest.fixture(scope="module", params=PIPELINES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name, float model and its artifact, captured and written without any pass."""
    _, architecture, samples, _ = PIPELINES[request.param]
    model = architecture.build()
    out = tmp_path_factory.mktemp("pipelines") / request.param
    graph = capture(model, samples())
    with artifact.staging(out) as folder:
        artifact.write(graph, folder, target=TARGETS["cpu"])
        artifact.seal(folder)
    return request.param, model, out


def test_whole_sampling_runs_equal_the_float_pipeline(
    exported: tuple[str, nn.Module, Path],
) -> None:
    name, model, out = exported
    pipeline, _, _, calls = PIPELINES[name]
    compiled = load(out)
    for batch, size in calls:
        expected = video(pipeline(model), batch, size)
        actual = video(pipeline(compiled), batch, size)
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) <= ALLOWED, (batch, size)


def test_components_check_and_move(exported: tuple[str, nn.Module, Path], tmp_path: Path) -> None:
    """A pipeline saved without its transformer loads with the artifact in its place."""
    name, model, out = exported
    pipeline, _, _, calls = PIPELINES[name]
    folder = tmp_path / "pipeline"
    pipeline(model).save_pretrained(folder)
    parts = {
        key: None
        for key in ("text_encoder", "tokenizer", "image_encoder", "image_processor")
        if key in pipeline(model).components
    }
    loaded = type(pipeline(model)).from_pretrained(folder, transformer=load(out), **parts)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.transformer, CompiledModel)
    loaded.to("cpu")
    batch, size = calls[0]
    expected = video(pipeline(model), batch, size)
    assert relative_error(video(loaded, batch, size), expected) <= ALLOWED


def test_quantised_run_stays_close(tmp_path: Path) -> None:
    """Eight bits a value: the whole guided run, three steps of it, keeps 25 dB (measured: 31)."""
    model = WAN.build()
    found = compiler.compile(model, WAN.samples(), "quant", "w8a8", "cpu", tmp_path / "w8a8")
    batch, size = PIPELINES["wan"][3][0]
    expected = video(wan_pipeline(model), batch, size)
    actual = video(wan_pipeline(load(found.path)), batch, size)
    assert relative_error(actual, expected) > 0
    assert sqnr_db(actual, expected) > 25
