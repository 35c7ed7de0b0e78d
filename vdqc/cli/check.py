"""``vdqc check``: compare a compiled model with its float model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vdqc.cli.common import FAILED, OK, progress_of, require_places, show, write_whole

#: Its line in ``vdqc --help``.
HELP = "compare a compiled model with its float model"


def add(sub: Any) -> None:
    """Its options."""
    sub.add_argument("artifact", help="a folder that compile wrote")
    sub.add_argument("--model", required=True, help="the model.py or folder it was compiled from")
    sub.add_argument(
        "--component", metavar="NAME", help="which model of a diffusers pipeline folder"
    )
    sub.add_argument(
        "--seed", type=int, default=0, help="seed of the first generation (default: 0)"
    )
    sub.add_argument("--seeds", type=int, default=1, help="how many generations (default: 1)")
    sub.add_argument(
        "--no-sites", action="store_true", help="compare outputs alone, not every site"
    )
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


def run(options: argparse.Namespace) -> int:
    """Carry it out; 1 if a threshold is missed."""
    from vdqc import check, report, summary
    from vdqc.check_result import Thresholds
    from vdqc.forecast import predicted_seconds
    from vdqc.ir import artifact
    from vdqc.ir.source import load_source
    from vdqc.loading import load
    from vdqc.report.data import report_data

    require_places(options.out, options.report)
    wanted = Thresholds(options.min_sqnr, options.min_psnr, options.min_ssim, options.min_accuracy)
    progress = progress_of(options)
    found = artifact.read(options.artifact, progress=progress)
    compiled = load(Path(options.artifact), reference=True)  # a machine that compiles can compare
    source = load_source(Path(options.model), component=options.component)
    result = check.check(
        compiled,
        source,
        seeds=range(options.seed, options.seed + options.seeds),
        generation=not options.no_generate,
        sites=not options.no_sites,
        timing_runs=options.runs,
        torch_compile=options.torch_compile,
        predicted=predicted_seconds(found.manifest),
        progress=progress,
    )
    if options.report:
        write_whole(options.report, report.render(report_data(found), result))
    data = result.to_json()
    try:
        misses = data["misses"] = wanted.misses(result)
    finally:  # what was measured is kept, also where a threshold was not
        if options.out:
            write_whole(options.out, json.dumps(data, indent=2) + "\n")
    show(options, data, summary.checked(result, misses, options.report))
    return FAILED if misses else OK
