"""Say what every site is for and how it will be quantised; found by dataflow, never by names.

::

    %9 = aten.linear(%8, @blocks.0.attn1.to_q.weight) # site blocks.0.attn1.to_q
    %9 = aten.linear(%8, @blocks.0.attn1.to_q.weight) # site blocks.0.attn1.to_q w8a8

Roles: ``q k v`` (and fusions of them, ``qkv``) reach an attention operand through reshapes, rotary
embedding and normalisation; ``cross_kv`` are k and v from other tokens than q's; ``attn_out``
reads attention; ``modulation`` makes the scale, shift or gate of a norm or a branch; ``mlp_up``
feeds an activation or the linear half of a gated one, ``mlp_gate`` its gated half, ``mlp_down``
reads the result; ``time_embed``, ``text_embed``, ``patch_embed`` depend on the timestep, the text
or the latent and lie before the blocks, ``proj_out`` after them.

Schemes: the last matching rule of the context wins, ``w8a8`` if none. High precision (``none``):
attention and convolutions (``im2col`` makes linears of them); weights that depend on an input,
always, and those that several sites read; what the model's class asks for
(``keep=hints``); by ``keep=default`` also embeddings, modulation and the output projection, which
every published recipe leaves alone because they are a percent of the work and carry the
conditioning. A rule that names a site exactly overrides both.

Source: SmoothQuant and later recipes quantise attention and MLP linears only, arXiv 2211.10438,
    section 5; for DiTs: ViDiT-Q, arXiv 2406.02540, section 4.
Invariant: nothing computed changes; only notes are written.
Online: nothing.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, final

from torch import fx

from vdqc.base.diagnostics import nearest
from vdqc.base.scheme import QuantScheme
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.analysis.dataflow import attention_operands, norm_modulations, residual_adds
from vdqc.ir.analysis.roles import (
    CONVOLUTIONS_MATTER,
    KEPT_ROLES,
    convolution_share,
    find_roles,
)
from vdqc.ir.analysis.tokens import token_frames
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.names import selects, weight_source
from vdqc.ir.site import Site, SiteKind, note, set_note

_NONE = QuantScheme.parse("none")
_DEFAULT = QuantScheme.parse("w8a8")
#: A fallback's groups are multiples of this: packed rows stay aligned, scales stay small.
_GROUP_UNIT = 16


class Keep(enum.StrEnum):
    """What stays in high precision although a rule would quantise it."""

    DEFAULT = "default"
    HINTS = "hints"
    NOTHING = "nothing"


#: Share of the linears' weights above which a warning says that shared ones stay in float.
SHARED_MATTERS = 0.2


@final
@dataclass(frozen=True)
class Annotate(Pass):
    """Write role and scheme on every site; ``keep`` says what stays in high precision."""

    name: ClassVar[str] = "annotate"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED})
    to: ClassVar[Stage | None] = Stage.ANNOTATED
    exact: ClassVar[bool] = True

    keep: Keep = Keep.DEFAULT

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Notes only; the facts are counts and the token to frame map."""
        roles = find_roles(graph)
        shared = _shared_weights(graph)
        schemes = {}
        for site in graph.sites():
            scheme = _NONE
            if site.kind is SiteKind.LINEAR:
                scheme = self._scheme(graph, ctx, site, roles[site.name], shared)
            schemes[site.name] = scheme.text
            set_note(site.node, role=roles[site.name], scheme=scheme.text)
        _tell_of_convolutions(graph, ctx, roles)
        _tell_of_shared(graph, ctx, shared)
        _tell_of_unused_rules(graph, ctx)
        return PassResult(
            0,
            {
                "roles": dict(Counter(roles.values())),
                "schemes": dict(Counter(schemes.values())),
                **_mark(graph),
            },
        )

    def _scheme(
        self, graph: Graph, ctx: Context, site: Site, role: str, shared: set[fx.Node]
    ) -> QuantScheme:
        """The scheme of one linear site, after everything that may keep it in float."""
        matching = [rule for rule in ctx.rules if selects(rule.select, site.name)]
        scheme = matching[-1].scheme if matching else _DEFAULT
        exact = bool(matching) and matching[-1].select == site.name
        if scheme.is_none:
            return scheme
        reason = self._reason(graph, site, role, shared, exact)
        if reason is not None:
            ctx.diagnostics.remark(site.name, *reason)
            return _NONE
        return _legal_groups(ctx, site, scheme)

    def _reason(
        self, graph: Graph, site: Site, role: str, shared: set[fx.Node], exact: bool
    ) -> tuple[str, str] | None:
        """Code and sentence if the site must or should stay in float."""
        if not graph.is_constant(site.weight):
            return "weight-varies", "the weight depends on an input: left in float"
        if exact:
            return None
        if weight_source(site.weight) in shared:
            return "weight-shared", "several sites read this weight: left in float"
        hint = _hint(site.name, graph.origin.keep) if self.keep != Keep.NOTHING else None
        if hint is not None:
            return "kept-by-model", f"the model asks for high precision ('{hint}'): left in float"
        if self.keep == Keep.DEFAULT and role in KEPT_ROLES:
            return "kept-by-role", f"its role is {role}: left in float (name it to quantise it)"
        return None


