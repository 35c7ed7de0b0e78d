from collections.abc import Callable

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from vdqc.engine.pass_manager import Context, PassManager
from vdqc.ir.analysis.absorb_rotation import absorb_rotation
from vdqc.ir.analysis.absorb_scale import Cost, ScaleFold, absorb_scale
from vdqc.ir.analysis.channels import aligned
from vdqc.ir.analysis.classes import Basis, channel_classes
from vdqc.ir.analysis.dataflow import attention_operands, norm_modulations, residual_adds
from vdqc.ir.analysis.templates import isomorphic_blocks
from vdqc.ir.graph import Graph
from vdqc.ir.site import SiteKind
from vdqc.passes.canonicalize import Canonicalize
from vdqc.testing.harness import AdaLNBlock, captured, models

A = torch.ops.aten


def canonical(model: nn.Module, *inputs: Tensor) -> Graph:
    graph = captured(model.double(), *(x.double() for x in inputs))
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    return graph


def fold_of(graph: Graph, name: str) -> ScaleFold:
    site = graph.site(name)
    return absorb_scale(graph, site.input, [peer.node for peer in graph.peers(site)])


def apply(graph: Graph, fold: ScaleFold, d: Tensor) -> None:
    """Carry out the edits as ScaleEdit documents them."""
    for index, edit in enumerate(fold.edits):
        factor = edit.factor(d)
        name = f"_factor_{graph.version}_{index}"  # an edit before this one keeps its own
        if edit.operand == -1:
            scale = graph.set_param(name, factor)
            scaled = graph.call_after(A.mul.Tensor, edit.node, scale, after=edit.node)
            graph.replace(edit.node, scaled)
            continue
        args = list(edit.node.args)
        args += [None] * (edit.operand + 1 - len(args))
        operand = args[edit.operand]
        if operand is None:
            value = graph.set_param(name, factor - 1 if edit.plus_one else factor)
        else:
            scale = graph.set_param(name, factor)
            value = graph.call(A.mul.Tensor, operand, scale, before=edit.node)
            if edit.plus_one:
                less = graph.set_param(f"{name}_one", factor - 1)
                value = graph.call(A.add.Tensor, value, less, before=edit.node)
        args[edit.operand] = value
        edit.node.args = tuple(args)
        graph.version += 1


