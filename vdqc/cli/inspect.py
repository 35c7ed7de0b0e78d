"""``vdqc inspect``: show what is in an artifact folder."""

from __future__ import annotations

import argparse
from typing import Any

from vdqc.cli.common import OK, progress_of, show

#: Its line in ``vdqc --help``.
HELP = "show what is in an artifact folder"


def add(sub: Any) -> None:
    """Its options."""
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


def run(options: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from vdqc import summary
    from vdqc.ir import artifact
    from vdqc.report.data import report_data

    found = artifact.read(options.artifact, progress=progress_of(options))
    if options.ir is not None:
        text = summary.ir_text(found.ir, options.ir)
    elif options.sites:
        text = summary.site_table(report_data(found).sites)
    else:
        text = summary.inspected(report_data(found), found.path)
    show(options, found.manifest, text)
    return OK
