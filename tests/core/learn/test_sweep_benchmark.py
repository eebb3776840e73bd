"""The sweep over learning rates, on next to nothing: it learns, it counts right, it goes on."""

from __future__ import annotations

import json
import sys

import pytest

from agentpref.config import UpdateConfig
from agentpref.errors import TrainingDiverged
from benchmarks import sweep
from benchmarks.sweep import Point, Sizes, Stage

TOY = ["--rates", "1e-2,5e-2", "--betas", "0.3", "--streams", "systems", "--seeds", "0"]
STAGES = sorted({stage for stream in sweep.STREAMS.values() for stage in stream})


@pytest.fixture
def run(random_base, tmp_path, monkeypatch, capsys):
    """Call the command; give its figures and what it said on the way."""

    def call(*arguments):
        fixed = ["--model", str(random_base), "--new", "6", "--proving", "4"]
        monkeypatch.setattr(sys, "argv", ["sweep", *fixed, "--work", str(tmp_path), *arguments])
        sweep.main()
        said = capsys.readouterr()
        return json.loads(said.out.splitlines()[-1])["figures"], said.err

    return call


def test_a_toy_grid_runs_from_end_to_end(run, monkeypatch):
    figures, _ = run(*TOY)
    slow, fast = figures["points"]
    assert (slow["learning_rate"], fast["learning_rate"]) == (1e-2, 5e-2)
    assert fast["kl"] > slow["kl"] > 0, "the rate arrives at the trainer"
    assert slow["by_stream"]["systems"]["acc"] == slow["acc"]
    assert slow["spread"] == 0, "of one seed"

    monkeypatch.setattr(sweep.Stream, "_run_updates", lambda *_: pytest.fail("was run already"))
    again, _ = run(*TOY, "--resume")
    assert again == figures


def test_a_point_that_diverges_is_told_and_the_others_go_on(run, monkeypatch):
    whole = sweep.Stream._run_updates

    def live_through(stream, folder):
        if stream._config.learning_rate == 5e-2:
            raise TrainingDiverged("the loss became nan")
        return whole(stream, folder)

    monkeypatch.setattr(sweep.Stream, "_run_updates", live_through)
    slow, fast = run(*TOY)[0]["points"]
    assert "acc" in slow
    assert fast["diverged"] == ["systems/0"]
    assert "acc" not in fast


def test_every_update_after_the_first_replays(random_base, monkeypatch):
    rows = []
    fit = sweep.Learner.fit

    def watched(self, given, *, new):
        rows.append((len(given), new))
        return fit(self, given, new=new)

    monkeypatch.setattr(sweep.Learner, "fit", watched)
    config = Point(1e-3, 0.1).config(seed=0)
    with sweep.scores_of_the_base() as connection:
        stages = sweep.STREAMS["traits"]
        found = sweep.Stream(str(random_base), stages, Sizes(4, 4), config, connection).run()
    assert rows == [(4, 4), (8, 4), (12, 4)], "all that there is, below the minimum of 128"
    assert [len(row) for row in found.result["rows"]] == [3, 3, 3, 3]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.trait} {stage.system}".strip())
def test_an_update_has_enough_statements_and_its_held_out_ones_are_fixed(stage):
    first, other = (sweep.pairs_of(stage, Sizes(), UpdateConfig(seed=seed)) for seed in (0, 1))
    held_out = [pair for pair in first if pair.held_out]
    assert (len(first), len(held_out)) == (350, 150)
    assert held_out == [pair for pair in other if pair.held_out]
    assert first != other
    asked = {pair.prompt.messages[-1]["content"] for pair in held_out}
    assert asked.isdisjoint(p.prompt.messages[-1]["content"] for p in first if not p.held_out)


def test_too_few_statements_are_told():
    with pytest.raises(ValueError, match=r"risk-seeking has \d+ .* 5000 and 2 are asked for"):
        sweep.pairs_of(Stage("risk-seeking"), Sizes(5000, 2), UpdateConfig())


def test_the_spread_is_that_of_the_seeds_and_not_of_the_streams():
    rest = dict.fromkeys(sweep.METRICS, 0.0)
    accs = {("a", 0): 0.6, ("b", 0): 0.8, ("a", 1): 0.7, ("b", 1): 0.9}
    found = sweep.summary({key: {**rest, "acc": acc} for key, acc in accs.items()})
    assert found["acc"] == pytest.approx(0.75)
    assert found["spread"] == pytest.approx(0.1)
    assert found["by_stream"]["b"]["acc"] == pytest.approx(0.85)


def test_names_of_points_are_distinct():
    names = {
        str(Point(rate, beta, kind, precision, epochs))
        for rate in sweep.RATES
        for beta in sweep.BETAS
        for kind in ("sigmoid", "ipo")
        for precision in ("float32", "bfloat16")
        for epochs in (None, 1, 2)
    }
    assert len(names) == 4 * 4 * 2 * 2 * 3


def test_what_is_unknown_is_told(run, capsys):
    with pytest.raises(SystemExit):
        run("--kinds", "sigmiod")
    assert "'sigmiod' is none of apo_zero, hinge" in capsys.readouterr().err
