import pytest
import torch
from torch import Tensor, fx, nn

from vdqc.ir.graph import Graph
from vdqc.ir.pattern import Match, Mismatch, any_, either, match, number, op, param
from vdqc.testing.harness import captured

A = torch.ops.aten


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(x * self.scale + 2) * y


def _graph() -> tuple[Graph, fx.Node]:
    graph = captured(Swish(), torch.randn(2, 4), torch.randn(2, 4))
    return graph, next(n for n in reversed(graph.nodes) if n.target is A.mul.Tensor)


def test_names_are_bound_and_operands_commute() -> None:
    _, root = _graph()
    inner = op(A.add.Tensor, op(A.mul.Tensor, param("w"), any_("x"), commutes=True), number("c"))
    found = match(op(A.mul.Tensor, any_("y"), op(A.sigmoid.default, inner), commutes=True), root)
    assert isinstance(found, Match)
    assert (found["x"].name, found["y"].name) == ("x", "y")
    assert (found["w"].target, found["c"]) == ("scale", 2)
    assert found.nodes[-1] is root
    assert found.is_private()


def test_a_name_that_occurs_twice_is_one_value() -> None:
    _, root = _graph()
    found = match(op(A.mul.Tensor, any_("x"), any_("x")), root)
    assert isinstance(found, Mismatch)
    assert "'x' is sigmoid" in found.reason.replace("aten.", "")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (op(A.add.Tensor, any_(), any_()), "expected aten.add, got aten.mul"),
        (op(A.mul.Tensor, param(), any_()), "expected a weight, got aten.sigmoid"),
        (op(A.mul.Tensor, op(A.sigmoid.default, op(A.mul.Tensor)), any_()), "got aten.add"),
    ],
)
def test_a_mismatch_says_where(pattern: object, reason: str) -> None:
    _, root = _graph()
    found = match(pattern, root)
    assert isinstance(found, Mismatch)
    assert not found
    assert reason in found.reason


def test_alternatives_are_tried_in_order() -> None:
    _, root = _graph()
    assert match(op(either(A.add.Tensor), any_()), root).__class__ is Mismatch
    sides = either(op(A.tanh.default, any_("a")), op(A.sigmoid.default, any_("b")))
    found = match(op(A.mul.Tensor, sides, any_()), root)
    assert isinstance(found, Match)
    assert set(found.values) == {"b"}


def test_a_covered_value_with_another_reader_is_not_private() -> None:
    graph, root = _graph()
    sigmoid = root.args[0]
    assert isinstance(sigmoid, fx.Node)
    graph.call(A.neg.default, sigmoid, before=root)
    found = match(op(A.mul.Tensor, op(A.sigmoid.default), any_()), root)
    assert isinstance(found, Match)
    assert not found.is_private()
