"""What every site is for, told from where its value goes and where its input comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import fx

from vdqc.ir.analysis.channels import shape
from vdqc.ir.analysis.dataflow import (
    MOVES,
    NORMS,
    attention_operands,
    norm_modulations,
    readers,
    residual_adds,
)
from vdqc.ir.blocks import block_name
from vdqc.ir.graph import Graph
from vdqc.ir.site import SITE_KINDS, Site, SiteKind, note

A = torch.ops.aten
_ACTIVATIONS = {
    A.gelu.default,
    A.silu.default,
    A.relu.default,
    A.tanh.default,
    A.sigmoid.default,
    A.erf.default,
    A.hardtanh.default,
    A.leaky_relu.default,
}
_POINTWISE = {
    A.mul.Tensor,
    A.add.Tensor,
    A.sub.Tensor,
    A.div.Tensor,
    A.neg.default,
    A.slice_scatter.default,
    A.pow.Tensor_Scalar,
    A.dropout.default,
}

#: A ModuleList child with one of these is a block.
_IN_BLOCKS = {*NORMS, A.group_norm.default, A.scaled_dot_product_attention.default}
#: Roles that stay in high precision by default: a percent of the work, and the conditioning.
KEPT_ROLES = frozenset({"time_embed", "text_embed", "patch_embed", "modulation", "proj_out"})
#: Share of the weights from which on it matters that convolutions stay in float.
CONVOLUTIONS_MATTER = 0.2


def find_roles(graph: Graph) -> Mapping[str, str]:
    """Site name to role, for every site; see ``passes/annotate.py`` for what the roles mean."""
    return _Roles(graph).find()


def convolution_share(graph: Graph, roles: Mapping[str, str]) -> float:
    """Share of convolutions in the weights that may be quantised, where ``im2col`` can help."""
    sizes = {SiteKind.LINEAR: 0, SiteKind.CONV: 0}
    for site in graph.sites():
        if site.kind not in sizes or roles[site.name] in KEPT_ROLES:
            continue
        weight = site.weight.meta["val"]
        if site.kind is SiteKind.CONV and weight.shape[1] != site.input.meta["val"].shape[1]:
            continue  # in groups: im2col leaves it, too
        sizes[site.kind] += int(weight.numel())
    return sizes[SiteKind.CONV] / max(1, sum(sizes.values()))


@final
class _Roles:
    """Assigns roles in order of certainty; the first role of a site stands."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.roles: dict[str, str] = {}
        self.residual = set(residual_adds(graph))
        self.latents = _latents(graph)
        self.above = _ancestors(graph)
        self.blocks = {block_name(node) for node in graph.nodes if node.target in _IN_BLOCKS} - {""}

    def find(self) -> Mapping[str, str]:
        for site in self.graph.sites(kind=SiteKind.ATTENTION):
            self._attention(site)
        self._explicit_attention()
        self._modulation()
        linears = self.graph.sites(kind=SiteKind.LINEAR)
        for site in [*linears, *self.graph.sites(kind=SiteKind.CONV)]:
            self._outside(site)
        for site in linears:
            self._mlp(site)
        for site in self.graph.sites():
            self._set(site.name, "other")
        return self.roles

    def _set(self, name: str, role: str) -> None:
        self.roles.setdefault(name, role)

    def _attention(self, site: Site) -> None:
        self._set(site.name, "attention")
        found = attention_operands(self.graph, site)
        for name in (*found.query, *found.key, *found.value):
            letters = "".join(
                letter
                for letter, names in zip("qkv", (found.query, found.key, found.value), strict=True)
                if name in names
            )
            self._set(name, "cross_kv" if found.cross and "q" not in letters else letters)
        for name in found.out:
            self._set(name, "attn_out")

    def _explicit_attention(self) -> None:
        """matmul of two activations: softmax written out, or linear attention."""
        for node in self.graph.nodes:
            if node.target not in (A.matmul.default, A.bmm.default):
                continue
            sides = [list(self._producers(arg, MOVES | _POINTWISE | _ACTIVATIONS | NORMS))
                     for arg in node.args[:2]]  # fmt: skip
            if not all(sides):
                continue
            for producer in (site for side in sides for site in side):
                self._set(note(producer)["site"], "qkv")
            for name in readers(node):
                self._set(name, "attn_out")

    def _modulation(self) -> None:
        """Producers of scales and shifts, and of all that is broadcast over tokens."""
        starts: list[fx.Node] = []
        for found in norm_modulations(self.graph):
            starts += [node for node in (found.scale, found.shift) if node is not None]
        for node in self.graph.nodes:
            if node.target in (A.mul.Tensor, A.add.Tensor) and len(shape(node)) >= 3:
                starts += [
                    arg
                    for arg in node.args[:2]
                    if isinstance(arg, fx.Node)
                    and arg.op == "call_function"
                    and not has_tokens(arg)
                    and has_tokens(node)
                ]
        passes = MOVES | _POINTWISE | {A.tanh.default, A.sigmoid.default}
        for start in starts:
            for producer in self._producers(start, passes):
                if self.above[producer] & self.latents and has_tokens(producer):
                    continue  # a product of two token streams, such as a gated MLP
                if self._feeds_linear(producer):
                    continue  # the embedding that producers of modulation read
                self._set(note(producer)["site"], "modulation")
                self._low_rank(producer)

    def _low_rank(self, producer: fx.Node) -> None:
        """The first factor of a modulation that a block makes by two linears."""
        for factor in self._producers(producer.args[0], set(MOVES)):
            if block_name(factor) in self.blocks and not self.above[factor] & self.latents:
                self._set(note(factor)["site"], "modulation")

    def _outside(self, site: Site) -> None:
        """Embeddings before the blocks and the projection after them."""
        if not self.blocks or block_name(site.node) in self.blocks:
            return
        above = self.above[site.node]
        if above & self.latents:
            after = any(node.target in NORMS or node in self.residual for node in above)
            self._set(site.name, "proj_out" if after else "patch_embed")
            return
        inputs = [node for node in above if node.op == "placeholder"]
        timed = any(len(shape(node)) <= 1 for node in inputs) or any(
            node.target in (A.sin.default, A.cos.default) for node in above
        )
        if inputs:
            timed = timed and all(len(shape(node)) <= 2 for node in inputs)
            self._set(site.name, "time_embed" if timed else "text_embed")

    def _mlp(self, site: Site) -> None:
        """A linear that reads an activation of other linears, and those."""
        gated: dict[str, bool] = {}
        self._activated(site.input, False, gated, set())
        if not any(gated.values()):
            return
        self._set(site.name, "mlp_down")
        for name, activated in gated.items():
            gate = activated and not all(gated.values())
            self._set(name, "mlp_gate" if gate else "mlp_up")

    def _activated(
        self, node: Any, activated: bool, found: dict[str, bool], seen: set[tuple[fx.Node, bool]]
    ) -> None:
        """Linears above ``node``, and whether an activation lies between."""
        if not isinstance(node, fx.Node) or (node, activated) in seen or node in self.residual:
            return
        seen.add((node, activated))
        if node.target is A.linear.default and "site" in note(node):
            name = note(node)["site"]
            found[name] = found.get(name, False) or activated
        elif node.target in _ACTIVATIONS:
            self._activated(node.args[0], True, found, seen)
        elif node.target in _POINTWISE or node.target in MOVES:
            for operand in node.all_input_nodes:
                self._activated(operand, activated, found, seen)

    def _feeds_linear(self, producer: fx.Node) -> bool:
        """True if a linear reads ``producer`` through activations and moves alone."""
        pending, seen = [producer], {producer}
        while pending:
            for user in pending.pop().users:
                if user.target is A.linear.default:
                    return True
                if user not in seen and (user.target in _ACTIVATIONS or user.target in MOVES):
                    seen.add(user)
                    pending.append(user)
        return False

    def _producers(self, start: Any, passes: set[Any]) -> Iterator[fx.Node]:
        """Linear sites above ``start`` through ops of ``passes``."""
        pending, seen = [start], set()
        while pending:
            node = pending.pop()
            if not isinstance(node, fx.Node) or node in seen or node in self.residual:
                continue
            seen.add(node)
            if node.target is A.linear.default:
                if "site" in note(node):
                    yield node
            elif node.target in passes or node.target is A.softmax.int:
                pending += node.all_input_nodes


