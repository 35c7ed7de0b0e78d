"""How thin attention over frames may be: the least density that keeps a budget's floor.

Error: InputError where no attention spans the frames of a video.
"""

from __future__ import annotations

import warnings

from vdqc.base.diagnostics import Diagnostics, InputError
from vdqc.engine.video_attention import obstacle, padding
from vdqc.ir.site import SiteKind
from vdqc.search.budget import Budget
from vdqc.search.job import Job
from vdqc.search.results import Applied, Point

#: Densities that are tried, the least that keeps the floor is taken.
DENSITIES = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7)


def thin_out(
    job: Job, budget: Budget, point: Point, dense: Applied
) -> tuple[float, Applied] | None:
    """The least density of attention over frames that keeps to the budget's floor, carried out.

    None if ``point`` leaves no room for it. Halves ``DENSITIES`` at every try.
    """
    low, high = 0, len(DENSITIES)
    found: tuple[float, Applied] | None = None
    while low < high and dense.error <= budget.floor_error:
        middle = (low + high) // 2
        applied = _thinned(job, point, DENSITIES[middle])
        if applied is not None and applied.error <= budget.floor_error:
            high, found = middle, (DENSITIES[middle], applied)
        else:
            low = middle + 1
    return found


def _thinned(job: Job, point: Point, density: float) -> Applied | None:
    """``point`` at a density; None if the frames of a sample allow no mask so thin."""
    said = Diagnostics()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            applied = job.apply(point, [sparsify_text(density)], said)
    except InputError as error:
        if error.diagnostic.code != "density":
            raise
        return None
    # such a call runs, but attends to everything: what was measured then is not the mask
    dense = any("attends to everything" in str(warning.message) for warning in warned)
    dense |= any(entry.code == "samples-too-small" for entry in said)
    return None if dense else applied


def check_attention(job: Job) -> None:
    """Raise InputError if no attention can be thinned out, with the reason of the first."""
    sites = job.graph.sites(kind=SiteKind.ATTENTION)
    reasons = [obstacle(site, padding(job.graph, site)) for site in sites]
    if any(not reason for reason in reasons):
        return
    first = next((reason[1] for reason in reasons if reason), "the model has none")
    raise InputError(f"--density: no attention spans the frames of a video: {first}")


def sparsify_text(density: float) -> str:
    """The pass that thins attention out to ``density``, spent where it saves most error."""
    return f"sparsify{{density={density:g},budget=calibrated}}"
