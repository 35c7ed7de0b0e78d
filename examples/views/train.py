"""Train the views model on rooms that are rendered on the fly.

    python train.py fit --minutes 25 --run runs/views   # resumes after a kill
    python train.py export --run runs/views             # averaged weights → weights.safetensors
    python train.py measure                             # poses and depth on held-out rooms

The loss is the mean absolute error of the logarithm of depth, and twice that of the nine numbers of
the poses. Minutes are processor time: on a shared machine, the clock says little.
The random numbers of a step come from the seed and its number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import model as example  # noqa: E402
import views_scenes as data  # noqa: E402
from views_net import ViewsNet, encode_pose  # noqa: E402

VIEWS = (4, 4, 3, 2)
"""How many views a scene has, by step."""


def fit(options: argparse.Namespace) -> None:
    """Train until the budget of processor time ends; write a checkpoint now and then."""
    run = Path(options.run)
    run.mkdir(parents=True, exist_ok=True)
    model = new_model(options.seed).train()
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizers = new_optimizers(model)
    step, seconds = 0, 0.0
    if (run / "checkpoint.pt").exists():
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        average, step, seconds = saved["average"], saved["step"], saved["seconds"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "average": average,
            "step": step,
            "seconds": seconds,
        }
        write_whole(run / "checkpoint.pt", state)

    means, seen = torch.zeros(2), 0
    base, last_save = time.process_time() - seconds, time.monotonic()
    while (share := seconds / (60 * options.minutes)) < 1:
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        rate = options.lr * cosine * min(1.0, (step + 1) / 200)
        for optimizer, scale in zip(optimizers, (options.matrix_lr, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        losses = training_losses(model, step, options)
        (losses[0] + 2 * losses[1]).backward()  # type: ignore[no-untyped-call,unused-ignore]
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
        if not bool(losses.isfinite().all()):
            raise RuntimeError(f"expected a finite loss at step {step}, got {losses}; lower --lr")
        seen += 1
        means.lerp_(losses.detach(), max(0.02, 1 / seen))
        step, seconds = step + 1, time.process_time() - base
        if step % 100 == 0:
            shown = "depth {:.4f} pose {:.4f}".format(*means.tolist())
            print(f"step {step} {shown} minutes {seconds / 60:.1f}", flush=True)
        if time.monotonic() - last_save > 120:
            save()
            last_save = time.monotonic()
    save()
    print(f"done: {step} steps, {seconds / 60:.1f} minutes", flush=True)


def training_losses(model: nn.Module, step: int, options: argparse.Namespace) -> Tensor:
    """Loss of depth and of poses on one batch of new rooms."""
    random = torch.Generator().manual_seed(options.seed * 1_000_003 + 10_000 + step)
    scenes = data.draw(options.batch, random, views=VIEWS[step % len(VIEWS)])
    # plain matrix products take two thirds of the time of the fused attention and its backward
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        output = model(images=scenes.images)
    depth = F.l1_loss(output["depth"].float().log(), scenes.depth.log())
    pose = F.l1_loss(output["pose"].float(), encode_pose(scenes.rotation, scenes.centre))
    return torch.stack([depth, pose])


def new_model(seed: int) -> nn.Module:
    """The untrained model; its branches start at a tenth."""
    torch.manual_seed(seed)
    model = ViewsNet()
    for name, weight in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(weight, 0.1)
    return model


def new_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
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
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def export(options: argparse.Namespace) -> None:
    """Write the averaged weights of a run, float16 on disk."""
    saved = torch.load(Path(options.run) / "checkpoint.pt", weights_only=True)
    names = [name for name, _ in ViewsNet().named_parameters()]
    state = {name: mean.half() for name, mean in zip(names, saved["average"], strict=True)}
    save_file(state, options.out)
    print(f"step {saved['step']} → {options.out}")


def measure(options: argparse.Namespace) -> None:
    """Print pose and depth accuracy on held-out rooms, and the median error of a pair."""
    model = example.model(Path(options.out))
    found = [example.generate(model, seed) for seed in range(options.seeds)]
    errors = [example.pose_errors(image, seed) for seed, image in enumerate(found)]
    poses = [example.accuracy(image, seed) for seed, image in enumerate(found)]
    depths = [example.depth_accuracy(image, seed) for seed, image in enumerate(found)]
    result = {
        "auc30": round(sum(poses) / len(poses), 4),
        "depth": round(sum(depths) / len(depths), 4),
        "median_degrees": round(torch.cat(errors).median().item(), 2),
        "scenes": options.seeds * example.SCENES,
        **trivial(options.seeds),
    }
    print(json.dumps(result))
    if options.sheet:
        from PIL import Image

        truth = data.numbered(example.labels(0)[:4])
        depth = torch.cat([truth.depth, found[0][:4, 0] * example.REACH], 1) / example.REACH
        grey = depth[:, :, None].expand(-1, -1, 3, -1, -1)
        cells = torch.cat([truth.images, grey], 1).permute(0, 3, 1, 4, 2)
        pixels = (cells.flatten(2, 3).flatten(0, 1) * 255).round().clamp(0, 255).to(torch.uint8)
        sheet = Image.fromarray(pixels.numpy())
        size = (2 * sheet.width, 2 * sheet.height)
        sheet.resize(size, Image.Resampling.NEAREST).save(options.sheet)


def trivial(seeds: int) -> dict[str, float]:
    """What the mean pose and the mean log depth of other rooms reach: the score of knowing nothing.

    The mean depth is taken per pixel, the mean pose per view.
    """
    other = data.draw(500, torch.Generator().manual_seed(1))
    pose = encode_pose(other.rotation, other.centre).mean(0, keepdim=True)
    pose[:, 1:] = pose[:, 1:].mean(1, keepdim=True)
    # views after the first are alike, so their means are too: tell them apart a little
    pose = pose + 1e-3 * torch.arange(pose.shape[1])[:, None]
    depth = other.depth.log().mean((0, 1), keepdim=True).exp().expand(1, data.VIEWS, -1, -1)
    image = example.picture(depth, *example.net.decode_pose(pose))
    images = image.expand(example.SCENES, -1, -1, -1, -1)
    poses = [example.accuracy(images, seed) for seed in range(seeds)]
    depths = [example.depth_accuracy(images, seed) for seed in range(seeds)]
    return {
        "auc30_trivial": round(sum(poses) / seeds, 4),
        "depth_trivial": round(sum(depths) / seeds, 4),
    }


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
    job = jobs.add_parser("fit", help="train, or resume training")
    job.add_argument("--run", required=True, help="folder of the checkpoint")
    job.add_argument("--minutes", type=float, default=25.0, help="resumed time included")
    job.add_argument("--batch", type=int, default=16)
    job.add_argument("--lr", type=float, default=1e-3)
    job.add_argument("--matrix-lr", type=float, default=3.0, help="Muon's rate, in units of --lr")
    job.set_defaults(work=fit)
    job = jobs.add_parser("export", help="averaged weights of a run → safetensors")
    job.add_argument("--run", required=True)
    job.add_argument("--out", default=str(HERE / "weights.safetensors"))
    job.set_defaults(work=export)
    job = jobs.add_parser("measure", help="accuracy on held-out rooms")
    job.add_argument("--out", default=str(HERE / "weights.safetensors"))
    job.add_argument("--seeds", type=int, default=8)
    job.add_argument("--sheet", default="", help="write a picture: views, true and found depth")
    job.set_defaults(work=measure)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work(options)
