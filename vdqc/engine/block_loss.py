"""The loss of one piece on one sample: student against teacher, by the terms that fit the piece.

Taps of the teacher are computed again in each step instead of being kept: a query and a key of a
long video are larger than all that the cache holds of a block.

Error: InputError [loss-misfit] for a term that no piece can use; see ``losses.total`` for values
that are not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import InputError
from vdqc.engine.block_cache import ActivationCache
from vdqc.engine.block_module import BlockModule, Cuts, Piece, attention_nodes, quantised_pieces
from vdqc.engine.frames import FrameMap, site_frames, sizes_of
from vdqc.engine.losses import AttentionSite, LossContext, LossTerm, Terms, total
from vdqc.engine.pass_manager import Context
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import note


@final
@dataclass(frozen=True)
class Call:
    """What a loss must know of a sample without reading it again.

    Attributes:
        place: the sample without its inputs: where it stands on its trajectory.
        sizes: of the call's axes, by symbol.
        lane: of those that samples are dealt into; terms remember within one.
    """

    place: Sample
    sizes: Mapping[str, int]
    lane: int


@final
class PieceLoss:
    """``loss(sample)``: the weighted sum and its parts.

    Attributes:
        weights: what ``auto`` weights found at the first call.
    """

    def __init__(
        self,
        piece: Piece,
        terms: Terms,
        student: Cuts,
        teacher: Cuts,
        cache: ActivationCache,
        own_cache: ActivationCache,
        calls: Mapping[int, Call],
    ) -> None:
        self.piece, self.terms, self.student = piece, terms, student
        self.cache, self.own_cache, self.calls = cache, own_cache, calls
        self.taps = sorted({kind for _, term in terms for kind in term.taps})
        self.weights: dict[str, float] = {}
        self._states: dict[int, dict[str, Tensor]] = {}  # by lane
        self.module = self._student(piece.free)
        self.attention = attention_nodes(teacher, piece.teacher_reads, piece.makes)
        self.teacher: BlockModule | None = None
        if self.taps:
            self.teacher = BlockModule(
                teacher, piece.teacher_reads, piece.makes, taps=self.taps, only_taps=True
            )

    @property
    def remembers(self) -> bool:
        """True if a term asks for the samples of a trajectory in order."""
        return any(term.ordered for _, term in self.terms)

    def __call__(self, sample: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one sample, differentiable in the piece's parameters."""
        return self._loss(self.module, sample, self._states)

    @torch.no_grad()
    def evaluate(self, samples: Sequence[int]) -> tuple[float, dict[str, float], int]:
        """Sums over ``samples`` of the loss and of its parts, and how many there were.

        The weights are quantised once. Terms with a memory work on a copy of it.
        """
        module = self._student(())
        remembering = any(term.remembers for _, term in self.terms)
        states = self._states
        if remembering:
            states = {lane: dict(state) for lane, state in states.items()}
        whole, parts = 0.0, dict.fromkeys((str(term) for _, term in self.terms), 0.0)
        for sample in samples:
            loss, found = self._loss(module, sample, states)
            whole += float(loss)
            for name, value in found.items():
                parts[name] += value
        module.release()
        return whole, parts, len(samples)

    def release(self) -> None:
        """Let go of the piece's weights."""
        self.module.release()
        if self.teacher is not None:
            self.teacher.release()

    def _student(self, trainable: Sequence[str]) -> BlockModule:
        piece = self.piece
        return BlockModule(self.student, piece.student_reads, piece.makes, trainable, self.taps)

    def _loss(
        self, module: BlockModule, sample: int, states: dict[int, dict[str, Tensor]]
    ) -> tuple[Tensor, dict[str, float]]:
        made, taps = module({key: self.own_cache.get(sample, key) for key in module.reads})
        wanted = {key: self.cache.get(sample, key) for key in self.piece.makes}
        fp_taps: dict[str, Tensor] = {}
        if self.teacher is not None:
            with torch.no_grad():
                reads = {key: self.cache.get(sample, key) for key in self.teacher.reads}
                fp_taps = self.teacher(reads)[1]
        main, *rest = output_order(wanted)
        call = self.calls[sample]
        sites = attention_sites(self.attention, call.sizes)
        ctx = LossContext(
            block=self.piece.name,
            sample=sample,
            timestep=call.place.timestep,
            fp_out=wanted[main],
            q_out=made[main],
            fp_taps=fp_taps,
            q_taps=taps,
            frames=output_frames(sites, wanted[main]),
            state=states.setdefault(call.lane, {}),
            weights=self.weights,
            attention=sites,
            fp_rest=tuple(wanted[key] for key in rest),
            q_rest=tuple(made[key] for key in rest),
            trajectory=call.place.trajectory,
            step=call.place.step,
            branch=call.place.branch,
        )
        return total(self.terms, ctx)


