"""Trained prompts as evidence: dealt into parts, judged before they are trained, by real models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentpref.config import GateSettings
from agentpref.errors import TrainingDiverged
from agentpref.learn import adapter
from agentpref.learn.data import UpdateData, UpdateRows
from agentpref.learn.trainer import Limits, TrainingReport
from agentpref.prove import crossfit, evaluate
from agentpref.prove.bootstrap import Paired
from agentpref.prove.evidence import Evidence, Generations

WRITES = Generations(distinct_2=1.0, mean_length=1.0)
TRAINED = TrainingReport(9, 3, 1e-2, 1.0, 0.1, 0.0, seconds=10.0, planned_steps=9)


@pytest.fixture
def rows(fresh_learner, pair_of):
    """A learner, and the rows of 24 pairs to train and 4 to hold out, which want a "yes"."""
    learner = fresh_learner(epochs=4)
    trained = learner.encode([pair_of(n, "yes") for n in range(24)])
    held_out = learner.encode([pair_of(n, "yes") for n in range(100, 104)])
    return learner, UpdateRows(UpdateData(), trained, [], held_out, [])


@pytest.fixture
def decide(rows):
    """Call ``decide(new, **changes)`` on an evaluation in which ``new`` prompts are better."""
    learner, data = rows
    learner.fit(data.new, new=len(data.new))
    scores = evaluate.score(learner, data.new_held_out)

    def call(better, limits=None, training=TRAINED, **changes):
        known = replace(scores, candidate=(1.0,) * better + (0.5,) * (4 - better))
        evidence = Evidence(new=known.paired(), kl=0.0, live=WRITES, candidate=WRITES)
        return crossfit.decide(
            learner,
            data,
            replace(evidence, **changes),
            training=training,
            config=learner.config,
            limits=limits or Limits(),
        )

    return call


def test_parts_are_of_prompts_and_their_order_is_by_hash(rows, pair_of):
    learner, data = rows
    parts = crossfit.deal(data.new, GateSettings(folds=5))
    assert [len(part) for part in parts] == [5, 5, 4, 5, 5]
    assert sorted(row.example.example_id for part in parts for row in part) == sorted(
        row.example.example_id for row in data.new
    )
    names = [[row.example.prompt.id for row in part] for part in parts]
    backwards = crossfit.deal(data.new[::-1], GateSettings(folds=5))
    assert [[row.example.prompt.id for row in part] for part in backwards] == names
    twice = [*data.new, *learner.encode([pair_of(n, "yes, it is") for n in range(24)])]
    both = crossfit.deal(twice, GateSettings(folds=5))
    assert [sorted(row.example.prompt.id for row in part) for part in both] == [
        sorted(part + part) for part in names
    ]
    assert crossfit.deal(data.new[:3], GateSettings(folds=4)) == []


@pytest.mark.guarantee("proof")
def test_each_part_is_judged_by_a_model_that_was_trained_on_the_parts_before(
    rows, pair_of, monkeypatch
):
    learner, data = rows
    old = learner.encode([pair_of(n, "yes, of old") for n in (0, 200)])
    trained, epochs, imitated, fit = [], [], [], learner.fit

    def remembering(some, **rest):
        trained.append([row.example for row in some])
        epochs.append(rest["epochs"])
        imitated.append(rest["imitation"])
        return fit(some, **rest)

    monkeypatch.setattr(learner, "fit", remembering)
    parts = crossfit.deal(data.new, GateSettings(folds=4))
    training = replace(TRAINED, epochs=2, imitation=5.0)
    found = crossfit.cross_fit(learner, parts, old, training, Limits())
    assert len(found) == 18
    assert imitated == [5.0] * 3, "they are trained as the candidate was"
    assert epochs == [7, 4, 3], "as many steps as the candidate takes in two epochs of 26 rows"
    for number, examples in enumerate(trained, start=1):
        before = {row.example.example_id for part in parts[:number] for row in part}
        judged = {row.example.prompt.id for row in parts[number]}
        replayed = {e.example_id for e in examples} - before
        assert before <= {e.example_id for e in examples}
        assert not judged & {e.prompt.id for e in examples}, "not even by an old example"
        assert replayed == {r.example.example_id for r in old if r.example.prompt.id not in judged}
    assert set(found.live) == {0.5}
    assert sum(found.candidate) > 0.9 * len(found), "a yes is learned at once"


def test_a_trial_leaves_the_candidate_as_it_was(rows, taught):
    _, data = rows
    learner = taught("yes")
    before, reached = adapter.weights(learner._model), set(learner.reached)
    scores = learner.ratios("candidate", data.new_held_out)
    with learner.trial(data.new[:4]) as report:
        assert report.steps > 0
        inside = adapter.weights(learner._model)
        assert any((inside[name] != before[name]).any() for name in before)
        assert learner.ratios("candidate", data.new_held_out) != scores
    after = adapter.weights(learner._model)
    assert all((after[name] == before[name]).all() for name in before)
    assert learner.ratios("candidate", data.new_held_out) == scores
    assert learner.reached == reached


def test_a_candidate_that_learned_less_than_such_models_gains_nothing_by_them(
    decide, rows, pair_of
):
    learner, _ = rows
    learner.restart("base")
    no = learner.encode([pair_of(n, "no, never", "yes") for n in range(24)])
    learner.fit(no, new=len(no))  # it was taught something else
    evidence, result = decide(4)
    assert len(evidence.cross_fitted) == 0
    assert result.verdict == "insufficient"
    assert "the candidate, which trained on them, about .00; train longer" in evidence.notes[-1]


def test_a_small_night_is_decided_with_its_trained_prompts(decide):
    evidence, result = decide(4)
    assert result.verdict == "passed"
    assert len(evidence.cross_fitted) == 16
    assert result.gain["cross_fitted_better"] == 16
    assert evidence.notes == ()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"training": replace(TRAINED, processes=2)}, "several processes trained together"),
        ({"limits": Limits(seconds=24.0)}, "no time to train 2 more models"),
        ({"cut_short": True}, None),
        ({"kl": 99.0}, None),
    ],
)
def test_where_that_cannot_be_it_is_left_out_and_told(decide, monkeypatch, changes, note):
    monkeypatch.setattr(crossfit, "cross_fit", lambda *_: pytest.fail("it was not to train"))
    evidence, result = decide(4, **changes)
    assert result.verdict != "passed"
    assert len(evidence.cross_fitted) == 0
    assert [note in found for found in evidence.notes] == ([True] if note else [])


@pytest.mark.parametrize("better", [0, 2])
def test_it_is_left_out_where_it_could_not_decide(decide, monkeypatch, better):
    monkeypatch.setattr(crossfit, "cross_fit", lambda *_: pytest.fail("it was not to train"))
    prompts = tuple(map(str, range(4 if better else 0)))
    candidate = (1.0, 1.0, 0.0, 0.0)[: len(prompts)]
    new = Paired((0.5,) * len(prompts), candidate, prompts)
    evidence, result = decide(4, new=new)
    assert (result.verdict, len(evidence.cross_fitted)) == ("insufficient", 0)
    assert result.gain["look_counts"] is bool(better), "had they been better it might have decided"


def test_a_model_that_diverges_proves_nothing_and_is_told(decide, monkeypatch):
    def diverge(*_):
        raise TrainingDiverged("the loss is nan")

    monkeypatch.setattr(crossfit, "cross_fit", diverge)
    evidence, result = decide(4)
    assert result.verdict == "insufficient"
    assert "one of its models diverged: the loss is nan" in evidence.notes[-1]


def test_settings_say_when_and_how_finely(decide, rows, monkeypatch):
    learner, _ = rows
    learner.config = replace(learner.config, gate=GateSettings(cross_fit_below=4))
    monkeypatch.setattr(crossfit, "cross_fit", lambda *_: pytest.fail("it was not to train"))
    assert decide(4)[1].verdict == "insufficient"
    monkeypatch.undo()
    learner.config = replace(learner.config, gate=GateSettings(cross_fit_below=5, folds=2))
    assert len(decide(4)[0].cross_fitted) == 12