def inputs_of(graph: Graph, names: list[str], call: list[Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    wanted = {graph.site(name).input: name for name in names}

    def observe(node: fx.Node, value: Tensor) -> None:
        if node in wanted:
            seen[wanted[node]] = value

    graph.run_inputs(call, observe)
    return seen


# where a scale goes -----------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", ["to_q", "to_out", "up", "down"])
def test_edits_scale_exactly_what_the_readers_see(name: str, gated: bool, affine: bool) -> None:
    model = AdaLNBlock(24, heads=2, gated=gated, affine=affine)
    call = [torch.randn(2, 6, 24).double(), torch.randn(2, 24).double()]
    graph = canonical(model, *call)
    before = inputs_of(graph, [name], call)[name]
    fold = fold_of(graph, name)
    d = torch.rand(before.shape[-1]).double() + 0.5
    apply(graph, fold, d)
    graph.module.graph.lint()
    torch.testing.assert_close(inputs_of(graph, [name], call)[name], before * d)
    online = name == "down" and not gated
    assert (fold.cost is Cost.ONLINE) == online == bool(fold.reason)
    if not online:
        assert fold.cost is Cost.FREE, "the modulation's producer is private"


class Shared(nn.Module):
    """Modulation from a table that another reader shares; ``how`` picks what is computed."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.fc, self.other, self.wide = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 24)
        self.how = how

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.how(self, x, y)


@pytest.mark.parametrize(
    ("how", "cost", "reason"),
    [
        (lambda m, x, y: m.fc(m.norm(x)), Cost.FREE, ""),
        (lambda m, x, y: m.fc(m.norm(x) * (1 + y) + y), Cost.SMALL, ""),
        (lambda m, x, y: m.fc(torch.sin(x)), Cost.ONLINE, "sin (%sin) is not linear"),
        (lambda m, x, y: m.fc(h := m.other(x)) + h, Cost.ONLINE, "%linear is also read by add"),
        (lambda m, x, y: m.fc(m.wide(x).chunk(3, -1)[1]), Cost.FREE, ""),
        (lambda m, x, y: m.fc(m.other(x) + m.other(y)), Cost.FREE, ""),
        (lambda m, x, y: m.fc(m.other(x).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)),
         Cost.FREE, ""),
        (lambda m, x, y: m.fc(torch.cat([m.other(x)[..., :4], x[..., :4].sin()], -1)),
         Cost.ONLINE, "sin"),
    ],
)  # fmt: skip
def test_costs_and_reasons(how: Callable[..., Tensor], cost: Cost, reason: str) -> None:
    call = [torch.randn(2, 6, 8).double(), torch.randn(2, 1, 8).double()]
    graph = canonical(Shared(how), *call)
    before = inputs_of(graph, ["fc"], call)["fc"]
    fold = fold_of(graph, "fc")
    assert (fold.cost, reason in fold.reason, bool(fold.reason)) == (cost, True, bool(reason))
    d = torch.rand(8).double() + 0.5
    reader = graph.site("fc").node
    apply(graph, fold, d)
    if fold.cost is not Cost.ONLINE:
        torch.testing.assert_close(inputs_of(graph, ["fc"], call)["fc"], before * d)
    assert graph.site("fc").node is reader


@given(models(), st.integers(0, 2**31))
def test_scaling_and_compensating_keeps_the_function(
    case: tuple[nn.Module, list[Tensor]], seed: int
) -> None:
    model, inputs = case
    call = [x.double() for x in inputs]
    graph = canonical(model, *inputs)
    before = graph.run_inputs(call)[0]
    generator = torch.Generator().manual_seed(seed)
    for name in ("to_q", "to_out", "up", "down"):
        site = graph.site(name)
        fold = fold_of(graph, name)
        if fold.cost is Cost.ONLINE:
            continue
        width = site.input.meta["val"].shape[-1]
        d = torch.rand(width, generator=generator).double() + 0.5
        peers = graph.peers(site)
        apply(graph, fold, d)
        for peer in peers:
            weight = graph.param(str(peer.weight.target)) if peer.weight.op == "get_attr" else None
            value = (graph.evaluate(peer.weight) if weight is None else weight) / d
            graph.set_operand(peer.node, 1, graph.set_param(f"{peer.name}._folded", value))
    torch.testing.assert_close(graph.run_inputs(call)[0], before)


# where a rotation goes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block", "reason"),
    [
        ("to_out", 12, ""),
        ("to_out", 4, ""),
        ("to_out", 24, "a block of 24 crosses heads of 12 channels"),
        ("to_q", 4, "does not commute with a rotation"),
        ("down", 4, "gelu"),
    ],
)
def test_only_linears_carry_a_rotation(name: str, block: int, reason: str) -> None:
    graph = canonical(AdaLNBlock(24, heads=2), torch.randn(2, 6, 24), torch.randn(2, 24))
    site = graph.site(name)
    readers = [peer.node for peer in graph.peers(site)]
    fold = absorb_rotation(graph, site.input, readers, block)
    assert reason in fold.reason
    assert bool(fold.edits) == (not reason)
    for edit in fold.edits:
        assert edit.node is graph.site("to_v").node
        assert (edit.at, edit.start, edit.stop) == (0, 0, 24)


# what values mean -------------------------------------------------------------------------------


def test_a_block_is_read_right() -> None:
    graph = canonical(AdaLNBlock(24, heads=2), torch.randn(2, 6, 24), torch.randn(2, 24))
    assert len(residual_adds(graph)) == 2
    found = norm_modulations(graph)
    assert [n.scale is not None and n.shift is not None for n in found] == [True, True]
    assert all(n.result.target is A.add.Tensor for n in found)
    (site,) = graph.sites(kind=SiteKind.ATTENTION)
    operands = attention_operands(graph, site)
    assert (operands.query, operands.key, operands.value) == (("to_q",), ("to_k",), ("to_v",))
    assert operands.out == ("to_out",)
    assert (operands.cross, operands.rope, operands.qk_norm) == (False, False, ())


def test_gates_block_rotations_of_the_residual_stream() -> None:
    graph = canonical(AdaLNBlock(24, heads=2), torch.randn(2, 6, 24), torch.randn(2, 24))
    stream = [
        next(c for c in channel_classes(graph, basis) if residual_adds(graph)[0] in c.values)
        for basis in Basis
    ]
    assert [c.writers for c in stream] == [("to_out", "down"), ()]
    assert stream[0].width == 24


def test_classes_partition_the_values() -> None:
    graph = canonical(AdaLNBlock(24, heads=2), torch.randn(2, 6, 24), torch.randn(2, 24))
    fine, coarse = (channel_classes(graph, basis) for basis in (Basis.ORTH, Basis.DIAG))
    for classes in (fine, coarse):
        assert len(set().union(*(c.values for c in classes))) == sum(len(c.values) for c in classes)
    assert all(any(f.values <= c.values for c in coarse) for f in fine), "diag only joins"
    dag = nx.DiGraph([(a, b) for b in graph.nodes for a in b.all_input_nodes])
    assert nx.is_directed_acyclic_graph(dag)


def test_blocks_of_one_class_are_one_template() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [AdaLNBlock(24, heads=2, gated=gated) for gated in (False, True, False)]
            self.blocks = nn.ModuleList(blocks)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, y)
            return x

    graph = canonical(Model(), torch.randn(2, 6, 24), torch.randn(2, 24))
    templates = isomorphic_blocks(graph)
    names = [[block.name for block in template.blocks] for template in templates]
    assert names == [["blocks.0", "blocks.2"], ["blocks.1"]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_aligned_axes_hold_the_same_elements(sizes: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(sizes) - 1)))) - {len(sizes)})
    merged = [
        int(torch.tensor(sizes[a:b]).prod())
        for a, b in zip([0, *cuts], [*cuts, len(sizes)], strict=True)
    ]
    covered = 1
    for outs, ins in aligned(merged, sizes):
        extent = int(torch.tensor([merged[a] for a in outs]).prod())
        assert extent == int(torch.tensor([sizes[a] for a in ins]).prod())
        covered *= extent
    assert covered == int(torch.tensor(sizes).prod())
