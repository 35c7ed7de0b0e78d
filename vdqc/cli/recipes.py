"""``vdqc recipes``: list the named recipes, or print one."""

from __future__ import annotations

import argparse
from typing import Any

from vdqc.cli.common import OK, show

#: Its line in ``vdqc --help``.
HELP = "list the named recipes, or print one"


def add(sub: Any) -> None:
    """Its options."""
    sub.add_argument("name", nargs="?", metavar="recipe", help="a name, or a .toml file")
    sub.add_argument("--json", action="store_true", help="print the recipes as JSON")


def run(options: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from vdqc import summary
    from vdqc.engine import named

    if options.name:
        found = named.named(options.name)
        show(options, found.to_json(), summary.one_recipe(found))
    else:
        every = [named.named(name) for name in named.names()]
        show(options, [each.to_json() for each in every], summary.recipe_list(every))
    return OK
