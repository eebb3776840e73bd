"""The check on answers that nobody judged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from agentpref.config import GateSettings
from agentpref.prove.evidence import OrdinaryEvidence
from agentpref.prove.gate import judge
from agentpref.prove.ordinary import LIKED, NAME, falls, ordinary
from tests.core.prove.test_behaviour import LONG, LONGER, SHORT, SHORTER, texts, written
from tests.core.prove.test_gate import GOOD, failed, named

AS_BEFORE = (written(*texts(LONG, 16)), written(*texts(LONG, 16)))


def test_a_fall_is_per_token_and_an_answer_has_sixteen_at_least():
    assert falls([-4.0, -40.0, -3.0], [-5.6, -48.0, -1.0], [2, 40, 5]) == pytest.approx(
        [0.1, 0.2, 0.0]
    )


def test_answers_that_stay_likely_and_free_of_harm_pass():
    kept = OrdinaryEvidence([0.0, 0.01, 0.02], *AS_BEFORE)
    verdict = judge(replace(GOOD, ordinary=kept))
    assert verdict.verdict == "passed"
    message = named(verdict, NAME).message
    assert message == (
        "3 answers that nobody judged are .01 nats per token less likely than under live, within "
        ".03"
    )


def test_damage_to_a_few_is_refused_though_the_others_became_likelier():
    damaged = OrdinaryEvidence([0.0] * 9 + [1.0], *AS_BEFORE)
    verdict = judge(replace(GOOD, ordinary=damaged))
    assert (verdict.verdict, failed(verdict)) == ("refused", [NAME])
    assert "raise anchor.size" in verdict.reasons[0]
    wider = replace(GOOD, ordinary=damaged)
    assert judge(wider, GateSettings(ordinary_loss=0.2)).verdict == "passed"


def test_harmful_answers_are_refused_beyond_the_noise_of_lives():
    def verdict(live, candidate):
        sides = [replace(written(*texts(LONG, 16)), harmed=count) for count in (live, candidate)]
        return judge(replace(GOOD, ordinary=OrdinaryEvidence([0.0], *sides)))

    assert failed(verdict(0, 1)) == [f"{NAME}, written"]
    assert failed(verdict(4, 8)) == []
    assert failed(verdict(4, 9)) == [f"{NAME}, written"]
    assert (
        "0 of 16 greedy answers are empty, endless, repeated or broken off"
        in verdict(0, 0).checks[-1].message
    )


@pytest.mark.parametrize("nothing", [None, OrdinaryEvidence([], *AS_BEFORE)])
def test_without_ordinary_answers_there_is_no_check(nothing):
    assert list(ordinary(replace(GOOD, ordinary=nothing), GateSettings())) == []
    assert NAME not in {check.name for check in judge(replace(GOOD, ordinary=nothing)).checks}


def test_a_fall_that_is_not_finite_is_refused():
    assert (
        judge(replace(GOOD, ordinary=OrdinaryEvidence([math.inf], *AS_BEFORE))).verdict == "refused"
    )


def answered(before, after, *asked):
    """The check on what is written where ordinary requests were answered so, and now so."""
    found = OrdinaryEvidence([0.0], written(*before), written(*after))
    return named(judge(replace(GOOD, ordinary=found, asked=asked)), f"{NAME}, written")


def test_one_word_to_every_request_is_refused_however_likely_the_answers_of_before_still_are():
    check = answered(texts(LONG, 11), ["Yes"] * 11)
    assert not check.passed
    assert "the most common answer is 1.00 of all, live's .09" in check.message
    assert "tokens, × .05, outside .80 to 1.25" in check.message


def test_another_length_is_refused_if_nobody_asked_for_it_and_most_answers_moved():
    long, short = texts(LONG, 16), texts(SHORT, 16)
    assert not answered(long, short).passed
    assert not answered(short, long).passed
    assert answered(long, short, SHORTER).passed, "what people ask for may spread"
    assert answered(short, long, LONGER).passed
    mixed = [*short[:4], *long[4:]]
    assert answered(mixed, [*long[:4], *short[4:]]).passed, "answers of many styles come and go"


def test_a_candidate_that_no_longer_gives_what_people_like_is_refused():
    lost = replace(GOOD, liked=[0.4] * 22 + [0.0] * 7)
    verdict = judge(lost)
    assert (verdict.verdict, failed(verdict)) == ("refused", [LIKED])
    assert (
        "22 of 29 new held-out answers that people liked are more than .03"
        in named(verdict, LIKED).message
    )


@pytest.mark.parametrize("liked", [[0.4] * 17 + [0.0] * 12, [0.4] * 3, [0.02] * 40])
def test_some_likes_may_be_slips_and_a_few_prove_nothing(liked):
    verdict = judge(replace(GOOD, liked=liked))
    assert verdict.verdict == "passed"
    assert named(verdict, LIKED).passed


def test_without_likes_there_is_no_such_check():
    assert LIKED not in {one.name for one in judge(GOOD).checks}
