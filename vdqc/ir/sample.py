"""One call of the model, as a user's ``samples()`` yields it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from vdqc.base.diagnostics import InputError


@final
@dataclass(frozen=True)
class Sample:
    """Keyword arguments of one ``forward`` call and where on the trajectory it stands.

    Attributes:
        inputs: argument name to tensor, python value, or nested tuple, list or dict of those.
        timestep: the denoising timestep, for statistics per step; None if it has none.
        trajectory, step: seed of the sampling run that made this call and the step of it, for
            what compares neighbouring steps; None if it was not recorded from one.
        branch: which of a step's calls it is, where guidance calls the model more than once.
    """

    inputs: Mapping[str, Any]
    timestep: float | None = None
    trajectory: int | None = None
    step: int | None = None
    branch: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Mapping):
            raise InputError(
                "expected a Sample of the arguments of forward by name, got a "
                f"{type(self.inputs).__name__}",
                'name them: Sample({"hidden_states": x, ...}, timestep=t)',
            )
