from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import MissingDependency, UpdateError
from agentpref.prove.bootstrap import Paired, lower_bound, pairs_needed

RIGHT = st.sampled_from([0.0, 0.5, 1.0])
ROWS = st.lists(st.tuples(RIGHT, RIGHT, st.integers(0, 9)), min_size=1, max_size=30)


def paired(rows: list[tuple[float, float, int]]) -> Paired:
    live, candidate, prompts = zip(*rows, strict=True)
    return Paired(live, candidate, tuple(map(str, prompts)))


def draw(rng: random.Random, prompts: int, each: int) -> Paired:
    """Pairs whose true change is +.2 (gain .3, loss .1); those of one prompt change together."""
    rows = []
    for prompt in range(prompts):
        live, candidate = rng.choices([(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)], [0.3, 0.1, 0.6])[0]
        rows += [(live, candidate, prompt)] * each
    return paired(rows)


@pytest.mark.parametrize(("prompts", "each"), [(80, 1), (60, 5)])
def test_the_bound_covers_the_truth_about_as_often_as_it_says(prompts: int, each: int) -> None:
    rng = random.Random(20260101)
    bounds = [lower_bound(draw(rng, prompts, each), seed=i, resamples=500) for i in range(300)]
    covered = sum(bound.lower <= 0.2 for bound in bounds) / len(bounds)
    assert 0.91 <= covered <= 0.985  # .95 ± 3 binomial standard errors


@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.645), (0.8, 0.842)])
def test_the_bound_is_one_sided(confidence: float, z: float) -> None:
    bound = lower_bound(draw(random.Random(8), prompts=500, each=1), confidence=confidence)
    assert bound.error is not None
    assert (bound.change - bound.lower) / bound.error == pytest.approx(z, abs=0.12)


def test_pairs_that_share_a_prompt_count_as_one_observation() -> None:
    few = draw(random.Random(1), prompts=60, each=1)
    copies = Paired.pooled([few] * 5)
    assert lower_bound(copies).lower == pytest.approx(lower_bound(few).lower)
    assert (lower_bound(copies).pairs, lower_bound(copies).prompts) == (300, 60)


def test_prompts_weigh_as_many_pairs_as_they_have() -> None:
    bound = lower_bound(paired([(0.0, 1.0, 0)] * 3 + [(1.0, 0.0, 1)]))
    assert bound.change == pytest.approx(0.5)
    assert bound.lower == -1.0  # one resample in four is the losing prompt alone


def test_the_same_seed_gives_the_same_bound() -> None:
    evidence = draw(random.Random(2), prompts=70, each=2)
    assert lower_bound(evidence, seed=3) == lower_bound(evidence, seed=3)
    assert len({lower_bound(evidence, seed=seed, resamples=50).lower for seed in range(9)}) > 1


def test_one_prompt_bounds_nothing() -> None:
    bound = lower_bound(paired([(0.0, 1.0, 0)] * 40))
    assert (bound.lower, bound.error) == (-1.0, None)
    assert "single prompt" in bound.message


@pytest.mark.parametrize(("live", "candidate", "change"), [(0.5, 1.0, 0.5), (1.0, 1.0, 0.0)])
def test_equal_changes_are_their_own_bound(live: float, candidate: float, change: float) -> None:
    bound = lower_bound(paired([(live, candidate, i) for i in range(9)]))
    assert (bound.lower, bound.error) == (change, None)
    assert "all 9 prompts changed equally" in bound.message


def test_no_pairs_have_no_bound() -> None:
    with pytest.raises(UpdateError, match="0 held-out pairs"):
        lower_bound(Paired())


def test_evidence_must_be_about_the_same_pairs_and_be_correctness() -> None:
    with pytest.raises(UpdateError, match=r"\(2, 1, 2\)"):
        Paired((0.0, 1.0), (1.0,), ("a", "b"))
    with pytest.raises(UpdateError, match=r"-3.2.*correctness\(\)"):
        Paired((0.0,), (-3.2,), ("a",))


@settings(max_examples=60, deadline=None)
@given(ROWS, st.data())
def test_the_bound_never_falls_when_a_pair_improves(
    rows: list[tuple[float, float, int]], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(rows) - 1))
    live, _, prompt = rows[index]
    better = [*rows]
    better[index] = (live, 1.0, prompt)
    before = lower_bound(paired(rows), resamples=200).lower
    assert lower_bound(paired(better), resamples=200).lower >= before - 1e-12


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_the_bounds_of_both_directions_enclose_the_change(
    rows: list[tuple[float, float, int]],
) -> None:
    evidence = paired(rows)
    low, high = lower_bound(evidence), -lower_bound(evidence.swap()).lower
    assert low.lower - 1e-12 <= low.change <= high + 1e-12


def test_the_pairs_needed_are_enough_most_of_the_time() -> None:
    rng = random.Random(5)
    needed = pairs_needed(lower_bound(draw(rng, prompts=200, each=1)), power=0.8)
    assert needed is not None
    assert 30 <= needed <= 90
    proven = [lower_bound(draw(rng, needed, 1), resamples=300).lower > 0 for _ in range(200)]
    assert sum(proven) / len(proven) >= 0.65


def test_no_number_of_pairs_settles_a_loss_or_an_unknown_spread() -> None:
    worse = lower_bound(draw(random.Random(6), prompts=90, each=1).swap())
    assert pairs_needed(worse) is None
    assert pairs_needed(worse, floor=-0.9) is not None
    assert pairs_needed(lower_bound(paired([(0.0, 1.0, 0)]))) is None


def test_a_missing_scipy_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingDependency, match=r"scipy.*pip install 'agentpref\[train\]'"):
        lower_bound(draw(random.Random(7), prompts=20, each=1))
