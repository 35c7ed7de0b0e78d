"""Block-wise reconstruction: train what passes left free against the float model, piece by piece.

For each piece (``block_module``), in order: the teacher computes the piece's outputs from its own
inputs, both cached; AdamW trains the piece's free parameters so that the student makes the same;
the best state seen stays. The next piece starts from the teacher's outputs (``inputs=float``) or
from what the trained student makes (``inputs=quantised``).

Error: InputError [loss-not-finite] or [gradient-not-finite] naming piece and term or parameter; the
graph then holds the last good state. With a checkpoint a killed run goes on at the piece it was in.
Source: Li et al., BRECQ, arXiv 2102.05426, section 3.3 (block by block); Sun et al., FlatQuant,
arXiv 2410.09426, section 3.4, and QuantVGGT, arXiv 2509.21302 (AdamW, cosine, float inputs).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch

from vdqc.base.diagnostics import InputError
from vdqc.engine.block_cache import ActivationCache
from vdqc.engine.block_loss import Call, PieceLoss, fitting_terms
from vdqc.engine.block_module import BlockModule, Cuts, Piece, opened, plan_blocks, plan_model
from vdqc.engine.block_trainer import Schedule, train
from vdqc.engine.checkpoint import Checkpoint, Saved, run_key
from vdqc.engine.distributed import Workers, workers
from vdqc.engine.frames import sizes_of
from vdqc.engine.losses import Terms
from vdqc.engine.pass_manager import Context
from vdqc.ir.graph import Graph


@final
@dataclass(frozen=True)
class Training:
    """How to train; see ``passes/distill.py`` for what each means to a user.

    Attributes:
        text: what, besides samples, weights and earlier passes, decides the result.
        memory: bytes of cached values before they go to disk.
        checkpoint: folder for finished pieces, None for none.
    """

    terms: Terms
    schedule: Schedule
    text: str = ""
    whole_model: bool = False
    quantised_inputs: bool = False
    memory: int = 2 * 2**30
    checkpoint: Path | None = None


@final
@dataclass(frozen=True)
class PieceResult:
    """What training did to one piece: losses on all samples, before and after."""

    name: str
    parameters: int
    start: float
    best: float
    epochs: int
    seconds: float
    resumed: bool = False
    terms: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "parameters": self.parameters,
            "start": self.start,
            "best": self.best,
            "epochs": self.epochs,
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
            "terms": dict(self.terms),
        }


def reconstruct(graph: Graph, ctx: Context, training: Training) -> list[PieceResult]:
    """Train the free parameters of ``graph`` in place; one result per piece that had any.

    Parameters stay free: the caller decides when they settle. Raises InputError for no samples.
    """
    if not ctx.samples:
        raise InputError("expected samples to train on, got none", "give samples()")
    teacher = ctx.teacher
    if teacher is None:
        teacher = opened(graph)
        ctx.diagnostics.remark(
            "", "no-teacher", "no float graph was kept: the graph without quantisers teaches"
        )
    pieces = plan(graph, teacher, training.whole_model, ctx)
    with workers() as group, torch.enable_grad():
        return _Run(graph, teacher, pieces, ctx, training, group).results()


def plan(graph: Graph, teacher: Graph, whole_model: bool, ctx: Context) -> list[Piece]:
    """The pieces to train; the whole model as one where it is asked for or has no blocks."""
    pieces = [] if whole_model else plan_blocks(graph, teacher)
    if not whole_model and not pieces and graph.free:
        ctx.diagnostics.remark(
            "",
            "no-blocks",
            "the model has no repeated blocks with something to train: it is trained as one block",
            "cached values and gradients are then those of the whole model",
        )
    if not pieces:
        pieces = plan_model(graph, teacher)
    left = graph.free - {name for piece in pieces for name in piece.free}
    if left:
        ctx.diagnostics.remark(
            "",
            "untrained",
            f"{len(left)} free parameters are read by several blocks or by none: they keep their "
            "start",
            *sorted(left)[:3],
            "distill{mode=model} trains them",
        )
    return pieces


@final
class _Run:
    """One call of ``reconstruct``: caches, checkpoint, progress."""

    def __init__(
        self,
        graph: Graph,
        teacher: Graph,
        pieces: Sequence[Piece],
        ctx: Context,
        training: Training,
        group: Workers,
    ) -> None:
        self.graph, self.ctx, self.training, self.group = graph, ctx, training, group
        self.pieces = pieces
        self.student_cuts, self.teacher_cuts = Cuts(graph), Cuts(teacher)
        ordered = any(term.ordered for _, term in training.terms)
        schedule = training.schedule.for_workers(group, ctx.diagnostics)
        self.schedule = schedule = replace(schedule, ordered=ordered)
        self.mine = schedule.shard(len(ctx.samples), group)
        self.checkpoint = self._checkpoint()
        self.cache = ActivationCache(training.memory, self.checkpoint.folder)
        self.own_cache = self.cache
        if training.quantised_inputs:
            self.own_cache = ActivationCache(training.memory, self.checkpoint.folder)
        self.calls: dict[int, Call] = {}

    def results(self) -> list[PieceResult]:
        """Train every piece in order."""
        self._feed()
        terms = fitting_terms(
            self.training.terms, self.pieces, self.teacher_cuts, self.ctx, self.training.whole_model
        )
        found = []
        trained = [piece for piece in self.pieces if piece.free]
        steps = self.schedule.steps(len(self.ctx.samples))
        bar = iter(self.ctx.progress(range(steps * len(trained)), "distill"))
        for index, piece in enumerate(self.pieces):
            self._teach(piece)
            if piece.free and terms[piece.name]:
                ticks = _Ticks(bar, steps)
                found.append(self._train(index, piece, terms[piece.name], ticks))
                ticks.finish()
            self._advance(index, piece)
        next(bar, None)  # a bar closes when its iterable ends
        return found

    def _feed(self) -> None:
        lanes = self.schedule.lanes(len(self.ctx.samples))
        lane_of = {sample: lane for lane, samples in enumerate(lanes) for sample in samples}
        for sample in self.mine:
            call = self.ctx.samples[sample]  # read once: a pool keeps its calls on disk
            inputs = self.graph.signature.bind((), call.inputs)
            sizes = sizes_of(self.graph.signature, inputs)
            self.calls[sample] = Call(replace(call, inputs={}), sizes, lane_of[sample])
            for node, value in zip(self.graph.inputs, inputs, strict=True):
                self.cache.put(sample, node.name, value)
                if self.own_cache is not self.cache:
                    self.own_cache.put(sample, node.name, value)

    @torch.no_grad()
    def _teach(self, piece: Piece) -> None:
        module = BlockModule(self.teacher_cuts, piece.teacher_reads, piece.makes)
        for sample in self.mine:
            made, _ = module({key: self.cache.get(sample, key) for key in module.reads})
            for key, value in made.items():
                self.cache.put(sample, key, value)
        module.release()

    @torch.no_grad()
    def _advance(self, index: int, piece: Piece) -> None:
        """Let go of what no later piece reads; compute what the student hands on."""
        later = self.pieces[index + 1 :]
        needed = set().union(*(p.reads for p in later), *(p.makes for p in later))
        if self.own_cache is not self.cache and later:
            module = BlockModule(self.student_cuts, piece.student_reads, piece.makes)
            for sample in self.mine:
                made, _ = module({key: self.own_cache.get(sample, key) for key in module.reads})
                for key, value in made.items():
                    self.own_cache.put(sample, key, value)
            module.release()
            self.own_cache.keep_only(needed)
        self.cache.keep_only(needed)

    def _train(self, index: int, piece: Piece, terms: Terms, ticks: _Ticks) -> PieceResult:
        start = time.perf_counter()
        params = {name: self._parameter(name) for name in piece.free}
        count = sum(value.numel() for value in params.values())
        saved = self.group.share(self.checkpoint.load(index, piece.name, self.ctx.diagnostics))
        if saved is not None and saved.params.keys() == params.keys():
            with torch.no_grad():
                for name, value in saved.params.items():
                    params[name].copy_(value)
            return PieceResult(piece.name, count, resumed=True, **saved.facts)
        loss = PieceLoss(
            piece,
            terms,
            self.student_cuts,
            self.teacher_cuts,
            self.cache,
            self.own_cache,
            self.calls,
        )
        try:
            total = len(self.ctx.samples)
            outcome = train(params, loss, self.schedule, total, self.group, ticks.step)
        except InputError as error:
            self._keep_last_good(index, piece, params, error)
            raise
        finally:
            loss.release()
        facts: dict[str, Any] = {
            "start": outcome.start,
            "best": outcome.best,
            "epochs": outcome.epochs,
            "seconds": time.perf_counter() - start,
            "terms": outcome.terms,
        }
        if self.group.is_first:
            self.checkpoint.save(index, piece.name, Saved(params, facts))
        self.group.wait()
        return PieceResult(piece.name, count, **facts)

    def _keep_last_good(
        self, index: int, piece: Piece, params: Mapping[str, torch.nn.Parameter], error: InputError
    ) -> None:
        error.add_note("the graph keeps the best state before that; try smaller rates")
        if self.group.is_first:
            saved = Saved(params, {"error": str(error)})
            file = self.checkpoint.save(index, piece.name, saved, good=False)
            if file is not None:
                error.add_note(f"that state is in {file}")

    def _parameter(self, name: str) -> torch.nn.Parameter:
        value = self.graph.param(name)
        assert isinstance(value, torch.nn.Parameter)
        return value

    def _checkpoint(self) -> Checkpoint:
        folder = self.training.checkpoint
        if folder is None:
            return Checkpoint(None)
        # the program's own text holds the schemes, which are in the text of no pass
        texts = [*self.ctx.trail, self.training.text, f"seed {self.ctx.seed}", str(self.graph)]
        texts.append(f"batch {self.schedule.batch}")  # grows with the workers
        place = folder / run_key(self.graph, self.ctx.samples, texts)
        place.mkdir(parents=True, exist_ok=True)
        return Checkpoint(place)


@final
class _Ticks:
    """One piece's share of the progress bar; early stops skip the rest of it."""

    def __init__(self, bar: Iterator[Any], steps: int) -> None:
        self.bar, self.left = bar, steps

    def step(self) -> None:
        """One optimiser step is done."""
        self.left -= 1
        next(self.bar, None)

    def finish(self) -> None:
        """No more steps."""
        while self.left > 0:
            self.step()
