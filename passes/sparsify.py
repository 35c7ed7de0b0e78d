"""Lets every query block of a video's self-attention see only the key blocks that matter to it.

::

    aten.scaled_dot_product_attention(%q, %k, %v)  ->
    vdqc.sparse_attention(%q, %k, %v, @heads, %dense, [F, S, text, first, W], 'svg{density=0.25}',
                          scale)

Frames, tokens of a frame and text come from the graph's own sizes, so that another resolution or
length gets its mask from the policy. ``svg`` gives each head a band in the order of frames or in
the order of pixels: ``heads=calibrated`` decides on the samples, ``online`` in every call. The
order that makes blocks of a head's pattern is part of the op, and undone in it.
``budget=calibrated`` spends one density of the whole model where it saves most error: heads get
levels from half to four times of it. Cross-attention, attention with a mask of its own, and what
has no frames stay dense, and say so; text tokens see and are seen by everything. A mask that only
says which text is padding becomes an operand, ``%valid`` bool[B, T].

``scores=int8`` computes q·kᵀ from codes of 8 bits, one scale a token; on a GPU the integer kernel
does. The mean of the keys is subtracted first: softmax does not see it, and channels that are large
in all keys do not widen their scales. It loses precision, so it goes behind ``quant``.

``dense`` is a glob of sites that stay dense, ``dense_steps`` the share of steps, from the noisy
end, in which everything attends to everything: the samples say which timesteps those are.

Source: Xi et al., Sparse VideoGen, arXiv 2502.01776, sections 4.1 and 4.2 (heads), 5.1 (dense
steps); Zhang et al., Sliding Tile Attention, arXiv 2502.04507; Zhang et al., Jenga, arXiv
2505.16864 (mass); Li et al., Radial Attention, arXiv 2506.19852; Zhang et al., SageAttention,
arXiv 2410.02367, section 4.2 (int8 scores, smoothed keys). Budgets over heads: ours.
Invariant: at density 1 and with scores in float the function of the graph is unchanged. Masks keep
to the density, but for what ``mass`` and blocks that are always on take beyond it; a call too small
for its density attends to everything, with a warning.
Online: the gathers that reorder tokens; for ``heads=online`` 64 queries of dense attention, for
``topk`` and ``mass`` the means of blocks.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from vdqc.base import video_mask
from vdqc.base.block_mask import blocks
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.mask_budget import SitePlan, assign, head_errors
from vdqc.base.sparsity import MASKS, MaskPolicy
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.engine.video_attention import LAYOUT, layouts, obstacle, padding
from vdqc.ir.analysis.key_masks import KeyMask
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.names import selects
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.site import Site, SiteKind, note, set_note
from vdqc.ir.size_nodes import SizeNodes, timestep_input
from vdqc.ir.sparse_ops import SPARSE_ATTENTION

aten = torch.ops.aten
#: Levels of a calibrated budget, as multiples of the density.
LEVELS = (0.5, 1.0, 2.0, 4.0)
_SCORES = "int8/token/dynamic"
#: What to do where shapes do not tell frames.
_VARY = "only an axis whose size varies is known for frames: let two samples differ in theirs"


class Heads(enum.StrEnum):
    """When a head's mask is decided."""

    CALIBRATED = "calibrated"
    ONLINE = "online"


class Budget(enum.StrEnum):
    """How the density is spread."""

    UNIFORM = "uniform"
    CALIBRATED = "calibrated"


class Scores(enum.StrEnum):
    """What the products of queries and keys are computed from."""

    FLOAT = "float"
    INT8 = "int8"


