"""Measure the example: how many generated videos show the two digits that were asked for.

    python examples/digits/evaluate.py --videos 200 --sheet samples.png
    python examples/digits/evaluate.py --model examples/digits_large/model.py --videos 8

Prints one JSON line. Every video is read by the classifier of the model's folder, which is measured
on held-out real videos in the same run: its mistakes bound what `accuracy` can reach.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import digits_classifier as classifier  # noqa: E402
import digits_data as data  # noqa: E402
import digits_sampler as sampler  # noqa: E402

from vdqc.ir.source import load_source  # noqa: E402


def main(options: argparse.Namespace) -> None:
    """Generate, read, print."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = load_source(Path(options.model))
    assert source.generate is not None
    own = source.generate.__globals__  # the functions of that model.py
    transformer = own["model"](Path(options.transformer)) if options.transformer else source.model
    transformer = transformer.to(device)
    reader = classifier.load_reader(Path(options.model).parent / "classifier.safetensors")
    batches: list[Tensor] = []
    wanted: list[Tensor] = []
    start = time.monotonic()
    for seed in range(options.seed, options.seed + -(-options.videos // own["VIDEOS"])):
        pairs = own["labels"](seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            made = own["sample"](
                transformer, pairs, seed, steps=options.steps, guidance=options.guidance
            )
        batches.append(made)
        wanted.append(pairs)
    seconds = (time.monotonic() - start) / len(batches)
    videos, pairs = torch.cat(batches), torch.cat(wanted)
    right = classifier.read(videos, reader) == pairs
    frames = classifier.read(classifier.single_frames(videos), reader)
    right_frames = (frames == pairs.repeat_interleave(videos.shape[2], dim=0)).all(dim=1)
    real = classifier.real_accuracy(reader, data.handwriting("test"), options.videos)
    result = {
        "accuracy": round(right.all(dim=1).float().mean().item(), 4),
        "frame_accuracy": round(right_frames.float().mean().item(), 4),
        "left": round(right[:, 0].float().mean().item(), 4),
        "right": round(right[:, 1].float().mean().item(), 4),
        "by_digit": [round(right[pairs == digit].float().mean().item(), 3) for digit in range(10)],
        "videos": len(videos),
        "steps": options.steps,
        "guidance": options.guidance,
        "seconds_per_generate": round(seconds, 2),
        "real_held_out": round(real, 4),
    }
    print(json.dumps(result))
    if options.sheet:
        from PIL import Image

        picture = data.contact_sheet(videos[: options.rows])
        Image.fromarray(picture.numpy()).save(options.sheet)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(HERE / "model.py"))
    parser.add_argument("--transformer", default="", help="a diffusers folder with other weights")
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first batch of 8")
    parser.add_argument("--steps", type=int, default=sampler.STEPS)
    parser.add_argument("--guidance", type=float, default=sampler.GUIDANCE)
    parser.add_argument(
        "--bf16", action="store_true", help="faster on some CPUs, slightly different"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's choice)"
    )
    parser.add_argument("--sheet", default="", help="write a picture of the first videos")
    parser.add_argument("--rows", type=int, default=8, help="videos in that picture")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
