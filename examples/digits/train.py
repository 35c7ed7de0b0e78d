"""Train the two networks of this example from nothing: the video transformer and its judge.

    python train.py transformer --minutes 90 --run runs/digits   # resumes after a kill
    python train.py export --run runs/digits                     # averaged weights → transformer/
    python train.py classifier                                   # → classifier.safetensors

Flow matching in the convention of Wan and diffusers' `FlowMatchEulerDiscreteScheduler`: a video x0
in [-1, 1] and noise n give `x = (1 - sigma) x0 + sigma n`; the transformer sees x and the timestep
1000 sigma, and learns the velocity `n - x0` with a mean squared error. One condition in ten is
dropped, for classifier-free guidance.

The transformer learns a few typical handwritings per digit (`--typical`): an hour on two shared
processor cores is enough for those, not for all 1438. Most training steps see short clips, which
cost less and teach the same strokes; whole videos come to dominate towards the end (`MIXTURE`).
Every step works on the same number of tokens.

Every random number of step k comes from `seed` and k, so a run of `--steps` that was killed and
resumed draws what an uninterrupted one would have drawn; with `--minutes` the schedule follows the
clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import digits_data as data  # noqa: E402
from digits_classifier import DigitReader, load_reader, real_accuracy, save_reader  # noqa: E402

CONFIG: dict[str, Any] = {
    "patch_size": (2, 4, 4),  # 16 x 32 x 32 → 512 tokens
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": data.TOKEN_DIM,
    "freq_dim": 256,
    "ffn_dim": 640,
    "num_layers": 5,
    "rope_max_seq_len": 32,
}
LENGTHS = (1 / 8, 1 / 4, 1 / 2, 1)
"""Clip lengths, as shares of a whole video."""
MIXTURE = (
    (0.55, (0.45, 0.25, 0.20, 0.10)),
    (0.75, (0.15, 0.30, 0.30, 0.25)),
    (1.01, (0.00, 0.10, 0.25, 0.65)),
)
"""Up to this share of the run, how often each of `LENGTHS` is drawn."""
SHIFT = 3.0
"""How far the noise levels of a whole video lean upwards; of a clip, less by the root of its
length: sixteen frames of one digit tell it through four times the noise that hides it in one."""


@dataclass
class Progress:
    """Where a run stands: steps, seconds spent training, running mean of the loss per length."""

    step: int
    seconds: float
    losses: dict[int, float]


def train_transformer(options: argparse.Namespace) -> None:
    """Train until the step or time budget ends; write a checkpoint now and then and at the end."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Path(options.run)
    run.mkdir(parents=True, exist_ok=True)
    model = (old_transformer(options.start) if options.start else new_transformer(options.seed)).to(
        device
    )
    model.train()
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizers = new_optimizers(model)
    progress = Progress(0, 0.0, {})
    if (run / "checkpoint.pt").exists():
        saved = torch.load(run / "checkpoint.pt", map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        average = [tensor.to(device) for tensor in saved["average"]]
        progress = Progress(saved["step"], saved["seconds"], saved["losses"])
        print(
            f"resumed at step {progress.step} after {progress.seconds / 60:.1f} minutes", flush=True
        )

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "average": average,
            "step": progress.step,
            "seconds": progress.seconds,
            "losses": progress.losses,
        }
        write_whole(run / "checkpoint.pt", state)
        with (run / "log.jsonl").open("a") as log:
            log.write(json.dumps(vars(progress)) + "\n")

    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # holds for the CPU, too
    digits = data.handwriting("train").to(device)
    if options.typical:
        digits = data.typical(digits, options.typical)
    base, last_save = time.monotonic() - progress.seconds, time.monotonic()
    while (share := share_done(progress, options)) < 1:
        rate = learning_rate(progress.step, share, options)
        for optimizer, scale in zip(optimizers, (options.matrix_lr, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        frames, loss = training_loss(model, digits, progress.step, share, options)
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(options.average, (1 + progress.step) / (10 + progress.step))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(
                f"expected a finite loss at step {progress.step}, got {value}; lower --lr"
            )
        progress.losses[frames] = 0.98 * progress.losses.get(frames, value) + 0.02 * value
        progress.step += 1
        progress.seconds = time.monotonic() - base
        if progress.step % 50 == 0:
            share = share_done(progress, options)
            left = progress.seconds * (1 - share) / max(share, 1e-6) / 60
            losses = " ".join(f"{f}f {v:.4f}" for f, v in sorted(progress.losses.items()))
            print(
                f"step {progress.step} loss {losses} lr {rate:.1e} left {left:.0f} min", flush=True
            )
        if time.monotonic() - last_save > 60 * options.save_minutes:
            save()
            last_save = time.monotonic()
    save()
    print(f"done: {progress.step} steps, {progress.seconds / 60:.1f} minutes", flush=True)


def training_loss(
    model: nn.Module, digits: data.Handwriting, step: int, share: float, options: argparse.Namespace
) -> tuple[int, Tensor]:
    """Clip length and flow-matching loss of one batch; seed and step fix all random numbers."""
    device = digits.images.device
    random = torch.Generator(device).manual_seed(options.seed * 1_000_003 + step)
    weights = next(weights for end, weights in MIXTURE if share < end)
    pick = torch.multinomial(torch.tensor(weights, device=device), 1, generator=random)
    frames = int(LENGTHS[int(pick)] * options.frames)
    batch = max(1, options.batch * options.frames // frames)
    videos, labels = data.draw(digits, batch, random, frames=frames, size=options.size)
    labels = labels.masked_fill(
        torch.rand(batch, 1, generator=random, device=device) < 0.1, data.DROPPED
    )
    length = 2 + step % 3
    uniform = torch.randn(batch, generator=random, device=device).sigmoid()
    shift = options.shift * math.sqrt(frames / options.frames)
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    noise = torch.randn(videos.shape, generator=random, device=device)
    noised = torch.lerp(videos, noise, sigma.view(-1, 1, 1, 1, 1))
    # on a CPU, plain matrix products take half the time of the fused attention and its backward
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, torch.bfloat16), plain:
        velocity = model(
            hidden_states=noised,
            timestep=1000 * sigma,
            encoder_hidden_states=data.tokens(labels, length),
            return_dict=False,
        )[0]
    return frames, F.mse_loss(velocity.float(), noise - videos)


def new_transformer(seed: int) -> nn.Module:
    """The untrained transformer: Xavier weights; modulation and output start at zero."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model: nn.Module = cast(Any, WanTransformer3DModel)(**CONFIG)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.condition_embedder.time_proj.weight)  # type: ignore[union-attr,arg-type]
    nn.init.zeros_(model.proj_out.weight)  # type: ignore[union-attr,arg-type]
    return model


def old_transformer(folder: str) -> nn.Module:
    """A trained transformer to go on from, float32."""
    from diffusers import WanTransformer3DModel

    model: nn.Module = cast(Any, WanTransformer3DModel).from_pretrained(
        folder, torch_dtype=torch.float32
    )
    return model


def new_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else.

    Muon's steps are scaled to the size of AdamW's, then by `--matrix-lr`.
    """
    named = dict(model.named_parameters())
    matrices = {name for name, weight in named.items() if "blocks." in name and weight.ndim == 2}
    rest = [weight for name, weight in named.items() if name not in matrices]
    return [
        torch.optim.Muon(
            [named[name] for name in sorted(matrices)],
            lr=0.0,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


def share_done(progress: Progress, options: argparse.Namespace) -> float:
    """How much of the budget is spent, 0 to 1: of the steps if given, else of the minutes."""
    if options.steps:
        return float(progress.step / options.steps)
    return float(progress.seconds / (60 * options.minutes))


def learning_rate(step: int, share: float, options: argparse.Namespace) -> float:
    """Linear warm-up over 200 steps, then half a cosine down to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return float(options.lr * cosine * min(1.0, (step + 1) / 200))


def export(options: argparse.Namespace) -> None:
    """Write the averaged weights of a run as a diffusers folder, float16 on disk."""
    saved = torch.load(Path(options.run) / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = new_transformer(0)
    for weight, mean in zip(model.parameters(), saved["average"], strict=True):
        weight.data.copy_(mean)
    model.half().save_pretrained(options.out)  # type: ignore[operator]
    print(f"step {saved['step']} → {options.out}")


def train_classifier(options: argparse.Namespace) -> None:
    """Train the judge on real videos of all training handwriting; measure it on both splits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    model = DigitReader(options.size).to(device).train()
    if options.start:
        model.features.load_state_dict(load_reader(Path(options.start)).features.state_dict())
    digits = data.handwriting("train").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps)
    random = torch.Generator(device).manual_seed(options.seed)
    for step in range(options.steps):
        varied = data.Handwriting(vary(digits.images, random), digits.labels)
        videos, labels = data.draw(varied, 64, random, frames=2, size=options.size)
        videos = videos + 0.1 * torch.rand(64, 1, 1, 1, 1, generator=random, device=device) * (
            torch.randn(videos.shape, generator=random, device=device)
        )
        loss = F.cross_entropy(model(videos).flatten(0, 1), labels.flatten(), label_smoothing=0.05)
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
    save_reader(model.eval(), Path(options.out))
    for split in ("train", "test"):
        share = real_accuracy(model.cpu(), data.handwriting(split), 1000)
        print(f"{split}: both digits right in {share:.2%} of 1000 real videos")


def vary(images: Tensor, random: torch.Generator) -> Tensor:
    """Handwriting [N, 8, 8] turned, sheared and scaled a little: a classifier has few examples."""
    count, device = len(images), images.device
    turn = torch.randn(count, 2, 2, generator=random, device=device) * 0.1
    shift = torch.randn(count, 2, 1, generator=random, device=device) * 0.06
    affine = torch.cat([torch.eye(2, device=device) + turn, shift], dim=2)
    grid = F.affine_grid(affine, [count, 1, 8, 8], align_corners=False)
    return F.grid_sample(images[:, None], grid, "bicubic", align_corners=False)[:, 0].clamp(0, 1)


def write_whole(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill leaves either the old file or the new one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's choice)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=data.SIZE, help="height and width of a frame")
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("transformer", help="train, or resume training, the video transformer")
    job.add_argument("--run", required=True, help="folder of the checkpoint and the log")
    job.add_argument(
        "--minutes", type=float, default=90.0, help="training time, resumed time included"
    )
    job.add_argument("--steps", type=int, default=0, help="a budget in steps instead of minutes")
    job.add_argument(
        "--batch", type=int, default=4, help="whole videos a step, or as many tokens of clips"
    )
    job.add_argument(
        "--typical", type=int, default=data.TYPICAL, help="handwritings per digit, 0 for all"
    )
    job.add_argument("--lr", type=float, default=1e-3)
    job.add_argument("--matrix-lr", type=float, default=3.0, help="Muon's rate, in units of --lr")
    job.add_argument("--shift", type=float, default=SHIFT, help="of the noise of whole videos")
    job.add_argument("--frames", type=int, default=data.FRAMES, help="of a whole video")
    job.add_argument("--start", default="", help="folder of a trained transformer to go on from")
    job.add_argument("--average", type=float, default=0.995, help="decay of the averaged weights")
    job.add_argument("--save-minutes", type=float, default=3.0)
    job.set_defaults(work=train_transformer)
    job = jobs.add_parser("export", help="averaged weights of a run → diffusers folder")
    job.add_argument("--run", required=True)
    job.add_argument("--out", default=str(HERE / "transformer"))
    job.set_defaults(work=export)
    job = jobs.add_parser("classifier", help="train the judge that reads both digits")
    job.add_argument("--steps", type=int, default=2500)
    job.add_argument("--start", default="", help="file of a trained judge whose features it has")
    job.add_argument("--out", default=str(HERE / "classifier.safetensors"))
    job.set_defaults(work=train_classifier)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work(options)
