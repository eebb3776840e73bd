"""Log-probs are computed once per policy and token ids, and come from the cache after that."""

from __future__ import annotations

from contextlib import closing
from math import nan

import pytest

from agentpref.home import Home
from agentpref.learn.cache import LogpCache, sequence_key
from agentpref.learn.logps import Scored
from agentpref.record.database import connect
from agentpref.record.integrity import examine
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


def scored(sums):
    """Sums alone as scores."""
    return [Scored(own, ()) for own in sums]


def score(cache, rows, scorer):
    """Scores from the cache, and from a scorer of those that it does not have."""
    known = cache.known(rows)
    missing = [own for own, scores in zip(rows, known, strict=True) if scores is None]
    if missing:
        cache.remember(missing, scored(scorer(missing)))
    return cache.known(rows)


def not_asked(rows):
    pytest.fail(f"asked again for {len(rows)} rows")


def test_a_cache_that_keeps_nothing_still_knows_what_is_there(connection, rows):
    looks = LogpCache(connection, NUMBERS, "base", keeps=False)
    scores = Scorer()(rows)
    looks.remember(rows, scored(scores))
    assert looks.known(rows) == [None] * len(rows)
    LogpCache(connection, NUMBERS, "base").remember(rows, scored(scores))
    assert looks.known(rows) == scores


