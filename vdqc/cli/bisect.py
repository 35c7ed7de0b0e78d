"""``vdqc bisect``: find the pass, the site and the timestep that break a check."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from vdqc.base.diagnostics import ConfigError
from vdqc.cli.common import FAILED, OK, add_recipe, diagnostics_of, progress_of, show

#: Its line in ``vdqc --help``.
HELP = "find the pass, the site and the timestep that break a check"


def add(sub: Any) -> None:
    """Its options."""
    add_recipe(sub)
    positional = next(action for action in sub._actions if action.dest == "model")
    positional.help = "a model.py, a diffusers folder, or an artifact (then with --model)"
    sub.add_argument(
        "--model",
        dest="source",
        metavar="MODEL",
        help="the model.py or folder that the artifact was compiled from",
    )
    sub.add_argument("--pool", metavar="DIR", help="calls that vdqc record kept: learnt and scored")
    sub.add_argument(
        "--mapped",
        action="store_true",
        default=None,
        help="stream a folder's weights from disk (default: if they exceed half of free memory)",
    )
    which = sub.add_mutually_exclusive_group()
    which.add_argument(
        "--min-sqnr", type=float, metavar="DB", help="fail below this step-locked SQNR"
    )
    which.add_argument(
        "--check",
        metavar="CMD",
        help="a shell command that gets an artifact ({artifact}, else added at the end) and exits "
        "with 0 if it is good; 125 if it cannot tell",
    )
    sub.add_argument("--keep", metavar="DIR", help="keep the artifacts that CMD was given")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Carry it out; 0 if a culprit was found, 1 if the check passes."""
    _check_words(options)
    from vdqc import compiler
    from vdqc.bisect import bisect, words
    from vdqc.bisect.checks import CommandCheck, ScoreCheck
    from vdqc.bisect.search import Check
    from vdqc.engine.pool import open_pool
    from vdqc.engine.recipe import Recipe
    from vdqc.ir import artifact
    from vdqc.loading import register_kernels
    from vdqc.passes.table import PASSES

    diagnostics, progress = diagnostics_of(options), progress_of(options)
    program, seed, model = None, options.seed, options.model
    if options.source is not None or artifact.is_artifact(Path(options.model)):
        found = artifact.read(options.model, progress=progress)
        _check_given(options)
        manifest, model = found.manifest, options.source
        recipe = Recipe.parse(manifest["recipe"], PASSES, manifest["rules"])
        seed, target_name = manifest["facts"]["seed"], manifest["target"]
        register_kernels()
        program = found.graph()
    else:
        recipe = compiler.parse_recipe(options.passes, options.scheme, options.recipe)
        target_name = options.target
    target = compiler.usable_target(target_name, diagnostics)
    calls = () if options.pool is None else open_pool(Path(options.pool))
    source = compiler.as_source(model, None, options.component, options.mapped)
    with tempfile.TemporaryDirectory(prefix="vdqc-bisect-") as folder:
        check: Check
        if options.check is None:
            samples = calls or source.samples
            check = ScoreCheck(source, samples, options.min_sqnr, target, progress)
        else:
            place = Path(options.keep or folder)
            place.mkdir(parents=True, exist_ok=True)
            check = CommandCheck(
                options.check, place, recipe, target, source.samples[0], source.name, seed,
                keep=options.keep is not None,
            )  # fmt: skip
        result = bisect(
            source, recipe, target, check, calls=calls, seed=seed, diagnostics=diagnostics,
            artifact=program, progress=progress,
        )  # fmt: skip
    show(options, result.to_json(), words.shown(result))
    return OK if result.found else FAILED


def _check_words(options: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    if options.min_sqnr is None and options.check is None:
        raise ConfigError(
            "expected a check, got none",
            "--min-sqnr DB scores the model itself; --check CMD asks a command",
        )
    if options.check is not None and not options.check.strip():
        raise ConfigError("--check: expected a command, got an empty text")
    if options.keep is not None and options.check is None:
        raise ConfigError("--keep goes with --check: the score needs no artifacts")


def _check_given(options: argparse.Namespace) -> None:
    """An artifact brings its recipe and lacks its model."""
    if options.source is None:
        raise ConfigError(
            f"{options.model} is an artifact, which has no float model",
            f"vdqc bisect {options.model} --model model.py, the one that it was compiled from",
        )
    for name in ("passes", "recipe", "scheme"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"expected no --{name} beside an artifact, which brings its own",
                f"to try another: vdqc bisect {options.source} --{name} ...",
            )
    if options.target != "auto":
        raise ConfigError("expected no --target beside an artifact, which brings its own")
