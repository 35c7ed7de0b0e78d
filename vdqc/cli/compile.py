"""``vdqc compile``: compile a model into an artifact folder."""

from __future__ import annotations

import argparse
from typing import Any

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
        "--mapped",
        action="store_true",
        default=None,
        help="stream a folder's weights from disk (default: if they exceed half of free memory)",
    )
    sub.add_argument(
        "--no-verify", action="store_true", help="skip the probe that measures every pass"
    )


def run(options: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
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
        fresh=options.fresh,
        aot=options.aot,
        seed=options.seed,
        verify=not options.no_verify,
        component=options.component,
        mapped=options.mapped,
        diagnostics=diagnostics_of(options),
        progress=progress_of(options),
    )
    if is_first_worker():
        print(summary.compiled(report_data(artifact), artifact.path, options.model))
    return OK
