"""The two checks: the step-locked score of vdqc's own, or any command with an exit code.

The score compares a program with the float model call by call on the same inputs, as ``vdqc check``
does. A command gets a whole artifact folder, which loads and runs at any stage: its path replaces
``{artifact}`` in the command, else it is added at the end.

Error: InputError for a float model that does not run or gives NaN, and for a command that cannot be
run (exit codes 126, 127) or says that it cannot tell (125, as for ``git bisect run``).
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base import numerics
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.target import Target
from vdqc.bisect.search import Outcome
from vdqc.calls import flat_output, users_code
from vdqc.compiled import stand_in
from vdqc.compiler import save_probe
from vdqc.engine.recipe import Recipe
from vdqc.ir import artifact
from vdqc.ir.graph import Graph
from vdqc.ir.learned import frozen
from vdqc.ir.sample import Sample
from vdqc.ir.source import Source
from vdqc.lowering.residual import has_residuals

Progress = Callable[[Any, str], Any]


@final
class ScoreCheck:
    """Passes where the SQNR over all calls together is at least ``min_sqnr`` dB."""

    def __init__(
        self,
        source: Source,
        calls: Sequence[Sample],
        min_sqnr: float,
        target: Target,
        progress: Progress = lambda items, description: items,
    ) -> None:
        if not math.isfinite(min_sqnr):
            raise ConfigError(f"--min-sqnr: expected a number of dB, got {min_sqnr}")
        self.min_sqnr, self.target = min_sqnr, target
        self.text = f"step-locked SQNR of at least {min_sqnr:g} dB on {len(calls)} calls"
        self._source, self._calls, self._progress = source, calls, progress
        self._expected: list[Tensor] | None = None

    @torch.no_grad()
    def judge(self, graph: Graph, label: str) -> Outcome:
        """Run every call through ``graph``."""
        if self._expected is None:
            self._expected = self._float_outputs(graph)
        run = self._runner(graph)
        errors = []
        pairs = zip(self._calls, self._expected, strict=True)
        for sample, expected in self._progress(list(pairs), label):
            error = numerics.relative_error(run(sample), expected)
            errors.append(error if math.isfinite(error) else math.inf)
        return self.outcome(errors)

    def outcome(self, errors: Sequence[float]) -> Outcome:
        """What these relative errors of the calls amount to."""
        mean = sum(error**2 for error in errors) / len(errors)
        sqnr = math.inf if mean == 0 else -10 * math.log10(mean) if mean < math.inf else -math.inf
        return Outcome(sqnr >= self.min_sqnr, sqnr, tuple(errors))

    def _float_outputs(self, graph: Graph) -> list[Tensor]:
        """What the model itself computes; ``graph``, if it is captured, where it is on disk."""
        model, advice = self._source.model, "expected samples that the model takes"
        outputs = []
        for number, sample in enumerate(self._progress(list(self._calls), "float model")):
            if self._source.stored:
                output = flat_output(graph.run(**sample.inputs))
            else:
                with users_code(f"the model's forward on call {number}", advice):
                    output = flat_output(model(**sample.inputs))
            if not bool(output.isfinite().all()):
                raise InputError(
                    f"call {number}: the float model's own output holds NaN or infinity",
                    "expected finite outputs: check the sample and the weights",
                    code="not-finite",
                )
            outputs.append(output)
        return outputs

    def _runner(self, graph: Graph) -> Callable[[Sample], Tensor]:
        if not has_residuals(graph.module):
            return lambda sample: flat_output(graph.run(**sample.inputs))
        model = stand_in(graph, self.target)  # what is kept between steps lives in the stand-in
        return lambda sample: flat_output(model(**sample.inputs))


@final
@dataclass
class CommandCheck:
    """Passes where ``command`` exits with 0; ``folder`` takes the artifacts, one at a time.

    With ``keep`` they stay there.
    """

    command: str
    folder: Path
    recipe: Recipe
    target: Target
    sample: Sample
    name: str = ""
    seed: int = 0
    keep: bool = False
    made: int = 0

    @property
    def text(self) -> str:
        """The command, as it was given."""
        return f"'{self.command}' exits with 0"

    def judge(self, graph: Graph, label: str) -> Outcome:
        """Write ``graph`` as an artifact and ask the command."""
        place = self._write(graph, label)
        try:
            return self._ask(place)
        finally:
            if not self.keep:
                shutil.rmtree(place, ignore_errors=True)

    def _write(self, graph: Graph, label: str) -> Path:
        """A whole artifact, but for the report."""
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60]
        place = self.folder / f"{self.made:02d}-{slug}"
        self.made += 1
        facts = {"name": self.name, "seed": self.seed, "bytes_float": 0, "sites": []}
        facts |= {"bisect": label}
        with artifact.staging(place, force=True) as staged:
            settled = frozen(graph)
            settled.free.clear()
            artifact.write(settled, staged, recipe=self.recipe, facts=facts, target=self.target)
            save_probe(settled, self.sample, staged)
            artifact.seal(staged)
        return place

    def _ask(self, place: Path) -> Outcome:
        path = shlex.quote(str(place.resolve()))
        named = "{artifact}" in self.command
        text = self.command.replace("{artifact}", path) if named else f"{self.command} {path}"
        done = subprocess.run(
            text,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            env={**os.environ, "VDQC_ARTIFACT": str(place.resolve())},
            check=False,
        )
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == -signal.SIGINT:
            raise KeyboardInterrupt
        if done.returncode in (125, 126, 127):
            raise InputError(
                f"expected the check to tell good from bad, it exited with {done.returncode}",
                *lines[-3:],
                "0 means good, anything else but 125, 126 and 127 means bad",
                code="check-failed",
            )
        return Outcome(done.returncode == 0, said=lines[-1] if lines else f"exit {done.returncode}")