def fitting_terms(
    terms: Terms, pieces: Sequence[Piece], teacher: Cuts, ctx: Context, whole_model: bool
) -> dict[str, Terms]:
    """Which terms each piece is trained by, a remark for each that does not fit.

    Raises InputError for a term that fits no piece.
    """
    trained = [piece for piece in pieces if piece.free]
    last = (
        next((p.name for p in reversed(trained) if p.is_block), trained[-1].name) if trained else ""
    )
    outputs = _example_outputs(teacher, trained, ctx)
    found: dict[str, list[tuple[float | str, LossTerm]]] = {piece.name: [] for piece in pieces}
    for weight, term in terms:
        reasons = []
        for piece in trained:
            reason = _level(term, piece.name == last, whole_model)
            if not reason:
                sites, out = outputs[piece.name]
                reason = term.misfit(sites, output_frames(sites, out), out)
                if reason and piece.is_block:
                    ctx.diagnostics.remark(piece.name, "loss-misfit", f"'{term}': {reason}")
            if reason:
                reasons.append(reason)
            else:
                found[piece.name].append((weight, term))
        if trained and len(reasons) == len(trained):
            raise _fits_none(term, reasons[-1])
    return dict(found)


def misfit(terms: Terms, graph: Graph, ctx: Context, whole_model: bool) -> InputError | None:
    """A term that no piece of an annotated graph can use, whatever will be free: the error that
    ``fitting_terms`` would raise behind all passes, from the example's shapes alone.
    """
    if not ctx.samples:
        return None
    cuts, sizes = Cuts(graph), sizes_of(graph.signature, ctx.probe_inputs(graph))
    outputs = []
    for piece in quantised_pieces(graph, whole_model):
        nodes = attention_nodes(cuts, piece.teacher_reads, piece.makes)
        values = {key: _as_captured(cuts.nodes[key].meta["val"]) for key in piece.makes}
        outputs.append((attention_sites(nodes, sizes), values[output_order(values)[0]]))
    for _, term in terms:
        reasons = [
            _level(term, True, whole_model) or term.misfit(sites, output_frames(sites, out), out)
            for sites, out in outputs
        ]
        if reasons and all(reasons):
            return _fits_none(term, reasons[-1])
    return None


def _as_captured(value: Any) -> Any:
    """A tensor of the example's sizes without data."""
    if not isinstance(value, Tensor):
        return value
    sizes = [size if isinstance(size, int) else int(size.node.hint) for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device="meta")


def _fits_none(term: LossTerm, reason: str) -> InputError:
    return InputError(
        f"loss term '{term}' fits no block: {reason}",
        "leave it out, or train another part of the model",
        code="loss-misfit",
    )


def _level(term: LossTerm, is_last: bool, whole_model: bool) -> str:
    if whole_model or term.level == "block" or (term.level == "last" and is_last):
        return ""
    if term.level == "last":
        return "it is for the last block"
    return "it is for end-to-end training: distill{mode=model}"


def _example_outputs(
    teacher: Cuts, pieces: Sequence[Piece], ctx: Context
) -> dict[str, tuple[dict[str, AttentionSite], Tensor]]:
    """Attention sites and the main output, without its data, of each piece on the first sample."""
    graph = teacher.graph
    inputs = graph.signature.bind((), ctx.samples[0].inputs)
    wanted = {teacher.nodes[key]: key for piece in pieces for key in piece.makes}
    seen: dict[str, Any] = {}

    def look(node: fx.Node, value: Any) -> None:
        if node in wanted:
            seen[wanted[node]] = value.to("meta") if isinstance(value, Tensor) else value

    with torch.no_grad():
        graph.run_inputs(inputs, look)
    sizes = sizes_of(graph.signature, inputs)
    found = {}
    for piece in pieces:
        nodes = attention_nodes(teacher, piece.teacher_reads, piece.makes)
        main, *_ = output_order({key: seen[key] for key in piece.makes})
        found[piece.name] = attention_sites(nodes, sizes), seen[main]
    return found


def output_order(values: Mapping[str, Any]) -> list[str]:
    """Keys of the float tensors among ``values``, the largest first: it is the video stream."""
    floats = [k for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()]
    return sorted(floats, key=lambda key: -values[key].numel())


def attention_sites(nodes: Sequence[fx.Node], sizes: Mapping[str, int]) -> dict[str, AttentionSite]:
    """What terms must know of attention nodes, for a call with these sizes."""
    found = {}
    for node in nodes:
        entries = note(node)
        tokens = entries.get("tokens", {})
        scale = node.kwargs.get("scale")
        found[str(entries["site"])] = AttentionSite(
            scale=float(scale) if isinstance(scale, (int, float)) else None,
            cross=bool(entries.get("cross", False)),
            extent=str(tokens.get("extent", "other")),
            frames=site_frames(tokens, sizes),
        )
    return found


def output_frames(sites: Mapping[str, AttentionSite], out: Tensor) -> FrameMap | None:
    """The frame of each token of an output: that of an attention over as many tokens."""
    if out.ndim != 3:
        return None
    maps = [site.frames for site in sites.values() if site.frames is not None]
    return next((frames for frames in maps if frames.tokens == out.shape[1]), None)