def test_scores_are_those_of_the_scorer_in_order(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    assert score(cache, rows, scorer) == Scorer()(rows)
    assert scorer.asked == [rows]


def test_scores_of_a_real_model_come_back_bit_for_bit(connection, make_learner, pairs):
    learner = make_learner()
    rows = learner.encode(pairs)
    cache = LogpCache(connection, learner.base.numbers, "base")
    scores = score(cache, rows, lambda missing: learner.score("base", missing))
    assert scores == learner.score("base", rows)
    assert score(cache, rows[::-1], not_asked) == scores[::-1]


def test_a_row_is_scored_once(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    score(cache, rows[:5], scorer)
    assert score(cache, rows, scorer) == Scorer()(rows)
    assert scorer.asked == [rows[:5], rows[5:]]
    score(cache, rows, not_asked)


def test_a_row_with_one_new_completion_is_scored(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    score(cache, rows, scorer)
    other = row(rows[1].prompt, *rows[1].completions, (99,))
    assert score(cache, [other], scorer) == Scorer()([other])
    assert len(scorer.asked) == 2


def test_rows_share_the_scores_of_the_same_completions_of_a_prompt(connection, rows):
    cache = LogpCache(connection, NUMBERS, "base")
    (scores,) = score(cache, rows[2:3], Scorer())
    first, second, third = rows[2].completions
    others = [row(rows[2].prompt, third, first), row(rows[2].prompt, second)]
    assert score(cache, others, not_asked) == [(scores[2], scores[0]), (scores[1],)]


def test_a_completion_with_a_mask_has_a_score_of_its_own(connection):
    cache = LogpCache(connection, NUMBERS, "base")
    whole, masked, full = (
        row((1,), (2, 3), masks=(mask,)) for mask in (None, (False, True), (True, True))
    )
    cache.remember([whole, masked], scored([(-3.0,), (-1.0,)]))
    assert score(cache, [masked, full, whole], not_asked) == [(-1.0,), (-3.0,), (-3.0,)]
    assert connection.execute("SELECT tokens FROM logp ORDER BY logp").fetchall() == [(2,), (1,)]


def test_keys_without_a_mask_are_those_of_older_homes():
    assert sequence_key((1, 2), (3,)) == "1828077f4e8ace0e994745da38c1e34e"
    assert len({sequence_key((1,), (2, 3), mask) for mask in MASKS}) == len(MASKS)


def test_another_prompt_makes_another_key(connection, rows):
    cache, scorer = LogpCache(connection, NUMBERS, "base"), Scorer()
    score(cache, rows[:1], scorer)
    score(cache, [row((7, 7), *rows[0].completions)], scorer)
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
    score(first, rows, Scorer())
    assert score(second, rows, Scorer(-7.0)) == Scorer(-7.0)(rows)
    assert score(first, rows, not_asked) == Scorer()(rows)


def test_scores_survive_reopening(home, rows):
    for scorer in (Scorer(), not_asked):
        with closing(connect(home)) as connection:
            scores = score(LogpCache(connection, NUMBERS, "base"), rows, scorer)
    assert scores == Scorer()(rows)


def test_scores_that_were_computed_elsewhere_are_kept(connection, rows):
    cache = LogpCache(connection, NUMBERS, "base")
    cache.remember(rows, scored(Scorer()(rows)))
    cache.remember([], [])
    assert score(cache, rows, not_asked) == Scorer()(rows)


def test_the_number_of_tokens_is_kept_with_each_score(connection, rows):
    score(LogpCache(connection, NUMBERS, "base"), rows, Scorer())
    found = connection.execute("SELECT tokens, count(*) FROM logp GROUP BY tokens").fetchall()
    assert found == [(2, 12), (3, 8), (4, 4)]


def test_without_rows_nothing_is_known(connection):
    assert LogpCache(connection, NUMBERS, "base").known([]) == []


def test_a_candidates_scores_outlive_its_promotion(connection, rows):
    candidate = LogpCache(connection, NUMBERS, "update-1")
    scores = score(candidate, rows, Scorer())
    candidate.rename("rev-1")
    assert score(LogpCache(connection, NUMBERS, "rev-1"), rows, not_asked) == scores
    assert policies(connection) == 1


def test_a_refused_candidates_scores_are_dropped(connection, rows):
    candidate = LogpCache(connection, NUMBERS, "update-1")
    score(candidate, rows, Scorer())
    candidate.forget()
    assert policies(connection) == 0


def policies(connection):
    return connection.execute("SELECT count(DISTINCT policy) FROM logp").fetchone()[0]


@pytest.mark.parametrize("changed", ["logp = -0.5", "tokens = 9", "checksum = NULL"])
def test_a_score_that_another_program_changed_is_computed_anew(connection, rows, changed):
    cache = LogpCache(connection, NUMBERS, "base")
    score(cache, rows, Scorer())
    (key,) = connection.execute("SELECT row FROM logp LIMIT 1").fetchone()
    connection.execute(f"UPDATE logp SET {changed} WHERE row = ?", (key,))
    (problem,) = examine(connection).problems
    assert problem[:2] == ("logp", key)
    scorer = Scorer()
    assert score(cache, rows, scorer) == Scorer()(rows)
    assert sum(map(len, scorer.asked)) == 1
    assert examine(connection).problems == []


def test_a_changed_score_does_not_follow_its_policy_to_a_revision(connection, rows):
    candidate, published = (LogpCache(connection, NUMBERS, name) for name in ("u-1", "rev-1"))
    score(candidate, rows, Scorer())
    connection.execute("UPDATE logp SET logp = -0.5 WHERE row = (SELECT min(row) FROM logp)")
    candidate.rename("rev-1")
    scorer = Scorer()
    assert score(published, rows, scorer) == Scorer()(rows)
    assert sum(map(len, scorer.asked)) == 1


def test_deciding_tokens_come_from_the_pass_that_scores(connection, make_learner, pairs):
    """Base and live are the same here: what one stored the other finds."""
    cache = LogpCache(connection, NUMBERS, "base")
    learner = make_learner()
    learner._caches = {"base": cache}
    rows = learner.encode(pairs[:4])
    expected = make_learner().scored("base", rows)
    assert learner.scored("base", rows) == expected
    assert cache.known_whole(rows) == expected
    assert cache.known(rows) == [one.sums for one in expected]
    assert all(one.deciding[0] >= one.sums[0] for one in expected), "one token of several"
    learner._compute = lambda policy, rows: [] if not rows else pytest.fail("again")
    assert learner.scored("base", rows) == expected
    assert learner.score("base", rows) == [one.sums for one in expected]


def test_whoever_asks_for_sums_first_needs_no_other_pass_for_deciding_tokens(
    connection, make_learner, pairs
):
    learner = make_learner()
    learner._caches = {"base": LogpCache(connection, NUMBERS, "base")}
    rows = learner.encode(pairs[:4])
    learner.score("base", rows)
    learner._compute = lambda policy, rows: [] if not rows else pytest.fail("again")
    assert learner.scored("base", rows) == make_learner().scored("base", rows)


def test_sums_of_older_versions_do_not_make_a_row_known_with_its_deciding_token(connection):
    cache, two = LogpCache(connection, NUMBERS, "base"), [row((1, 2), (3, 4), (3, 5))]
    cache.remember(two, [Scored((-1.0, -2.0), ())])
    assert cache.known(two) == [(-1.0, -2.0)]
    assert cache.known_whole(two) == [None]
    cache.remember(two, [Scored((-1.0, -2.0), (-0.5, -1.5))])
    assert cache.known_whole(two) == [Scored((-1.0, -2.0), (-0.5, -1.5))]
    without = [row((1, 2), (3, 4)), row((1, 2), (3, 4), (3, 4, 5))]
    cache.remember(without, [Scored((-1.0,), (nan,)), Scored((-1.0, -2.0), (nan, nan))])
    assert [len(one.deciding) for one in cache.known_whole(without)] == [1, 2]
