"""The parts of a search: words, the solver against every choice, globs, bytes before and after."""

import fnmatch
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vdqc.base.diagnostics import ConfigError, Diagnostics
from vdqc.base.scheme import QuantScheme
from vdqc.base.target import TARGETS
from vdqc.engine import named
from vdqc.engine.recipe import parse_passes, parse_rule
from vdqc.footprint import kernel_bytes
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind
from vdqc.lowering.lower import lower
from vdqc.passes.quant import Quant
from vdqc.passes.table import PASSES
from vdqc.search import parse_schemes
from vdqc.search.budget import Budget
from vdqc.search.cost import FLOAT, Way
from vdqc.search.sensitivity import spread
from vdqc.search.solve import GAP, UNLIMITED, Option, solve, total, undominated
from vdqc.search.writing import globs, recipe_of
from vdqc.testing.harness import annotated, context, run

# -- words ---------------------------------------------------------------------------------------


def test_budgets_are_shares_or_amounts() -> None:
    budget = Budget.parse("size=0.35, time=12ms", "sqnr=30")
    assert budget.size is not None
    assert budget.time is not None
    assert budget.size.of(1000) == 350
    assert budget.time.of(1.0) == 12e3
    assert budget.floor_error == pytest.approx(1e-3)
    found = Budget.parse("size=2GiB", None)
    assert found.size is not None
    assert found.size.of(1.0) == 2 * 2**30
    assert found.floor_error == math.inf


@pytest.mark.parametrize(
    ("budget", "floor", "message"),
    [
        (None, None, "expected --budget or --floor, got neither"),
        ("sise=0.5", None, "unknown key 'sise'.*did you mean 'size'"),
        ("size", None, "expected size=<value>, got 'size'"),
        ("size=", None, "expected size=<value>"),
        ("", None, "got nothing"),
        ("size=half", None, "expected size as a number, got 'half'"),
        ("size=-1", None, "expected size as a number, got '-1'"),
        ("size=nan", None, "expected size as a number"),
        ("size=0", None, "share in 0 ... 1, got 0"),
        ("size=2", None, "share in 0 ... 1, got 2"),
        ("size=2Gb", None, "unknown unit 'Gb' of size.*did you mean 'GB'"),
        ("time=2GB", None, "unknown unit 'GB' of time"),
        ("size=0.5,size=0.6", None, "'size' is said twice"),
        (None, "psnr=30", "unknown key 'psnr'"),
        (None, "sqnr=high", "expected sqnr in dB, got 'high'"),
        (None, "sqnr=inf", "expected sqnr in dB"),
    ],
)
def test_bad_budgets_are_refused(budget: str | None, floor: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        Budget.parse(budget, floor)


@pytest.mark.parametrize("texts", [["w8a9"], ["none"], ["w2+1a8"], ["w8a8-static"], []])
def test_bad_schemes_are_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_schemes(texts)


def test_samples_are_spread_over_timesteps() -> None:
    samples = [Sample({}, timestep=float(t)) for t in (5, 1, 9, 3, 7, 2)]
    assert [s.timestep for s in spread(samples, 3)] == [1.0, 9.0, 3.0]
    assert spread(samples, 9) == samples


# -- the solver ----------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(0, 9).map(float), st.floats(1e-7, 1.0))
OPTIONS = st.builds(Option, NUMBERS, st.integers(-9, 20).map(lambda n: 1e5 * n), NUMBERS)
GROUPS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=4)


@given(GROUPS, st.data())
def test_the_solver_finds_what_trying_every_choice_finds(
    groups: list[list[Option]], data: st.DataObject
) -> None:
    every = [total(groups, choice) for choice in itertools.product(*map(range, map(len, groups)))]
    limit = data.draw(st.sampled_from(every))
    limits = Option(math.inf, limit.bytes, data.draw(st.sampled_from([limit.us, math.inf])))
    best = min(o.error for o in every if o.bytes <= limits.bytes and o.us <= limits.us)
    choice = solve(groups, limits)
    assert choice is not None
    found = total(groups, choice)
    least = sum(min(option.error for option in group) for group in groups)
    assert found.error - least <= (best - least) * (1 + 3 * GAP) + 1e-12
    assert found.bytes <= limits.bytes
    assert found.us <= limits.us * (1 + 1e-9) + 1e-12


