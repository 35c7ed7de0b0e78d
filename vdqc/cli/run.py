"""``vdqc run``: run a compiled model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vdqc.cli.common import OK, progress_of

#: Its line in ``vdqc --help``.
HELP = "run a compiled model"


def add(sub: Any) -> None:
    """Its options."""
    sub.add_argument("artifact", help="a folder that compile wrote")
    sub.add_argument("--model", help="its model.py: run generate() instead of one forward pass")
    sub.add_argument(
        "--component", metavar="NAME", help="which model of a diffusers pipeline folder"
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the generation (default: 0)")
    sub.add_argument(
        "--reference",
        action="store_true",
        help="without its GPU: through the references of its kernels, slowly",
    )
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--frames", metavar="DIR", help="write each frame as a PNG into DIR")
    where.add_argument("--output", metavar="FILE", help="write the result as .safetensors")


def run(options: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from vdqc import runner, summary

    result = runner.run(
        Path(options.artifact),
        Path(options.model) if options.model else None,
        seed=options.seed,
        component=options.component,
        reference=options.reference,
        progress=progress_of(options),
    )
    if options.frames:
        runner.write_frames(result, Path(options.frames))
    if options.output:
        runner.write_tensors(result, Path(options.output))
    print(summary.ran(result, options.frames or options.output))
    return OK