@final
@dataclass(frozen=True)
class Sparsify(Pass):
    """Makes self-attention over frames block-sparse.

    Attributes:
        policy: ``svg``, ``spatial``, ``temporal``, ``tile``, ``radial``, ``topk`` or ``mass``.
        density: share of the block pairs that are computed; of ``mass`` the least.
        heads: ``calibrated`` or ``online``, for policies with several masks.
        budget: ``uniform``, or ``calibrated`` over all layers and heads.
        block: tokens of a block: 64 or 128 where a GPU is to run it.
        sinks: leading frames that every query attends to (SVG uses 1 where text is not joined in).
        mass: probability that ``mass`` reaches, 0.6 if not given.
        scores: ``float``, or ``int8`` from codes of queries and keys.
        dense: glob of sites that stay dense, several as ``a|b``.
        dense_steps: share of steps that stay dense, from the noisy end.
        select: glob of sites.
    """

    policy: str = "svg"
    density: float = 0.25
    heads: Heads = Heads.CALIBRATED
    budget: Budget = Budget.UNIFORM
    block: int = 128
    sinks: int = 0
    mass: float = 0.0
    scores: Scores = Scores.FLOAT
    dense: str = ""
    dense_steps: float = 0.0
    select: str = "*"

    name: ClassVar[str] = "sparsify"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED, Stage.COMPRESSED})
    exact: ClassVar[bool] = False
    takes: ClassVar[SiteKind] = SiteKind.ATTENTION

    def __post_init__(self) -> None:
        base = self.base
        if self.scores is Scores.INT8:  # codes lose precision, which nothing may before quant
            # of the instance, so that a wrong order is refused before a model is loaded
            object.__setattr__(self, "at", frozenset({Stage.COMPRESSED}))
        if self.budget is Budget.CALIBRATED and not base.masks:
            raise ConfigError(f"sparsify.budget: '{self.policy}' chooses blocks itself")
        if not 0 <= self.dense_steps < 1:
            raise ConfigError(
                "sparsify.dense_steps: expected 0 up to, not including, 1, "
                f"got {self.dense_steps:g}"
            )

    @property
    def base(self) -> MaskPolicy:
        """The policy at the one density; raises ConfigError."""
        mass = self.mass or (0.6 if self.policy == "mass" else 0.0)
        return MaskPolicy(self.policy, (self.density,), self.block, self.sinks, mass)

    def planned(self) -> Sparsify:
        """This pass without what it needs samples for, to explain what it would do."""
        found = Sparsify(self.policy, self.density, Heads.ONLINE, Budget.UNIFORM, self.block,
                         self.sinks, self.mass, self.scores, self.dense, 0.0,
                         self.select)  # fmt: skip
        object.__setattr__(found, "at", Sparsify.at)  # a plan stays annotated
        return found

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite; facts: policy, masks and density of every site, and of the whole run."""
        found = graph.sites(self.select, SiteKind.ATTENTION)
        masks = {site.name: padding(graph, site) for site in found}
        sites = [site for site in found if self._matches(site, masks[site.name], ctx)]
        if not sites:
            ctx.diagnostics.warning(
                "", "nothing-sparse", "no attention spans the frames of a video"
            )
            return PassResult(0)
        examples = [layouts(graph, sample.inputs, sites) for sample in ctx.samples]
        self._check(examples, sites, ctx)
        plans = self._plans(graph, sites, examples, masks, ctx)
        sizes, dense = SizeNodes(graph), self._dense_flag(graph, ctx)
        for site in sites:
            if self.scores is Scores.INT8:
                quantise_scores(graph, site)
            rewrite(graph, site, plans[site.name], sizes, dense, masks[site.name])
        shares = {s.name: plans[s.name].density for s in sites}
        mean = sum(shares.values()) / len(shares)
        return PassResult(
            len(sites),
            {
                "sparsity": {s.name: plans[s.name].facts() for s in sites},
                "mask_density": mean,
                "effective_density": self.dense_steps + (1 - self.dense_steps) * mean,
            },
        )

    # -- match ----------------------------------------------------------------------------------

    def _matches(self, site: Site, mask: KeyMask | None, ctx: Context) -> bool:
        """True if ``site`` is dense self-attention over frames; says why it is not."""
        reason = obstacle(site, mask)
        if not reason and self.dense and selects(self.dense, site.name):
            reason = "dense", f"it matches dense={self.dense}"
        if not reason:
            return True
        code, message = reason
        message = f"stays dense: {message}"
        if code == "no-frames":
            ctx.diagnostics.warning(site.name, code, message, _VARY)
        else:
            ctx.diagnostics.remark(site.name, code, message)
        return False

    def _check(
        self, examples: Sequence[Mapping[str, list[int]]], sites: Sequence[Site], ctx: Context
    ) -> None:
        """Raise InputError where the density cannot be reached at the largest sample's sizes."""
        for site in sites:
            sizes = [example[site.name] for example in examples]
            if not sizes:
                continue
            largest = max(sizes, key=lambda s: s[0] * s[1] + s[2])
            rows = blocks(largest[0] * largest[1] + largest[2], self.block)
            try:
                video_mask.reachable(largest, str(self.base))
            except InputError as error:
                found = error.diagnostic
                if found.code != "density" or rows * self.density >= 2:
                    raise InputError(
                        found.message, *found.notes, code=found.code, site=site.name
                    ) from error
                ctx.diagnostics.warning(
                    site.name,
                    "samples-too-small",
                    f"the samples have {rows} blocks of {self.block} tokens: too few for a density "
                    f"of {self.density:g}; calls of their size attend to everything",
                )

    # -- plan -----------------------------------------------------------------------------------

    def _plans(
        self,
        graph: Graph,
        sites: Sequence[Site],
        examples: Sequence[Mapping[str, list[int]]],
        masks: Mapping[str, KeyMask | None],
        ctx: Context,
    ) -> dict[str, SitePlan]:
        base = self.base
        several = len(MASKS[base.name]) > 1
        calibrated = self.budget is Budget.CALIBRATED
        if (several and self.heads is Heads.CALIBRATED) or calibrated:
            policy = self._levels(examples) if calibrated else base
            errors, shares = measure(graph, ctx, sites, policy, examples, masks)
            if errors:
                return assign(policy, errors, shares, self.density, len(MASKS[base.name]))
            ctx.diagnostics.warning(
                "", "not-calibrated", "no sample is large enough for masks: heads decide online"
            )
        found = {}
        for site in sites:
            layout = examples[0][site.name] if examples else None
            share = video_mask.density(layout, str(base)) if layout else self.density
            found[site.name] = SitePlan(base, None, share)
        return found

    def _levels(self, examples: Sequence[Mapping[str, list[int]]]) -> MaskPolicy:
        """The densities that every sample large enough can have."""
        levels = []
        for level in sorted({min(1.0, self.density * factor) for factor in LEVELS}):
            policy = MaskPolicy(self.policy, (level,), self.block, self.sinks)
            if level == self.density or any(_reaches(e, policy) for e in examples):
                levels.append(level)
        return MaskPolicy(self.policy, tuple(levels), self.block, self.sinks)

    def _dense_flag(self, graph: Graph, ctx: Context) -> fx.Node | None:
        if self.dense_steps == 0:
            return None
        node = timestep_input(graph, ctx.samples)
        times = sorted(s.timestep for s in ctx.samples if s.timestep is not None)
        if node is None or not times:
            raise InputError(
                "expected a timestep input and samples that name theirs, for dense_steps",
                "give Sample(..., timestep=t)",
            )
        from_here = times[min(len(times) - 1, round(len(times) * (1 - self.dense_steps)))]
        first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        above = graph.call(aten.ge.Scalar, node, from_here, before=first)
        flag = graph.call(aten.any.default, above, before=first)
        for made in (above, flag):
            made.meta.pop("nn_module_stack", None)
        return flag


