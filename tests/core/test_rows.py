"""Rows that forms of a linear are weighed on."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vdqc.engine.rows import input_rows
from vdqc.ir.sample import Sample
from vdqc.testing.harness import annotated

GRAPH = annotated(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 4))


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 20))
def test_rows_come_from_all_samples(samples: int, tokens: int, count: int) -> None:
    calls = [Sample({"input": torch.full((tokens, 4), float(i))}) for i in range(samples)]
    rows = input_rows(GRAPH, calls, GRAPH.groups(), count)["0"]
    assert len(rows) == min(count, samples * min(tokens, -(-count // samples)))
    each = torch.bincount(rows[:, 0].long(), minlength=samples)
    assert int(each.max() - each.min()) <= 1
    assert bool((each > 0).all()) or count < samples
