from dataclasses import replace
from itertools import chain

import pytest
import torch

from vdqc.base import hadamard
from vdqc.base.diagnostics import ConfigError
from vdqc.base.options import check_seed
from vdqc.engine.block_trainer import Schedule
from vdqc.engine.pass_manager import Context
from vdqc.engine.recipe import parse_passes
from vdqc.passes.table import PASSES

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
