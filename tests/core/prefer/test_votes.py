"""Who is heard when people disagree, with themselves or with each other."""

from __future__ import annotations

from agentpref.prefer.votes import Opinion, settle
from agentpref.types import Origin


def opinion(
    row: str, side: str | None, *, by: str | None = "ann", origin: Origin = "comparison"
) -> Opinion[str]:
    """Say one thing on the only question there is, at a time that is the row's number."""
    voters = frozenset({("human", by)})
    return Opinion((row,), float(row), voters, "which?", side, origin, about=row)


def carried(*opinions: Opinion[str]) -> list[str]:
    winners, _ = settle(opinions)
    return [row for question in winners for opinion in question for row in opinion.rows]


def left(*opinions: Opinion[str]) -> dict[str, str]:
    return dict(settle(opinions)[1])


def test_the_same_voters_newest_word_stands() -> None:
    said = [opinion("1", "x"), opinion("2", "y"), opinion("3", "y")]
    assert carried(*said) == ["2", "3"]
    assert left(*said) == {"1": "superseded"}


def test_a_voter_who_returns_to_a_first_opinion_is_heard_on_both_occasions() -> None:
    said = [opinion("1", "x"), opinion("2", "y"), opinion("3", "x")]
    assert carried(*said) == ["1", "3"]


def test_a_later_tie_takes_a_preference_back() -> None:
    assert left(opinion("1", "x"), opinion("2", None)) == {"1": "superseded", "2": "tie"}


def test_rows_without_a_user_are_one_voters() -> None:
    assert carried(opinion("1", "x", by=None), opinion("2", "y", by=None)) == ["2"]


def test_more_voters_carry_the_question() -> None:
    said = [opinion("1", "x", by="a"), opinion("2", "y", by="b"), opinion("3", "x", by="c")]
    assert carried(*said) == ["1", "3"]
    assert left(*said) == {"2": "outvoted"}


def test_saying_a_thing_often_is_one_vote() -> None:
    said = [opinion("1", "x", by="a"), opinion("2", "x", by="a"), opinion("3", "y", by="b")]
    assert left(*said) == {"1": "contradicted", "2": "contradicted", "3": "contradicted"}


def test_a_stronger_signal_outweighs_any_number_of_weaker_ones() -> None:
    thumbs = [opinion(str(n), "x", by=f"u{n}", origin="thumbs") for n in range(5)]
    assert carried(*thumbs, opinion("9", "y", by="b", origin="correction")) == ["9"]


def test_weaker_signals_decide_between_equal_stronger_ones() -> None:
    said = [
        opinion("1", "x", by="a"),
        opinion("2", "y", by="b"),
        opinion("3", "y", by="c", origin="judge"),
    ]
    assert carried(*said) == ["2", "3"]


def test_a_tie_does_not_speak_against_a_preference() -> None:
    said = [opinion("1", "x", by="a"), opinion("2", None, by="b")]
    assert carried(*said) == ["1"]
    assert left(*said) == {"2": "tie"}
