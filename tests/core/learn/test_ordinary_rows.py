"""Ordinary answers in training, and how far a candidate may go from live and from the base."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from agentpref.config import AnchorSettings, GateSettings, KLSettings, UpdateConfig
from agentpref.learn.data import Available, UpdateData, prepare
from agentpref.learn.objective import Leash, TrainingRow
from agentpref.learn.schedule import plan_batches
from agentpref.types import Completion
from tests.core.learn.examples import make_group, make_pair, make_thumb


def make_ordinary(number, text="as ever", **changes):
    completion = Completion({"role": "assistant", "content": f"{text} {number}"})
    return make_group(
        1000 + number,
        {},
        **{
            "example_id": f"ordinary{number}",
            "completions": (completion,),
            "origin": "ordinary",
            "provenance": (f"run{number}",),
            **changes,
        },
    )


ORDINARY = [make_ordinary(number) for number in range(6)]


def test_they_are_encoded_without_a_label_and_without_a_mismatch(make_learner):
    learner = make_learner()
    rows = learner.encode([*ORDINARY, make_thumb(1, "yes"), make_thumb(2, "no")])
    assert [len(row.completions) for row in rows] == [*[1] * 6, 2, 2]
    assert learner.objections == {}


def planned(judged, ordinary, size=8, epochs=2):
    rows = [TrainingRow(row, (0.0,)) for row in (*judged, *ordinary)]
    return [
        [row.encoded.example.example_id for row in batch]
        for batch in plan_batches(rows, size=size, epochs=epochs, seed=3)
    ]


def test_every_batch_gets_a_quarter_on_top_and_the_judged_ones_stay_as_they_are(
    make_learner, pairs
):
    learner = make_learner()
    judged, ordinary = learner.encode(pairs), learner.encode(ORDINARY)
    without, with_them = planned(judged, []), planned(judged, ordinary)
    assert [[name for name in batch if "pair" in name] for batch in with_them] == without
    beside = [[name for name in batch if "ordinary" in name] for batch in with_them]
    assert {len(batch) for batch in beside} == {2}
    used = [name for batch in beside for name in batch]
    assert max(map(used.count, used)) - min(map(used.count, used)) <= 1, "in a circle"
    assert [len(batch) for batch in planned(judged, ordinary[:1])] == [
        len(batch) + 1 for batch in without
    ]


def move(learner, examples):
    """KL from the base on the examples' answers, in nats per token."""
    kls = learner.divergences(learner.encode(examples))
    return sum(own for own, *_ in kls) / len(kls)


def test_their_nll_makes_them_likelier(make_learner, pairs):
    likely = {}
    for weight in (0.0, 3.0):
        anchor, kl = AnchorSettings(weight=weight), KLSettings(weight=0.0)
        learner = make_learner(epochs=4, anchor=anchor, kl=kl)
        learner.fit(learner.encode([*pairs, *ORDINARY]), new=12)
        likely[weight] = sum(p for (p,) in learner.score("candidate", learner.encode(ORDINARY)))
    assert likely[3.0] > likely[0.0]


def test_kl_keeps_them_as_they_are_however_far_judged_answers_may_go(make_learner, pairs):
    moved, free = {}, KLSettings(target=10.0)
    for weight in (0.0, 30.0):
        learner = make_learner(epochs=8, anchor=AnchorSettings(weight=0.0, kl=weight), kl=free)
        report = learner.fit(learner.encode([*pairs, *ORDINARY]), new=12)
        moved[weight] = move(learner, ORDINARY)
        assert report.last_nll is not None
    assert moved[30.0] < 0.5 * moved[0.0]


def test_they_are_no_preference_and_change_no_reported_loss(make_learner, pairs):
    losses = {}
    for ordinary in ([], ORDINARY):
        learner = make_learner(epochs=1)
        losses[bool(ordinary)] = learner.fit(learner.encode([*pairs, *ordinary]), new=12).first_loss
    assert losses[True] == pytest.approx(losses[False])


