"""The pairs of a night: parted, frozen without text, and found again or refused."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import UnusableState
from agentpref.prefer.night import Agenda, Night
from agentpref.types import Pair, Prompt


def make(number, **changes):
    prompt = Prompt(f"prompt{number}", ({"role": "user", "content": f"Secret {number}?"},))
    sides = ({"role": "assistant", "content": text} for text in ("a secret", "another"))
    pair = Pair(f"pair{number}", "n", float(number), prompt, *sides, "comparison")
    return replace(pair, provenance=(f"c{number}",), **changes)


TRAIN = [make(n) for n in range(4)]
HELD_OUT = [make(n, held_out=True) for n in range(10, 14)]
AGENDA = Agenda((TRAIN[2], TRAIN[0]), (TRAIN[1],), (HELD_OUT[0],), (HELD_OUT[1],))


def thaw(pairs, frozen=None):
    return Agenda.thaw(orjson.loads(orjson.dumps(frozen or AGENDA.freeze())), pairs)


def test_pairs_are_parted_by_side_and_by_what_was_learned():
    night = Night.of([*TRAIN, *HELD_OUT], {"pair0", "pair10"})
    assert night.counts() == {"new": 3, "old": 1, "new_held_out": 3, "old_held_out": 1}
    assert "pair0" not in night.fresh
    assert len(night.fresh) == 6


def test_an_agenda_comes_back_in_its_order_whatever_came_in_since():
    assert thaw([*HELD_OUT, *TRAIN, make(99)]) == AGENDA


def test_frozen_it_holds_no_text():
    assert b"ecret" not in orjson.dumps(AGENDA.freeze())


def test_words_that_agree_may_have_been_added():
    agreed = replace(TRAIN[2], provenance=("c2", "c77"), created_at=50.0)
    assert thaw([agreed, *TRAIN[:2], *HELD_OUT]).new[0] == agreed


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
    others = [pair for pair in (*TRAIN, *HELD_OUT) if pair != TRAIN[2]]
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
            thaw([*TRAIN, *HELD_OUT], frozen)
