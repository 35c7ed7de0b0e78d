"""Adds back what the masks of ``sparsify`` drop, as it was when it was last compared.

::

    vdqc.sparse_attention(%q, %k, %v, ...)  ->
    vdqc.reparameterized_attention(%q, %k, %v, ..., 'residual{order=2,interval=5,rank=16}')

Every ``interval`` steps a *refresh* computes dense and sparse attention, uses dense and keeps the
difference; in between, a *reuse* computes sparse attention alone and adds what was kept, moved on
by a second-order term of rank ``rank``. Lowering makes two programs of the graph, which share all
weights, and the compiled model keeps the residuals and chooses: per branch of guidance, anew for
every video, dense again wherever the steps are not those that it expects.

Source: Yang et al., QuantSparse, arXiv 2509.23681, section 3.2, equations 11 to 15; the cached
residual is that of Yuan et al., DiTFastAttn, arXiv 2406.08552, section 3.2. Linear extrapolation
and the stores: ours.
Invariant: a refresh gives what dense attention gives. A residual that moves linearly, by a rank of
at most ``rank``, is reproduced exactly with ``extrapolation=linear``.
Online: one sum per site and step; per refresh dense attention and an eigenproblem of the width of a
head; one residual per site and branch, in memory as ``store`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import fx

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.residual import CachePolicy, Extrapolation, Reference, Store
from vdqc.base.video_mask import density
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.signature import TensorInput
from vdqc.ir.site import Site, SiteKind
from vdqc.ir.size_nodes import timestep_input
from vdqc.ir.sparse_ops import REPARAMETERIZED_ATTENTION, SPARSE_ATTENTION

_GIB = 2**30


@final
@dataclass(frozen=True)
class Reparameterize(Pass):
    """Keeps the residual of every sparse attention between denoising steps.

    Attributes:
        order: 1 holds the residual, 2 also its change from refresh to refresh.
        rank: of that change; 0 leaves it out.
        interval: steps from one refresh to the next.
        extrapolation: ``hold`` adds the same change in every step, ``linear`` in proportion.
        reference: change since the ``refresh`` before, or since the ``adjacent`` step, which is
            then dense too.
        store: ``resident``, ``host``, ``int8`` or ``lowrank``.
        memory: GiB that the residuals of all branches may take; 0 for no limit.
        select: glob of sites.
    """

    order: int = 2
    rank: int = 16
    interval: int = 5
    extrapolation: Extrapolation = Extrapolation.HOLD
    reference: Reference = Reference.REFRESH
    store: Store = Store.RESIDENT
    memory: float = 0.0
    select: str = "*"

    name: ClassVar[str] = "reparameterize"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED, Stage.COMPRESSED})
    exact: ClassVar[bool] = False
    takes: ClassVar[SiteKind] = SiteKind.ATTENTION

    def __post_init__(self) -> None:
        self.policy("")

    def planned(self) -> Reparameterize:
        """This pass, which needs no samples."""
        return self

    def policy(self, timestep: str) -> CachePolicy:
        """What the compiled model will follow; raises ConfigError."""
        return CachePolicy(
            self.order, self.rank, self.interval, self.extrapolation, self.reference, self.store,
            self.memory, timestep,
        )  # fmt: skip

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite; facts: bytes of the residuals at the probe's sizes, share of dense work."""
        sites = matches(graph, self.select, ctx)
        if not sites:
            return PassResult(0)
        policy = self.policy(timestep_path(graph, ctx))
        needed = sum(residual_bytes(site.node, policy) for site in sites)
        if policy.memory and needed > policy.memory * _GIB:
            raise ConfigError(
                f"expected a memory of at least {needed / _GIB:.3f} GiB for the residuals of one "
                f"branch at the sizes of the first sample, got {policy.memory:g}",
                "store=int8 takes half of bfloat16, store=lowrank least",
            )
        share = sum(site_density(graph, site.node) for site in sites) / len(sites)
        for site in sites:
            rewrite(graph, site, policy)
        refreshes = 2 if policy.reference is Reference.ADJACENT and policy.second else 1
        dense = refreshes / max(policy.interval, refreshes)
        facts = {"policy": str(policy), "bytes_per_branch": needed, "mask_density": share}
        return PassResult(
            len(sites), {"cache": {**facts, "effective_density": dense + (1 - dense) * share}}
        )


# match ------------------------------------------------------------------------------------------


def matches(graph: Graph, select: str, ctx: Context) -> list[Site]:
    """Sparse attention sites; says so if there are none."""
    found = [
        s for s in graph.sites(select, SiteKind.ATTENTION) if s.node.target is SPARSE_ATTENTION
    ]
    if not found:
        ctx.diagnostics.warning(
            "", "nothing-sparse", "no attention is sparse: put 'sparsify' before 'reparameterize'"
        )
    return found


def timestep_path(graph: Graph, ctx: Context) -> str:
    """Path of the input that holds the timestep; raises InputError."""
    node = timestep_input(graph, ctx.samples)
    if node is None:
        raise InputError(
            "expected an input that holds the timestep, found none",
            "give Sample(..., timestep=t), equal to one of the inputs",
            code="no-timestep",
        )
    entry = graph.signature.inputs[graph.inputs.index(node)]
    assert isinstance(entry, TensorInput)
    return entry.path


# math -------------------------------------------------------------------------------------------


def residual_bytes(node: fx.Node, policy: CachePolicy) -> int:
    """Bytes of one site's residual at the sizes of the captured example."""
    value: Any = node.meta["val"]
    batch, heads, tokens, width = _hints(value.shape)
    return policy.nbytes(batch * heads * tokens * width, tokens, width, value.dtype.itemsize)


def site_density(graph: Graph, node: fx.Node) -> float:
    """Share of block pairs that one site computes at the sizes of the captured example."""
    layout: Any = node.args[5]
    sizes = _hints([n.meta["val"] if isinstance(n, fx.Node) else n for n in layout])
    heads = node.args[3]
    return density(
        sizes, str(node.args[6]), graph.evaluate(heads) if isinstance(heads, fx.Node) else None
    )


def _hints(sizes: Sequence[Any]) -> list[int]:
    return [size if isinstance(size, int) else int(size.node.hint) for size in sizes]


# rewrite ----------------------------------------------------------------------------------------


def rewrite(graph: Graph, site: Site, policy: CachePolicy) -> None:
    """Replace one sparse attention."""
    given, valid = site.node.args[:8], site.node.args[8:]
    args = (*given, str(policy), *valid)
    graph.replace(site.node, graph.call(REPARAMETERIZED_ATTENTION, *args, before=site.node))
