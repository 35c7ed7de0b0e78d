"""The second search: of the sites that a pass changed, the one that breaks the check.

Programs have the first ``k`` of them as they are after the pass and the rest as they were before.
"""

from __future__ import annotations

import torch

from vdqc.base import numerics
from vdqc.bisect import words
from vdqc.bisect.mix import Mixer
from vdqc.bisect.results import Finding, Step
from vdqc.bisect.search import Outcome, Trials, first_failure, most_runs
from vdqc.ir.sample import Sample

#: By how much a site of an exact pass may move by itself: code flips of a lowered quantiser are
#: below it, rows in another order or scaled are above.
MOVED = 0.01


def search_sites(
    trials: Trials, before: Step, after: Step, good: Outcome, bad: Outcome, sample: Sample
) -> Finding:
    """The site that is to blame; ``good`` and ``bad`` are the outcomes of the two graphs."""
    mixer = Mixer(before.graph, after.graph)
    inputs = after.graph.signature.bind((), sample.inputs)
    if after.exact:
        dtype = getattr(torch, after.graph.origin.dtype)
        errors = mixer.join_coupled(inputs, max(MOVED, 5 * numerics.TOLERANCE[dtype]))
    else:
        errors = mixer.local_errors(inputs)
    sites, count = mixer.sites, len(mixer.sites)
    if not sites:
        return Finding("site", "", 0, 0, words.no_difference(after.text), good, bad)
    every, most = set(sites), most_runs(count)
    outcomes = {count: bad}
    with trials.counted(most, "bisect sites"):
        outcomes[0] = trials.run("site", f"no site of {count}", lambda: mixer.mix(every))
        if not outcomes[0].passed:
            text, runs = words.not_a_site(after.text, outcomes[0]), trials.runs("site")
            return Finding(
                "site", "", 0, count, text, good, outcomes[0], runs=runs, most=most, each=errors
            )

        def passes(index: int) -> bool:
            label = f"first {index} of {count} sites"
            outcomes[index] = trials.run("site", label, lambda: mixer.mix(sites[index:]))
            return outcomes[index].passed

        index = first_failure(count, passes)
        name = sites[index - 1]
        alone, without = outcomes[index], outcomes[index - 1]
        if index > 1:
            alone = trials.run("site", f"{name} alone", lambda: mixer.mix(every - {name}))
        if index < count:
            without = trials.run("site", f"all but {name}", lambda: mixer.mix({name}))
    text = words.culprit("site", name, index, count, alone, without, errors)
    if joined := mixer.joined(name):
        text += f" ({name} stands for {', '.join(joined)} too, whose output '{after.text}' moved)"
    ends = outcomes[index - 1], outcomes[index], alone, without
    return Finding("site", name, index, count, text, *ends, trials.runs("site"), most, errors)
