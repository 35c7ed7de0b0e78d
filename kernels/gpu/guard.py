"""A guard around bold variants: those that only a compiler has vouched for.

If such a variant does not compile, or differs from the plain variant at its first use, the plain
one serves from then on. Under ``VDQC_PLAIN=1`` the plain one always serves: a variant that hangs
cannot be caught here.

Error: none of its own.
Source: ours.
"""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from vdqc.base.numerics import TOLERANCE
from vdqc.kernels.gpu.runtime import ABSENT, compile_errors, first_line, is_plain

_Result = TypeVar("_Result")

#: Values that ``agrees`` compares at a time.
_PIECE = 2**22

#: True: agreed with its fallback at first use; False: the fallback serves. By variant.
_VERDICTS: dict[str, bool] = {}


def compile_or_fallback(
    key: str, primary: Callable[[], _Result], fallback: Callable[[], _Result]
) -> _Result:
    """``primary()``; once it did not compile, ``fallback()``, with one warning."""
    if not _VERDICTS.get(key, True):
        return fallback()
    try:
        return primary()
    except compile_errors() as error:
        if _is_fatal(error):
            raise
        _VERDICTS[key] = False
        warnings.warn(
            f"{key} does not compile ({first_line(error)}): the plain variant serves", stacklevel=2
        )
        return fallback()


def guarded(
    key: str,
    primary: Callable[[], Tensor],
    fallback: Callable[[], Tensor],
    agree: Callable[[Tensor, Tensor], bool] = torch.equal,
) -> Tensor:
    """``primary()`` once it has agreed with ``fallback()``; see the module's text.

    While a CUDA graph is being captured nothing can be compared: an unproven variant waits. For a
    GPU that is not there both are compiled, ``is_plain`` or not: where the program will run, it
    may be otherwise.
    """
    if ABSENT.get() is not None:
        expected = fallback()
        try:
            return primary()
        except compile_errors():
            return expected
    if is_plain():
        return fallback()
    if _VERDICTS.get(key):
        return primary()
    if key in _VERDICTS or _capturing():
        return fallback()
    expected = fallback()
    found = compile_or_fallback(key, primary, lambda: expected)
    if key not in _VERDICTS:
        _VERDICTS[key] = agree(found, expected)
        if not _VERDICTS[key]:
            warnings.warn(
                f"{key} differs from the plain variant: the plain variant serves", stacklevel=2
            )
    return found if _VERDICTS[key] else expected


def agrees(found: Tensor, expected: Tensor) -> bool:
    """True if both are equal integers, or floats that differ by roundings: within the tolerance of
    their dtype by norm, piece by piece, NaN and infinity in the same places.

    By pieces: of HunyuanVideo's feed-forward both results take 3 GB each, and copies of them in
    float32, whole, 12 more; and one bad tile of a large result must not drown in the norm of all.
    """
    if not found.is_floating_point():
        return torch.equal(found, expected)
    allowed, verdicts = TOLERANCE[expected.dtype], []
    for one, other in zip(
        found.flatten().split(_PIECE), expected.flatten().split(_PIECE), strict=True
    ):
        left, right = one.float(), other.float()
        same = (left == right) | (left.isnan() & right.isnan())
        error = (left - right).masked_fill(same, 0.0).norm()
        verdicts.append(error <= allowed * right.masked_fill(~right.isfinite(), 0.0).norm())
    return not verdicts or bool(torch.stack(verdicts).all())


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_fatal(error: BaseException) -> bool:
    """True for errors that another kernel would meet too: out of memory, a broken context."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    # what Triton's driver raises bears the first words; only a launch refused is the kernel's own
    if text.startswith("Triton Error [CUDA]"):
        return "invalid argument" not in text
    return "CUDA error" in text or "illegal memory access" in text