# match ------------------------------------------------------------------------------------------


def _hint(name: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that matches ``name`` as diffusers reads it: a regex, found anywhere."""
    for pattern in patterns:
        try:
            found = re.search(pattern, name)
        except re.error:
            found = re.search(re.escape(pattern), name)
        if found:
            return pattern
    return None


def _shared_weights(graph: Graph) -> set[fx.Node]:
    sources = Counter(
        weight_source(site.weight) for site in graph.sites() if site.kind is not SiteKind.ATTENTION
    )
    return {source for source, count in sources.items() if source is not None and count > 1}


def _tell_of_convolutions(graph: Graph, ctx: Context, roles: Mapping[str, str]) -> None:
    """Warn where a good part of the weights stays in float because convolutions hold it."""
    share = convolution_share(graph, roles)
    if share > CONVOLUTIONS_MATTER and any(not rule.scheme.is_none for rule in ctx.rules):
        ctx.diagnostics.warning(
            "",
            "conv-float",
            f"convolutions hold {share:.0%} of the weights and stay in float",
            "put im2col first in the pass list to quantise them as linears over patches",
        )


def _tell_of_shared(graph: Graph, ctx: Context, shared: Collection[fx.Node]) -> None:
    """Warn where a good part of the weights stays in float because several sites read it."""
    sites = graph.sites(kind=SiteKind.LINEAR)
    held = [
        site
        for site in sites
        if weight_source(site.weight) in shared and note(site.node)["scheme"] == _NONE.text
    ]
    kept, whole = (
        sum({weight_source(s.weight): s.weight.meta["val"].numel() for s in group}.values())
        for group in (held, sites)
    )
    if kept > SHARED_MATTERS * whole and any(not rule.scheme.is_none for rule in ctx.rules):
        ctx.diagnostics.warning(
            "",
            "shared-float",
            f"{kept / whole:.0%} of the weights are read by several sites and stay in float",
            "a block that runs more than once shares its weights: name a site exactly to "
            f"quantise it, e.g. '{held[0].name}=<scheme>'",
        )


def _tell_of_unused_rules(graph: Graph, ctx: Context) -> None:
    """Warn of rules that no linear or convolution matches: a name that was misspelt."""
    names = [site.name for site in graph.sites() if site.kind is not SiteKind.ATTENTION]
    for rule in ctx.rules:
        if names and not any(selects(rule.select, name) for name in names):
            ctx.diagnostics.warning(
                "", "rule-unused", f"'{rule}' matches no site", nearest(rule.select, names)
            )


# math -------------------------------------------------------------------------------------------


def nearest_group(width: int, wanted: int) -> int | None:
    """The legal group size nearest to ``wanted`` by ratio, at most twice off, or None."""
    divisors = [
        size
        for size in range(_GROUP_UNIT, width + 1, _GROUP_UNIT)
        if width % size == 0 and wanted <= 2 * size and size <= 2 * wanted
    ]
    return min(divisors, key=lambda size: max(size / wanted, wanted / size), default=None)


def _legal_groups(ctx: Context, site: Site, scheme: QuantScheme) -> QuantScheme:
    """``scheme`` with a group size that divides the site's input channels."""
    wanted = scheme.weight.granularity.size if scheme.weight is not None else 0
    width = int(site.weight.meta["val"].shape[-1])
    if not wanted or width % wanted == 0:
        return scheme
    group = nearest_group(width, wanted)
    text = scheme.text.replace(f"-g{wanted}", f"-g{group}" if group else "")
    chosen = f"groups of {group}" if group else "one scale per output channel"
    ctx.diagnostics.warning(
        site.name,
        "group-size",
        f"groups of {wanted} do not divide {width} input channels; using {chosen} ({text})",
    )
    return QuantScheme.parse(text)


# rewrite ----------------------------------------------------------------------------------------


def _mark(graph: Graph) -> dict[str, object]:
    """Notes on attention, norms and residual adds; returns what the report tells of them."""
    tokens = token_frames(graph)
    nodes = {site.name: site for site in graph.sites(kind=SiteKind.ATTENTION)}
    cross = 0
    for entry in tokens:
        site = nodes[entry.site]
        operands = attention_operands(graph, site)
        cross += operands.cross
        facts = {key: value for key, value in asdict(entry).items() if key != "site"}
        facts["extent"] = str(entry.extent)
        set_note(site.node, tokens=facts, cross=operands.cross, rope=operands.rope)
    modulations = norm_modulations(graph)
    for found in modulations:
        set_note(found.norm, role="norm" if found.scale is None else "modulated_norm")
    residuals = residual_adds(graph)
    for node in residuals:
        set_note(node, role="residual_add")
    return {
        "attention": {"self": len(tokens) - cross, "cross": cross},
        "norms": {
            "bare": sum(found.scale is None for found in modulations),
            "modulated": sum(found.scale is not None for found in modulations),
        },
        "residual_adds": len(residuals),
        "tokens": [asdict(entry) for entry in tokens],
    }
