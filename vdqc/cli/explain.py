"""``vdqc explain``: say what compile would do, before it does it."""

from __future__ import annotations

import argparse
from typing import Any

from vdqc.cli.common import OK, add_recipe, diagnostics_of, progress_of, show

#: Its line in ``vdqc --help``.
HELP = "say what compile would do, before it does it"


def add(sub: Any) -> None:
    """Its options."""
    add_recipe(sub)
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from vdqc import compiler, summary
    from vdqc.engine.pass_manager import tell_of_untrained
    from vdqc.explain import explain

    diagnostics = diagnostics_of(options)
    recipe = compiler.parse_recipe(options.passes, options.scheme, options.recipe)
    tell_of_untrained(recipe.passes, diagnostics)
    target = compiler.usable_target(options.target, diagnostics)
    source = compiler.as_source(options.model, None, options.component)
    plan = explain(source, recipe, target, diagnostics, progress=progress_of(options))
    show(options, plan.to_json(), summary.planned(plan))
    return OK
