"""What every way of compressing a group of peers would cost in error, measured on samples.

::

    error of a choice = Σ over groups of gain · local error        (relative, squared)
    local error       = |x̂·Ŵᵀ - x·Wᵀ|² / |x·Wᵀ|²                   on rows, both sides quantised
    gain              = error of the model's output / local error  this group alone quantised

Transforms are the passes themselves, run on copies of the graph; weights are computed one at a
time. A gain is measured once, at the scheme whose local error is nearest to -30 dB: where rounding
of the model's own dtype is negligible, and the model still responds in proportion. It is taken to
hold for the other ways of the group, and errors of groups are taken to be independent, so that
their squares add. Both are assumptions: ``search`` measures what it chose.

Error: InputError without samples, or where an input or output is NaN or infinite.
Source: Zhou et al., "Adaptive quantization for deep neural network", arXiv 1712.01048 (the noise of
layers reaches the output in proportion and adds up).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from vdqc.base import numerics
from vdqc.base.diagnostics import InputError
from vdqc.base.scheme import QuantScheme, QuantSpec
from vdqc.engine.pass_manager import Context, Pass, PassManager, probe_output
from vdqc.engine.rows import input_rows
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.peers import param_name, quantised_groups
from vdqc.ir.sample import Sample
from vdqc.ir.site import Site, note
from vdqc.passes.annotate import nearest_group
from vdqc.passes.rotate import Rotate
from vdqc.passes.smooth import Smooth
from vdqc.search.cost import Transforms, Way

#: Rows of a group's input that its local errors are measured on.
ROWS = 256
#: Local error at which a gain is measured.
PROBED_ERROR = 1e-3


@final
@dataclass(frozen=True)
class Measured:
    """What is known of every group, by the name of its first site.

    Attributes:
        local: local error of each way.
        gain: of the output; multiplied with a local error it is the error of the output.
        transforms: what the passes inserted to measure it.
    """

    local: Mapping[str, Mapping[Way, float]]
    gain: Mapping[str, float]
    transforms: Transforms


@torch.no_grad()
def measure(
    graph: Graph, ctx: Context, probes: Sequence[Sample], schemes: Sequence[QuantScheme]
) -> Measured:
    """Local errors on the samples of ``ctx``, gains on ``probes``; the graph stays as it is.

    ``graph`` is annotated; its groups are the linears that have a scheme.
    """
    groups = quantised_groups(graph)
    expected = input_rows(graph, ctx.samples, groups, ROWS, seed=ctx.seed, progress=ctx.progress)
    local: dict[str, dict[Way, float]] = {group[0].name: {} for group in groups}
    blocks: dict[str, int] = {}
    scales: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
    for passes in ((), (Smooth(),), (Rotate(),), (Rotate(), Smooth())):
        variant = graph if not passes else _transformed(graph, passes, ctx)
        rotated, smoothed = Rotate() in passes, Smooth() in passes
        own = quantised_groups(variant)
        rows = expected
        if passes:
            rows = input_rows(variant, ctx.samples, own, ROWS, seed=ctx.seed, progress=ctx.progress)
        for plain, group in ctx.progress(list(zip(groups, own, strict=True)), "local errors"):
            name, notes = group[0].name, note(group[0].node)
            if bool(notes.get("rotated")) != rotated or bool(notes.get("smoothed")) != smoothed:
                continue  # a pass left it alone: it is measured without that pass
            if rotated:
                blocks[name] = int(notes["rotated"])
            if smoothed:
                scales[rotated][name] = variant.param(param_name(group[0], "smooth"))
            usable = [s for s in schemes if s.input is not None or not smoothed]
            texts = legal(usable, group[0])
            found = _local_errors(graph, plain, expected[name], variant, group, rows[name], texts)
            local[name] |= {
                Way(text, rotated, smoothed): e for text, e in zip(texts, found, strict=True)
            }
    gain = _gains(graph, groups, probes, local, ctx)
    return Measured(local, gain, Transforms(blocks, scales[False], scales[True]))


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """``count`` samples, evenly over the timesteps that they name, or over their order."""
    order = sorted(range(len(samples)), key=lambda i: (samples[i].timestep or 0.0, i))
    count = min(count, len(order))
    picked = {order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)}
    return [samples[i] for i in sorted(picked)]


def outputs(graph: Graph, samples: Iterable[Sample]) -> list[Tensor]:
    """Everything that ``graph`` computes for each sample, as float64 vectors."""
    return [probe_output(graph, graph.signature.bind((), sample.inputs)) for sample in samples]


def mean_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Mean relative squared error: what ``vdqc check`` calls SQNR over all calls."""
    errors = [numerics.relative_error(a, e) ** 2 for a, e in zip(found, expected, strict=True)]
    return sum(errors) / len(errors)


