"""Cached log-probs: right, asked for once, and of one policy only."""

from __future__ import annotations

from contextlib import closing

import pytest

from agentpref.home import Home
from agentpref.learn.cache import LogpCache
from agentpref.learn.encode import EncodedPair, EncodedThumb
from agentpref.learn.logps import PairLogps
from agentpref.record.database import connect
from agentpref.types import Thumb

NUMBERS = "d" * 64 + ":" + "t" * 64


@pytest.fixture
def home(tmp_path):
    return Home.create(tmp_path / "home")


@pytest.fixture
def connection(home):
    with closing(connect(home)) as connection:
        yield connection


@pytest.fixture
def rows(pairs):
    return [EncodedPair(p, (1, n), (2, n, 3), (4, n)) for n, p in enumerate(pairs)]


class Scorer:
    """Scores that tell rows, sides and scorers apart, and a note of what was asked for."""

    def __init__(self, base: float = 0.0) -> None:
        self.base, self.asked = base, []

    def __call__(self, rows):
        self.asked.append([row.pair.pair_id for row in rows])
        return [PairLogps(self.base - row.prompt[1], self.base - 0.1 * row.width) for row in rows]


def not_asked(rows):
    pytest.fail(f"asked again for {len(rows)} rows")


def test_scores_are_the_scorers_in_order(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    assert cache.score(rows, scorer) == Scorer()(rows)
    assert scorer.asked == [[row.pair.pair_id for row in rows]]


def test_scores_of_a_real_model_come_back_bit_for_bit(connection, make_learner, pairs):
    learner = make_learner()
    rows = learner.encode(pairs)
    cache = LogpCache(connection, learner.base.numbers, "base")
    scores = cache.score(rows, lambda missing: learner.score("base", missing))
    assert scores == learner.score("base", rows)
    assert cache.score(rows[::-1], not_asked) == scores[::-1]


def test_a_row_is_asked_for_once_ever(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    cache.score(rows[:5], scorer)
    assert cache.score(rows, scorer) == Scorer()(rows)
    assert scorer.asked == [[row.pair.pair_id for row in part] for part in (rows[:5], rows[5:])]
    cache.score(rows, not_asked)


def test_a_row_with_one_new_side_is_asked_for(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    cache.score(rows, scorer)
    other = EncodedPair(rows[0].pair, rows[0].prompt, rows[0].chosen, (99,))
    assert cache.score([other], scorer) == Scorer()([other])
    assert len(scorer.asked) == 2


def test_what_is_known_does_not_depend_on_the_pair_that_asked(connection, rows):
    cache = LogpCache(connection, NUMBERS, "base")
    (scores,) = cache.score(rows[:1], Scorer())
    swapped = EncodedPair(rows[5].pair, rows[0].prompt, rows[0].rejected, rows[0].chosen)
    assert cache.score([swapped], not_asked) == [PairLogps(scores.rejected, scores.chosen)]


def test_the_prompt_counts(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    cache.score(rows[:1], scorer)
    cache.score([EncodedPair(rows[0].pair, (7, 7), rows[0].chosen, rows[0].rejected)], scorer)
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
    assert found == [(2, len(rows)), (3, len(rows))]


def test_no_rows_ask_nobody(connection):
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


def test_thumbs_and_pairs_share_the_scores_of_the_same_tokens(connection, pairs):
    pair = pairs[0]
    thumb = Thumb("r", "test", 0.0, pair.prompt, pair.chosen, desirable=True)
    as_thumb = EncodedThumb(thumb, (1, 0), (2, 0, 3), (5,))
    cache = LogpCache(connection, NUMBERS, "base")
    cache.remember([EncodedPair(pair, (1, 0), (2, 0, 3), (5,))], [PairLogps(-1.0, -2.0)])
    assert cache.score([as_thumb], not_asked) == [PairLogps(-1.0, -2.0)]
    other = EncodedThumb(thumb, (1, 0), (2, 0, 3), (6,))
    assert cache.score([other], lambda rows: [PairLogps(-1.0, -3.0)]) == [PairLogps(-1.0, -3.0)]
