"""The command line: ``vdqc compile | record | run | check | explain | inspect | passes | recipes``.

Exit codes: 0 fine, 1 a check failed, 2 bad usage or input. Results go to stdout, everything else
(progress, warnings, errors) to stderr; with ``--json`` stdout holds one JSON value, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vdqc.base.diagnostics import ConfigError, Diagnostics, VdqcError, nearest
from vdqc.version import __version__

OK, FAILED, BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors that a user can cause are printed, not raised."""
    try:
        options = build_parser().parse_args(argv)
    except VdqcError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        code: int = options.command(options)
        return code
    except VdqcError as error:
        if options.debug:
            raise
        print(_with_notes(error), file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # `vdqc inspect out/ --ir | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        if options.debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}  [file]", file=sys.stderr)
        print("  note: check the path, its permissions and the space on its disk", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _with_notes(error: VdqcError) -> str:
    lines = [str(error), *(f"  note: {note}" for note in getattr(error, "__notes__", ()))]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """Argparse that offers the nearest option or command, in the words of every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, f"see '{self.prog} --help'", code="usage")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, extra = self.parse_known_args(args, namespace)
        if extra:
            words = [word for word in getattr(options, "words", ()) if word.startswith("--")]
            raise ConfigError(
                f"unknown argument '{extra[0]}'", nearest(extra[0], words), code="usage"
            )
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.metavar or action.dest
            raise ConfigError(
                f"unknown {what} '{value}'",
                nearest(str(value), map(str, action.choices)),
                code="usage",
            )


def build_parser() -> argparse.ArgumentParser:
    """Every command and option."""
    parser = _Parser(
        prog="vdqc", description="Compile a diffusion transformer into a low-bit program."
    )
    parser.add_argument("--version", action="version", version=f"vdqc {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=_Parser)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument("--quiet", "-q", action="store_true", help="no progress, no remarks")
        sub.add_argument("--verbose", "-v", action="store_true", help="show remarks too")
        sub.set_defaults(command=command)
        return sub

    _add_compile(add("compile", compile_command, "compile a model into an artifact folder"))
    _add_record(add("record", record_command, "record a sampler's calls to calibrate on"))
    _add_run(add("run", run_command, "run a compiled model"))
    _add_check(add("check", check_command, "compare a compiled model with its float model"))
    _add_explain(add("explain", explain_command, "say what compile would do, before it does it"))
    _add_inspect(add("inspect", inspect_command, "show what is in an artifact folder"))
    _add_passes(add("passes", passes_command, "list the passes, or one pass with its options"))
    _add_recipes(add("recipes", recipes_command, "list the named recipes, or print one"))
    for sub in commands.choices.values():
        sub.set_defaults(words=list(sub._option_string_actions))
    return parser


def _add_recipe(sub: Any) -> None:
    sub.add_argument("model", help="a model.py with model() and samples(), or a diffusers folder")
    sub.add_argument(
        "--passes",
        help="passes in order, as 'rotate,smooth{alpha=0.6},quant' (default: rotate,smooth,quant)",
    )
    sub.add_argument(
        "--recipe", metavar="NAME", help="a named recipe (vdqc recipes) or a .toml file of one"
    )
    sub.add_argument(
        "--scheme",
        action="append",
        metavar="[GLOB=]SCHEME",
        help="w8a8, w4a8-g64, none, ...; repeat with globs of site names, the last match wins "
        "(default: the recipe's, else w8a8)",
    )
    sub.add_argument(
        "--target", default="auto", help="cpu, sm80 ... sm120, or auto: this machine (default)"
    )
    sub.add_argument(
        "--component", metavar="NAME", help="which model of a diffusers pipeline folder"
    )
    sub.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")


def _add_compile(sub: Any) -> None:
    _add_recipe(sub)
    sub.add_argument("-o", "--out", metavar="DIR", help="output folder (default: <stem>.vdqc)")
    sub.add_argument("--pool", metavar="DIR", help="calls that vdqc record kept, to learn from")
    sub.add_argument("--force", action="store_true", help="replace the output folder if it exists")
    sub.add_argument("--aot", action="store_true", help="add an AOTInductor package")
    sub.add_argument(
        "--mapped",
        action="store_true",
        default=None,
        help="stream a folder's weights from disk (default: if they exceed half of free memory)",
    )
    sub.add_argument(
        "--no-verify", action="store_true", help="skip the probe that measures every pass"
    )


def _add_record(sub: Any) -> None:
    sub.add_argument("model", help="a model.py with model(), samples() and generate()")
    sub.add_argument("-o", "--out", required=True, metavar="DIR", help="the pool's folder")
    sub.add_argument(
        "--trajectories", type=int, default=10, metavar="N", help="sampling runs (default: 10)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the first one (default: 0)")
    sub.add_argument("--component", metavar="NAME", help="which model of a pipeline folder")


def _add_run(sub: Any) -> None:
    sub.add_argument("artifact", help="a folder that compile wrote")
    sub.add_argument("--model", help="its model.py: run generate() instead of one forward pass")
    sub.add_argument(
        "--component", metavar="NAME", help="which model of a diffusers pipeline folder"
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the generation (default: 0)")
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--frames", metavar="DIR", help="write each frame as a PNG into DIR")
    where.add_argument("--output", metavar="FILE", help="write the result as .safetensors")


def _add_check(sub: Any) -> None:
    sub.add_argument("artifact", help="a folder that compile wrote")
    sub.add_argument("--model", required=True, help="the model.py or folder it was compiled from")
    sub.add_argument(
        "--component", metavar="NAME", help="which model of a diffusers pipeline folder"
    )
    sub.add_argument(
        "--seed", type=int, default=0, help="seed of the first generation (default: 0)"
    )
    sub.add_argument("--seeds", type=int, default=1, help="how many generations (default: 1)")
    sub.add_argument("--no-generate", action="store_true", help="samples only, no whole generation")
    sub.add_argument(
        "--torch-compile", action="store_true", help="time both under torch.compile too"
    )
    sub.add_argument("--runs", type=int, default=5, help="timed forward passes (default: 5)")
    sub.add_argument(
        "--min-sqnr", type=float, metavar="DB", help="fail below this step-locked SQNR"
    )
    sub.add_argument("--min-psnr", type=float, metavar="DB", help="fail below this PSNR")
    sub.add_argument("--min-ssim", type=float, metavar="X", help="fail below this SSIM")
    sub.add_argument("--min-accuracy", type=float, metavar="X", help="fail below this accuracy")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub.add_argument("-o", "--out", metavar="FILE", help="write the result as JSON")
    sub.add_argument("--report", metavar="FILE", help="write the report with the comparison in it")


def _add_explain(sub: Any) -> None:
    _add_recipe(sub)
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_inspect(sub: Any) -> None:
    sub.add_argument("artifact", help="a folder that compile wrote")
    sub.add_argument(
        "--ir",
        nargs="?",
        const="",
        metavar="PASS",
        help="the printed IR, after PASS (default: last)",
    )
    sub.add_argument("--sites", action="store_true", help="one line per site")
    sub.add_argument("--json", action="store_true", help="print the manifest as JSON")


def _add_passes(sub: Any) -> None:
    sub.add_argument("name", nargs="?", metavar="pass", help="one pass, with its options")
    sub.add_argument("--json", action="store_true", help="print the table as JSON")


def _add_recipes(sub: Any) -> None:
    sub.add_argument("name", nargs="?", metavar="recipe", help="a name, or a .toml file")
    sub.add_argument("--json", action="store_true", help="print the recipes as JSON")


def compile_command(options: argparse.Namespace) -> int:
    """``vdqc compile``."""
    from vdqc import compiler, summary
    from vdqc.engine.distributed import is_first_worker
    from vdqc.report.data import report_data

    artifact = compiler.compile(
        options.model,
        passes=options.passes,
        recipe=options.recipe,
        pool=options.pool,
        scheme=options.scheme,
        target=options.target,
        out=options.out,
        force=options.force,
        aot=options.aot,
        seed=options.seed,
        verify=not options.no_verify,
        component=options.component,
        mapped=options.mapped,
        diagnostics=_diagnostics(options),
        progress=_progress(options),
    )
    if is_first_worker():
        print(summary.compiled(report_data(artifact), artifact.path, options.model))
    return OK


def record_command(options: argparse.Namespace) -> int:
    """``vdqc record``."""
    from vdqc import compiler

    if options.trajectories < 1:
        raise ConfigError(f"--trajectories: expected at least 1, got {options.trajectories}")
    seeds = range(options.seed, options.seed + options.trajectories)
    pool = compiler.record_pool(
        options.model, options.out, seeds, component=options.component, progress=_progress(options)
    )
    print(f"{len(pool)} calls of {options.trajectories} trajectories -> {options.out}/")
    print(f"next: vdqc compile {options.model} --recipe s2q_vdit --pool {options.out}")
    return OK


def run_command(options: argparse.Namespace) -> int:
    """``vdqc run``."""
    from vdqc import runner, summary

    result = runner.run(
        Path(options.artifact),
        Path(options.model) if options.model else None,
        seed=options.seed,
        component=options.component,
        progress=_progress(options),
    )
    if options.frames:
        runner.write_frames(result, Path(options.frames))
    if options.output:
        runner.write_tensors(result, Path(options.output))
    print(summary.ran(result, options.frames or options.output))
    return OK


def check_command(options: argparse.Namespace) -> int:
    """``vdqc check``: exit 1 if a threshold is missed."""
    from vdqc import check, report, summary
    from vdqc.compiled import load
    from vdqc.ir import artifact
    from vdqc.ir.source import load_source
    from vdqc.report.data import report_data

    wanted = check.Thresholds(
        options.min_sqnr, options.min_psnr, options.min_ssim, options.min_accuracy
    )
    progress = _progress(options)
    found = artifact.read(options.artifact, progress=progress)
    compiled = load(Path(options.artifact))
    source = load_source(Path(options.model), component=options.component)
    result = check.check(
        compiled,
        source,
        seeds=range(options.seed, options.seed + options.seeds),
        generation=not options.no_generate,
        timing_runs=options.runs,
        torch_compile=options.torch_compile,
        progress=progress,
    )
    misses = wanted.misses(result)
    data = {**result.to_json(), "misses": misses}
    if options.out:
        Path(options.out).write_text(json.dumps(data, indent=2) + "\n")
    if options.report:
        Path(options.report).write_text(report.render(report_data(found), result))
    _print(options, data, summary.checked(result, misses, options.report))
    return FAILED if misses else OK


def explain_command(options: argparse.Namespace) -> int:
    """``vdqc explain``."""
    from vdqc import compiler, summary
    from vdqc.explain import explain

    diagnostics = _diagnostics(options)
    recipe = compiler.parse_recipe(options.passes, options.scheme, options.recipe)
    target = compiler.usable_target(options.target, diagnostics)
    source = compiler.as_source(options.model, None, options.component)
    plan = explain(source, recipe, target, diagnostics, progress=_progress(options))
    _print(options, plan.to_json(), summary.planned(plan))
    return OK


def inspect_command(options: argparse.Namespace) -> int:
    """``vdqc inspect``."""
    from vdqc import summary
    from vdqc.ir import artifact
    from vdqc.report.data import report_data

    found = artifact.read(options.artifact, progress=_progress(options))
    if options.ir is not None:
        text = summary.ir_text(found.ir, options.ir)
    elif options.sites:
        text = summary.site_table(report_data(found).sites)
    else:
        text = summary.inspected(report_data(found), found.path)
    _print(options, found.manifest, text)
    return OK


def passes_command(options: argparse.Namespace) -> int:
    """``vdqc passes``."""
    from vdqc import catalog, summary
    from vdqc.engine.recipe import load_pass
    from vdqc.passes.table import PASSES

    if options.name:
        entry = catalog.describe(load_pass(options.name, PASSES))
        _print(options, entry, summary.one_pass(entry))
    else:
        entries = catalog.catalog(PASSES)
        _print(options, entries, summary.pass_list(entries))
    return OK


def recipes_command(options: argparse.Namespace) -> int:
    """``vdqc recipes``."""
    from vdqc import summary
    from vdqc.engine import named

    if options.name:
        found = named.named(options.name)
        _print(options, found.to_json(), summary.one_recipe(found))
    else:
        every = [named.named(name) for name in named.names()]
        _print(options, [each.to_json() for each in every], summary.recipe_list(every))
    return OK


def _print(options: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, indent=2) if options.json else text)


def _diagnostics(options: argparse.Namespace) -> Diagnostics:
    return Diagnostics(stream=sys.stderr, verbose=options.verbose)


def _progress(options: argparse.Namespace) -> Callable[[Any, str], Any]:
    """Bars with time left on stderr, for work that takes more than a second."""
    from tqdm import tqdm

    hidden = options.quiet or not sys.stderr.isatty()

    def bar(items: Any, description: str) -> Any:
        return tqdm(items, desc=description, disable=hidden, leave=False, delay=1)

    return bar
