import pytest
import torch
from torch import nn

from vdqc.base.diagnostics import VerifyError
from vdqc.ir import ops
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.site import set_note
from vdqc.ir.verifier import verify
from vdqc.testing.harness import captured

aten = torch.ops.aten


def small() -> Graph:
    return captured(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), torch.randn(4, 16))


def test_a_captured_graph_is_valid() -> None:
    verify(small())


def test_a_mutating_op_is_refused() -> None:
    graph = small()
    site = graph.site("0")
    graph.replace(site.node, graph.call_after(aten.add_.Tensor, site.node, 1.0, after=site.node))
    with pytest.raises(VerifyError, match=r"aten.add_ writes to its operand"):
        verify(graph)


def test_fake_quantize_waits_for_compressed() -> None:
    graph = small()
    site = graph.site("0")
    set_note(site.node, scheme="w8a16")
    fake = torch.ops.vdqc.fake_quantize.default
    weight = graph.call(fake, site.weight, None, None, "int8/channel/dynamic", before=site.node)
    graph.set_operand(site.node, 1, weight)
    with pytest.raises(VerifyError, match="not allowed at captured"):
        verify(graph)
    graph.stage = Stage.ANNOTATED
    with pytest.raises(VerifyError, match="loses information"):
        verify(graph)
    graph.stage = Stage.COMPRESSED
    verify(graph)
    graph.stage = Stage.LOWERED
    with pytest.raises(VerifyError, match="not allowed at lowered"):
        verify(graph)


def test_every_annotated_site_needs_a_scheme() -> None:
    graph = small()
    graph.stage = Stage.ANNOTATED
    with pytest.raises(VerifyError, match="has no scheme"):
        verify(graph)


def test_a_scheme_must_be_carried_out() -> None:
    graph = small()
    set_note(graph.site("0").node, scheme="w8a8")
    graph.stage = Stage.COMPRESSED
    with pytest.raises(VerifyError, match="not behind fake_quantize") as caught:
        verify(graph)
    assert "aten.linear" in str(caught.value)  # the lines around the node are quoted


def test_ops_are_registered() -> None:
    assert ops.fake_quantize is not None
