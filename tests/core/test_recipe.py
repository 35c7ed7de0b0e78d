from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdqc.base.diagnostics import ConfigError
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.engine.recipe import Recipe, parse_passes, parse_rule
from vdqc.ir.graph import Graph, Stage


class Method(StrEnum):
    ABSMAX = "absmax"
    MSE = "mse"


@final
@dataclass(frozen=True)
class Example(Pass):
    """One option of each type."""

    alpha: float = 0.5
    block: int = 64
    learn: bool = False
    method: Method = Method.ABSMAX
    select: str = "*"
    limit: int | None = None

    name: ClassVar[str] = "example"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        return PassResult(0)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    import sys
    import types

    module = types.ModuleType("vdqc_example_pass")
    module.Example = Example  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vdqc_example_pass", module)
    return {"example": "vdqc_example_pass:Example"}


def test_options_of_every_type(table: dict[str, str]) -> None:
    text = "example{alpha=0.25,block=128,learn=true,method=mse,select=blocks.*,limit=3}"
    (item,) = parse_passes(text, table)
    assert item == Example(0.25, 128, True, Method.MSE, "blocks.*", 3)
    assert str(item) == text


def test_a_list_round_trips(table: dict[str, str]) -> None:
    recipe = Recipe.parse(" example , example{block=32} ", table, ["w4a8", "blocks.0.*=none"])
    assert str(recipe) == "example,example{block=32}"
    assert Recipe.parse(str(recipe), table, ["w4a8", "blocks.0.*=none"]) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exampel", "did you mean 'example'"),
        ("example{alhpa=1}", "did you mean 'alpha'"),
        ("example{alpha=much}", "example.alpha: expected float, got 'much'"),
        ("example{learn=yes}", "expected true or false, got 'yes'"),
        ("example{method=mes}", "did you mean 'mse'"),
        ("example{alpha}", "expected option=value"),
        ("example{block=8, block=16}", "example.block: expected one value, got '8' and '16'"),
        ("example{", "cannot read the pass list"),
        ("", "empty"),
    ],
)
def test_bad_text_is_refused(table: dict[str, str], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_passes(text, table)


def test_a_pass_list_in_texts(table: dict[str, str]) -> None:
    texts = ("example{alpha=0.25,block=128}", "example", "example{block=8},example")
    assert parse_passes(texts, table) == parse_passes(",".join(texts), table)
    assert str(Recipe.parse([*texts], table)) == ",".join(texts)
    with pytest.raises(ConfigError, match="the pass list is empty"):
        parse_passes([], table)
    with pytest.raises(ConfigError, match="expected the passes as texts, got one of type Example"):
        parse_passes([Example()], table)  # type: ignore[list-item]


def test_none_where_the_type_allows_it(table: dict[str, str]) -> None:
    assert parse_passes("example{limit=none}", table) == (Example(),)


@given(st.floats(0, 1), st.integers(1, 4096), st.booleans())
def test_text_round_trips(alpha: float, block: int, learn: bool) -> None:
    import sys
    import types

    module = types.ModuleType("vdqc_example_pass")
    module.Example = Example  # type: ignore[attr-defined]
    sys.modules["vdqc_example_pass"] = module
    item = Example(alpha=alpha, block=block, learn=learn)
    assert parse_passes(str(item), {"example": "vdqc_example_pass:Example"}) == (item,)


def test_rules() -> None:
    assert str(parse_rule("w8a8")) == "*=w8a8"
    assert str(parse_rule("blocks.0.*=none")) == "blocks.0.*=none"
