"""``vdqc passes``: list the passes, or one pass with its options."""

from __future__ import annotations

import argparse
from typing import Any

from vdqc.cli.common import OK, show

#: Its line in ``vdqc --help``.
HELP = "list the passes, or one pass with its options"


def add(sub: Any) -> None:
    """Its options."""
    sub.add_argument("name", nargs="?", metavar="pass", help="one pass, with its options")
    sub.add_argument("--json", action="store_true", help="print the table as JSON")


def run(options: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from vdqc import catalog, summary
    from vdqc.engine.recipe import load_pass
    from vdqc.passes.table import PASSES

    if options.name:
        entry = catalog.describe(load_pass(options.name, PASSES))
        show(options, entry, summary.one_pass(entry))
    else:
        entries = catalog.catalog(PASSES)
        show(options, entries, summary.pass_list(entries))
    return OK
