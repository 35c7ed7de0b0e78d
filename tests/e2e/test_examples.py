"""The small trained examples do what their README says, and still do at eight bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vdqc.compiled import CompiledModel
from vdqc.compiler import compile
from vdqc.ir.source import Source, load_source
from vdqc.loading import load

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> tuple[Source, Any]:
    """The source, and the functions of its model.py."""
    pytest.importorskip("sklearn")
    source = load_source(EXAMPLES / name / "model.py")
    assert source.generate is not None
    return source, source.generate.__globals__


def compiled(source: Source, folder: Path) -> CompiledModel:
    artifact = compile(
        source.model,
        source.samples[:2],
        "quant",
        ["w8a8"],
        target="cpu",
        out=folder / "out",
        verify=False,
    )
    return load(artifact.path)


def test_digits_unet_draws_the_digit_that_is_asked_for(tmp_path: Path) -> None:
    source, own = example("digits_unet")
    digits = torch.arange(10)
    images = own["sample"](source.model, digits, 0, steps=10)
    assert (own["read"](images) == digits).sum() >= 9
    assert images.shape == (10, 1, 16, 16)

    model = compiled(source, tmp_path)
    again = own["sample"](model, digits, 0, steps=10)
    assert (own["read"](again) == digits).sum() >= 9
    assert 0 < (again - images).abs().mean() < 0.01

    wrong = own["sample"](source.model, digits.roll(1), 0, steps=10)
    assert (own["read"](wrong) == digits).sum() <= 1  # the label decides, not the noise


def test_views_finds_poses_and_depth(tmp_path: Path) -> None:
    source, own = example("views")
    seen = own["generate"](source.model, 0)
    pose, depth = own["accuracy"](seen, 0), own["depth_accuracy"](seen, 0)
    assert pose >= 0.6
    assert depth >= 0.9

    again = own["generate"](compiled(source, tmp_path), 0)
    assert own["accuracy"](again, 0) >= pose - 0.03
    assert own["depth_accuracy"](again, 0) >= depth - 0.01

    other = own["generate"](source.model, 1)  # right for its own rooms, not for these
    assert own["accuracy"](other, 0) < 0.1


def test_a_rendered_room_is_the_same_place_from_every_view() -> None:
    _, own = example("views")
    rooms = own["data"].numbered(own["labels"](0))
    truth = own["picture"](rooms.depth, rooms.rotation, rooms.centre)
    assert own["accuracy"](truth, 0) == own["depth_accuracy"](truth, 0) == 1.0

    # what the first camera sees, seen from the second: never behind what that one sees there
    rays, size = own["data"].pixel_rays(), own["data"].SIZE
    points = rooms.depth[:, 0].flatten(1)[..., None] * rays - rooms.centre[:, 1, None]
    local = points @ rooms.rotation[:, 1]
    place = local[..., :2] / local[..., 2:] / rays[:, 0].max() * (1 - 1 / size)
    inside = (local[..., 2] > 0) & (place.abs() < 1).all(-1)
    there = torch.nn.functional.grid_sample(
        rooms.depth[:, 1, None], place[:, None], mode="nearest", align_corners=False
    )[:, 0, 0]
    ratio = (local[..., 2] / there)[inside]
    assert inside.float().mean() > 0.3
    assert (ratio > 0.95).float().mean() > 0.95  # a pixel's edge may stand out
    assert ((ratio - 1).abs() < 0.05).float().mean() > 0.7  # the rest is hidden there


def test_digits_large_sees_digits_through_noise() -> None:
    source, own = example("digits_large")
    data, classifier = own["sampler"].data, own["classifier"]
    judge = classifier.load_reader(EXAMPLES / "digits_large" / "classifier.safetensors")

    random = torch.Generator().manual_seed(3)
    digits = data.typical(data.handwriting("train"), data.TYPICAL)
    video, pair = data.draw(digits, 1, random, frames=own["FRAMES"], size=64)
    sigma = 0.6
    noised = torch.lerp(video, torch.randn(video.shape, generator=random), sigma)
    with torch.no_grad():
        (velocity,) = source.model(
            hidden_states=noised,
            timestep=torch.tensor([1000 * sigma]),
            encoder_hidden_states=data.tokens(pair),
            return_dict=False,
        )
    patches = source.samples[0].inputs["hidden_states"].shape
    assert (patches[2] // 2) * (patches[3] // 4) * (patches[4] // 4) == 4096

    def right(seen: torch.Tensor) -> float:
        """Share of frames in which the judge reads both digits."""
        frames = classifier.single_frames((seen + 1) / 2)
        found: torch.Tensor = (classifier.read(frames, judge) == pair).all(1).float().mean()
        return found.item()

    assert right(video) > 0.9
    assert right(noised) < 0.5
    assert right(noised - sigma * velocity) > 0.9
