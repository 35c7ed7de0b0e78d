"""Pass and PassManager: what a rewrite declares, and the runner that holds it to that.

A pass is a frozen dataclass; its fields are its options, its text (``smooth{alpha=0.6}``) is its
cache key. The manager checks the order before a model is loaded, runs each pass, verifies the graph
against its stage, and measures on a probe sample what the pass did to the output: nothing, if it is
``exact``.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, final

import torch
from torch import Tensor, fx

from vdqc.base import numerics
from vdqc.base.diagnostics import (
    Diagnostics,
    InputError,
    OrderError,
    VdqcError,
    VerifyError,
    nearest,
)
from vdqc.base.options import check_seed, option_text
from vdqc.base.scheme import QuantScheme
from vdqc.base.target import TARGETS, Target
from vdqc.engine.calibrate import ActivationStats, activation_stats
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.learned import frozen
from vdqc.ir.names import globs_of, module_path, selects, source_line
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind
from vdqc.ir.verifier import verify

#: Options of passes that are globs of sites.
_GLOBS = ("select", "dense")


@final
@dataclass(frozen=True)
class Rule:
    """Sites matching the glob ``select`` get ``scheme``; the last matching rule wins."""

    select: str
    scheme: QuantScheme

    def __str__(self) -> str:
        return f"{self.select}={self.scheme}"


@final
@dataclass
class Context:
    """What passes share besides the graph.

    Attributes:
        samples: calls to learn from.
        target: the machine the program is for.
        diagnostics: where passes say what they did and did not do.
        rules: which sites get which scheme.
        seed: of every random choice.
        progress: wraps an iterable with a bar; ``(iterable, description) -> iterable``.
        teacher: the graph as it was before the first lossy pass, while a pass that asks for it is
            still to come; its parameters do not change with those of the graph.
        trail: texts of the passes that ran.
        probe: the call that every pass is measured on; the first sample unless given.
    """

    samples: Sequence[Sample] = ()
    target: Target = TARGETS["cpu"]
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    rules: Sequence[Rule] = ()
    seed: int = 0
    progress: Callable[[Any, str], Any] = lambda items, description: items
    teacher: Graph | None = None
    trail: list[str] = field(default_factory=list)
    probe: Sample | None = None
    _stats: tuple[int, int, ActivationStats] | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed, "seed")

    def use(self, samples: Sequence[Sample]) -> None:
        """Learn from other samples from here on; the probe stays."""
        self.probe = self.probe or (self.samples[0] if self.samples else None)
        self.samples, self._stats = samples, None

    def probe_inputs(self, graph: Graph) -> list[Any]:
        """The probe as the inputs of ``graph``."""
        return graph.signature.bind((), (self.probe or self.samples[0]).inputs)

    def stats(self, graph: Graph) -> ActivationStats:
        """Activation statistics of the graph as it is now; measured once per version."""
        key = (id(graph), graph.version)
        if self._stats is None or self._stats[:2] != key:
            self._stats = (*key, activation_stats(graph, self.samples, progress=self.progress))
        return self._stats[2]


@final
@dataclass(frozen=True)
class PassResult:
    """What a pass reports: how many places it rewrote, and numbers for the report."""

    rewrites: int
    facts: dict[str, Any] = field(default_factory=dict)


class Pass(abc.ABC):
    """Base of every pass; subclasses are ``@final @dataclass(frozen=True)``.

    ``at`` are the stages it runs at, ``to`` the stage it leaves the graph at (None: unchanged),
    ``exact`` promises that the function computed stays the same.
    """

    name: ClassVar[str]
    at: ClassVar[frozenset[Stage]]
    to: ClassVar[Stage | None] = None
    exact: ClassVar[bool]
    #: True for a pass that compares with the float graph, ``Context.teacher``.
    wants_teacher: ClassVar[bool] = False
    #: True for a pass that trains what those before it left free.
    trains: ClassVar[bool] = False
    #: The kind of site that its option ``select`` names.
    takes: ClassVar[SiteKind] = SiteKind.LINEAR

    @abc.abstractmethod
    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite ``graph`` in place."""

    def refusal(self, graph: Graph, ctx: Context) -> VdqcError | None:
        """What will stop this pass, if the annotated graph tells: asked before others run."""
        return None

    def planned(self) -> Pass | None:
        """What stands in for this pass before anything is computed from weights or samples.

        None where neither the kernels of sites nor what runs between them depend on it.
        """
        return None

    def undecided(self) -> str:
        """What of bytes and kernels only weights and samples decide, in a few words; "" if nothing.

        A plan takes it as the schemes of sites say.
        """
        return ""

    def leaves_free(self) -> Sequence[str]:
        """The options, as ``learn=true``, that leave something for a later pass to train."""
        return ()

    def forwards(self) -> float:
        """Forward passes of the whole model for each sample that it takes; a backward is two."""
        return 0.0

    def __str__(self) -> str:
        """``name{option=value,...}`` with the options that differ from their defaults."""
        options = [
            f"{f.name}={option_text(getattr(self, f.name))}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


@final
@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one graph.

    ``error`` is the relative RMS change of the probe output by this pass, ``sqnr_db`` the fidelity
    of the graph so far against the float model; both None where nothing was probed.
    """

    text: str
    exact: bool
    stage: Stage
    seconds: float
    rewrites: int
    error: float | None = None
    sqnr_db: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Instrument(Protocol):
    """Called around each pass; it reads the graph and must not edit it."""

    def before_pass(self, text: str, graph: Graph) -> None:
        """Before ``text`` runs."""

    def after_pass(self, record: PassRecord, graph: Graph) -> None:
        """After it was verified."""


def check_order(passes: Sequence[Pass], start: Stage = Stage.CAPTURED) -> Stage:
    """The stage that ``passes`` lead to; raises OrderError naming the first that cannot run."""
    stage = start
    for index, item in enumerate(passes):
        if stage not in item.at:
            wanted = " or ".join(str(s) for s in sorted(item.at))
            before = ", ".join(p.name for p in passes[:index]) or "no pass"
            raise OrderError(
                f"'{item.name}' runs at {wanted}, "
                f"but the passes before it leave the graph at {stage}",
                f"before it: {before}",
                _advice(item, stage),
            )
        stage = item.to if item.to is not None else stage
    return stage


def check_passes(passes: Sequence[Pass], graph: Graph, ctx: Context) -> None:
    """Raise what will stop one of ``passes``, all to come, as far as the annotated graph tells."""
    for item in passes:
        refusal = item.refusal(graph, ctx)
        if refusal is not None:
            refusal.add_note(f"said by '{item}' before any pass behind annotate ran")
            raise refusal


def tell_of_untrained(passes: Sequence[Pass], diagnostics: Diagnostics) -> None:
    """Warn of options that leave free what no pass behind them trains."""
    last = max((index for index, item in enumerate(passes) if item.trains), default=-1)
    if left := [f"{p.name}{{{option}}}" for p in passes[last + 1 :] for option in p.leaves_free()]:
        diagnostics.warning(
            "",
            "learned-untrained",
            f"nothing trains what is left free by {', '.join(left)}: it stays where it starts",
            "put distill behind, or leave the option out (of split: learn=false)",
        )


def _advice(item: Pass, stage: Stage) -> str:
    if stage > max(item.at):
        return f"put '{item.name}' earlier: nothing takes a graph back"
    return f"put a pass that leads to {min(item.at)} before it"


@final
class PassManager:
    """Runs passes in order. Raises OrderError when built from passes in an impossible order."""

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        probe: bool = True,
        instruments: Sequence[Instrument] = (),
        start: Stage = Stage.CAPTURED,
    ) -> None:
        self.passes = tuple(passes)
        self.final_stage = check_order(passes, start)
        self.probe = probe
        self.instruments = tuple(instruments)
        self.probed: tuple[Tensor, Tensor] | None = None  # float and final output of the last run

    @torch.no_grad()
    def run(self, graph: Graph, ctx: Context) -> list[PassRecord]:
        """Rewrite ``graph`` by every pass; raises VerifyError where one breaks its promise."""
        inputs = self._probe_inputs(graph, ctx)
        original = _float_output(graph, inputs) if inputs is not None else None
        before = original
        records, checked = [], False
        for index, item in enumerate(self.passes):
            if not checked and graph.stage is Stage.ANNOTATED:
                check_passes(self.passes[index:], graph, ctx)
                checked = True
            lossless = ctx.teacher is None and graph.stage < Stage.COMPRESSED
            if lossless and not item.exact and _wants_teacher(self.passes[index:]):
                ctx.teacher = frozen(graph)
            for instrument in self.instruments:
                instrument.before_pass(str(item), graph)
            start = time.perf_counter()
            result = self._apply(item, graph, ctx)
            seconds = time.perf_counter() - start
            ctx.trail.append(str(item))
            if not _wants_teacher(self.passes[index + 1 :]):
                ctx.teacher = None
            verify(graph)
            error = sqnr = None
            if inputs is not None and before is not None and original is not None:
                after = probe_output(graph, inputs) if result.rewrites else before
                error = numerics.relative_error(after, before)
                sqnr = numerics.sqnr_db(after, original)
                _check_probe(item, graph, after, error)
                before = after
            record = PassRecord(
                str(item),
                item.exact,
                graph.stage,
                seconds,
                result.rewrites,
                error,
                sqnr,
                result.facts,
            )
            records.append(record)
            for instrument in self.instruments:
                instrument.after_pass(record, graph)
        if original is not None and before is not None:
            self.probed = original, before
        return records

    def _probe_inputs(self, graph: Graph, ctx: Context) -> list[Any] | None:
        if not self.probe or not ctx.samples:
            return None
        return ctx.probe_inputs(graph)

    def _apply(self, item: Pass, graph: Graph, ctx: Context) -> PassResult:
        _tell_of_unused_globs(item, graph, ctx)
        try:
            with graph.edited_by(str(item)):
                result = item.run(graph, ctx)
        except VdqcError as error:
            error.add_note(f"while '{item}' ran")
            raise
        graph.stage = item.to if item.to is not None else graph.stage
        graph.clean()
        return result


def _tell_of_unused_globs(item: Pass, graph: Graph, ctx: Context) -> None:
    """Warn of globs among the options of ``item`` that match no site: names that were misspelt."""
    names = [site.name for site in graph.sites(kind=item.takes)]
    for option in _GLOBS:
        for glob in filter(None, globs_of(str(getattr(item, option, "")))):
            if names and not any(selects(glob, name) for name in names):
                ctx.diagnostics.warning(
                    "",
                    "glob-unused",
                    f"{item.name}.{option}: '{glob}' matches no {item.takes} site",
                    nearest(glob, names),
                )


def _wants_teacher(passes: Sequence[Pass]) -> bool:
    return any(item.wants_teacher for item in passes)


def probe_output(graph: Graph, inputs: Sequence[Any]) -> Tensor:
    """Every output of one call, as one float64 vector."""
    outputs = [value for value in graph.run_inputs(inputs) if isinstance(value, Tensor)]
    return torch.cat([value.detach().double().flatten() for value in outputs])


def _float_output(graph: Graph, inputs: Sequence[Any]) -> Tensor:
    """The captured model's output; raises InputError naming the first node that is not finite."""
    output = probe_output(graph, inputs)
    if bool(torch.isfinite(output).all()):
        return output

    def observe(node: fx.Node, value: Any) -> None:
        is_activation = isinstance(value, Tensor) and not graph.is_constant(node)
        # -inf is how attention masks say "never": only NaN and what reaches a site is a fault
        if is_activation and bool(torch.isnan(value).any()):
            line = source_line(node)
            raise InputError(
                f"the model's own output holds NaN or infinity; NaN first at %{node.name}",
                *([line] if line else []),
                "expected finite activations: check the sample and the weights",
                code="not-finite",
                site=module_path(node),
            )

    graph.run_inputs(inputs, observe)
    raise InputError(
        "the model's own output holds infinity",
        "expected finite activations: check the sample and the weights",
        code="not-finite",
    )


def _check_probe(item: Pass, graph: Graph, after: Tensor, error: float) -> None:
    if not bool(torch.isfinite(after).all()):
        raise VerifyError(
            f"after '{item}' the probe output holds NaN or infinity", code="not-finite"
        )
    allowed = numerics.TOLERANCE[getattr(torch, graph.origin.dtype)]
    if item.exact and error > allowed:
        raise VerifyError(
            f"'{item}' is exact, yet moved the probe output by {error:.2e} (allowed {allowed:.0e})",
            "run the passes one by one to see where: vdqc bisect",
            code="not-exact",
        )
