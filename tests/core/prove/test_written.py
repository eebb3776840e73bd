"""What people ask for is written, and not only ranked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentpref.prove.bootstrap import Paired
from agentpref.prove.evidence import Sampled
from agentpref.prove.gate import judge
from agentpref.prove.written import moves
from tests.core.prove.test_behaviour import LONG, SHORT, SHORTER, evidence, texts, wish, written
from tests.core.prove.test_gate import failed, named


@pytest.mark.guarantee("proof")
def test_what_is_ranked_but_not_written_is_refused_with_numbers():
    verdict = judge(evidence(texts(LONG), texts(LONG), SHORTER))
    assert failed(verdict) == ["written"]
    (reason,) = verdict.reasons
    assert (
        "ranked, but not written: fewer words (41.0 -> 41.0; chosen 8.0, rejected 38.0)" in reason
    )
    assert "on 32 new prompts, of which 32 got the answer of before: train longer" in reason
    (reason,) = judge(evidence(texts(LONG), texts(LONG), SHORTER, cut_short=True)).reasons
    assert reason.endswith("of before: max_minutes stopped the training: raise it")


def test_what_is_not_written_yet_is_refused_only_where_a_gain_is_proven():
    few = Paired((0.5,) * 3, (1.0,) * 3, ("a", "b", "c"))
    verdict = judge(replace(evidence(texts(LONG), texts(LONG), SHORTER), new=few))
    assert (verdict.verdict, failed(verdict)) == ("insufficient", ["new preferences", "written"])


def test_where_one_wish_is_written_and_another_is_not_the_report_says_which():
    lists = wish("list items", 1, 3.0, 0.0)
    check = named(judge(evidence(texts(LONG), texts(SHORT), SHORTER, lists)), "written")
    assert check.passed
    assert "fewer words" in check.message
    assert "; not: more list items (.00 -> .00; chosen 3.0, rejected .00)" in check.message


def test_of_what_is_asked_for_plainly_half_must_be_written_and_a_faint_wish_is_no_excuse():
    """A masked first token left "Certainly!" in its place, and lengths moved a little by chance."""
    some = [*texts(SHORT)[:6], *texts(LONG)[6:]]
    unmoved = [wish(name, 1, 1.0, 0.0) for name in ("list items", "code blocks", "questions")]
    plainly = evidence(texts(LONG), some, replace(SHORTER, p=1e-60), *unmoved[:1])
    assert named(judge(plainly), "written").passed, "the others are less plain by far"
    for p, passed in ((1e-20, True), (1e-9, False), (1e-3, False)):
        found = evidence(texts(LONG), some, replace(SHORTER, p=p), *unmoved)
        assert named(judge(found), "written").passed is passed


@pytest.mark.parametrize("form", ["tool call", "valid tool call", "JSON", "written in German"])
def test_a_form_that_is_asked_for_and_not_written_refuses_whatever_came_with_it(form):
    """An imitation of calls became shorter, in fewer lines, and wrote no call (docs/LOG.md)."""
    asked = wish(form, 1, 1.0, 0.0)
    check = named(judge(evidence(texts(LONG), texts(SHORT), SHORTER, asked)), "written")
    assert not check.passed
    assert f"ranked, but not written: more {form} (.00 -> .00" in check.message
    assert "fewer words" not in check.message
    faint = replace(asked, p=SHORTER.p**0.4)
    assert named(judge(evidence(texts(LONG), texts(SHORT), SHORTER, faint)), "written").passed
    fewer = wish(form, -1, 0.0, 1.0)
    assert named(judge(evidence(texts(LONG), texts(SHORT), SHORTER, fewer)), "written").passed


def test_a_few_answers_that_all_move_as_asked_are_enough():
    some = [*texts(SHORT)[:3], *texts(LONG)[3:]]
    assert named(judge(evidence(texts(LONG), some, SHORTER)), "written").passed
    back = [*texts(SHORT)[:3], *texts(LONG + " And one more thing.")[3:]]
    assert not named(judge(evidence(texts(LONG), back, SHORTER)), "written").passed


def test_sampled_answers_count_where_the_greedy_one_did_not_move():
    drawn = Sampled(written(*texts(LONG, 16)), written(*texts(SHORT, 16)), 0.7)
    found = evidence(texts(LONG), texts(LONG), SHORTER, sampled=drawn)
    (move,) = moves(found)
    assert (move.up, move.down, move.moved) == (16, 0, True)


@pytest.mark.guarantee("proof")
def test_what_people_surely_ask_for_and_only_the_candidate_writes_is_a_gain_that_ranking_misses():
    """Live ranked short answers rightly by accident, and so long ones were served for ever."""
    ranked = Paired((1.0,) * 40, (1.0,) * 40, tuple(map(str, range(40))))
    found = replace(evidence(texts(LONG), texts(SHORT), SHORTER), new=ranked, unseen=12)
    verdict = judge(found)
    assert verdict.verdict == "passed"
    message = named(verdict, "new preferences").message
    assert "; asked for (1 in over a million by chance) and written: fewer words" in message
    assert verdict.gain["written"] == 1
    unmoved = replace(found, candidate=found.live)
    assert judge(unmoved).verdict != "passed"
    for changed in (
        {"unseen": 4},  # too few held-out prompts to tell that answers moved
        {"asked": (replace(SHORTER, p=1e-3, tests=20),)},  # perhaps random labels asked for it
        {"new": Paired((1.0,) * 40, (1.0,) * 39 + (0.0,), ranked.prompts)},  # ranked worse
        {"looks": 10**5},
    ):
        assert judge(replace(found, **changed)).verdict != "passed", changed
    harmed = judge(replace(found, kl=1.0))
    assert harmed.verdict == "refused"


@pytest.mark.guarantee("proof")
def test_what_live_ranks_rightly_and_does_not_write_is_never_called_nothing_to_gain():
    """Live ranked all calls above prose and wrote one in eight: its nights taught nothing more."""
    ranked = Paired((1.0,) * 50, (1.0,) * 50, tuple(map(str, range(50))))
    some = [*texts(SHORT)[:3], *texts(LONG)[3:]]
    found = replace(evidence(texts(LONG), some, SHORTER), new=ranked, unseen=16, known=True)
    verdict = judge(found)
    assert (verdict.verdict, failed(verdict)) == ("refused", ["new preferences", "written"])
    assert "live is right about nearly all of them, and does not write so" in verdict.reasons[0]
    more = [*texts(SHORT)[:8], *texts(LONG)[8:]]
    assert judge(replace(found, candidate=written(*more))).verdict == "passed"
    trained_on = [*texts(LONG)[:16], *texts(SHORT)[16:]]
    assert judge(replace(found, candidate=written(*trained_on))).verdict == "insufficient"
    there = evidence(texts(SHORT), texts(SHORT), SHORTER)
    assert judge(replace(there, new=ranked, known=True)).verdict == "nothing_to_gain"


def test_live_that_writes_so_already_has_no_room_to_move():
    check = named(judge(evidence(texts(SHORT), texts(SHORT), SHORTER)), "written")
    assert check.passed
    assert check.message.startswith("live writes so already: fewer words")


def test_few_new_prompts_do_not_show_what_is_written():
    found = replace(evidence(texts(LONG), texts(LONG), SHORTER), fresh=7)
    check = named(judge(found), "written")
    assert check.passed
    assert check.message == "too few new prompts to see it: 7 of 8"
    nothing = named(judge(evidence(texts(LONG), texts(LONG))), "written")
    assert nothing.message.startswith("the pairs ask for nothing")
