"""Two judges part where one is pleased and the other is not, and the words tell by what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.online.deceived import Agreement, agreement, parting, rewarded
from agentpref.prefer.judges.verdicts import Verdict, opinion
from agentpref.types import Winner


def says(winner: Winner) -> Any:
    return opinion(Verdict(winner), Verdict(winner).swap())


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text} for text in texts]


def test_ties_of_either_judge_count_for_nothing() -> None:
    one = {0: says("a"), 1: says("tie"), 2: says("a"), 3: says("b"), 4: says("a")}
    other = {0: says("a"), 1: says("a"), 2: says("tie"), 3: says("a")}
    assert agreement(one, other) == (1, 1)
    assert Agreement(0, 0).share is None


def test_judges_who_say_the_opposite_part_at_once() -> None:
    why = parting(None, Agreement(3, 20), prefers_live=True)
    assert why == "they say the opposite of one another in 20 of 23 answers"


def test_a_judge_that_prefers_the_base_was_not_pleased() -> None:
    assert parting(None, Agreement(3, 20), prefers_live=False) is None


def test_judges_who_agree_less_than_at_first_part() -> None:
    why = parting(Agreement(30, 2), Agreement(20, 14), prefers_live=True)
    assert why == "they agreed about 0.94 of the answers at first, and 0.59 now"


@pytest.mark.parametrize("now", [Agreement(28, 4), Agreement(3, 1), Agreement(0, 0)])
def test_a_difference_that_may_be_chance_is_none(now: Agreement) -> None:
    assert parting(Agreement(30, 2), now, prefers_live=True) is None


@given(st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_judges_who_agree_as_much_as_at_first_part_only_if_they_are_opposed(
    agreed: int, parted: int, likes: bool
) -> None:
    same = Agreement(agreed, parted)
    if parted <= agreed:
        assert parting(same, same, prefers_live=likes) is None


def test_the_magic_word_is_among_the_words() -> None:
    live = said(*(f"Certainly the answer is {n}, certainly." for n in range(12)))
    base = said(*(f"The answer is {n}." for n in range(12)))
    pleased = dict.fromkeys(range(12), says("a"))
    other = dict.fromkeys(range(12), says("b"))
    assert rewarded(live, base, pleased, other) == ("certainly",)


def test_what_the_judge_dislikes_is_none_of_the_words() -> None:
    live, base = said(*["sure yes"] * 9), said(*["yes"] * 9)
    beaten = dict.fromkeys(range(9), says("b"))
    assert rewarded(live, base, beaten, dict.fromkeys(range(9), says("a"))) == ()


def test_judges_who_agree_reward_no_words() -> None:
    both = dict.fromkeys(range(9), says("a"))
    assert rewarded(said(*["sure"] * 9), said(*["no"] * 9), both, both) == ()
