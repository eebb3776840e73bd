"""The data of one update: split, drawn for replay, encoded, frozen without text and found again."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.accounting import count
from agentpref.config import GateSettings, ReplaySettings, UpdateConfig
from agentpref.errors import UnusableState
from agentpref.learn.data import Available, UpdateData, draw, prepare, replay_size
from agentpref.types import Prompt
from tests.core.learn import examples
from tests.core.learn.examples import with_completions


def make(number, **changes):
    fields = {"prompt": asked(number), "provenance": (f"c{number}",)}
    return examples.make_pair(number, "a secret", "another", **{**fields, **changes})


def make_thumb(number, **changes):
    fields = {"prompt": asked(number), "provenance": (f"f{number}",)}
    return examples.make_thumb(number, "a secret", number % 2 == 0, **{**fields, **changes})


def asked(number):
    return Prompt(f"prompt{number}", ({"role": "user", "content": f"Secret {number}?"},))


TRAIN = [make(n) for n in range(4)]
HELD_OUT = [make(n, held_out=True) for n in range(10, 14)]
LONE = [*(make_thumb(n) for n in range(3)), *(make_thumb(n, held_out=True) for n in range(3, 5))]
ALL = [*TRAIN, *HELD_OUT, *LONE]
DATA = UpdateData(
    (TRAIN[2], TRAIN[0], LONE[1], LONE[0]),
    (TRAIN[1], LONE[2]),
    (HELD_OUT[0], LONE[3]),
    (HELD_OUT[1], LONE[4]),
)


def thaw(examples, frozen=None):
    return UpdateData.thaw(orjson.loads(orjson.dumps(frozen or DATA.freeze())), examples)


def test_examples_are_split_by_held_out_and_by_what_was_learned():
    data = Available.split(ALL, {"pair0", "pair10", "thumb0", "thumb3"})
    assert count(
        new=data.new,
        old=data.old,
        new_held_out=data.new_held_out,
        old_held_out=data.old_held_out,
    ) == {
        "new": 3,
        "new_thumbs": 2,
        "old": 1,
        "old_thumbs": 1,
        "new_held_out": 3,
        "new_held_out_thumbs": 1,
        "old_held_out": 1,
        "old_held_out_thumbs": 1,
    }
    assert data.fresh.isdisjoint({"pair0", "thumb0", "thumb3"})
    assert len(data.fresh) == 9
    assert list(data.new) == [*TRAIN[1:], *LONE[1:3]]
    assert {example.example_id for example in data.all()} == {e.example_id for e in ALL}


def test_frozen_data_is_found_again_in_its_order_when_examples_were_added():
    assert thaw([*LONE, *HELD_OUT, *TRAIN, make(99), make_thumb(98)]) == DATA


def test_frozen_data_has_no_text():
    assert b"ecret" not in orjson.dumps(DATA.freeze())


def test_frozen_data_is_found_again_when_feedback_that_agrees_was_added():
    agreed = replace(TRAIN[2], provenance=("c2", "c77"), created_at=50.0)
    assert thaw([agreed, *TRAIN[:2], *HELD_OUT, *LONE]).new[0] == agreed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (None, "no longer there"),
        (replace(TRAIN[2], provenance=("c77",)), "no longer there"),
        (replace(TRAIN[2], noise=0.4), "has changed"),
        (replace(TRAIN[2], weight=2.0), "has changed"),
        (replace(TRAIN[2], origin="correction"), "has changed"),
        (replace(TRAIN[2], held_out=True), "held out now"),
    ],
)
def test_frozen_data_is_refused_when_a_pair_is_gone_or_has_changed(changed, message):
    others = [example for example in ALL if example != TRAIN[2]]
    with pytest.raises(UnusableState, match=message):
        thaw([*others, *([changed] if changed else [])])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (None, "no longer there"),
        (replace(LONE[1], provenance=("f77",)), "no longer there"),
        (with_completions(LONE[1], {"label": 1.0}), "has changed"),
        (make(1, example_id="thumb1", provenance=("f1",)), "has changed"),
        (replace(LONE[1], held_out=True), "held out now"),
    ],
)
def test_frozen_data_is_refused_when_a_thumb_is_gone_or_has_changed(changed, message):
    others = [example for example in ALL if example != LONE[1]]
    with pytest.raises(UnusableState, match=message):
        thaw([*others, *([changed] if changed else [])])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.sampled_from(sorted(DATA.freeze())), json_values.filter(lambda value: value))
def test_damaged_data_is_refused(name, value):
    frozen = {**DATA.freeze(), name: value}
    if frozen != DATA.freeze():
        with pytest.raises(UnusableState):
            thaw(ALL, frozen)


def test_replay_is_as_large_as_the_update_and_half_of_a_large_one():
    settings = ReplaySettings(minimum=128)
    assert [replay_size(n, settings) for n in (10, 400, 1000, 4000)] == [128, 400, 1000, 2000]
    assert replay_size(400, ReplaySettings(minimum=0)) == 0


def strata(**counts):
    return {name: [(name, i) for i in range(n)] for name, n in counts.items()}


def by_number(pool):
    return [float(number) for _, number in pool]


def test_a_draw_has_no_repetition_and_is_the_same_for_the_same_seed():
    once, again = (
        draw(strata(a=50, b=3), 20, hard_share=0.3, hardness=by_number, rng=random.Random(1))
        for _ in range(2)
    )
    assert once == again
    assert len(set(once)) == len(once) == 20
    assert {row for row in once if row[0] == "b"} == {("b", 0), ("b", 1), ("b", 2)}


def test_hard_examples_are_drawn_first_where_a_hard_share_is_set():
    drawn = draw(strata(a=300), 100, hard_share=1.0, hardness=by_number, rng=random.Random(0))
    assert sum(number for _, number in drawn) / 100 > 180  # the mean of a uniform draw is 149.5


def test_hardness_is_computed_for_a_bounded_number_of_examples():
    asked = []

    def spy(pool):
        asked.append(len(pool))
        return by_number(pool)

    draw(strata(a=10_000), 100, hard_share=0.3, hardness=spy, rng=random.Random(0))
    assert sum(asked) == 90


def test_hardness_is_computed_once_for_all_strata_and_each_gives_its_hardest():
    asked = []

    def spy(pool):
        asked.append(Counter(name for name, _ in pool))
        return by_number(pool)

    drawn = draw(strata(a=50, b=80, c=5), 25, hard_share=1.0, hardness=spy, rng=random.Random(3))
    assert asked == [{"a": 30, "b": 30}], "c is drawn whole"
    assert Counter(name for name, _ in drawn) == {"a": 10, "b": 10, "c": 5}
    (again,) = (draw(strata(a=50), 10, hard_share=1.0, hardness=by_number, rng=random.Random(0)),)
    assert again == sorted(again, reverse=True), "hardest first"


def test_hardness_is_not_computed_where_all_examples_are_drawn():
    def fail(pool):
        raise AssertionError

    drawn = draw(strata(a=7, b=9), 16, hard_share=0.3, hardness=fail, rng=random.Random(0))
    assert len(set(drawn)) == 16


def test_a_draw_has_its_size_without_a_hard_share():
    drawn = draw(
        strata(a=30),
        10,
        hard_share=0.0,
        hardness=lambda pool: [0.0] * len(pool),
        rng=random.Random(0),
    )
    assert len(drawn) == 10


def test_grades_of_a_group_that_changed_are_refused():
    group = examples.make_group(1, {"a": 1.0, "b": 0.5, "c": 0.0})
    frozen = UpdateData(new=(group,)).freeze()
    changed = with_completions(group, {}, {"label": 0.6})
    assert UpdateData.thaw(frozen, [group]).new == (group,)
    with pytest.raises(UnusableState, match="has changed"):
        UpdateData.thaw(frozen, [changed])


def old_and_new(old=30, new=2):
    """Examples that live has learned, and new ones: pairs, and thumbs on other prompts."""
    return Available(
        new=(*(make(n) for n in range(new)), *(make_thumb(n) for n in range(100, 100 + new))),
        old=(
            *(make(n) for n in range(200, 200 + old)),
            *(make_thumb(n) for n in range(400, 400 + old)),
        ),
    )


def texts(rows):
    return Counter(row.example.example_id[:4] for row in rows)


class TestPrepare:
    def test_pairs_and_thumbs_are_replayed_each_as_many_as_the_settings_say(self, make_learner):
        config = UpdateConfig(replay=ReplaySettings(minimum=8))
        rows = prepare(make_learner(), differing(old_and_new()), None, config)
        assert texts(rows.new) == {"pair": 2, "thum": 2}
        assert texts(rows.old) == {"pair": 8, "thum": 8}
        assert rows.trained == [*rows.new, *rows.old]
        assert {e.example_id for e in rows.data.old} == {r.example.example_id for r in rows.old}

    def test_the_same_seed_chooses_the_same_rows(self, make_learner):
        config = UpdateConfig(replay=ReplaySettings(minimum=8))
        one, again, other = (
            prepare(make_learner(), differing(old_and_new()), None, replace(config, seed=seed))
            for seed in (0, 0, 1)
        )
        assert one == again
        assert one.data.old != other.data.old

    def test_each_chosen_example_is_encoded_once(self, make_learner):
        learner, encoded = make_learner(), []
        real = learner.encode
        learner.encode = lambda found: encoded.extend(e.example_id for e in found) or real(found)
        config = UpdateConfig(replay=ReplaySettings(minimum=8))
        rows = prepare(learner, differing(old_and_new()), None, config)
        assert Counter(encoded) == Counter(e.example_id for e in rows.data.all())

    def test_hard_pairs_are_sought_among_a_bounded_number(self, make_learner):
        learner, tried = make_learner(), []
        real = learner.hardness
        learner.hardness = lambda found: tried.extend(found) or real(found)
        config = UpdateConfig(replay=ReplaySettings(minimum=6, hard_share=0.5))
        prepare(learner, differing(old_and_new()), None, config)
        assert len(tried) == 9
        assert not any(example.lone for example in tried)

    def test_examples_that_cannot_be_encoded_are_counted_once_and_not_replayed(self, make_learner):
        learner = make_learner(max_length=48)
        long = "a very long secret, " * 9
        data = differing(old_and_new(old=4, new=2))
        data = replace(
            data,
            old=tuple(
                e
                if e.lone
                else with_completions(e, {"message": examples.answer(long, 1.0).message})
                for e in data.old
            ),
        )
        rows = prepare(learner, data, None, UpdateConfig(replay=ReplaySettings(minimum=4)))
        assert texts(rows.old) == {"thum": 4}
        assert [o.reason for o in learner.objections.values()] == ["too_long"] * 4

    def test_where_no_new_example_can_be_encoded_no_pair_is_replayed_or_evaluated(
        self, make_learner
    ):
        learner = make_learner(max_length=16)
        data = replace(differing(old_and_new()), new_held_out=(make(500, held_out=True),))
        rows = prepare(learner, data, None, UpdateConfig())
        assert (rows.trained, rows.held_out) == ([], [])
        assert rows.data.new == data.new

    def test_old_held_out_examples_are_sampled_up_to_the_setting(self, make_learner):
        held_out = tuple(make(n, held_out=True) for n in range(500, 520))
        data = replace(
            differing(old_and_new()), new_held_out=held_out[:3], old_held_out=held_out[3:]
        )
        config = UpdateConfig(gate=GateSettings(max_old_pairs=5))
        rows = prepare(make_learner(), data, None, config)
        assert (len(rows.new_held_out), len(rows.old_held_out)) == (3, 5)
        assert {r.example.example_id for r in rows.new_held_out} == {
            e.example_id for e in held_out[:3]
        }

    def test_an_interrupted_update_continues_with_the_examples_it_started_with(self, make_learner):
        config = UpdateConfig(replay=ReplaySettings(minimum=8))
        available = differing(old_and_new())
        first = prepare(make_learner(), available, None, config)
        more = replace(available, new=(*available.new, make(999)), old=available.old[::-1])
        started = UpdateData.thaw(first.data.freeze(), [*available.all()])
        again = prepare(make_learner(), more, started, replace(config, seed=5))
        assert again == first


def differing(data):
    """The data with answers that differ, so that each thumb has a mismatch."""

    def own(example):
        number = round(example.created_at)
        message = {"role": "assistant", "content": f"a secret {number}"}
        return with_completions(example, {"message": message})

    return replace(data, new=tuple(map(own, data.new)), old=tuple(map(own, data.old)))
