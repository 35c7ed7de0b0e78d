"""``vdqc report``: write the page of one artifact again, or one page that compares several."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vdqc.base.diagnostics import InputError
from vdqc.cli.common import OK, progress_of, require_places, show, write_whole

#: Its line in ``vdqc --help``.
HELP = "write the report of an artifact, or compare several"


def add(sub: Any) -> None:
    """Its options."""
    sub.add_argument(
        "artifacts", nargs="+", metavar="ARTIFACT", help="folders that compile wrote, up to 7"
    )
    sub.add_argument(
        "-o", "--out", default="report.html", metavar="FILE", help="where (default: report.html)"
    )
    sub.add_argument(
        "--check",
        action="append",
        default=[],
        metavar="FILE",
        help="what vdqc check wrote with -o; one per artifact, in their order",
    )
    sub.add_argument(
        "--block", default="", metavar="NAME", help="show this block's program (default: the first)"
    )
    sub.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from vdqc import report
    from vdqc.base.diagnostics import ConfigError
    from vdqc.ir import artifact
    from vdqc.report import compare
    from vdqc.report.data import report_data

    require_places(options.out)
    several = len(options.artifacts) > 1
    if several and options.block:
        raise ConfigError("expected one artifact with --block, got several")
    if len(options.check) > len(options.artifacts):
        raise ConfigError(
            f"expected at most {len(options.artifacts)} --check, got {len(options.check)}"
        )
    checks = [read_check(Path(file)) for file in options.check]
    progress = progress_of(options)
    found = [report_data(artifact.read(folder, progress=progress)) for folder in options.artifacts]
    if several:
        text = compare.render(found, checks)
    else:
        text = report.render(found[0], checks[0] if checks else None, options.block)
    out = Path(options.out)
    write_whole(out, text)
    data = {"report": str(out), "bytes": len(text.encode()), "artifacts": options.artifacts}
    show(options, data, f"report      {out}")
    return OK


def read_check(file: Path) -> Any:
    """The ``CheckResult`` that ``vdqc check -o`` wrote; raises InputError for anything else."""
    from vdqc.check_result import CheckResult

    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(
            f"expected the JSON of a check in {file}, got text that is none: {error}",
            "vdqc check ARTIFACT --model MODEL -o FILE writes it",
        ) from error
    return CheckResult.from_json(data)