def _transformed(graph: Graph, passes: Sequence[Pass], ctx: Context) -> Graph:
    twin = graph.clone()
    PassManager(passes, probe=False, start=Stage.ANNOTATED).run(
        twin, Context(ctx.samples, ctx.target, seed=ctx.seed, progress=ctx.progress)
    )
    return twin


def legal(schemes: Sequence[QuantScheme], site: Site) -> list[str]:
    """The schemes with groups that divide the width of ``site``, as ``annotate`` makes them."""
    width, found = int(site.weight.meta["val"].shape[-1]), []
    for scheme in schemes:
        wanted, text = scheme.weight.granularity.size if scheme.weight else 0, scheme.text
        if wanted and width % wanted:
            group = nearest_group(width, wanted)
            text = text.replace(f"-g{wanted}", f"-g{group}" if group else "")
        found.append(text)
    return list(dict.fromkeys(found))


def _local_errors(
    graph: Graph,
    plain: Sequence[Site],
    expected: Tensor,
    variant: Graph,
    group: Sequence[Site],
    rows: Tensor,
    schemes: Sequence[str],
) -> list[float]:
    """Local error of ``group`` of ``variant`` in each scheme, against ``plain`` of ``graph``."""
    noise, energy = [0.0] * len(schemes), 0.0
    for before, site in zip(plain, group, strict=True):
        wanted = expected @ graph.evaluate(before.weight).to(expected).T
        energy += float(wanted.double().square().sum())
        weight = variant.evaluate(site.weight).to(rows)
        for index, text in enumerate(schemes):
            scheme = QuantScheme.parse(text)
            found = nearest(rows, scheme.input) @ quantised_weight(weight, scheme).T
            noise[index] += float((found - wanted).double().square().sum())
    return [value / energy if energy > 0 else 0.0 for value in noise]


def quantised_weight(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """float[N, K] rounded to nearest as ``quant`` does; itself if the scheme leaves it."""
    spec = scheme.weight
    if spec is None:
        return weight
    return numerics.nearest(weight, spec, whole=scheme.input is not None)


def nearest(value: Tensor, spec: QuantSpec | None) -> Tensor:
    """``value`` rounded to nearest over its own range; itself without a spec."""
    return value if spec is None else numerics.nearest(value, spec)


def _gains(
    graph: Graph,
    groups: Sequence[Sequence[Site]],
    probes: Sequence[Sample],
    local: Mapping[str, Mapping[Way, float]],
    ctx: Context,
) -> dict[str, float]:
    expected = outputs(graph, probes)
    if not all(bool(value.isfinite().all()) for value in expected):
        raise InputError("the model's own output holds NaN or infinity", code="not-finite")
    gains = {}
    for group in ctx.progress(groups, "sensitivity"):
        plain = {way: e for way, e in local[group[0].name].items() if way == Way(way.scheme)}
        way = min(plain, key=lambda w: abs(math.log10(max(plain[w], 1e-30) / PROBED_ERROR)))
        probe = _Probe(graph, group, QuantScheme.parse(way.scheme))
        found = [probe.output(sample) for sample in probes]
        own = probe.noise / probe.energy if probe.energy > 0 else 0.0
        gains[group[0].name] = mean_error(found, expected) / own if own > 0 else 0.0
    return gains


@final
class _Probe:
    """Runs a graph with one group quantised; the graph is not edited.

    ``noise`` and ``energy`` are the sums of squares of what that changed, and of the group's
    products, over all runs.
    """

    def __init__(self, graph: Graph, group: Sequence[Site], scheme: QuantScheme) -> None:
        self._graph, self._scheme, self._input = graph, scheme, group[0].input
        self._sites: dict[fx.Node, tuple[Tensor, Tensor | None]] = {
            site.node: (
                quantised_weight(graph.evaluate(site.weight), scheme),
                None if site.bias is None else graph.evaluate(site.bias),
            )
            for site in group
        }
        self._value: Tensor | None = None
        self.noise = self.energy = 0.0

    def output(self, sample: Sample) -> Tensor:
        """Everything that the perturbed model computes, as one float64 vector."""
        inputs = self._graph.signature.bind((), sample.inputs)
        found = self._graph.run_inputs(inputs, self._look)
        self._value = None
        return torch.cat([v.double().flatten() for v in found if isinstance(v, Tensor)])

    def _look(self, node: fx.Node, value: Any) -> None:
        if node is self._input:
            self._value = nearest(value, self._scheme.input)
        if node not in self._sites:
            return
        assert self._value is not None
        weight, bias = self._sites[node]
        made = F.linear(self._value, weight, bias)
        plain = value.double() if bias is None else value.double() - bias.double()
        self.noise += float((made.double() - value.double()).square().sum())
        self.energy += float(plain.square().sum())
        value.copy_(made)  # a linear's output is a tensor of its own: what reads it sees the change
