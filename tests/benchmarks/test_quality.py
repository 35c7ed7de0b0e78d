"""The quality table's own parts: ablations that fit their recipes, and what is computed once."""

import argparse
from pathlib import Path

import pytest
import quality
import torch
from quality_ablations import ABLATIONS, ablated, is_ablation, names
from quality_claims import CLAIMS, verdicts
from quality_memo import digest, once_captured, once_run
from quality_sparsity import VARIANTS, passes
from torch import nn

from vdqc import Sample
from vdqc.compiler import compile, parse_recipe
from vdqc.engine.named import named
from vdqc.engine.named import names as named_recipes
from vdqc.ir.artifact import read


@pytest.mark.parametrize("name", [name for recipe in ABLATIONS for name in names(recipe)])
def test_an_ablation_is_a_recipe_of_its_own(name: str) -> None:
    text, scheme = ablated(name)
    recipe = named(name.partition("-")[0])
    assert is_ablation(name)
    assert text != recipe.pass_list
    assert str(parse_recipe(text, list(scheme))) != str(parse_recipe(None, None, recipe.name))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_sparsity_is_a_recipe(name: str, tmp_path: Path) -> None:
    parse_recipe(passes(name, "digits", 0.25, tmp_path, "w4a8", 0), "w4a8")


def test_short_forms_stand_for_all() -> None:
    assert list(quality.spelled(["rtn", "qvdit-*"])) == ["rtn", *names("qvdit")]
    assert list(quality.spelled(["sparsity"])) == list(VARIANTS)


def test_rows_carry_the_whole_name_of_a_part_or_a_file() -> None:
    options = argparse.Namespace(
        recipes="mpq_dmv2-mtrd=0.1,own/mine.toml", schemes="w3a6", densities="1", seeds="0", again=0
    )
    found = [job["recipe"] for job in quality.jobs(options, "unet", [])]
    assert found == ["mpq_dmv2-mtrd=0.1", "mine"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()


def test_a_clone_of_the_first_capture_compiles_to_the_same(tmp_path: Path) -> None:
    net, samples = (
        model(),
        [Sample({"input": torch.randn(3, 8)}), Sample({"input": torch.ones(5, 8)})],
    )
    found = []
    for folder in ("alone", "first", "second"):
        with once_captured() as spared:
            if folder == "second":
                compile(net, samples, "rotate,quant", "w4a8", target="cpu", out=tmp_path / "warm")
                assert not spared
            artifact = compile(
                net, samples, "rotate,quant", "w4a8", target="cpu", out=tmp_path / folder
            )
            assert len(spared) == (folder == "second")
        found.append(read(artifact.path).manifest["files"]["weights.safetensors"])
    assert found[0] == found[1] == found[2]


def test_the_float_model_answers_a_call_once() -> None:
    net, calls = model(), []
    net.register_forward_hook(lambda *_: calls.append("hook"))
    net[0].register_forward_hook(lambda *_: calls.append("computed"))
    value = torch.randn(2, 8)
    with torch.no_grad(), once_run(net):
        first = net(value)
        first.add_(1)  # the caller's own
        again = net(value.clone())
        other = net(value + 1)
    assert calls == ["computed", "hook", "hook", "computed", "hook"]
    assert torch.allclose(again, first - 1)
    assert not torch.equal(other, again)
    assert "forward" not in vars(net)


def test_calls_are_told_apart_by_content_dtype_and_name() -> None:
    value = torch.arange(4.0)
    same = digest(((value,), {"scale": 2}))
    assert same == digest(((value.clone(),), {"scale": 2}))
    for args, kwargs in (
        ((value + 1,), {"scale": 2}),
        ((value.double(),), {"scale": 2}),
        ((value.view(2, 2),), {"scale": 2}),
        ((value,), {"scale": 3}),
        ((value,), {"other": 2}),
    ):
        assert digest((args, kwargs)) != same


def measured(recipe: str, *sqnr_db: float, bits: float = 4.2) -> list[dict[str, object]]:
    common = {"model": "views", "scheme": "w4a4", "effective_bits": bits}
    return [common | {"recipe": recipe, "sqnr_db": value} for value in sqnr_db]


@pytest.mark.parametrize(
    ("own", "word"), [((30.0, 30.4), "ahead"), ((25.3, 25.9), "level"), ((24.0, 24.2), "behind")]
)
def test_a_claim_holds_beyond_both_spreads(own: tuple[float, ...], word: str) -> None:
    rows = measured("quantvggt", *own) + measured("quarot", 25.2, 25.8) + measured("rtn", 23.9)
    (found,) = verdicts(rows)
    assert (found.best.recipe, found.word) == ("quarot", word)
    assert (found.missing, found.richer) == (("smoothquant", "gptq", "awq"), ())
    assert (found.own.seeds, found.best.seeds) == (2, 2)
    assert found.best.spread == pytest.approx(0.3)


def test_claims_are_judged_at_equal_bits() -> None:
    rich = measured("gptq", 40.0, bits=5.0) + measured("smoothquant", 20.0, bits=5.0)
    (found,) = verdicts(measured("quantvggt", 30.0) + measured("quarot", 25.0, bits=4.25) + rich)
    assert (found.best.recipe, found.word) == ("quarot", "ahead")
    assert [cell.recipe for cell in found.richer] == ["gptq"]
    assert not list(verdicts(measured("quantvggt", 30.0) + rich))


def test_claims_name_recipes() -> None:
    for claim in CLAIMS:
        assert {claim.recipe, *claim.against} <= set(named_recipes())
        assert set(claim.published) <= set(claim.schemes)
        assert {paper.baseline for paper in claim.published.values()} <= set(claim.against)


def test_margins_of_papers_and_of_rows_are_shares_of_what_baselines_lose() -> None:
    (found,) = verdicts(measured("quantvggt", 30.0) + measured("quarot", 20.0))
    assert found.removed == pytest.approx(0.9)
    paper = found.claim.published["w4a4"]
    assert paper.removed == pytest.approx((88.2 - 81.6) / (90.0 - 81.6))
