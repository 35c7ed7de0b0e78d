"""Sparse recipes from a model to videos: tiny architectures, and the digits of the example."""

import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdqc.base.diagnostics import Diagnostics
from vdqc.base.metrics import psnr_db
from vdqc.base.numerics import sqnr_db
from vdqc.base.target import TARGETS
from vdqc.compiled import CompiledModel
from vdqc.compiler import compile, parse_recipe
from vdqc.explain import explain
from vdqc.ir.source import Source
from vdqc.kernels.sparse_attention import SPARSE_ATTENTION
from vdqc.loading import load
from vdqc.testing.architectures import ARCHITECTURES, Architecture

WAN, HUNYUAN, LTX = (ARCHITECTURES[name] for name in ("wan-t2v", "hunyuan-video", "ltx"))
#: Another resolution and text length.
OTHER = {"F": 5, "H": 12, "W": 20, "L": 14}
SPARSE = "sparsify{density=0.6,block=16}"
DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "model.py"


def trajectory(
    model: Any, steps: int, of: Architecture = WAN, **shape: int
) -> list[tuple[Tensor, Tensor]]:
    """Outputs of both branches of guidance over a sampling run that looks at nothing it made."""
    call = of.inputs(seed=3, **shape)
    other = {**call, "encoder_hidden_states": -call["encoder_hidden_states"]}
    found = []
    for step in range(steps):
        time = torch.full_like(call["timestep"], 900 - 30 * step)
        with torch.no_grad():
            parts = []
            for name, own in (("cond", call), ("uncond", other)):
                inputs = {**own, "timestep": time, "return_dict": False}
                if not isinstance(model, CompiledModel):
                    parts.append(model(**inputs)[0])
                    continue
                with model.cache_context(name):
                    parts.append(model(**inputs)[0])
        found.append((parts[0], parts[1]))
    return found


@pytest.mark.parametrize("quantised", [False, True])
def test_wan_with_residuals(quantised: bool, tmp_path: Path) -> None:
    wan = WAN.build()
    before = "rotate,smooth,quant," if quantised else ""
    out = compile(
        wan,
        WAN.samples(),
        passes=f"{before}{SPARSE},reparameterize{{interval=3}}",
        scheme="w8a8" if quantised else "none",
        target="cpu",
        out=tmp_path / "out",
    )
    model = load(out.path)
    cache = model.residual_cache
    assert cache is not None
    floats, found = trajectory(wan, 7), trajectory(model, 7)
    assert (cache.refreshes, cache.reuses) == (6, 8)
    least = 25 if quantised else 60
    for step, (pair, wanted) in enumerate(zip(found, floats, strict=True)):
        for own, original in zip(pair, wanted, strict=True):
            # dense steps are those of the float model; the others stay near
            assert sqnr_db(own, original) > (least if step % 3 == 0 else 15)
    for own, original in zip(trajectory(model, 1, **OTHER)[0], trajectory(wan, 1, **OTHER)[0],
                             strict=True):  # fmt: skip
        assert sqnr_db(own, original) > least


@pytest.mark.parametrize(
    ("of", "passes", "scheme", "least", "reused"),
    [
        (HUNYUAN, "sparsify{density=1,block=16}", "none", 60, 60),
        (HUNYUAN, f"rotate,smooth,quant,{SPARSE},reparameterize{{interval=3}}", "w8a8", 20, 15),
        (LTX, f"{SPARSE},reparameterize{{interval=3}}", "none", 60, 15),
    ],
    ids=["padded-text", "padded-text-quantised", "packed-tokens"],
)
def test_padded_text_and_packed_tokens(
    of: Architecture, passes: str, scheme: str, least: float, reused: float, tmp_path: Path
) -> None:
    original = of.build()
    out = compile(
        original, of.samples(), passes=passes, scheme=scheme, target="cpu", out=tmp_path / "out"
    )
    model = load(out.path)
    sparse = [n for n in model.program.graph.nodes if n.target is SPARSE_ATTENTION.op]
    assert len(sparse) == (3 if of is HUNYUAN else 1)
    for shape in ({}, {"L": 14}, {"F": 5, "H": 12, "W": 20}, OTHER):
        steps = 1 if shape else 4
        wanted = trajectory(original, steps, of, **shape)
        for step, (pair, floats) in enumerate(zip(trajectory(model, steps, of, **shape), wanted,
                                                  strict=True)):  # fmt: skip
            for own, value in zip(pair, floats, strict=True):
                assert sqnr_db(own, value) > (least if step % 3 == 0 else reused)


@pytest.mark.parametrize(
    ("passes", "scheme", "least"),
    [
        ("sparsify{density=1,block=16}", "none", 100),
        ("sparsify{policy=topk,density=0.5,block=16}", "none", 20),
        ("rotate,quant,sparsify{density=0.6,block=16,sinks=1}", "w8a8", 20),
    ],
)
def test_attention_over_views(passes: str, scheme: str, least: float, tmp_path: Path) -> None:
    views = ARCHITECTURES["vggt"]
    original = views.build()
    out = compile(
        original, views.samples(), passes=passes, scheme=scheme, target="cpu", out=tmp_path / "out"
    )
    model = load(out.path)
    sparse = [n for n in model.program.graph.nodes if n.target is SPARSE_ATTENTION.op]
    assert len(sparse) == 2  # attention within a frame stays dense
    torch.manual_seed(0)
    for frames, height, width in ((4, 16, 24), (9, 32, 16)):
        images = torch.randn(2, frames, 3, height, width)
        wanted, found = original(images), model(images)
        assert all(sqnr_db(found[key], wanted[key]) > least for key in wanted)


def test_explain_shows_policy_density_and_time() -> None:
    source = Source(WAN.build(), WAN.samples(), name="wan")
    recipe = parse_recipe(f"rotate,smooth,quant,{SPARSE},reparameterize", "w8a8")
    plan = explain(source, recipe, TARGETS["cpu"], Diagnostics())
    rows = {row.name: row for row in plan.sites if row.kind == "attention"}
    sparse = [row for row in rows.values() if row.kernel == "sparse_attention"]
    assert len(sparse) * 2 == len(rows)  # the others are cross-attention
    for row in sparse:
        assert "svg{density=0.6,block=16}: 0." in row.why
        assert "residual{order=2,interval=5}" in row.why
        assert row.predicted_us is not None
        assert row.predicted_us > 0


@pytest.mark.slow
def test_digits_are_still_digits(tmp_path: Path) -> None:
    example = runpy.run_path(str(DIGITS))
    model, samples = example["model"](), list(itertools.islice(example["samples"](), 3))
    pairs = torch.tensor([[3, 7]])
    wanted = example["sample"](model, pairs, 0, steps=8)
    reached = []
    for passes in ("", ",reparameterize{interval=3}"):
        out = compile(
            model,
            samples,
            passes="sparsify{density=0.5,block=64}" + passes,
            scheme="none",
            target="cpu",
            out=tmp_path / f"out{len(reached)}",
            verify=False,
        )
        video = example["sample"](load(out.path), pairs, 0, steps=8)
        reached.append(psnr_db(video, wanted))
    assert min(reached) > 15
