"""Remarks: the comments from which a model may teach itself, and those that it may not."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest

import agentpref
from agentpref.config import CommentSettings, UpdateConfig
from agentpref.home import Home
from agentpref.prefer import remarks
from agentpref.prefer.examples import is_held_out
from agentpref.record.database import connect
from agentpref.record.updates import Updates
from agentpref.serve.registry import Registry
from tests.core.test_pipeline import CONFIG, learn, teach

ON = UpdateConfig(comments=CommentSettings(weight=1.0))
NUMBERS = [n for n in range(100) if not is_held_out([{"role": "user", "content": f"Say {n}"}], 0.4)]


@pytest.fixture
def home(tmp_path):
    return Home.create(tmp_path / "home").path


def record(log, number, answer="A long answer, of many words.", **more):
    return log.record([{"role": "user", "content": f"Say {number}"}], answer, **more)


def drawn(home, config=ON):
    with closing(connect(Home.open(home), readonly=True)) as connection:
        return remarks.draw(connection, "default", config)


def test_a_comment_is_told_to_live_and_is_no_label(home):
    with agentpref.Log(home) as log:
        run = record(log, NUMBERS[0], tags=["talk"])
        comment = log.thumbs(run, up=False, comment="  too\n long ", user_id="ana")
    [one] = drawn(home)
    assert (one.origin, one.tag, one.ordinary) == ("remark", "talk", True)
    assert one.provenance == (run, comment)
    assert one.completions[0].label is None
    assert one.advice.startswith("A reader said of an answer to this: 'too long'. Answer so that")


def test_they_are_off_unless_they_have_a_weight(home):
    with agentpref.Log(home) as log:
        log.thumbs(record(log, NUMBERS[0]), up=False, comment="too long")
    assert drawn(home, UpdateConfig()) == []
    assert len(drawn(home)) == 1


def test_praise_held_out_prompts_calls_and_what_was_taken_back_teach_nothing(home):
    others = [[{"role": "user", "content": f"Say {n}"}] for n in range(100, 200)]
    held_out = next(n for n, own in enumerate(others, 100) if is_held_out(own, ON.held_out))
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}  # fmt: skip
    with agentpref.Log(home) as log:
        log.thumbs(record(log, NUMBERS[0]), up=True, comment="lovely", user_id="a")
        log.thumbs(record(log, held_out), up=False, comment="too long", user_id="a")
        log.thumbs(record(log, NUMBERS[1], call), up=False, comment="no", user_id="a")
        log.thumbs(record(log, NUMBERS[2], metadata={"finish_reason": "length"}), up=False,
                     comment="broke off", user_id="a")  # fmt: skip
        log.thumbs(record(log, NUMBERS[3]), up=False, comment="too long", source="model")
        log.correct(record(log, NUMBERS[4]), "Short.", comment="too long", user_id="a")
        run = record(log, NUMBERS[5])
        log.thumbs(run, up=False, comment="too long", user_id="a")
        log.retract(run, user_id="a")
    assert drawn(home) == []


def test_the_newest_comment_of_a_voter_counts_and_each_voter_has_one(home):
    with agentpref.Log(home) as log:
        run = record(log, NUMBERS[0])
        for user, words in (("a", "too long"), ("a", "too dry"), ("b", "too loud")):
            log.thumbs(run, up=False, comment=words, user_id=user)
    found = drawn(home)
    assert [one.advice.split("'")[1] for one in found] == ["too loud", "too dry"]
    assert len({one.example_id for one in found}) == 2


def test_the_newest_are_taken_and_a_long_one_is_cut(home):
    with agentpref.Log(home) as log:
        for number in NUMBERS[:3]:
            log.thumbs(record(log, number), up=False, comment=f"{number} " + "word " * 200)
    some = replace(ON, comments=CommentSettings(weight=1.0, size=2))
    found = drawn(home, some)
    words = [one.advice.split("'")[1] for one in found]
    assert [int(text.split()[0]) for text in words] == [NUMBERS[2], NUMBERS[1]]
    assert {len(text) for text in words} == {remarks.LONGEST}


def test_an_update_is_taught_by_them_and_forgetting_who_said_it_taints_it(home, random_base):
    teach(home, range(40))
    with agentpref.Log(home) as log:
        run = record(log, NUMBERS[0])
        log.thumbs(run, up=False, comment="too long", user_id="ana")
    config = replace(CONFIG, comments=CommentSettings(weight=1.0))
    report = learn(home, random_base, config)
    assert report.verdict == "promoted", report.reasons
    assert report.counts["taught"] == 1
    assert report.counts.get("anchored", 0) == 0
    assert report.training["last_lesson"] < report.training["first_lesson"]
    with closing(connect(Home.open(home), readonly=True)) as connection:
        learned = Updates(connection).learned_by(report.revision)
    [one] = drawn(home, config)
    assert one.example_id not in learned, "it may teach again"
    with agentpref.Log(home) as log:
        log.forget(user_id="ana")
    assert Registry(home).get(report.revision).tainted_at is not None
    assert drawn(home, config) == []


def test_their_weight_changes_the_run(home, random_base, tmp_path):
    import shutil

    teach(home, range(20))
    with agentpref.Log(home) as log:
        log.thumbs(record(log, NUMBERS[0]), up=False, comment="too long", user_id="ana")
    digests = set()
    for weight in (0.0, 0.5, 2.0):
        other = shutil.copytree(home, tmp_path / str(weight))
        report = learn(other, random_base, replace(CONFIG, comments=CommentSettings(weight=weight)))
        digests.add(Registry(other).get(report.revision).manifest["tensors"])
    assert len(digests) == 3
