"""Calls of the user's own model: their output as one vector, their faults as one clear error."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vdqc.base.diagnostics import InputError, VdqcError


@contextmanager
def users_code(what: str, advice: str) -> Iterator[None]:
    """Turn an exception of ``what`` into an InputError with the user's line that led to it."""
    try:
        yield
    except (VdqcError, OSError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not {"torch", "vdqc"} & set(Path(f.filename).parts)]
        where = [f"{Path(own[-1].filename).name}:{own[-1].lineno}  {own[-1].line}"] if own else []
        raise InputError(
            f"{what} failed: {type(error).__name__}: {str(error).strip()}", *where, advice
        ) from error


def flat_output(output: Any) -> Tensor:
    """Every tensor that a model returned, as one float64 vector on the CPU."""
    # output classes of diffusers and transformers are ordered dictionaries
    plain = list(output.values()) if isinstance(output, Mapping) else output
    leaves = [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]
    if not leaves:
        raise InputError(f"expected the model to return tensors, got {type(output).__name__}")
    return torch.cat([leaf.detach().cpu().double().flatten() for leaf in leaves])
