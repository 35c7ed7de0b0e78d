"""Losses: the grammar, the sum of terms, what holds for every term, and the error of outputs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.engine.losses import loss_text, make_term, parse, tap, total
from vdqc.testing.harness import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
HELP = runpy.run_path(str(Path(__file__).with_name("loss_context.py")))
SITE, context = HELP["SITE"], HELP["context"]
ALL = "block+msad{stride=3,salient=2}+std+tmd+trd{window=1}+mtrd"


# -- the grammar and the sum ------------------------------------------------------------------


def test_text_both_ways() -> None:
    text = "block+2*msad{global=0.001,local=auto}+100*tmd{reduction=sum}+auto*mtrd{seed=3}"
    assert loss_text(parse(text)) == text
    nested = text.replace("{", "(").replace("}", ")").replace(",local", ";local")
    assert loss_text(parse(nested)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the loss at ''"),
        ("block+", "cannot read the loss at ''"),
        ("blok", "did you mean 'block'"),
        ("msad{strid=2}", "did you mean 'stride'"),
        ("auto*block", "sets the scale"),
        ("block+block", "given twice"),
        ("block{reduction=max}", "did you mean 'mean'"),
        ("block+msad{global=much}", "expected a number of at least 0 or auto, got much"),
        ("msad{stride=0}", "msad.stride: expected 1 or more, got 0"),
        ("std{low=2}", "expected 0 <= low <= high"),
        ("tmd{temperature=0}", "tmd.temperature: expected a number above 0"),
        ("trd{window=0}", "trd.window: expected 1 or more"),
        ("mtrd{gate=2}", "mtrd.gate: expected 0 ... 1"),
        ("nan*block", "expected a weight of at least 0"),
    ],
)
def test_bad_text_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        parse(text)
    assert message in "\n".join((str(caught.value), *caught.value.diagnostic.notes))


def test_auto_is_the_ratio_of_first_losses() -> None:
    terms = parse("3*block+auto*tmd")
    weights: dict[str, float] = {}
    first, parts = total(terms, context(weights=weights))
    assert float(first) == pytest.approx(2 * 3 * parts["block"])
    second, parts_2 = total(terms, context(weights=weights, noise=0.2))
    ratio = 3 * parts["block"] / parts["tmd"]
    assert float(second) == pytest.approx(3 * parts_2["block"] + ratio * parts_2["tmd"])


def test_auto_waits_for_a_first_loss_that_is_not_zero() -> None:
    terms, weights = parse("block+auto*tmd"), {}
    assert float(total(terms, context(weights=weights, noise=0))[0]) == 0
    loss, parts = total(terms, context(weights=weights))
    assert float(loss) == pytest.approx(2 * parts["block"])


def test_auto_is_more_than_half_precision_holds() -> None:
    ctx = context()
    half = {n: getattr(ctx, n).detach().half() for n in ("fp_out", "q_out")}
    first, parts = total(parse("1e7*block+auto*tmd"), context(**half, weights=(found := {})))
    assert min(found.values()) > 65504  # float16's largest
    assert parts["tmd"] * min(found.values()) == pytest.approx(1e7 * parts["block"])
    assert bool(first.isfinite())


def test_a_sum_that_overflows_is_named() -> None:
    ctx = context()
    with pytest.raises(InputError, match="weighted sum of the loss terms is inf") as caught:
        total(parse("1e308*block+1e308*tmd"), context(q_out=ctx.q_out * 1e3))
    assert "a weight is too large" in caught.value.diagnostic.notes[0]


def test_a_further_output_that_is_not_finite_is_named() -> None:
    ctx = context()
    bad = torch.full_like(ctx.fp_out, float("nan"))
    with pytest.raises(InputError) as caught:
        total(parse("block"), context(fp_rest=(ctx.fp_out,), q_rest=(bad,)))
    assert "the quantised block's output 1 holds NaN" in caught.value.diagnostic.notes[0]


@pytest.mark.parametrize("text", ALL.split("+"))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_names_itself(text: str, bad: float) -> None:
    ctx = context()
    with torch.no_grad():
        ctx.q_out[0, 0, 0] = bad
        ctx.q_taps[tap(SITE, "query")][0, 0, 0, 0] = bad
    name = str(make_term(text.partition("{")[0], text.partition("{")[2].rstrip("}")))
    with pytest.raises(InputError, match=r"blocks.0: loss term") as caught:
        total(parse(text), ctx)
    assert f"loss term '{name}' is" in str(caught.value)
    assert caught.value.diagnostic.code == "loss-not-finite"
    assert "quantised" in caught.value.diagnostic.notes[0]


@pytest.mark.parametrize("text", ALL.split("+"))
def test_zero_without_quantisation_and_a_gradient_with_it(text: str) -> None:
    assert float(total(parse(text), context(noise=0))[0]) == 0
    ctx = context()
    total(parse(text), ctx)[0].backward()
    touched = [v.grad for v in (ctx.q_out, *ctx.q_taps.values()) if v.grad is not None]
    assert touched
    assert all(float(grad.abs().sum()) > 0 for grad in touched)


@settings(max_examples=3)
@given(st.integers(0, 2**31))
def test_every_term_has_the_gradient_of_its_value(seed: int) -> None:
    ctx = context(seed=seed)

    def loss(out: Tensor, query: Tensor) -> Tensor:
        taps = {**ctx.q_taps, tap(SITE, "query"): query}
        fresh = context(seed=seed, q_out=out, q_taps=taps)
        return total(parse(ALL), fresh)[0]

    assert torch.autograd.gradcheck(
        loss, (ctx.q_out, ctx.q_taps[tap(SITE, "query")]), fast_mode=True
    )


def test_half_precision_is_summed_in_float32() -> None:
    out = torch.full((1, 4, 4), 300.0, dtype=torch.float16)
    ctx = context(fp_out=out, q_out=-out)
    assert float(total(parse("block"), ctx)[0]) == 360_000  # beyond float16


# -- block ------------------------------------------------------------------------------------


def test_outputs_count_element_by_element() -> None:
    ctx = context(fp_rest=(torch.zeros(2, 5, 6),), q_rest=(torch.ones(2, 5, 6),))
    whole = (ctx.q_out - ctx.fp_out).square().sum() + 60
    assert_close(total(parse("block"), ctx)[0], whole / (2 * 17 * 6))
    assert_close(total(parse("block{reduction=row}"), ctx)[0], whole / (2 * 17))
    assert_close(total(parse("block{reduction=sum}"), ctx)[0], whole)
