from dataclasses import dataclass
from typing import ClassVar, final

import pytest
import torch
from torch import nn

from vdqc.base.diagnostics import OrderError, VerifyError
from vdqc.engine.pass_manager import Context, Pass, PassManager, PassResult, check_order
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.sample import Sample
from vdqc.testing.harness import captured

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the input of every linear; claims to be exact, which holds for factor 1."""

    factor: float = 1.0
    select: str = "*"
    name: ClassVar[str] = "scale"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED})
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        for site in graph.sites(self.select):
            scaled = graph.call(aten.mul.Tensor, site.input, self.factor, before=site.node)
            graph.set_operand(site.node, 0, scaled)
        return PassResult(len(graph.sites(self.select)))


@final
@dataclass(frozen=True)
class Late(Pass):
    """Runs at annotated only."""

    name: ClassVar[str] = "late"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        return PassResult(0)


def graph_and_context() -> tuple[Graph, Context]:
    x = torch.randn(3, 8)
    graph = captured(nn.Sequential(nn.Linear(8, 8)), x)
    return graph, Context(samples=[Sample({"input": x})])


def test_impossible_order_is_refused_before_anything_runs() -> None:
    with pytest.raises(OrderError) as caught:
        PassManager([Scale(), Late()])
    assert "'late' runs at annotated, but the passes before it leave the graph at captured" in str(
        caught.value
    )


def test_order_gives_the_final_stage() -> None:
    assert check_order([Scale()]) is Stage.CAPTURED


def test_record_holds_text_rewrites_and_error() -> None:
    graph, ctx = graph_and_context()
    (record,) = PassManager([Scale()]).run(graph, ctx)
    assert (record.text, record.rewrites, record.error) == ("scale", 1, 0.0)
    assert record.sqnr_db == float("inf")


def test_a_pass_that_lies_about_being_exact_is_caught() -> None:
    graph, ctx = graph_and_context()
    with pytest.raises(VerifyError, match="is exact, yet moved the probe output"):
        PassManager([Scale(factor=1.5)]).run(graph, ctx)


def test_nan_is_caught() -> None:
    graph, ctx = graph_and_context()
    with pytest.raises(VerifyError, match="NaN or infinity"):
        PassManager([Scale(factor=float("nan"))]).run(graph, ctx)


def test_text_shows_only_what_differs_from_the_defaults() -> None:
    assert str(Scale()) == "scale"
    assert str(Scale(factor=0.5)) == "scale{factor=0.5}"


def test_a_glob_that_matches_nothing_is_told_of() -> None:
    graph, ctx = graph_and_context()
    (record,) = PassManager([Scale(select="0|blocks.*")]).run(graph, ctx)
    assert record.rewrites == 1
    told = {entry.code: str(entry) for entry in ctx.diagnostics}
    assert "scale.select: 'blocks.*' matches no linear site" in told["glob-unused"]
    assert "known: 0" in told["glob-unused"]


def test_globs_may_have_spaces_around_them() -> None:
    graph, ctx = graph_and_context()
    (record,) = PassManager([Scale(select="blocks.* | 0 ")]).run(graph, ctx)
    assert record.rewrites == 1
    assert [str(entry).count("'blocks.*'") for entry in ctx.diagnostics] == [1]


def test_instruments_see_each_pass() -> None:
    seen = []

    class Watch:
        def before_pass(self, text: str, graph: Graph) -> None:
            seen.append(("before", text))

        def after_pass(self, record: object, graph: Graph) -> None:
            seen.append(("after", str(graph.stage)))

    graph, ctx = graph_and_context()
    PassManager([Scale()], instruments=[Watch()]).run(graph, ctx)
    assert seen == [("before", "scale"), ("after", "captured")]


def test_nodes_carry_the_pass_that_made_them() -> None:
    from vdqc.ir.site import note

    graph, ctx = graph_and_context()
    PassManager([Scale()]).run(graph, ctx)
    made = [note(node)["origin"] for node in graph.nodes if node.target is aten.mul.Tensor]
    assert made == ["scale"]
