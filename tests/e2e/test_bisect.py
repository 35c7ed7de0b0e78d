"""Planted faults are found, each in at most ceil(log2(n)) + 5 runs: a site, a pass, a timestep."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from vdqc import Sample
from vdqc.base.diagnostics import InputError
from vdqc.base.target import TARGETS
from vdqc.bisect import ARTIFACT, bisect, words
from vdqc.bisect.checks import ScoreCheck
from vdqc.bisect.search import Outcome
from vdqc.cli import main
from vdqc.compiler import complete, parse_recipe
from vdqc.engine.pass_manager import Pass, PassResult
from vdqc.engine.recipe import Recipe
from vdqc.ir.artifact import seal
from vdqc.ir.graph import Stage
from vdqc.ir.peers import feed, quantised_groups, wrap_weight
from vdqc.ir.site import SiteKind
from vdqc.ir.size_nodes import timestep_input
from vdqc.ir.source import Source, load_source
from vdqc.testing.architectures import ARCHITECTURES

aten = torch.ops.aten
CPU = TARGETS["cpu"]
BAD_SITE, BAD_STEP = "blocks.1.up", 450.0
TINY = Path(__file__).parent.parent / "tiny_model.py"


@dataclass(frozen=True)
class Requantise(Pass):
    """Scales of all weights a little larger; sixty times at one site."""

    name: ClassVar[str] = "requantise"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.COMPRESSED})
    exact: ClassVar[bool] = False

    def run(self, graph, ctx):
        for group in quantised_groups(graph):
            for site in group:
                name = f"{site.name}.weight_scale"
                factor = 60.0 if site.name == BAD_SITE else 1.001
                graph.set_param(name, graph.param(name) * factor)
        return PassResult(1)


@dataclass(frozen=True)
class Halve(Pass):
    """Inputs halved and weights doubled; at one site the weight is forgotten."""

    name: ClassVar[str] = "halve"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def run(self, graph, ctx):
        for group in quantised_groups(graph):
            feed(graph, group, aten.mul.Tensor, 0.5)
            for site in group:
                wrap_weight(graph, site, aten.mul.Tensor, 1.0 if site.name == BAD_SITE else 2.0)
        return PassResult(1)


@dataclass(frozen=True)
class RangePerStep(Pass):
    """Static ranges by timestep, all the same but for one, at every site but the first."""

    name: ClassVar[str] = "range_per_step"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.COMPRESSED})
    exact: ClassVar[bool] = False

    def run(self, graph, ctx):
        timestep = timestep_input(graph, ctx.samples)
        for quantiser in {s.input for s in graph.sites("blocks.*", SiteKind.LINEAR)}:

            def call(op, *args, before=quantiser):
                return graph.call(op, *args, before=before)

            first = call(aten.select.int, call(aten.reshape.default, timestep, [-1]), 0, 0)
            distance = call(aten.abs.default, call(aten.sub.Tensor, first, BAD_STEP))
            near = call(aten.lt.Scalar, distance, 1.0)
            scale = quantiser.args[1]
            narrow = call(aten.mul.Tensor, scale, 0.02)
            graph.set_operand(quantiser, 1, call(aten.where.self, near, narrow, scale))
        return PassResult(1)


def source(steps: int = 3) -> Source:
    tiny = load_source(TINY)
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(steps):
        t, batch = 900.0 - 150.0 * index, 2 + index % 2
        x = torch.randn(batch, 12 + 4 * (index % 2), 32, generator=generator)
        samples.append(Sample({"x": x, "timestep": torch.full((batch,), t)}, timestep=t))
    return Source(tiny.model, samples, tiny.name)


def planted(passes: str, scheme: str, after: str, plant: Pass) -> Recipe:
    """The recipe of ``passes`` with ``plant`` behind the pass named ``after``."""
    recipe = parse_recipe(passes, scheme)
    names = [item.name for item in recipe.passes]
    at = names.index(after) + 1
    return complete(Recipe((*recipe.passes[:at], plant, *recipe.passes[at:]), recipe.rules))


def search(recipe: Recipe, min_sqnr: float, steps: int = 3, **options):
    model = source(steps)
    check = ScoreCheck(model, model.samples, min_sqnr, CPU)
    result = bisect(model, recipe, CPU, check, **options)
    for found in result.findings:
        assert found.runs <= found.most
        assert found.most <= math.ceil(math.log2(max(found.count, 1))) + 5
    return result


def test_the_site_of_a_wrong_scale_is_found():
    result = search(planted("rotate,smooth,quant,calibrate", "w8a8", "quant", Requantise()), 25.0)
    passes, site, timestep = result.findings
    assert (passes.culprit, passes.good.passed, passes.bad.passed) == ("requantise", True, False)
    assert (site.culprit, site.count) == (BAD_SITE, 11)
    assert (site.alone.passed, site.without.passed) == (False, True)
    assert max(site.each, key=site.each.get) == BAD_SITE
    assert timestep.culprit == "" or timestep.runs == 0
    assert "3 of 3 are below 25 dB" in timestep.text
    assert f"site {BAD_SITE} (9 of 11) is at fault" in result.conclusion
    assert BAD_SITE in words.shown(result)


def test_the_bug_of_a_pass_that_claims_to_be_exact_is_found():
    result = search(planted("rotate,smooth,quant", "w8a8", "rotate", Halve()), 25.0)
    passes, site, _ = result.findings
    assert passes.culprit == "halve"
    assert passes.good.sqnr_db > 100
    assert site.culprit == BAD_SITE
    assert (site.alone.passed, site.without.passed) == (False, True)


class Silent:
    """The score as a command would give it: passed or not, and nothing else."""

    text = "a check of one bit"

    def __init__(self, check):
        self.check = check

    def judge(self, graph, label):
        return Outcome(self.check.judge(graph, label).passed, said=label)


@pytest.mark.parametrize("silent", [False, True])
def test_the_timestep_of_a_wrong_range_is_found(silent):
    steps = 7
    recipe = planted("quant", "w8a8-static", "quant", RangePerStep())
    model = source(steps)
    score = ScoreCheck(model, model.samples, 20.0, CPU)
    result = bisect(model, recipe, CPU, Silent(score) if silent else score)
    passes, site, timestep = result.findings
    assert passes.culprit == "range_per_step"
    assert site.culprit.startswith("blocks.")
    assert (timestep.culprit, timestep.index, timestep.count) == ("450", 4, steps)
    assert (timestep.alone.passed, timestep.without.passed) == (False, True)
    for found in result.findings:
        assert found.runs <= math.ceil(math.log2(found.count)) + 5
    assert (timestep.runs > 0) is silent
    if not silent:
        assert max(timestep.each, key=timestep.each.get) == "450"


def test_an_artifact_that_its_recipe_does_not_explain_is_blamed():
    graphs = []

    class Keep:
        text = "anything"

        def judge(self, graph, label):
            graphs.append(graph)
            return Outcome(True)

    recipe, model = parse_recipe("quant", "w8a8"), source()
    result = bisect(model, recipe, CPU, Keep())
    assert not result.found
    assert "nothing to find" in result.conclusion
    broken = graphs[-1].clone()
    name = "out.bias"
    broken.set_param(name, broken.param(name) + 10)
    result = search(recipe, 25.0, artifact=broken)
    found, site, timestep = result.findings
    assert found.culprit == ARTIFACT
    assert "its recipe passes now" in result.conclusion
    assert (site.culprit, site.count) == ("out", 1)
    assert timestep.runs == 0


def test_a_check_that_the_float_model_fails_is_refused():
    class Never:
        text = "the impossible"

        def judge(self, graph, label):
            return Outcome(False, said="no")

    with pytest.raises(InputError, match="fails for the float model already: no"):
        bisect(source(), parse_recipe("quant", "w8a8"), CPU, Never())


class Video(torch.nn.Module):
    """Two layers of self-attention over the tokens of [B, 1, F, H, W], at a timestep."""

    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv3d(1, 16, (1, 2, 2), (1, 2, 2))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 48) for _ in range(2))

    def forward(self, x, timestep):
        h = self.patch(x).flatten(2).transpose(1, 2) * (1 + timestep[:, None, None] / 1000)
        for block in self.blocks:
            q, k, v = block(h).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            attended = torch.nn.functional.scaled_dot_product_attention(4 * q, k, v)
            h = h + attended.transpose(1, 2).flatten(2)
        return h


def steps(count, frames=6, batch=5):
    x = torch.randn(batch, 1, frames, 8, 12, generator=torch.Generator().manual_seed(1))
    times = [900.0 - 10 * i for i in range(count)]
    return [Sample({"x": x, "timestep": torch.full((batch,), t)}, timestep=t) for t in times]


@pytest.mark.parametrize("fault", ["a scheme", "a residual"])
def test_a_program_with_a_residual_cache(fault):
    """The score runs it through its two programs, step by step."""
    calls = steps(6)
    model = Source(Video().eval(), [calls[0], *steps(1, 7, 3)])
    scheme = ["w8a8", "blocks.1=w2a8"] if fault == "a scheme" else "none"
    passes = "quant,sparsify{density=0.4,block=16},reparameterize{interval=3}"
    recipe = parse_recipe(passes, scheme)
    seen = ScoreCheck(model, calls, -1000.0, CPU)
    scores = [
        trial.outcome.sqnr_db for trial in bisect(model, recipe, CPU, seen, calls=calls).trials
    ]
    above = 5 if fault == "a scheme" else 1  # dB that the whole program is short of
    check = ScoreCheck(model, calls, scores[-1] + above, CPU)
    result = bisect(model, recipe, CPU, check, calls=calls)
    found, site, _ = result.findings
    for each in result.findings:
        assert each.runs <= each.most
    if fault == "a scheme":
        assert (found.culprit, site.culprit) == ("quant", "blocks.1")
        return
    assert found.culprit == "lower"
    assert "what is lost between refreshes shows here" in found.text
    assert site.culprit.endswith(":attention")


# -- the command ----------------------------------------------------------------------------


def run(capsys, *words):
    code = main(["bisect", *(str(word) for word in words), "--quiet"])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_searches_by_a_shell_command(capsys, model_file):
    check = "! grep -q -e fake_quantize -e vdqc_kernels.int8_linear {artifact}/program.json"
    code, out, err = run(capsys, model_file, "--passes", "quant", "--check", check, "--json")
    assert code == 0, err
    result = json.loads(out)
    passes, site, timestep = result["findings"]
    assert passes["culprit"] == "quant"
    assert (site["culprit"], site["index"]) == ("blocks.0.to_q", 1)
    assert "first of several" in site["text"]
    assert (timestep["culprit"], timestep["count"]) == ("900", 3)
    assert result["runs"] == len(result["trials"])


def test_the_command_searches_an_artifact(capsys, tiny_artifact):
    words = (tiny_artifact, "--model", tiny_artifact.parent / "model.py")
    code, out, err = run(capsys, *words, "--min-sqnr", "20")
    assert (code, err) == (1, "")
    assert "nothing to find: the artifact passes" in out
    code, out, _ = run(capsys, *words, "--min-sqnr", "60")
    assert code == 0
    assert "'quant' (pass 6 of 8) is the first that breaks the check" in out
    code, _, err = run(capsys, *words, "--min-sqnr", "20", "--passes", "quant")
    assert code == 2
    assert "expected no --passes beside an artifact" in err
    code, _, err = run(capsys, tiny_artifact, "--min-sqnr", "20")
    assert code == 2
    assert "which has no float model" in err


def test_the_site_of_a_scale_that_was_edited_in_the_artifact_is_found(
    capsys, tiny_artifact, tmp_path
):
    out = shutil.copytree(tiny_artifact, tmp_path / "out")
    weights = load_file(out / "weights.safetensors")
    weights[f"{BAD_SITE}.kernel.scale"] *= 60
    save_file(weights, out / "weights.safetensors", {"format": "pt"})
    seal(out)
    model = tiny_artifact.parent / "model.py"
    code, text, err = run(capsys, out, "--model", model, "--min-sqnr", "20", "--json")
    assert (code, err) == (0, "")
    passes, site, timestep = json.loads(text)["findings"]
    assert passes["culprit"] == ARTIFACT
    assert (site["culprit"], site["count"]) == (BAD_SITE, 1)
    assert passes["runs"] + site["runs"] + timestep["runs"] <= 5


DIT_SITE = "transformer_blocks.0.ff.net.2"


def test_a_model_that_stays_on_disk(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vdqc.ir.weights.SPILLED_BYTES", 1 << 10)
    ARCHITECTURES["dit"].build().save_pretrained(tmp_path / "dit", max_shard_size="100KB")
    words = ("--passes", "rotate,quant", "--scheme", "w8a8", "--scheme", f"{DIT_SITE}=w2a8")
    code, out, err = run(capsys, tmp_path / "dit", "--mapped", *words, "--min-sqnr", "34", "--json")
    assert code == 0, err
    passes, site, _ = json.loads(out)["findings"]
    assert passes["culprit"] == "quant"
    assert site["culprit"] == DIT_SITE
    for found in json.loads(out)["findings"]:
        assert found["runs"] <= found["most"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "expected a check, got none"),
        (("--check", " "), "expected a command, got an empty text"),
        (("--min-sqnr", "9", "--keep", "x"), "--keep goes with --check"),
        (("--min-sqnr", "9", "--check", "true"), "not allowed with argument"),
        (("--min-sqnr", "nan"), "expected a number of dB"),
        (("--min-sqnr", "9", "--passes", "quantt"), "did you mean 'quant'?"),
        (("--min-sqnr", "9", "--model", "m.py"), "expected an artifact folder"),
        (("--check", "false"), "the check fails for the float model already"),
        (("--check", "exit 125 #"), "expected the check to tell good from bad"),
    ],
)
def test_bad_words_are_one_clear_error(capsys, model_file, words, expected):
    code, out, err = run(capsys, model_file, *words)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("error: ") == 1
