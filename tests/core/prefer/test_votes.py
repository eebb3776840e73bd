"""Which votes win when people contradict themselves or each other."""

from __future__ import annotations

from agentpref.prefer.votes import Vote, settle
from agentpref.types import Origin


def vote(
    row: str, side: str | None, *, by: str | None = "ann", origin: Origin = "comparison"
) -> Vote[str]:
    """A vote on the one question of these tests; its time is the row's number."""
    voters = frozenset({("human", by)})
    return Vote((row,), float(row), voters, "which?", side, origin, subject=row)


def winners(*votes: Vote[str]) -> list[str]:
    won, _ = settle(votes)
    return [row for question in won for vote in question for row in vote.rows]


def lost(*votes: Vote[str]) -> dict[str, str]:
    return dict(settle(votes)[1])


def test_the_newest_vote_of_a_voter_supersedes_the_older_ones() -> None:
    said = [vote("1", "x"), vote("2", "y"), vote("3", "y")]
    assert winners(*said) == ["2", "3"]
    assert lost(*said) == {"1": "superseded"}


def test_a_voter_who_returns_to_the_first_side_keeps_both_votes_for_it() -> None:
    said = [vote("1", "x"), vote("2", "y"), vote("3", "x")]
    assert winners(*said) == ["1", "3"]


def test_a_later_tie_supersedes_a_preference() -> None:
    assert lost(vote("1", "x"), vote("2", None)) == {"1": "superseded", "2": "tie"}


def test_rows_without_a_user_count_as_one_voter() -> None:
    assert winners(vote("1", "x", by=None), vote("2", "y", by=None)) == ["2"]


def test_the_side_with_more_voters_wins() -> None:
    said = [vote("1", "x", by="a"), vote("2", "y", by="b"), vote("3", "x", by="c")]
    assert winners(*said) == ["1", "3"]
    assert lost(*said) == {"2": "outvoted"}


def test_a_voter_who_repeats_a_vote_counts_once() -> None:
    said = [vote("1", "x", by="a"), vote("2", "x", by="a"), vote("3", "y", by="b")]
    assert lost(*said) == {"1": "contradicted", "2": "contradicted", "3": "contradicted"}


def test_a_stronger_signal_outweighs_any_number_of_weaker_ones() -> None:
    thumbs = [vote(str(n), "x", by=f"u{n}", origin="thumbs") for n in range(5)]
    assert winners(*thumbs, vote("9", "y", by="b", origin="correction")) == ["9"]


def test_weaker_signals_decide_between_equal_stronger_ones() -> None:
    said = [
        vote("1", "x", by="a"),
        vote("2", "y", by="b"),
        vote("3", "y", by="c", origin="judge"),
    ]
    assert winners(*said) == ["2", "3"]


def test_a_tie_of_another_voter_does_not_outvote_a_preference() -> None:
    said = [vote("1", "x", by="a"), vote("2", None, by="b")]
    assert winners(*said) == ["1"]
    assert lost(*said) == {"2": "tie"}