# math -------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    graph: Graph,
    ctx: Context,
    sites: Sequence[Site],
    policy: MaskPolicy,
    examples: Sequence[Mapping[str, list[int]]],
    masks: Mapping[str, KeyMask | None],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per site: error of every mask for every head, float64[masks, H], and the masks' densities.

    Squared errors of the outputs of 64 queries, as a share of the squared outputs of the site, so
    that sites compare; the mean over samples and their batch.
    """
    by_node = {site.node: site for site in sites}
    operands = {operand for site in sites for operand in site.node.all_input_nodes[:3]}
    kept = [mask for site in sites if (mask := masks[site.name]) is not None]
    operands |= {mask.valid for mask in kept}
    errors: dict[str, list[Tensor]] = {}
    shares: dict[str, Tensor] = {}
    fitting = [i for i, example in enumerate(examples) if _reaches(example, policy)]
    for at in ctx.progress(fitting, "sparsify"):
        values: dict[fx.Node, Tensor] = {}

        def look(node: fx.Node, value: Any, at: int = at, values: Any = values) -> None:
            if node in operands:
                values[node] = value
            if node not in by_node:
                return
            site = by_node[node]
            q, k, v = (values[operand] for operand in node.args[:3])
            mask = masks[site.name]
            valid = None if mask is None else values[mask.valid]
            layout = examples[at][site.name]
            found = head_errors(q, k, v, scale_of(node), layout, policy, valid)
            errors.setdefault(site.name, []).append(found[0])
            shares[site.name] = found[1]
            for operand in node.args[:3]:
                values.pop(operand, None)

        sample = ctx.samples[at]
        graph.run_inputs(graph.signature.bind((), sample.inputs), look)
    return {name: torch.stack(all_).mean(0) for name, all_ in errors.items()}, shares


def scale_of(node: fx.Node) -> float:
    """The factor on the scores of a dense attention."""
    given: Any = node.kwargs.get("scale")
    width: Any = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    return float(given) if given is not None else float(width) ** -0.5


def _reaches(example: Mapping[str, list[int]], policy: MaskPolicy) -> bool:
    try:
        for layout in example.values():
            video_mask.reachable(layout, str(policy))
    except InputError:
        return False
    return True


# rewrite ----------------------------------------------------------------------------------------


def quantise_scores(graph: Graph, site: Site) -> None:
    """Put queries, and keys less their mean over tokens, behind quantisers of 8 bits.

    A plan, which stays annotated, holds a note in their place.
    """
    query, key = site.node.args[:2]
    mean = graph.call(aten.mean.dim, key, [2], True, before=site.node)
    key = graph.call(aten.sub.Tensor, key, mean, before=site.node)
    if graph.stage is Stage.ANNOTATED:
        graph.set_operand(site.node, 1, key)
        set_note(site.node, integer_scores=True)
        return
    for index, value in enumerate((query, key)):
        codes = graph.call(FAKE_QUANTIZE, value, None, None, _SCORES, before=site.node)
        graph.set_operand(site.node, index, codes)


def rewrite(
    graph: Graph,
    site: Site,
    plan: SitePlan,
    sizes: SizeNodes,
    dense: fx.Node | None,
    mask: KeyMask | None = None,
) -> None:
    """Replace one dense attention."""
    tokens = note(site.node)["tokens"]
    layout = [
        int(tokens[key]) if isinstance(tokens.get(key), bool) else sizes.of(tokens.get(key, ""))
        for key in LAYOUT
    ]
    heads = None
    if plan.heads is not None:
        name = site.name.replace(":", ".").replace("#", "_")
        heads = graph.set_param(f"{name}.mask_of_head", plan.heads)
    node = site.node
    operands = [*node.args[:3], heads, dense, layout, str(plan.policy), scale_of(node)]
    exist = () if mask is None else (mask.valid,)
    sparse = graph.call(SPARSE_ATTENTION, *operands, *exist, before=node)
    graph.replace(node, sparse)
    if mask is not None and mask.queries:  # queries of padding have no keys
        absent = graph.call(aten.bitwise_not.default, mask.valid, before=sparse)
        for axis in (1, 3):
            absent = graph.call(aten.unsqueeze.default, absent, axis, before=sparse)
        fill = aten.masked_fill.Scalar
        graph.replace(sparse, graph.call_after(fill, sparse, absent, 0.0, after=sparse))
