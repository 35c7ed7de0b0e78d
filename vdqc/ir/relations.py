"""What an exported program assumes about sizes, as text: symbols, their ranges, relations.

Symbols are renamed ``s0, s1, ...`` by first appearance among the inputs. Export also records
exclusions of the form ``size != 1`` that come from its own stride reasoning on the example; the
program is right there (checked on every architecture in the tests), so they are dropped, and a
least size of 2 that only says "not specialised" becomes 1. Equalities, bounds and whatever the
forward itself compared stay: they are branches that it took.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter

from vdqc.base.diagnostics import CaptureError
from vdqc.ir.signature import Size, evaluate

_TORCH = str(Path(torch.__file__).parent)


@final
class Symbols:
    """Names the symbols of one export's fake values, in the order in which sizes are asked for."""

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}
        self._environment: Any = None

    def size(self, value: int | torch.SymInt) -> Size:
        """A number, or an expression over named symbols."""
        if isinstance(value, int):
            return value
        self._environment = value.node.shape_env
        expression = value.node.expr
        if not expression.free_symbols:
            return int(expression)
        for symbol in sorted(expression.free_symbols, key=str):
            self.names.setdefault(
                symbol, sympy.Symbol(f"s{len(self.names)}", integer=True, positive=True)
            )
        return self._text(expression)

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        """Symbol to (least, greatest) size; None for no limit."""
        found = {}
        for symbol, name in self.names.items():
            bounds = self._environment.var_to_range[symbol]
            low = int(bounds.lower) if bounds.lower.is_number else 0
            unlimited = bounds.upper in (int_oo, sympy.oo) or bounds.upper > 2**31
            high = None if unlimited else int(bounds.upper)
            found[str(name)] = (1 if low <= 2 else low, high)
        return found

    def guards(self) -> tuple[str, ...]:
        """Relations between sizes, without exclusions."""
        if self._environment is None:
            return ()
        found: dict[str, None] = {}
        for guard in self._environment.guards:
            expression = self._environment.replace(guard.expr)
            parts = expression.args if isinstance(expression, sympy.And) else (expression,)
            for part in parts:
                if part.free_symbols and not _is_exclusion(part, guard.sloc.framework_loc):
                    self._known(part)
                    found[self._text(part)] = None
        return tuple(found)

    def _known(self, expression: Any) -> None:
        if unknown := expression.free_symbols - set(self.names):
            raise CaptureError(
                f"the forward depends on a size that no input shows: {expression}",
                f"symbols {sorted(map(str, unknown))} come from data or from python state",
            )

    def _text(self, expression: Any) -> str:
        return str(PythonPrinter().doprint(expression.xreplace(self.names)))


def check_example(
    guards: Sequence[str], inputs: Sequence[tuple[Size, ...]], values: Sequence[Any]
) -> None:
    """Raises CaptureError unless every guard can be evaluated and holds for the example."""
    symbols: dict[str, int] = {}
    for sizes, value in zip(inputs, values, strict=True):
        actual = tuple(value.shape) if isinstance(value, Tensor) else (value,)
        for size, found in zip(sizes, actual, strict=True):
            if isinstance(size, str) and size.isidentifier():
                symbols.setdefault(size, int(found))
    for guard in guards:
        if not evaluate(guard, symbols):
            raise CaptureError(f"the relation {guard} does not hold for the example: {symbols}")


def _is_exclusion(expression: Any, location: Any) -> bool:
    """Whether torch's own shape rules, not the forward, asked if a size is other than 0 or 1."""
    if not str(getattr(location, "filename", "")).startswith(_TORCH):
        return False
    match expression:
        case sympy.Ne():
            return True
        case sympy.Ge(args=(_, bound)) if bound in (0, 1, 2):
            return True
        case sympy.Gt(args=(_, bound)) if bound in (0, 1):
            return True
    return False