def has_tokens(node: fx.Node) -> bool:
    """True if a value has an axis between batch and channels that is longer than one."""
    return any(size != 1 for size in shape(node)[1:-1])


def _ancestors(graph: Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """Inputs, norms, adds and sin/cos whose values (not sizes) reach a node: what roles ask for."""
    marks = {*NORMS, A.sin.default, A.cos.default, A.add.Tensor, *SITE_KINDS}
    above: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        own = {node} if node.op == "placeholder" or node.target in marks else set()
        values = [
            n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt)
        ]
        above[node] = frozenset(own).union(*(above[operand] for operand in values))
    return above


def _latents(graph: Graph) -> frozenset[fx.Node]:
    """Inputs with all the axes of the output but batch: what is being denoised, and its like."""
    wanted: set[Any] = set()
    for node in graph.output.all_input_nodes:
        wanted |= _symbols(shape(node)[1:])
    batch = {s for node in graph.inputs for s in _symbols(shape(node)[:1])}
    wanted -= batch
    tensors = [node for node in graph.inputs if len(shape(node)) >= 3]
    found = [node for node in tensors if wanted and _symbols(shape(node)[1:]) >= wanted]
    return frozenset(found or tensors[:1])


def _symbols(sizes: list[Any]) -> set[Any]:
    return {symbol for size in sizes for symbol in getattr(size, "free_symbols", set())}
