"""Live is asked about what is new: thumbs of one kind, which nothing can tell, never count."""

from __future__ import annotations

import pytest

from agentpref.learn.encode import EncodedExample
from agentpref.prove.known import Known, known
from tests.core.learn.examples import make_pair, make_thumb


class Live:
    """Ranks as people did, but for the pairs of some numbers."""

    def __init__(self, wrong=()):
        self.wrong = {f"pair{number}" for number in wrong}
        self.asked = 0

    def ratios(self, policy, rows):
        assert policy == "live"
        self.asked += len(rows)
        return [self._ratios(row.example) for row in rows]

    def _ratios(self, example):
        liked = example.completions[0].label == 1.0
        return (1.0, 0.0) if liked is not (example.example_id in self.wrong) else (-1.0, 0.0)


def row(example):
    return EncodedExample(example, (9,), ((1, 2), (3,)), (None, None))


def pairs(number, start=0, **changes):
    return [row(make_pair(n, "yes", "no", **changes)) for n in range(start, start + number)]


def thumbs(number, liked, start=1000, **changes):
    return [row(make_thumb(n, "yes", liked, **changes)) for n in range(start, start + number)]


def ask(*rows, live=None):
    return known(live or Live(), [], [one for some in rows for one in some], risk=0.05)


def test_pairs_that_live_ranks_rightly_are_known():
    found = ask(pairs(80))
    assert found == Known(nothing_to_gain=True, prompts=80, right=80)
    assert found.all
    few = ask(pairs(80), live=Live(wrong=range(2)))
    assert (few.all, few.right) == (True, 78)
    assert ask(pairs(80), live=Live(wrong=range(20))) == Known()
    assert ask(pairs(8)) == Known(), "so few could all be wrong"


@pytest.mark.parametrize("liked", [True, False])
def test_thumbs_of_one_kind_are_never_known(liked):
    """Live was "right about 80 of 80" dislikes of what it writes, and they counted as learned."""
    found = ask(thumbs(80, liked))
    assert found == Known(untold=80)
    assert not found.all
    assert not ask(thumbs(80, liked), thumbs(1, not liked, start=2000)).all


def test_beside_what_is_known_they_are_left_to_learn():
    for tag in ("untagged", "another"):
        found = ask(pairs(200), thumbs(80, False, tag=tag))
        assert found == Known(nothing_to_gain=True, prompts=200, right=200, untold=80)
        assert not found.all


def test_a_few_of_them_among_what_is_known_are_no_gain_worth_having():
    assert ask(pairs(300), thumbs(3, True)) == Known(True, 300, 300)


def test_thumbs_of_both_kinds_are_known_by_as_many_of_either():
    found = ask(thumbs(40, True), thumbs(60, False, start=2000))
    assert found == Known(True, prompts=80, right=80)


def test_what_is_held_out_is_asked_first_and_may_be_enough():
    live = Live(wrong=range(20))
    assert known(live, pairs(40, held_out=True), pairs(200, start=100), risk=0.05) == Known()
    assert live.asked == 40
    live = Live()
    assert ask(thumbs(80, True), live=live).untold == 80
    assert live.asked == 0, "what tells nothing is not scored"
