"""Binary search, mixed graphs and programs by timestep, each against the graphs they come from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.numerics import relative_error
from vdqc.base.target import TARGETS
from vdqc.bisect import words
from vdqc.bisect.checks import CommandCheck, ScoreCheck
from vdqc.bisect.mix import END, Mixer
from vdqc.bisect.search import Outcome, Trial, Trials, first_failure, most_runs
from vdqc.bisect.switch import cuts, switched
from vdqc.engine.recipe import Recipe
from vdqc.ir.frontend import capture
from vdqc.ir.sample import Sample
from vdqc.ir.source import Source
from vdqc.loading import load
from vdqc.passes.fold import Fold
from vdqc.passes.quant import Quant
from vdqc.passes.smooth import Smooth
from vdqc.passes.split import Branch, Split
from vdqc.testing.harness import AdaLNBlock, annotated, context, run

WIDTH = 16


# -- search ---------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=200))
def test_the_search_ends_at_a_true_transition_whatever_the_check_says_between(middle):
    states = [True, *middle, False]
    asked = []

    def passes(index):
        asked.append(index)
        return states[index]

    count = len(states) - 1
    index = first_failure(count, passes)
    assert states[index - 1]
    assert not states[index]
    assert len(asked) == len(set(asked)) <= math.ceil(math.log2(count))
    assert len(asked) + 5 <= most_runs(count) or not asked


@given(st.integers(1, 500), st.data())
def test_the_only_transition_is_found(count, data):
    wanted = data.draw(st.integers(1, count))
    assert first_failure(count, lambda index: index < wanted) == wanted


# -- mixing ---------------------------------------------------------------------------------


def block(gated: bool = True):
    torch.manual_seed(0)
    model = AdaLNBlock(WIDTH, 2, gated=gated, affine=True).eval()
    x = torch.randn(2, 6, WIDTH)
    x[..., 3] *= 20  # something to smooth
    return model, (x, torch.randn(2, WIDTH))


def pair(*passes, scheme="w4a8", gated=True):
    """The graphs before and after the last pass, and their inputs."""
    model, inputs = block(gated)
    graph = annotated(model, *inputs, scheme=scheme)
    ctx = context(*inputs, model=model, scheme=scheme)
    run(graph, *passes[:-1], ctx=ctx)
    before = graph.clone()
    run(graph, passes[-1], ctx=ctx)
    return before, graph, inputs


@pytest.mark.parametrize(
    "passes",
    [
        (Quant(),),
        (Smooth(), Quant()),
        (Split(rank=2), Quant()),
        (Quant(), Split(branch=Branch.OOLRI, rank=2)),
    ],
    ids=lambda passes: ",".join(map(str, passes)),
)
def test_a_mix_of_one_kind_is_that_graph_bit_for_bit(passes):
    before, after, inputs = pair(*passes)
    mixer = Mixer(before, after)
    assert len(mixer.sites) == 8
    assert not torch.equal(before.run(*inputs)[0], after.run(*inputs)[0])
    assert torch.equal(mixer.mix(()).run(*inputs)[0], after.run(*inputs)[0])
    assert torch.equal(mixer.mix(mixer.sites).run(*inputs)[0], before.run(*inputs)[0])


def test_restoring_sites_moves_the_output_and_leaves_both_graphs_alone():
    before, after, inputs = pair(Smooth(), Quant())
    texts = str(before), str(after)
    mixer = Mixer(before, after)
    exact = before.run(*inputs)[0]
    half = relative_error(mixer.mix(mixer.sites[4:]).run(*inputs)[0], exact)
    assert 0 < half < relative_error(after.run(*inputs)[0], exact)
    alone = mixer.mix(set(mixer.sites) - {"down"})
    assert [s.name for s in alone.sites() if "fake_quantize" in str(s.node.args[1])] == ["down"]
    assert (str(before), str(after)) == texts


def test_a_quantiser_that_peers_share_is_copied_once():
    before, after, _ = pair(Quant())
    mixer = Mixer(after, before)  # the other way round: quantisers come back
    graph = mixer.mix({"to_q", "to_k", "to_v"})
    inputs = {site.input for site in graph.sites("to_?")}
    assert len(inputs) == 1


def test_only_sites_that_differ_are_searched_and_the_wrong_one_stands_out():
    before, after, inputs = pair(Quant(), scheme="w8a8")
    graph = after.clone()
    graph.set_param("up.weight_scale", graph.param("up.weight_scale") * 50)
    mixer = Mixer(after, graph)
    assert mixer.sites == ["up"]
    errors = Mixer(before, graph).local_errors(graph.signature.bind(inputs, {}))
    assert max(errors, key=errors.get) == "up"
    assert errors["up"] > 10 * errors["down"] > 0


def test_what_only_the_end_reads_is_searched_too():
    before, _, inputs = pair(Quant())
    after = before.clone()
    end = after.output
    (value,) = end.all_input_nodes
    end.replace_input_with(value, after.call(torch.ops.aten.mul.Tensor, value, 3, before=end))
    after.clean()
    mixer = Mixer(before, after)
    assert mixer.sites == [END]
    assert mixer.local_errors(after.signature.bind(inputs, {})) == {END: pytest.approx(2.0)}
    assert torch.equal(mixer.mix({END}).run(*inputs)[0], before.run(*inputs)[0])


def test_sites_whose_outputs_changed_in_meaning_stay_with_their_readers():
    before, after, inputs = pair(Smooth(alpha=0.9), Fold())  # scales move into rows of 'up'
    bound = after.signature.bind(inputs, {})
    mixer = Mixer(before, after)
    assert mixer.local_errors(bound)["down"] > 0.1
    errors = mixer.join_coupled(bound, 0.01)
    assert max(errors.values()) < 1e-5
    assert "up" not in mixer.sites
    assert "up" in mixer.joined("down")
    exact = before.run(*inputs)[0]
    for index in range(len(mixer.sites) + 1):
        assert relative_error(mixer.mix(mixer.sites[index:]).run(*inputs)[0], exact) < 1e-5


def test_a_fault_is_not_taken_for_a_change_of_meaning():
    before, after, inputs = pair(Smooth(alpha=0.9), Fold())
    name = str(after.site("gate").weight.target)
    after.set_param(name, after.param(name) * 1.5)
    mixer = Mixer(before, after)
    errors = mixer.join_coupled(after.signature.bind(inputs, {}), 0.01)
    assert [site for site, error in errors.items() if error > 0.01] == ["gate"]
    assert "up" in mixer.joined("down")


# -- timesteps ------------------------------------------------------------------------------


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, timestep):
        return self.down(self.up(x).relu() + timestep[:, None] / 1000)


def timed(dtype=torch.float32):
    torch.manual_seed(0)
    make = {t: 2 + t % 2 for t in (900, 501, 100)}
    samples = [
        Sample({"x": torch.randn(b, WIDTH), "timestep": torch.full((b,), t, dtype=dtype)}, t)
        for t, b in make.items()
    ]
    return Timed().eval(), samples


@pytest.fixture(scope="module")
def timed_pair():
    model, samples = timed()
    before = capture(model, samples)
    after = before.clone()
    after.set_param("up.weight", after.param("up.weight") * 2)
    return before, after, samples


def test_cuts_lie_between_neighbours():
    assert cuts([900.0, 500.0, 100.0]) == [math.inf, 700.0, 300.0, -math.inf]


def test_a_switched_graph_is_one_or_the_other_by_timestep(timed_pair):
    before, after, samples = timed_pair
    graph = switched(before, after, 300.0, 700.0, samples)
    for sample in samples:
        wanted = after if sample.timestep == 501 else before
        assert torch.equal(graph.run(**sample.inputs)[0], wanted.run(**sample.inputs)[0])


def test_a_switched_graph_loads_as_an_artifact(timed_pair, tmp_path):
    before, after, samples = timed_pair
    graph = switched(before, after, -math.inf, 700.0, samples)
    command = f"cp -r {{artifact}} {tmp_path}/kept && echo seen && false"
    check = CommandCheck(command, tmp_path / "w", Recipe(()), TARGETS["cpu"], samples[0])
    (tmp_path / "w").mkdir()
    assert check.judge(graph, "some label") == Outcome(False, said="seen")
    assert list((tmp_path / "w").iterdir()) == []
    model = load(tmp_path / "kept")
    for sample in samples:
        assert torch.equal(model(**sample.inputs), graph.run(**sample.inputs)[0])


def test_a_program_without_timestep_is_refused():
    before, after, _ = pair(Quant())
    with pytest.raises(InputError, match="no-timestep"):
        switched(before, after, 0.0, 1.0, [])


# -- checks ---------------------------------------------------------------------------------


def test_the_score_is_that_of_all_calls_together(timed_pair):
    before, after, samples = timed_pair
    model, _ = timed()
    check = ScoreCheck(Source(model, samples), samples, 20.0, TARGETS["cpu"])
    assert check.judge(before, "float").passed
    bad = check.judge(after, "bad")
    mean = sum(error**2 for error in bad.errors) / 3
    assert not bad.passed
    assert bad.sqnr_db == pytest.approx(-10 * math.log10(mean))
    nan = after.clone()
    nan.set_param("up.weight", nan.param("up.weight") * math.nan)
    assert check.judge(nan, "nan") == Outcome(False, -math.inf, (math.inf,) * 3)


def test_a_threshold_must_be_a_number():
    with pytest.raises(ConfigError, match="expected a number of dB, got nan"):
        ScoreCheck(Source(nn.Identity(), []), [], math.nan, TARGETS["cpu"])


@pytest.mark.parametrize(
    ("command", "passed", "said"),
    [("true", True, "exit 0"), ("echo 7.5 dB; exit 3 #", False, "7.5 dB"), ("test -d", True, None)],
)
def test_a_command_tells_by_its_exit_code(timed_pair, tmp_path, command, passed, said):
    before, _, samples = timed_pair
    check = CommandCheck(command, tmp_path, Recipe(()), TARGETS["cpu"], samples[0], keep=True)
    outcome = check.judge(before, "Float model!")
    assert outcome.passed is passed
    assert said in (None, outcome.said)
    assert [path.name for path in tmp_path.iterdir()] == ["00-float-model"]


@pytest.mark.parametrize("command", ["exit 125 #", "no-such-program-here"])
def test_a_command_that_cannot_tell_is_an_error(timed_pair, tmp_path, command):
    before, _, samples = timed_pair
    check = CommandCheck(command, tmp_path, Recipe(()), TARGETS["cpu"], samples[0])
    with pytest.raises(InputError, match="check-failed"):
        check.judge(before, "x")


# -- words ----------------------------------------------------------------------------------


class Always:
    text = "anything"

    def judge(self, graph, label):
        return Outcome(True, math.inf)


def test_computed_outcomes_are_no_runs():
    trials = Trials(Always())
    with trials.counted(3, "bisect"):
        trials.run("site", "one", lambda: None)
        trials.compute("site", "two", Outcome(False, 3.0))
    assert trials.runs("site") == 1
    text = words.table(trials.made)
    assert "no run needed" in text
    assert "3.0 dB" in text
    assert words.conclusion([], [Trial("pass", "after lower", Outcome(True, 41.0))]) == (
        "nothing to find: after lower passes (41.0 dB, 1 run)"
    )


@pytest.mark.parametrize(
    ("alone", "without", "expected"),
    [
        (False, True, "is at fault"),
        (True, True, "tips it"),
        (False, False, "first of several"),
        (True, False, "errors add up"),
    ],
)
def test_a_culprit_is_blamed_for_what_it_does_by_itself(alone, without, expected):
    outcomes = Outcome(alone, 10.0), Outcome(without, 20.0)
    assert expected in words.culprit("site", "up", 2, 4, *outcomes, {"up": 0.1, "down": 0.2})
