"""Log-probs are computed once per policy and token ids, and come from the cache after that."""

from __future__ import annotations

from contextlib import closing

import pytest

from agentpref.home import Home
from agentpref.learn.cache import LogpCache, sequence_key
from agentpref.record.database import connect
from tests.core.learn.families import row

MASKS = [None, (True, False), (False, True)]
NUMBERS = "d" * 64 + ":" + "t" * 64


@pytest.fixture
def home(tmp_path):
    return Home.create(tmp_path / "home")


@pytest.fixture
def connection(home):
    with closing(connect(home)) as connection:
        yield connection


@pytest.fixture
def rows():
    """Rows of one to three completions."""
    return [row((1, n), *((2 + c, n) + (3,) * c for c in range(1 + n % 3))) for n in range(12)]


class Scorer:
    """Scores that differ by row, completion and scorer, and a list of the rows it scored."""

    def __init__(self, base: float = 0.0) -> None:
        self.base, self.asked = base, []

    def __call__(self, rows):
        self.asked.append(list(rows))
        return [
            tuple(self.base - own.prompt[1] - 0.1 * sum(ids) for ids in own.completions)
            for own in rows
        ]


def not_asked(rows):
    pytest.fail(f"asked again for {len(rows)} rows")


def test_scores_are_those_of_the_scorer_in_order(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    assert cache.score(rows, scorer) == Scorer()(rows)
    assert scorer.asked == [rows]


def test_scores_of_a_real_model_come_back_bit_for_bit(connection, make_learner, pairs):
    learner = make_learner()
    rows = learner.encode(pairs)
    cache = LogpCache(connection, learner.base.numbers, "base")
    scores = cache.score(rows, lambda missing: learner.score("base", missing))
    assert scores == learner.score("base", rows)
    assert cache.score(rows[::-1], not_asked) == scores[::-1]


def test_a_row_is_scored_once(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    cache.score(rows[:5], scorer)
    assert cache.score(rows, scorer) == Scorer()(rows)
    assert scorer.asked == [rows[:5], rows[5:]]
    cache.score(rows, not_asked)


def test_a_row_with_one_new_completion_is_scored(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    cache.score(rows, scorer)
    other = row(rows[1].prompt, *rows[1].completions, (99,))
    assert cache.score([other], scorer) == Scorer()([other])
    assert len(scorer.asked) == 2


def test_rows_share_the_scores_of_the_same_completions_of_a_prompt(connection, rows):
    cache = LogpCache(connection, NUMBERS, "base")
    (scores,) = cache.score(rows[2:3], Scorer())
    first, second, third = rows[2].completions
    others = [row(rows[2].prompt, third, first), row(rows[2].prompt, second)]
    assert cache.score(others, not_asked) == [(scores[2], scores[0]), (scores[1],)]


def test_a_completion_with_a_mask_has_a_score_of_its_own(connection):
    cache = LogpCache(connection, NUMBERS, "base")
    whole, masked, full = (
        row((1,), (2, 3), masks=(mask,)) for mask in (None, (False, True), (True, True))
    )
    cache.remember([whole, masked], [(-3.0,), (-1.0,)])
    assert cache.score([masked, full, whole], not_asked) == [(-1.0,), (-3.0,), (-3.0,)]
    assert connection.execute("SELECT tokens FROM logp ORDER BY logp").fetchall() == [(2,), (1,)]


def test_keys_without_a_mask_are_those_of_older_homes():
    assert sequence_key((1, 2), (3,)) == "1828077f4e8ace0e994745da38c1e34e"
    assert len({sequence_key((1,), (2, 3), mask) for mask in MASKS}) == len(MASKS)


def test_another_prompt_makes_another_key(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    cache.score(rows[:1], scorer)
    cache.score([row((7, 7), *rows[0].completions)], scorer)
    assert len(scorer.asked) == 2


@pytest.mark.parametrize(
    "other",
    [
        (NUMBERS, "rev-000001-0123456789ab"),
        ("e" * 64 + ":" + "t" * 64, "base"),
        ("d" * 64 + ":" + "u" * 64, "base"),
    ],
)
def test_policies_do_not_mix(connection, rows, other):
    first, second = LogpCache(connection, NUMBERS, "base"), LogpCache(connection, *other)
    first.score(rows, Scorer())
    assert second.score(rows, Scorer(-7.0)) == Scorer(-7.0)(rows)
    assert first.score(rows, not_asked) == Scorer()(rows)


def test_scores_survive_reopening(home, rows):
    for scorer in (Scorer(), not_asked):
        with closing(connect(home)) as connection:
            scores = LogpCache(connection, NUMBERS, "base").score(rows, scorer)
    assert scores == Scorer()(rows)


def test_scores_that_were_computed_elsewhere_are_kept(connection, rows):
    cache = LogpCache(connection, NUMBERS, "base")
    cache.remember(rows, Scorer()(rows))
    cache.remember([], [])
    assert cache.score(rows, not_asked) == Scorer()(rows)


def test_the_number_of_tokens_is_kept_with_each_score(connection, rows):
    LogpCache(connection, NUMBERS, "base").score(rows, Scorer())
    found = connection.execute("SELECT tokens, count(*) FROM logp GROUP BY tokens").fetchall()
    assert found == [(2, 12), (3, 8), (4, 4)]


def test_without_rows_the_scorer_is_not_called(connection):
    assert LogpCache(connection, NUMBERS, "base").score([], not_asked) == []


def test_a_candidates_scores_outlive_its_promotion(connection, rows):
    candidate = LogpCache(connection, NUMBERS, "update-1")
    scores = candidate.score(rows, Scorer())
    candidate.rename("rev-1")
    assert LogpCache(connection, NUMBERS, "rev-1").score(rows, not_asked) == scores
    assert policies(connection) == 1


def test_a_refused_candidates_scores_are_dropped(connection, rows):
    candidate = LogpCache(connection, NUMBERS, "update-1")
    candidate.score(rows, Scorer())
    candidate.forget()
    assert policies(connection) == 0


def policies(connection):
    return connection.execute("SELECT count(DISTINCT policy) FROM logp").fetchone()[0]
