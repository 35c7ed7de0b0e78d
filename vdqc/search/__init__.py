"""search(): a scheme and transforms for every group of linears, the best that a budget allows.

    measure   local error of every way, gain of every group              vdqc.search.sensitivity
    price     bytes exactly as stored, time as explain predicts it       vdqc.search.cost
    solve     a multiple-choice knapsack, as an integer program          vdqc.search.solve
    write     a recipe that compile takes                                vdqc.search.writing
    apply     its passes and lowering, on the graph: measured SQNR and bytes beside the predicted

A group of peers (q, k, v) is the unit, for it shares one quantiser and one transform. Under a floor
the measured error corrects the predicted one and the choice is made again, so that it is the
measured SQNR that reaches the floor.

Error: InputError where the budget or the floor cannot be reached; it names the least that can.
"""

from __future__ import annotations

from collections.abc import Sequence

from vdqc.base.diagnostics import ConfigError, Diagnostics
from vdqc.base.scheme import QuantScheme
from vdqc.base.target import Target
from vdqc.compile_checks import check_weights
from vdqc.compiler import capture_source
from vdqc.ir.sample import Sample
from vdqc.ir.source import Source
from vdqc.lowering.rules import sized_like
from vdqc.search.budget import Budget
from vdqc.search.density import check_attention, sparsify_text, thin_out
from vdqc.search.job import Job, Progress
from vdqc.search.results import Applied, Point, SearchResult
from vdqc.search.sensitivity import spread

#: Schemes that are tried unless others are named; ``none`` leaves a group in float.
SCHEMES = ("w8a8", "w6a8", "w4a8", "w4a8-g64", "none")
#: Samples that local errors are measured on, spread over timesteps.
SAMPLES = 16


def parse_schemes(texts: Sequence[str]) -> list[QuantScheme]:
    """The schemes to choose from, each once; raises ConfigError."""
    schemes = {text: QuantScheme.parse(text) for text in texts}
    for text, scheme in schemes.items():
        if (scheme.weight is not None and scheme.weight.planes) or "-static" in text:
            raise ConfigError(
                f"--schemes: '{text}' is not searched over",
                "binary planes and static ranges come from passes of their own (split, calibrate)",
            )
    if all(scheme.is_none for scheme in schemes.values()):
        raise ConfigError("--schemes: expected at least one scheme that quantises")
    return list(schemes.values())


def search(
    source: Source,
    budget: Budget,
    schemes: Sequence[QuantScheme],
    target: Target,
    diagnostics: Diagnostics,
    *,
    calls: Sequence[Sample] = (),
    seed: int = 0,
    apply: bool = True,
    density: bool = False,
    progress: Progress = lambda items, description: items,
) -> SearchResult:
    """The best choice for ``source`` within ``budget``, and a recipe for it; see the module.

    Learns from ``calls``, by default the samples of the source. ``apply`` carries the recipe out.
    ``density`` then thins attention over frames out as far as the floor allows.
    """
    captured, _ = capture_source(source, diagnostics)
    check_weights(captured, progress)
    with sized_like(captured, source.samples[0].inputs):
        samples = spread(calls or source.samples, SAMPLES)
        job = Job(source.name, captured, samples, schemes, target, diagnostics, seed, progress)
        if density:
            check_attention(job)
        job.check_budget(budget)
        job.measure()
        chosen, applied = job.choose(budget, apply)
        dense, share, after = applied, None, []
        if density and applied is not None:
            found = thin_out(job, budget, chosen, applied)
            share, applied = found or (1.0, applied)
            after = [sparsify_text(share)] if found else []
        return SearchResult(
            source.name,
            str(target),
            budget,
            job.bytes_float,
            job.account.float_us,
            tuple(tuple(site.name for site in group) for group in job.groups),
            tuple(job.measured.gain[group[0].name] for group in job.groups),
            chosen,
            job.front(budget, chosen),
            job.recipe(chosen, job.about(budget, chosen, applied), after),
            len(job.probes),
            applied,
            () if applied is None else tuple(job.missed(budget, applied)),
            share,
            None if dense is None else dense.attention_us,
        )


__all__ = ["SCHEMES", "Applied", "Point", "SearchResult", "parse_schemes", "search"]
