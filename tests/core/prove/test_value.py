"""The check on what conversations earn: when a gain is proven, and when nothing is said."""

from __future__ import annotations

import math

import pytest

from agentpref.config import GateSettings
from agentpref.prove.evidence import ValueEvidence
from agentpref.prove.gain import NAME
from agentpref.prove.value import FEWEST, check, refusal, weigh

SETTINGS = GateSettings()


def found(live: float = 0.3, candidate: float = 0.6, error: float = 0.05, **more: float):
    return ValueEvidence(live, candidate, error, **{"conversations": 100, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("evidence", "state"),
    [
        (found(), "proven"),
        (found(error=0.25), "open"),
        (found(candidate=0.3), "open"),
        (found(candidate=0.1), "loss"),
        (found(error=0.0), "proven"),
        (found(candidate=0.3, error=0.0), "open"),
        (found(candidate=0.3 + 1e-9, error=1e-10), "open"),
    ],
)
def test_a_gain_is_proven_by_its_size_against_its_error(
    evidence: ValueEvidence, state: str
) -> None:
    gain = weigh(evidence, 0, SETTINGS)
    assert gain.state == state
    assert gain.refuted is (state == "loss")
    result = check(evidence, gain, SETTINGS)
    assert (result.name, result.passed) == (NAME, state == "proven")
    assert f".30 -> {evidence.candidate:.2f}".replace("0.", ".") in result.message


def test_each_look_asks_for_more() -> None:
    evidence = found(error=0.14)
    first, tenth = (weigh(evidence, looks, SETTINGS) for looks in (0, 9))
    assert (first.state, tenth.state) == ("proven", "open")
    assert tenth.needed < first.needed
    assert tenth.look == 10
    assert weigh(evidence, 0, GateSettings(confidence=0.999)).state == "open"


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        (found(conversations=FEWEST - 1), "19 held-out conversations, of at least 20"),
        (found(unsupported=0.2), "20% of what the candidate would say is like no logged answer"),
        (found(unsupported_live=0.5), "50% of what live would say is like no logged answer"),
        (found(explained=0.05), "answers tell 5% of what held-out conversations come to"),
        (found(explained=-0.3), "answers tell 0% of what held-out conversations come to"),
        (found(candidate=math.nan), "no finite number"),
        (found(error=math.nan), "no finite number"),
    ],
)
def test_where_the_log_does_not_tell_no_number_is_said(evidence: ValueEvidence, why: str) -> None:
    assert why in refusal(evidence)
    gain = weigh(evidence, 3, SETTINGS)
    assert (gain.state, gain.look, gain.counts) == ("open", 3, False)
    result = check(evidence, gain, SETTINGS)
    assert not result.passed
    assert why in result.message
    assert "->" not in result.message


def test_the_numbers_are_plain_values_that_reports_keep() -> None:
    assert weigh(found(), 0, SETTINGS).to_mapping() == {
        "chance": pytest.approx(0.0, abs=1e-8),
        "needed": pytest.approx(0.025, abs=0.02),
        "look": 1,
        "look_counts": True,
        "likely": True,
        "comparisons_needed": None,
    }
