import tomllib
from pathlib import Path

import pytest

from vdqc.base.diagnostics import ConfigError
from vdqc.compiler import parse_recipe
from vdqc.engine.named import FOLDER, NamedRecipe, named, names, parse


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_a_legal_list_of_passes(name: str) -> None:
    found = named(name)
    recipe = parse_recipe(None, None, name)
    assert {str(item).partition("{")[0] for item in found.passes} <= {p.name for p in recipe.passes}
    assert found.about.endswith(".")
    assert found.source or name in ("rtn", "composed", "searched")  # the textbook, and ours


@pytest.mark.parametrize("name", names())
def test_recipes_survive_their_own_text(name: str) -> None:
    found = named(name)
    assert parse(name, tomllib.loads(found.to_toml())) == found


def test_a_recipe_of_ones_own_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(NamedRecipe("mine", ("smooth{alpha=0.3}", "quant"), ("w4a8",)).to_toml())
    recipe = parse_recipe(None, None, str(file))
    assert str(recipe) == "canonicalize,annotate,smooth{alpha=0.3},fold,quant,fold"
    assert [str(rule) for rule in recipe.rules] == ["*=w4a8"]
    assert [str(rule) for rule in parse_recipe(None, "w8a8", str(file)).rules] == ["*=w8a8"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes = ['quant'", "cannot read the recipe"),
        ("pases = ['quant']", "unknown entry 'pases'"),
        ("passes = 'quant'", "expected 'passes' to be a list of texts"),
        ("scheme = ['w8a8']", "expected 'passes', a list of at least one pass"),
        ("about = 3\npasses = ['quant']", "expected 'about' to be a text"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        named(str(file))


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'qvditt'") as error:
        named("qvditt")
    assert "did you mean 'qvdit'" in str(error.value)
    with pytest.raises(ConfigError, match="found nothing"):
        named(str(FOLDER / "none.toml"))


def test_a_pass_list_and_a_recipe_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="got both"):
        parse_recipe("quant", None, "rtn")
