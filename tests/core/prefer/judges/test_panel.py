"""Panels of judges: they start from the best one, and which answer is called a means nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.prefer.judges.panel import Panel, cross_validated, fit_panel

LLMBAR = Path(__file__).parents[3] / "data" / "llmbar" / "verdicts.json"
SIGNS = {"1": 0.5, "2": -0.5, None: 0.0}
OTHER = {"a": "b", "b": "a", "tie": "tie"}

signs = st.sampled_from((-1.0, -0.5, 0.0, 0.5, 1.0))
rows = st.dictionaries(st.sampled_from(("one", "two", "three")), signs)
cases = st.lists(st.tuples(rows, st.sampled_from(("a", "b"))), max_size=20)


def negative(row: Mapping[str, float]) -> dict[str, float]:
    return {name: -sign for name, sign in row.items()}


def llmbar() -> tuple[list[dict[str, float]], list[Any]]:
    found = json.loads(LLMBAR.read_text(encoding="utf-8"))
    said = [
        {name: sum(SIGNS[one] for one in both) for name, both in row["verdicts"].items()}
        for row in found
    ]
    return said, ["a" if row["label"] == "1" else "b" for row in found]


def simulated(
    seed: int, n: int, rights: Sequence[float]
) -> tuple[list[dict[str, float]], list[Any]]:
    rng = random.Random(seed)
    gold = [rng.choice("ab") for _ in range(n)]
    said = [
        {
            f"judge {number}": 1.0 if (rng.random() < right) == (better == "a") else -1.0
            for number, right in enumerate(rights)
        }
        for better in gold
    ]
    return said, gold


def accuracy(votes: Sequence[str], gold: Sequence[str]) -> float:
    """The share of right votes, a tie counting half."""
    points = (
        0.5 if vote == "tie" else float(vote == better)
        for vote, better in zip(votes, gold, strict=True)
    )
    return sum(points) / len(gold)


def voted(panel: Panel, said: Sequence[Mapping[str, float]]) -> list[str]:
    return [panel.vote(one)[0] for one in said]


@given(cases, rows)
def test_swapping_the_answers_swaps_the_vote_and_nothing_else(cases: Any, row: Any) -> None:
    said, gold = [one for one, _ in cases], [better for _, better in cases]
    panel = fit_panel(said, gold)
    assert fit_panel([negative(one) for one in said], [OTHER[one] for one in gold]) == panel
    winner, sure = panel.vote(row)
    assert panel.vote(negative(row)) == (OTHER[winner], sure)
    assert 0.5 <= sure <= 1


@given(cases)
def test_a_panel_survives_json(cases: Any) -> None:
    panel = fit_panel([one for one, _ in cases], [better for _, better in cases])
    assert Panel.from_mapping(json.loads(json.dumps(panel.to_mapping()))) == panel


@given(cases, st.integers(2, 7))
def test_every_question_gets_a_vote_of_a_panel_that_has_not_seen_it(cases: Any, folds: int) -> None:
    said, gold = [one for one, _ in cases], [better for _, better in cases]
    votes = cross_validated(said, gold, folds)
    assert len(votes) == len(gold)
    for number in range(len(gold)):  # to turn a label around does not change its own vote
        turned = [OTHER[one] if at == number else one for at, one in enumerate(gold)]
        assert cross_validated(said, turned, folds)[number] == votes[number]  # type: ignore[arg-type]


def test_no_gold_makes_a_panel_that_decides_nothing() -> None:
    panel = fit_panel([], [])
    assert panel.vote({"good": 1.0}) == ("tie", 0.5)
    assert cross_validated([], []) == []


def test_one_gold_label_is_enough_to_vote_and_too_little_to_be_validated() -> None:
    assert fit_panel([{"good": 1.0}], ["a"]).vote({"good": -1.0})[0] == "b"
    assert cross_validated([{"good": 1.0}], ["a"]) == ["tie"]


def test_verdicts_that_cancel_each_other_out_are_a_tie() -> None:
    assert Panel({"one": 0.3, "two": 0.1, "three": 0.2}).vote(
        {"one": 1.0, "two": -1.0, "three": -1.0}
    ) == ("tie", 0.5)


def test_judges_that_are_missing_or_unknown_count_as_ties() -> None:
    panel = Panel({"good": 2.0, "fair": 1.0})
    assert panel.vote({"fair": -1.0})[0] == "b"
    assert panel.vote({}) == panel.vote({"stranger": 1.0}) == ("tie", 0.5)


def test_four_judges_little_better_than_a_coin_do_not_outvote_a_good_one() -> None:
    said, gold = simulated(0, 1_030, (0.95, 0.6, 0.6, 0.6, 0.6))
    panel = fit_panel(said[:30], gold[:30])
    best = accuracy([("b", "a")[one["judge 0"] > 0] for one in said[30:]], gold[30:])
    majority = accuracy([("b", "a")[sum(one.values()) > 0] for one in said[30:]], gold[30:])
    assert accuracy(voted(panel, said[30:]), gold[30:]) == best
    assert majority < best - 0.1


def test_equal_judges_share_the_vote_once_the_gold_says_so() -> None:
    said, gold = simulated(1, 1_300, (0.75,) * 5)
    panel = fit_panel(said[:300], gold[:300])
    assert accuracy(voted(panel, said[300:]), gold[300:]) > 0.85  # alone: .75


def test_a_judge_that_is_always_wrong_is_heard_the_other_way_round() -> None:
    said = [{"liar": -1.0 if better == "a" else 1.0} for better in "ab" * 20]
    assert fit_panel(said, list("ab" * 20)).vote({"liar": 1.0})[0] == "b"  # type: ignore[arg-type]


def test_the_probability_of_a_vote_is_that_of_the_logistic_model() -> None:
    assert Panel({"good": 2.0}).vote({"good": 0.5}) == ("a", pytest.approx(0.731059, abs=1e-6))


def test_thirty_real_gold_labels_make_a_panel_no_worse_than_its_best_judge() -> None:
    said, gold = llmbar()
    for seed in range(20):
        order = list(range(100))
        random.Random(seed).shuffle(order)
        fitted_on, rest = order[:30], order[30:]
        panel = fit_panel([said[one] for one in fitted_on], [gold[one] for one in fitted_on])
        kept = [gold[one] for one in rest]
        single = max(
            accuracy(voted(Panel({name: 1.0}), [said[one] for one in rest]), kept)
            for name in said[0]
        )
        assert accuracy(voted(panel, [said[one] for one in rest]), kept) >= single - 0.01


def test_a_panel_validated_on_real_gold_is_righter_than_its_best_judge() -> None:
    said, gold = llmbar()
    best = max(accuracy(voted(Panel({name: 1.0}), said), gold) for name in said[0])
    assert accuracy(cross_validated(said, gold), gold) >= best == 0.955
