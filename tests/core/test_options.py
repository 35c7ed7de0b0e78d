import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

from vdqc.base import hadamard
from vdqc.base.diagnostics import ConfigError, Diagnostics
from vdqc.base.options import check_seed
from vdqc.compiler import compile, parse_recipe
from vdqc.engine.block_trainer import Schedule
from vdqc.engine.named import names
from vdqc.engine.pass_manager import Context, tell_of_untrained
from vdqc.engine.recipe import parse_passes
from vdqc.ir.sample import Sample
from vdqc.passes.table import PASSES
from vdqc.testing.harness import annotated, context, run

LARGEST = 2**62 - 1


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    for text in ("rotate", "select", "distill"):
        with pytest.raises(ConfigError, match=rf"{text}\.seed: expected a seed of at most 62 bits"):
            parse_passes(f"{text}{{seed={LARGEST + 1}}}", PASSES)
    with pytest.raises(ConfigError, match=": seed: expected a seed of at most 62"):
        Context(seed=-LARGEST - 1)


@pytest.mark.parametrize("seed", [LARGEST, -LARGEST])
def test_the_largest_seeds_of_run_and_pass_add_up_to_one(seed: int) -> None:
    check_seed(seed, "seed")
    assert hadamard.random_signs(4, (seed + seed) ^ 0xFFFFFFFF).abs().eq(1).all()


def test_samples_are_shuffled_by_any_seed() -> None:
    schedule = Schedule(seed=2 * LARGEST)
    assert sorted(chain(*schedule.order(6, 3, shuffled=True))) == list(range(6))
    # what a negative seed shuffles stays what torch makes of it
    generator = torch.Generator().manual_seed(-1_000_003 + 2)
    wanted = torch.randperm(6, generator=generator).tolist()
    assert list(chain(*replace(schedule, seed=-1).order(6, 2, shuffled=True))) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "split{branch=tqe,rank=5}",
            "split.rank belongs to branch=svd or branch=oolri, got branch",
        ),
        ("split{branch=oolri,rounds=2}", "split.rounds belongs to branch=svd, got branch=oolri"),
        ("split{placement=inner}", "split.placement belongs to branch=oolri, got branch=svd"),
        ("split{init=svd}", "split.init belongs to branch=tqe"),
        ("split{gain=none}", "split.gain belongs to branch=tqe"),
        ("rotate{form=orthogonal}", "rotate.form belongs to learn=true, got learn=false"),
        ("rotate{learn=true,block=8}", "rotate.block belongs to learn=false, got learn=true"),
        (
            "calibrate{method=absmax,percentile=70}",
            "calibrate.percentile belongs to method=percentile, got method=absmax",
        ),
        ("allocate{choice=row}", "allocate.choice belongs to method=planes, got method=rows"),
        ("allocate{low=3}", "allocate.low belongs to method=layers, got method=rows"),
        ("allocate{search=error,largest=2}", "allocate.largest belongs to search=kurtosis"),
        (
            "allocate{method=layers,search=error}",
            "allocate.search belongs to method=rows or method=planes, got method=layers",
        ),
        ("allocate{search=error,budget=nan}", "allocate.budget: expected bits above 0, got nan"),
        ("allocate{search=error,budget=inf}", "allocate.budget: expected bits above 0, got inf"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_passes(text, PASSES)


def untrained(passes: str | None, recipe: str | None = None) -> list[str]:
    """What is said of options that leave free what nothing trains."""
    diagnostics = Diagnostics()
    tell_of_untrained(parse_recipe(passes, None, recipe).passes, diagnostics)
    return [entry.message for entry in diagnostics if entry.code == "learned-untrained"]


@pytest.mark.parametrize(
    ("passes", "named"),
    [
        ("quant{clip=learned}", "by quant{clip=learned}:"),
        ("smooth{learn=true},rotate,quant", "by smooth{learn=true}:"),
        ("rotate{learn=true},quant,gptq", "by rotate{learn=true}:"),
        ("quant{rounding=learned,step=input},calibrate", "quant{step=input}, quant{rounding=lea"),
        ("rotate{learn=true},smooth{learn=true},quant", "rotate{learn=true}, smooth{learn=true}:"),
        ("quant,split{branch=tqe}", "by split{branch=tqe}:"),
        ("split{learn=true},quant", "by split{learn=true}:"),
        ("quant,split{branch=oolri,placement=inner,learn=false}", "by split{placement=inner}:"),
    ],
)
def test_what_is_left_free_and_not_trained_is_told_of_once(passes: str, named: str) -> None:
    (message,) = untrained(passes)
    assert named in message
    assert not untrained(f"{passes},distill")


@pytest.mark.parametrize(
    "passes",
    [
        "smooth,rotate,quant",
        "smooth{learn=true}",
        "rotate{learn=true}",
        *(f"quant{{{option}=learned}}" for option in ("clip", "step", "rounding")),
        "split,quant",
        "split{learn=true}",
        *(f"quant,split{{branch={branch}}}" for branch in ("tqe", "oolri")),
        *(f"quant,split{{branch={branch},learn=false}}" for branch in ("tqe", "oolri")),
        *(f"quant,split{{branch=oolri,placement=inner,learn={on}}}" for on in ("true", "false")),
        "quant{clip=learned},split{branch=tqe},distill{epochs=1}",
    ],
)
def test_passes_say_what_they_leave_free(passes: str) -> None:
    model, x = nn.Linear(16, 16), torch.randn(3, 16)
    graph = annotated(model, x, scheme="w4a4")
    run(graph, *parse_passes(passes, PASSES), ctx=context(x, model=model, scheme="w4a4"))
    assert bool(graph.free) == bool(untrained(passes))


@pytest.mark.parametrize("name", names())
def test_recipes_train_what_they_leave_free(name: str) -> None:
    assert not untrained(None, name)


def test_compile_tells_of_what_is_not_trained(tmp_path: Path) -> None:
    samples = [Sample({"input": torch.randn(batch, 8)}) for batch in (2, 3)]
    artifact = compile(
        nn.Linear(8, 8), samples, ["quant{clip=learned}"], target="cpu", out=tmp_path / "out"
    )
    told = {entry["code"]: entry for entry in artifact.manifest["diagnostics"]}
    assert "put distill behind" in str(told["learned-untrained"])