@given(GROUPS)
def test_the_least_size_and_nothing_below_it(groups: list[list[Option]]) -> None:
    choice = solve(groups, UNLIMITED, ("bytes", "us", "error"))
    assert choice is not None
    least = sum(min(option.bytes for option in group) for group in groups)
    assert total(groups, choice).bytes == least
    assert solve(groups, Option(math.inf, least - 1, math.inf)) is None


@given(st.lists(OPTIONS, min_size=1, max_size=8))
def test_what_is_left_out_is_beaten(group: list[Option]) -> None:
    def beats(a: Option, b: Option) -> bool:
        return a.error <= b.error and a.bytes <= b.bytes and a.us <= b.us

    kept = undominated(group)
    for i, option in enumerate(group):
        beaten = any(beats(group[j], option) for j in kept if j != i)
        assert beaten != (i in kept)


# -- the recipe ----------------------------------------------------------------------------------

NAMES = [f"blocks.{b}.{leaf}" for b in range(3) for leaf in ("attn1.to_q", "attn2.to_q", "up")]


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_globs_match_their_names_and_no_other(names: set[str]) -> None:
    made = globs(sorted(names), set(NAMES) - names)
    assert {n for n in NAMES if any(fnmatch.fnmatchcase(n, glob) for glob in made)} == names
    assert len(made) <= len(names)


@given(st.lists(st.sampled_from(["w8a8", "w4a8", "none"]), min_size=9, max_size=9), st.integers())
def test_a_recipe_says_what_was_chosen(schemes: list[str], bits: int) -> None:
    ways = [
        FLOAT if scheme == "none" else Way(scheme, bool(bits >> i & 1), bool(bits >> (9 + i) & 1))
        for i, scheme in enumerate(schemes)
    ]
    groups = [([name], way) for name, way in zip(NAMES, ways, strict=True)]
    recipe = recipe_of(groups, ["out"], convolutions=NAMES[::2])
    assert named.parse(recipe.name, {"passes": [*recipe.passes], "scheme": [*recipe.scheme]})
    rules = [parse_rule(text) for text in recipe.scheme]
    passes = {item.name: item for item in parse_passes(recipe.pass_list, PASSES)}
    for name, way in zip(NAMES, ways, strict=True):
        matching = [rule for rule in rules if fnmatch.fnmatchcase(name, rule.select)]
        assert str(matching[-1].scheme) == way.scheme
        for word, wanted in (("rotate", way.rotated), ("smooth", way.smoothed)):
            select = passes[word].select if word in passes else ""  # type: ignore[attr-defined]
            reached = any(fnmatch.fnmatchcase(name, glob) for glob in select.split("|"))
            assert reached == wanted or way == FLOAT
        im2col = passes["im2col"].select if "im2col" in passes else ""  # type: ignore[attr-defined]
        if name in NAMES[::2]:  # a convolution is respelled if, and only if, it is quantised
            reached = any(fnmatch.fnmatchcase(name, glob) for glob in im2col.split("|"))
            assert reached == (way != FLOAT)
    assert not any(fnmatch.fnmatchcase("out", rule.select) for rule in rules[1:])


def test_select_takes_several_globs() -> None:
    graph = annotated(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(3, 8))
    assert [site.name for site in graph.sites("3|[01]")] == ["0", "1", "3"]
    assert [group[0].name for group in graph.groups("2|0")] == ["0", "2"]


# -- bytes ---------------------------------------------------------------------------------------

SCHEMES = [
    "w8a8",
    "w8a8-asym",
    "w6a8",
    "w4a8-g16",
    "w4a8-asym-g16",
    "w6a8-g16",
    "w4a16-g16",
    "w3a6",
]


@pytest.mark.parametrize("text", SCHEMES)
def test_bytes_are_those_that_lowering_stores(text: str) -> None:
    model, x = nn.Sequential(nn.Linear(48, 20)), torch.randn(6, 48)
    graph = annotated(model, x, scheme=text)
    run(graph, Quant(), ctx=context(x, model=model, scheme=text))
    (choice,) = lower(graph, TARGETS["cpu"], Diagnostics())
    assert choice.bytes == kernel_bytes(choice.kernel, 20, 48, QuantScheme.parse(text))
    assert not graph.sites(kind=SiteKind.ATTENTION)


def test_a_solver_that_prints_leaves_stdout_alone(capfd: pytest.CaptureFixture[str]) -> None:
    import ctypes

    from vdqc.search.solve import _silent

    print("before", flush=True)
    with _silent():
        ctypes.CDLL(None).puts(b"HiGHS says something")
    print("after", flush=True)
    assert capfd.readouterr().out == "before\nafter\n"
