"""When a gain is proven, refuted or open, over looks and with the evidence of trained prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentpref.config import GateSettings
from agentpref.prove.bootstrap import Paired
from agentpref.prove.evidence import Evidence, Generations
from agentpref.prove.gain import gain, odds, weigh, without_gain

SETTINGS = GateSettings()
WRITES = Generations(distinct_2=1.0, mean_length=1.0)


def signs(better: int, worse: int = 0, unchanged: int = 0, *, name: str = "held out") -> Paired:
    candidate = (1.0,) * better + (0.0,) * worse + (0.5,) * unchanged
    prompts = tuple(f"{name} {i}" for i in range(len(candidate)))
    return Paired((0.5,) * len(candidate), candidate, prompts)


def evidence(new: Paired, **changes: object) -> Evidence:
    return Evidence(new=new, kl=0.0, live=WRITES, candidate=WRITES, **changes)  # type: ignore[arg-type]


def state(found: Evidence) -> str:
    return weigh(found, SETTINGS).state


@pytest.mark.guarantee("proof")
def test_each_look_asks_for_more() -> None:
    found = evidence(signs(15, 5))  # 1 in 48
    assert state(found) == "proven"
    later = weigh(replace(found, looks=1), SETTINGS)
    assert (later.state, later.look, later.counts) == ("open", 2, True)
    assert later.needed == pytest.approx(0.95 * 0.05 / 6)
    assert state(replace(evidence(signs(17, 3)), looks=1)) == "proven"  # 1 in 776
    message = gain(replace(found, looks=1), later, SETTINGS, 0).message
    assert "1 in 48 by chance, 1 in 126 or rarer proves a gain (second look)" in message


def test_a_choice_among_candidates_shares_the_error_of_as_many_looks() -> None:
    found = weigh(evidence(signs(17, 3), looks=3, choices=2), SETTINGS)
    assert (found.look, found.needed) == (4, pytest.approx(0.95 * 0.05 / (3 * 5)))


def test_a_look_that_could_prove_nothing_does_not_count() -> None:
    few = weigh(evidence(signs(5), looks=3), SETTINGS)
    assert (few.state, few.look, few.counts) == ("open", 3, False)
    more = weigh(evidence(signs(3, 5), looks=3, to_cross_fit=12), SETTINGS)
    assert (more.look, more.counts) == (4, True), "the trained ones might have proved it"


@pytest.mark.guarantee("proof")
def test_trained_prompts_to_come_share_the_error_with_the_held_out_ones() -> None:
    assert state(evidence(signs(15, 5))) == "proven"
    waiting = evidence(signs(15, 5), to_cross_fit=60)
    assert state(waiting) == "open"
    assert weigh(waiting, SETTINGS).needed == pytest.approx(0.95 * 0.0125)
    assert state(evidence(signs(17, 3), to_cross_fit=60)) == "proven"
    judged = replace(waiting, cross_fitted=signs(36, 24, name="trained"))
    found = weigh(judged, SETTINGS)
    assert (found.state, found.needed) == ("proven", pytest.approx(0.95 * 0.0125))
    assert found.chance == pytest.approx(0.00916, abs=1e-5), "of 51 among 80"
    message = gain(judged, found, SETTINGS, 0).message
    assert (
        "15 of 20 prompts better, 5 worse; of 60 trained ones, each judged before it was trained, "
        "36 better, 24 worse: 1 in 109 by chance, 1 in 84 or rarer proves a gain" in message
    )


def test_trained_prompts_prove_nothing_where_the_candidate_itself_is_no_better() -> None:
    strong = signs(55, 5, name="trained")
    assert state(evidence(signs(10, 10), to_cross_fit=60, cross_fitted=strong)) == "open"
    assert state(evidence(signs(11, 9), to_cross_fit=60, cross_fitted=strong)) == "proven"
    assert state(evidence(signs(5, 15), to_cross_fit=60, cross_fitted=strong)) == "loss"


def test_unchanged_prompts_are_no_evidence_either_way() -> None:
    assert state(evidence(signs(6))) == state(evidence(signs(6, 0, 10))) == "proven"
    assert state(evidence(signs(0, 0, 20))) == "open"
    assert state(evidence(signs(0, 0, 40))) == "worthless"


def test_confidence_sets_the_risk() -> None:
    assert weigh(evidence(signs(15, 5)), GateSettings(confidence=0.99)).state == "open"
    assert weigh(evidence(signs(17, 3)), GateSettings(confidence=0.99)).state == "proven"


def test_each_look_asks_for_more_of_a_likely_gain_too() -> None:
    found = evidence(signs(9, 4))  # 1 in 7.5
    assert not weigh(found, SETTINGS).is_likely
    found = evidence(signs(10, 4))  # 1 in 11
    assert (weigh(found, SETTINGS).state, weigh(found, SETTINGS).is_likely) == ("open", True)
    assert not weigh(replace(found, looks=1), SETTINGS).is_likely, "1 in 30 at the second look"
    assert weigh(replace(evidence(signs(12, 4)), looks=1), SETTINGS).is_likely is False  # 1 in 26
    assert weigh(replace(evidence(signs(13, 4)), looks=1), SETTINGS).is_likely  # 1 in 41


def test_where_live_is_right_already_nobody_is_told_to_check_the_labels() -> None:
    known = replace(signs(0, 0, 40), live=(1.0,) * 40, candidate=(1.0,) * 40)
    message = gain(evidence(known), weigh(evidence(known), SETTINGS), SETTINGS, 0).message
    assert "none of 40 prompts better or worse; live is right about nearly all of them" in message


def test_the_report_has_the_numbers() -> None:
    found = weigh(evidence(signs(8, 4, 3), looks=1, comparisons=75), SETTINGS).to_mapping()
    assert found["chance"] == pytest.approx(794 / 4096)
    assert found["comparisons_needed"] == pytest.approx(670)
    assert {name: found[name] for name in ("prompts", "better", "worse", "look")} == {
        "prompts": 15,
        "better": 8,
        "worse": 4,
        "look": 2,
    }


@pytest.mark.parametrize(
    ("chance", "words"),
    [(1.0, "1 in 1"), (0.4, "1 in 2.5"), (0.025, "1 in 40"), (1e-4, "1 in 10,000")],
)
def test_chances_are_written_as_odds(chance: float, words: str) -> None:
    assert odds(chance) == words


def by_tag(**changes):
    """Accuracy on 20 pairs of each tag, from its first number to its second."""
    return {tag: {"pairs": 20, "before": a, "after": b} for tag, (a, b) in changes.items()}


def test_tags_that_gain_nothing_beside_others_are_named() -> None:
    """A night of coin labels was promoted with a good one, .52 -> .52, and nothing said so."""
    (note,) = without_gain(by_tag(coin=(0.52, 0.52), good=(0.5, 0.9)))
    assert note.startswith(
        "no gain of its own on new held-out pairs: coin (.52 -> .52 on 20 pairs)"
    )
    many = {f"t{n}": (0.5, 0.4) for n in range(7)}
    assert "t4 (.50 -> .40 on 20 pairs) and 2 more; " in without_gain(by_tag(**many, z=(0, 1)))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"a": (0.5, 0.9), "b": (0.5, 0.6)},
        {"a": (0.5, 0.9), "known": (1.0, 1.0)},
        {"written": (0.7, 0.7)},
        {},
    ],
)
def test_where_every_tag_gains_or_none_does_by_rank_nothing_is_named(changes) -> None:
    assert without_gain(by_tag(**changes)) == []
