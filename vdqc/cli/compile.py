"""``vdqc compile``: compile a model into an artifact folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdqc.base.diagnostics import ConfigError
from vdqc.cli.common import OK, add_recipe, diagnostics_of, progress_of

#: Its line in ``vdqc --help``.
HELP = "compile a model into an artifact folder"


def add(sub: Any) -> None:
    """Its options."""
    add_recipe(sub)
    sub.add_argument("-o", "--out", metavar="DIR", help="output folder (default: <stem>.vdqc)")
    sub.add_argument("--pool", metavar="DIR", help="calls that vdqc record kept, to learn from")
    sub.add_argument("--force", action="store_true", help="replace the output folder if it exists")
    sub.add_argument(
        "--fresh",
        action="store_true",
        help="drop what an interrupted run of a streamed model finished (DIR.partial)",
    )
    sub.add_argument("--aot", action="store_true", help="add an AOTInductor package")
    sub.add_argument(
        "--precompile",
        action="store_true",
        help="add the GPU kernels as machine code: the first run compiles nothing",
    )
    sub.add_argument(
        "--mapped",
        action="store_true",
        default=None,
        help="stream a folder's weights from disk (default: if they exceed half of free memory)",
    )
    sub.add_argument(
        "--no-verify", action="store_true", help="skip the probe that measures every pass"
    )
    given = sub.add_mutually_exclusive_group()
    given.add_argument(
        "--prompts", metavar="FILE", help="learn from a pipeline's own calls: one prompt a line"
    )
    given.add_argument(
        "--embeddings", metavar="FILE", help="the same from prompt embeddings, .safetensors"
    )
    sub.add_argument(
        "--sampling",
        action="append",
        metavar="NAME=VALUE",
        help="an argument of the pipeline's call, as height=480 or num_inference_steps=20",
    )


def run(options: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from vdqc import compiler, summary
    from vdqc.engine.distributed import is_first_worker
    from vdqc.ir.folder import INDEX
    from vdqc.report.data import report_data

    common: dict[str, Any] = {
        "passes": options.passes,
        "recipe": options.recipe,
        "pool": options.pool,
        "scheme": options.scheme,
        "target": options.target,
        "out": options.out,
        "force": options.force,
        "fresh": options.fresh,
        "aot": options.aot,
        "precompile": options.precompile,
        "seed": options.seed,
        "verify": not options.no_verify,
        "component": options.component,
        "mapped": options.mapped,
        "diagnostics": diagnostics_of(options),
        "progress": progress_of(options),
    }
    several = options.component and ("," in options.component or options.component == "all")
    if options.prompts or options.embeddings or options.sampling or several:
        from vdqc.hub.experts import compile_pipeline

        if not (Path(options.model) / INDEX).is_file():
            raise ConfigError(
                f"expected a pipeline folder with {INDEX}, got {options.model}",
                "--prompts, --embeddings, --sampling and several components need a pipeline",
            )
        made = compile_pipeline(
            options.model,
            **common,
            conditions=_conditions(options),
            sampling=_sampling(options.sampling or ()),
        )
    else:
        artifact = compiler.compile(options.model, **common)
        made = {"": artifact}
    if is_first_worker():
        for artifact in made.values():
            print(summary.compiled(report_data(artifact), artifact.path, options.model))
    return OK


def _conditions(options: argparse.Namespace) -> Any:
    from vdqc.hub.sampler import read_embeddings, read_prompts

    if options.prompts:
        return read_prompts(Path(options.prompts))
    return read_embeddings(Path(options.embeddings)) if options.embeddings else None


def _sampling(words: Sequence[str]) -> dict[str, Any]:
    """``height=480`` as ``{"height": 480}``; what is not JSON is a text."""
    found = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier():
            raise ConfigError(f"--sampling: expected NAME=VALUE, got '{word}'")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