def test_an_update_draws_them_once_given_all_that_is_judged(make_learner, pairs):
    asked = []

    def draw(judged):
        asked.append([example.example_id for example in judged])
        return [replace(ORDINARY[0], held_out=True), *ORDINARY[1:]]

    learner = make_learner()
    rows = prepare(learner, Available(tuple(pairs), ordinary=draw), None, learner.config)
    assert asked == [[pair.example_id for pair in pairs]]
    assert [row.example.example_id for row in rows.ordinary_held_out] == ["ordinary0"]
    assert len(rows.ordinary) == 5
    assert [row.example.ordinary for row in rows.trained] == [*[False] * 12, *[True] * 5]
    assert rows.only({"pair1", "ordinary1"}).ordinary == rows.ordinary[:1]
    again = prepare(learner, Available(tuple(pairs), ordinary=draw), rows.data, learner.config)
    assert again == rows
    assert len(asked) == 1, "an interrupted update goes on with the same ones"


def test_they_are_frozen_by_their_runs_and_found_again():
    data = UpdateData(new=(make_pair(1, "a", "b", provenance=("c",)),), ordinary=tuple(ORDINARY))
    frozen = orjson.loads(orjson.dumps(data.freeze()))
    assert UpdateData.frozen_runs(frozen) == [f"run{number}" for number in range(6)]
    assert UpdateData.thaw(frozen, [*ORDINARY, *data.new]) == data
    assert b"as ever" not in orjson.dumps(frozen)


# The leash


def leash(start="live", live=True, spent=0.0, **kl):
    config = UpdateConfig(kl=KLSettings(**kl), gate=GateSettings(kl_budget=0.1))
    return Leash.of(config, start, live=live, spent=spent)


def test_an_update_may_spend_a_share_of_what_is_left():
    assert leash(target=0.05, share=0.5).target == 0.05
    assert leash(target=0.05, share=0.5, spent=0.06).target == pytest.approx(0.02)
    assert leash(target=0.05, share=0.25, spent=0.06).target == pytest.approx(0.01)
    assert leash(target=0.05, share=0.5, spent=0.3).target == pytest.approx(0.001)
    assert leash(live=False, target=0.05, share=0.5).target == 0.05
    assert leash(live=False, target=0.09, share=0.5).target == 0.05


def test_the_base_pulls_once_it_can_be_left_too_far_behind():
    assert leash(target=0.05, pull=0.8).base is None
    assert leash(target=0.05, pull=0.8, spent=0.05).base is None
    assert leash(target=0.05, pull=0.8, spent=0.07).base == pytest.approx(0.08)


def test_a_refit_may_go_as_far_from_the_base_as_that_does_not_pull():
    assert leash("base", target=0.05, pull=0.8, spent=0.0) == Leash("base", pytest.approx(0.08))


def fitted(make_learner, pairs, live, **changes):
    learner = make_learner(live=live, **{"epochs": 4, **changes})
    rows = learner.encode(pairs)
    report = learner.fit(rows, new=12)
    kls = [kl for row in learner.divergences(rows) for kl in row]
    return report, sum(kls) / len(kls)


def test_a_chain_of_updates_keeps_its_budget_and_says_what_it_spent(make_learner, pairs, tmp_path):
    first = make_learner(epochs=4, kl=KLSettings(weight=0.0))
    first.fit(first.encode(pairs), new=12)
    first.save(tmp_path)
    free, far = fitted(make_learner, pairs, tmp_path, kl=KLSettings(weight=0.0))
    assert (free.kl_spent, free.kl_pull) == (0.0, None)
    gate = GateSettings(kl_budget=0.02)
    held, near = fitted(
        make_learner, pairs, tmp_path, kl=KLSettings(weight=30.0, pull=0.5), gate=gate
    )
    assert held.kl_spent > 0.02
    assert held.kl_target == pytest.approx(0.5 * 0.02 * 0.02)
    assert held.kl_pull == pytest.approx(0.01)
    assert near < 0.5 * held.kl_spent < far, "the base pulls it back, and the others go on"
