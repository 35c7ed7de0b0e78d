"""``vdqc record``: record a sampler's calls to calibrate on."""

from __future__ import annotations

import argparse
from typing import Any

from vdqc.base.diagnostics import ConfigError
from vdqc.cli.common import OK, progress_of

#: Its line in ``vdqc --help``.
HELP = "record a sampler's calls to calibrate on"


def add(sub: Any) -> None:
    """Its options."""
    sub.add_argument("model", help="a model.py with model(), samples() and generate()")
    sub.add_argument("-o", "--out", required=True, metavar="DIR", help="the pool's folder")
    sub.add_argument(
        "--trajectories", type=int, default=10, metavar="N", help="sampling runs (default: 10)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the first one (default: 0)")
    sub.add_argument("--component", metavar="NAME", help="which model of a pipeline folder")


def run(options: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from vdqc import compiler

    if options.trajectories < 1:
        raise ConfigError(f"--trajectories: expected at least 1, got {options.trajectories}")
    seeds = range(options.seed, options.seed + options.trajectories)
    pool = compiler.record_pool(
        options.model,
        options.out,
        seeds,
        component=options.component,
        progress=progress_of(options),
    )
    print(f"{len(pool)} calls of {options.trajectories} trajectories -> {options.out}/")
    print(f"next: vdqc compile {options.model} --recipe s2q_vdit --pool {options.out}")
    return OK
