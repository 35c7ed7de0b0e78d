"""What vdqc has to say: remarks, warnings and errors, each with a site and a stable code.

A message is one sentence with its numbers ("expected X, got Y"); notes say where and what to do::

    warning: blocks.3.ffn.fc2: input maximum 413 is 96 times the median channel  [input-outlier]
      note: wan.py:312  x = self.ffn(x)
"""

from __future__ import annotations

import difflib
import enum
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, final


class Severity(enum.StrEnum):
    """How much a diagnostic matters."""

    REMARK = "remark"
    WARNING = "warning"
    ERROR = "error"


@final
@dataclass(frozen=True)
class Diagnostic:
    """One thing said about one place; ``str()`` is the form that users read."""

    severity: Severity
    message: str
    code: str
    site: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.site}: " if self.site else ""
        lines = [f"{self.severity}: {where}{self.message}  [{self.code}]"]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@final
@dataclass
class Diagnostics:
    """Collects diagnostics in order; warnings also go to ``stream`` as they come.

    ``stream`` is None for silence (the library default); the command line gives stderr.
    """

    stream: IO[str] | None = None
    verbose: bool = False
    entries: list[Diagnostic] = field(default_factory=list)

    def remark(self, site: str, code: str, message: str, *notes: str) -> None:
        """Something worth a line in the report."""
        self.add(Diagnostic(Severity.REMARK, message, code, site, notes))

    def warning(self, site: str, code: str, message: str, *notes: str) -> None:
        """Something the user should know although the work goes on."""
        self.add(Diagnostic(Severity.WARNING, message, code, site, notes))

    def add(self, diagnostic: Diagnostic) -> None:
        """Keep ``diagnostic``; show it if it is a warning or if remarks are wanted."""
        self.entries.append(diagnostic)
        shown = self.verbose or diagnostic.severity is not Severity.REMARK
        if self.stream is not None and shown:
            print(diagnostic, file=self.stream)

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(self.entries)

    @staticmethod
    def to_stderr(verbose: bool = False) -> Diagnostics:
        """Diagnostics that are shown on stderr."""
        return Diagnostics(stream=sys.stderr, verbose=verbose)


class VdqcError(Exception):
    """Base of every error that vdqc raises on purpose; carries one error diagnostic.

    ``message`` says expected and got; ``code`` is stable; ``notes`` say where and what to do.
    """

    code: str = "error"

    def __init__(self, message: str, *notes: str, code: str | None = None, site: str = "") -> None:
        self.diagnostic = Diagnostic(Severity.ERROR, message, code or self.code, site, notes)
        super().__init__(str(self.diagnostic))

    def __str__(self) -> str:
        return str(self.diagnostic)  # torch.fx appends a traceback to ``args``


class ConfigError(VdqcError):
    """A word the user typed (pass, option, scheme, target, file) is not one vdqc can act on."""

    code = "config"


class OrderError(ConfigError):
    """Passes in an order that no graph can follow."""

    code = "pass-order"


class InputError(VdqcError):
    """A model, a sample or a file that does not fit."""

    code = "input"


class CaptureError(InputError):
    """The model could not be turned into a graph."""

    code = "capture"


class VerifyError(VdqcError):
    """A graph broke a rule of its stage, or an exact pass moved the output."""

    code = "verify"


class LoweringError(VdqcError):
    """No kernel, or a kernel that disagrees with its reference."""

    code = "lowering"


class ArtifactError(InputError):
    """A folder that is damaged, foreign, or from a newer vdqc."""

    code = "artifact"


#: Words that an error lists at most: a model has hundreds of sites.
_LISTED = 40


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that offers what the user may have meant, or lists what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    more = f", ... ({len(known)} in all)" if len(known) > _LISTED else ""
    return f"known: {', '.join(known[:_LISTED])}{more}"
