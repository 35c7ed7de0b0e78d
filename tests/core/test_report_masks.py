"""Sparse attention before and after compiling: what explain says, what the page draws."""

import pytest

from vdqc import report, summary
from vdqc.base.diagnostics import Diagnostics
from vdqc.base.target import TARGETS
from vdqc.check import check
from vdqc.compiler import compile, parse_recipe
from vdqc.explain import explain
from vdqc.ir import artifact
from vdqc.ir.source import Source
from vdqc.loading import load
from vdqc.report.data import report_data
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ("density=0.6", "spatial band or temporal band: the samples decide"),
        ("density=0.6,heads=online", "spatial band or temporal band: every call decides"),
        ("density=0.6,budget=calibrated", "at a density of its own: the samples decide"),
        ("policy=topk,density=0.6", "every call, head and query block chooses"),
    ],
)
def test_explain_says_policy_density_and_who_decides(options, how):
    source = Source(WAN.build(), WAN.samples(), name="wan")
    recipe = parse_recipe(f"sparsify{{{options},block=16}}", "none")
    plan = explain(source, recipe, TARGETS["cpu"], Diagnostics())
    sparse = [row.name for row in plan.sites if row.why.startswith(("svg", "topk"))]
    assert [mask.site for mask in plan.masks] == sparse != []
    for mask in plan.masks:
        assert 0 < mask.density <= 0.7
        assert mask.heads == 4
        assert how in mask.how
    assert how in summary.planned(plan)
    assert len(plan.to_json()["masks"]) == len(sparse)


def test_masks_that_calls_make_are_seen_and_drawn(tmp_path):
    """Also with residuals, where two programs take turns."""
    wan = WAN.build()
    passes = "sparsify{policy=topk,density=0.6,block=16},reparameterize{interval=3}"
    out = compile(
        wan, WAN.samples(), passes, "none", "cpu", tmp_path / "out", verify=False
    ).path  # fmt: skip
    result = check(load(out), Source(wan, WAN.samples(), name="wan"), timing_runs=0)
    data = report_data(artifact.read(out))
    assert set(result.masks) == {row.site for row in data.masks} != set()
    for mask in result.masks.values():
        heads, rows, columns = mask.kept.shape
        assert (heads, mask.order.shape[0]) == (4, 4)
        assert rows == columns == -(-mask.order.shape[1] // mask.block)
        assert bool(mask.kept.diagonal(dim1=-2, dim2=-1).all())
    measured = {error.name for error in result.sites if error.sqnr_db}
    assert set(result.masks) <= measured
    page = report.render(data, result)
    assert page.count('alt="mask: head') == 4 * len(data.masks)
    assert "every head, call and query block chooses from the data" in page
