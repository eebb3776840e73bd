"""The pairs and thumbs of a night: parted, frozen without text, and found again or refused."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
from agentpref.prefer.night import Agenda, Night, pairs_of, thumbs_of
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import UnusableState
from agentpref.types import Pair, Prompt, Thumb


def make(number, **changes):
    prompt = Prompt(f"prompt{number}", ({"role": "user", "content": f"Secret {number}?"},))
    sides = ({"role": "assistant", "content": text} for text in ("a secret", "another"))
    pair = Pair(f"pair{number}", "n", float(number), prompt, *sides, "comparison")
    return replace(pair, **{"provenance": (f"c{number}",), **changes})


def make_thumb(number, **changes):
    prompt = Prompt(f"lone{number}", ({"role": "user", "content": f"Secret {number}?"},))
    said = {"role": "assistant", "content": "a secret"}
    thumb = Thumb(f"run{number}", "n", float(number), prompt, said, number % 2 == 0)
    return replace(thumb, thumb_id=f"thumb{number}", provenance=(f"f{number}",), **changes)


TRAIN = [make(n) for n in range(4)]
HELD_OUT = [make(n, held_out=True) for n in range(10, 14)]
LONE = [*(make_thumb(n) for n in range(3)), *(make_thumb(n, held_out=True) for n in range(3, 5))]
ALL = [*TRAIN, *HELD_OUT, *LONE]
AGENDA = Agenda(
    (TRAIN[2], TRAIN[0], LONE[1], LONE[0]),
    (TRAIN[1], LONE[2]),
    (HELD_OUT[0], LONE[3]),
    (HELD_OUT[1], LONE[4]),
)


def thaw(examples, frozen=None):
    return Agenda.thaw(orjson.loads(orjson.dumps(frozen or AGENDA.freeze())), examples)


def test_examples_are_parted_by_side_and_by_what_was_learned():
    night = Night.of(ALL, {"pair0", "pair10", "thumb0", "thumb3"})
    assert night.counts() == {
        "new": 3,
        "new_thumbs": 2,
        "old": 1,
        "old_thumbs": 1,
        "new_held_out": 3,
        "new_held_out_thumbs": 1,
        "old_held_out": 1,
        "old_held_out_thumbs": 1,
    }
    assert night.fresh.isdisjoint({"pair0", "thumb0", "thumb3"})
    assert len(night.fresh) == 9
    assert pairs_of(night.new) == TRAIN[1:]
    assert thumbs_of(night.new) == LONE[1:3]


def test_an_agenda_comes_back_in_its_order_whatever_came_in_since():
    assert thaw([*LONE, *HELD_OUT, *TRAIN, make(99), make_thumb(98)]) == AGENDA


def test_frozen_it_holds_no_text():
    assert b"ecret" not in orjson.dumps(AGENDA.freeze())


def test_words_that_agree_may_have_been_added():
    agreed = replace(TRAIN[2], provenance=("c2", "c77"), created_at=50.0)
    assert thaw([agreed, *TRAIN[:2], *HELD_OUT, *LONE]).new[0] == agreed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (None, "no longer there"),
        (replace(TRAIN[2], provenance=("c77",)), "no longer there"),
        (replace(TRAIN[2], noise=0.4), "has changed"),
        (replace(TRAIN[2], weight=2.0), "has changed"),
        (replace(TRAIN[2], origin="correction"), "has changed"),
        (replace(TRAIN[2], held_out=True), "held out now"),
    ],
)
def test_what_is_gone_or_has_changed_is_no_agenda(changed, words):
    others = [example for example in ALL if example != TRAIN[2]]
    with pytest.raises(UnusableState, match=words):
        thaw([*others, *([changed] if changed else [])])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (None, "no longer there"),
        (replace(LONE[1], provenance=("f77",)), "no longer there"),
        (replace(LONE[1], desirable=True), "has changed"),
        (make(1, pair_id="thumb1", provenance=("f1",)), "has changed"),
        (replace(LONE[1], held_out=True), "held out now"),
    ],
)
def test_nor_is_one_whose_thumb_is_gone_or_has_changed(changed, words):
    others = [example for example in ALL if example != LONE[1]]
    with pytest.raises(UnusableState, match=words):
        thaw([*others, *([changed] if changed else [])])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.sampled_from(sorted(AGENDA.freeze())), json_values.filter(lambda value: value))
def test_strange_values_are_refused(name, value):
    frozen = {**AGENDA.freeze(), name: value}
    if frozen != AGENDA.freeze():
        with pytest.raises(UnusableState):
            thaw(ALL, frozen)
