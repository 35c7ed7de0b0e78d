"""Train the digits UNet and the classifier that reads what it draws.

    python train.py reader                        # → reader.safetensors, a minute
    python train.py unet --minutes 25 --run runs/digits_unet      # resumes after a kill
    python train.py export --run runs/digits_unet # averaged weights → unet/
    python train.py measure                       # accuracy of 200 images, and of the reader

An image x0 in [-1, 1] and noise n give `x = cos(a) x0 + sin(a) n`; the UNet sees x and the timestep
2000 a / pi, and learns the velocity `cos(a) n - sin(a) x0` with a mean squared error. One condition
in ten is dropped, for classifier-free guidance. The random numbers of a step come from the seed and
its number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import model as example  # noqa: E402
import unet_data as data  # noqa: E402
from unet_reader import Reader, load_reader, real_accuracy, save_reader  # noqa: E402

CONFIG: dict[str, Any] = {
    "sample_size": data.SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 3),  # heads, of 32 channels: diffusers' name is historical
    "use_linear_projection": True,
    "cross_attention_dim": data.TOKEN_DIM,
    "norm_num_groups": 16,
}


def train_unet(options: argparse.Namespace) -> None:
    """Train until the time budget ends; write a checkpoint every few minutes and at the end."""
    run = Path(options.run)
    run.mkdir(parents=True, exist_ok=True)
    model = new_unet(options.seed).train()
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    step, seconds, losses = 0, 0.0, []
    if (run / "checkpoint.pt").exists():
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step, seconds = saved["average"], saved["step"], saved["seconds"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
            "seconds": seconds,
        }
        write_whole(run / "checkpoint.pt", state)

    digits = data.handwriting("train")
    base, last_save = time.monotonic() - seconds, time.monotonic()
    while (share := seconds / (60 * options.minutes)) < 1:
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * cosine * min(1.0, (step + 1) / 200)
        loss = training_loss(model, digits, step, options)
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"expected a finite loss at step {step}, got {loss}; lower --lr")
        losses = [*losses[-99:], loss.item()]
        step, seconds = step + 1, time.monotonic() - base
        if step % 100 == 0:
            print(
                f"step {step} loss {sum(losses) / len(losses):.4f} minutes {seconds / 60:.1f}",
                flush=True,
            )
        if time.monotonic() - last_save > 120:
            save()
            last_save = time.monotonic()
    save()
    print(f"done: {step} steps, {seconds / 60:.1f} minutes", flush=True)


def training_loss(
    model: nn.Module, digits: data.Handwriting, step: int, options: argparse.Namespace
) -> Tensor:
    """Velocity loss of one batch; times are spread evenly over it."""
    random = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    images, labels = data.draw(digits, options.batch, random)
    dropped = torch.rand(options.batch, generator=random) < 0.1
    labels = labels.masked_fill(dropped, data.DROPPED)
    even = torch.arange(options.batch) + torch.rand(1, generator=random)
    times = (even / options.batch).clamp(0.001, 1)
    noise = torch.randn(images.shape, generator=random)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(
            sample=example.mix(images, noise, times),
            timestep=1000 * times,
            encoder_hidden_states=data.tokens(labels),
            return_dict=False,
        )[0]
    return F.mse_loss(velocity.float(), example.velocity(images, noise, times))


def new_unet(seed: int) -> nn.Module:
    """The untrained UNet; its last convolution starts at zero."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    model: nn.Module = cast(Any, UNet2DConditionModel)(**CONFIG)
    nn.init.zeros_(model.conv_out.weight)  # type: ignore[union-attr,arg-type]
    return model


def export(options: argparse.Namespace) -> None:
    """Write the averaged weights of a run as a diffusers folder, float16 on disk."""
    saved = torch.load(Path(options.run) / "checkpoint.pt", weights_only=True)
    model = new_unet(0)
    for weight, mean in zip(model.parameters(), saved["average"], strict=True):
        weight.data.copy_(mean)
    model.half().save_pretrained(options.out)  # type: ignore[operator]
    print(f"step {saved['step']} → {options.out}")


def train_reader(options: argparse.Namespace) -> None:
    """Train the judge on all training handwriting, varied and noised; measure it on both splits."""
    torch.manual_seed(options.seed)
    model = Reader().train()
    digits = data.handwriting("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps)
    random = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        images, labels = data.draw(digits, 128, random, vary=1.5)
        level = 0.15 * torch.rand(128, 1, 1, 1, generator=random)
        images = images + level * torch.randn(images.shape, generator=random)
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
    save_reader(model.eval(), HERE / "reader.safetensors")
    for split in ("train", "test"):
        share = real_accuracy(model, data.handwriting(split), 2000)
        print(f"{split}: {share:.2%} of 2000 real images read right")


def measure(options: argparse.Namespace) -> None:
    """Print how many generated images read as asked for, over ten seeds, and a contact sheet."""
    model = example.model(Path(options.out))
    begin = time.monotonic()
    batches = [example.generate(model, seed) for seed in range(options.seeds)]
    seconds = (time.monotonic() - begin) / options.seeds
    shares = [example.accuracy(images, seed) for seed, images in enumerate(batches)]
    reader = load_reader(HERE / "reader.safetensors")
    result = {
        "accuracy": round(sum(shares) / len(shares), 4),
        "images": options.seeds * example.IMAGES,
        "seconds_per_generate": round(seconds, 2),
        "real_held_out": round(real_accuracy(reader, data.handwriting("test"), 2000), 4),
    }
    print(json.dumps(result))
    if options.sheet:
        from PIL import Image

        order = example.labels(0).argsort(stable=True)
        cells = F.pad(batches[0][order, 0], (1, 1, 1, 1), value=0.5)
        sheet = cells.unflatten(0, (2, -1)).permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)
        picture = Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(
            options.sheet
        )


def write_whole(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill leaves either the old file or the new one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument("--seed", type=int, default=0)
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("unet", help="train, or resume training, the UNet")
    job.add_argument("--run", required=True, help="folder of the checkpoint")
    job.add_argument("--minutes", type=float, default=25.0, help="resumed time included")
    job.add_argument("--batch", type=int, default=32)
    job.add_argument("--lr", type=float, default=1e-3)
    job.set_defaults(work=train_unet)
    job = jobs.add_parser("export", help="averaged weights of a run → diffusers folder")
    job.add_argument("--run", required=True)
    job.add_argument("--out", default=str(HERE / "unet"))
    job.set_defaults(work=export)
    job = jobs.add_parser("reader", help="train the judge")
    job.add_argument("--steps", type=int, default=1500)
    job.set_defaults(work=train_reader)
    job = jobs.add_parser("measure", help="accuracy of what the UNet draws")
    job.add_argument("--out", default=str(HERE / "unet"))
    job.add_argument("--seeds", type=int, default=10)
    job.add_argument("--sheet", default="", help="write a picture of the first seed's images")
    job.set_defaults(work=measure)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work(options)
