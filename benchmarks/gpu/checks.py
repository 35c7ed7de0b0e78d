"""Right before fast: results against references in higher precision, on memory that was poisoned.

No op is timed whose check fails; the timed operands themselves are checked on sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vdqc.base.numerics import TOLERANCE, relative_error


class WrongError(Exception):
    """A result that differs from its reference; no speed of the op is printed."""


def poison(tensor: Tensor) -> Tensor:
    """Fill fresh memory with values that no kernel would leave behind."""
    if tensor.dtype == torch.bool or tensor.numel() == 0:
        return tensor.fill_(True)
    if tensor.is_floating_point():
        if tensor.element_size() == 1:  # fp8: not every backend fills it
            tensor.view(torch.uint8).fill_(0xFF)
            return tensor
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).max - 5)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, everything that is allocated empty starts poisoned."""
    empty, like, new = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def around(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **named: poison(make(*args, **named))

    with (
        mock.patch.object(torch, "empty", around(empty)),
        mock.patch.object(torch, "empty_like", around(like)),
        mock.patch.object(torch.Tensor, "new_empty", around(new)),
    ):
        yield


def ran_poisoned(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """``call`` with poisoned outputs."""
    with poisoned():
        return call(*args, **named)


def close(what: str, found: Tensor, expected: Tensor, allowed: float | None = None) -> float:
    """The relative error; WrongError above ``allowed`` (the tolerance of the dtype found)."""
    if found.shape != expected.shape:
        raise WrongError(f"{what}: expected {list(expected.shape)}, got {list(found.shape)}")
    limit = TOLERANCE[found.dtype] if allowed is None else allowed
    error = relative_error(found, expected.to(found.device))
    if not error <= limit:
        raise WrongError(f"{what}: relative error {error:.2e}, allowed {limit:.0e}")
    return error


def same(what: str, found: Tensor, expected: Tensor) -> None:
    """WrongError unless integers are equal."""
    expected = expected.to(found.device)
    if found.dtype != expected.dtype or not torch.equal(found, expected):
        count = int((found != expected).sum()) if found.shape == expected.shape else found.numel()
        raise WrongError(f"{what}: {count} of {expected.numel()} integers differ")


def nearly_same(what: str, found: Tensor, expected: Tensor, share: float = 0.002) -> None:
    """Codes behind float steps: a value at the edge of two codes may fall to either side."""
    apart = (found.int() - expected.to(found.device).int()).abs()
    flips = float((apart > 0).float().mean()) if apart.numel() else 0.0
    if apart.numel() and (int(apart.max()) > 1 or flips > share):
        raise WrongError(f"{what}: codes differ by up to {int(apart.max())}, {flips:.2%} of them")


def sampled_rows(rows: int, count: int = 48) -> Tensor:
    """Rows to look at: the first, the last and some between."""
    if rows <= count:
        return torch.arange(rows)
    inside = torch.randperm(rows - 2)[: count - 2] + 1
    return torch.cat([torch.tensor([0, rows - 1]), inside])


def finite(what: str, values: Sequence[Tensor]) -> None:
    """WrongError if anything is NaN or infinite."""
    for value in values:
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise WrongError(f"{what}: not all values are finite")
