"""Tags that no update trains: what is said of them is told apart, and decides nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

import agentpref
from agentpref.config import AnchorSettings
from agentpref.prefer.examples import is_held_out
from tests.core.test_pipeline import CONFIG, NO, YES, learn

APART = replace(CONFIG, held_out_tags=("colours", "colors"))


def judge(home, tag, numbers, answers=(YES, NO)):
    """Log two answers to questions of a tag, of which the first was liked better."""
    with agentpref.Log(home) as log:
        for number in numbers:
            asked = [{"role": "user", "content": f"Is {number} one of the {tag}?"}]
            runs = [log.record(asked, text, tags=[tag]) for text in answers]
            log.compare(*runs, winner="a")


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "home"
    judge(home, "numbers", range(30))
    judge(home, "colours", range(12))
    return home


def notes(report):
    return [note for note in report.notes if note.startswith("held-out tag")]


def test_what_is_held_out_by_tag_trains_and_proves_nothing_and_is_told(home, random_base):
    report = learn(home, random_base, APART)
    counts = report.counts
    assert report.verdict == "promoted"
    assert counts["exam"] == 12
    assert counts["new"] + counts["new_held_out"] == 30
    assert set(report.accuracy) == {"numbers"}
    (told,) = report.training["exam"]
    assert (told["tag"], told["prompts"], told["before"]) == ("colours", 12, 0.5)
    assert told["better"] == 12, "a yes is learned for all questions"
    assert notes(report) == [
        f"held-out tag 'colours': .50 -> {told['after']:.2f} on 12 prompts that no update trains, "
        "12 better, 0 worse",
        "held-out tag 'colors': no example has it",
    ]
    assert learn(home, random_base, APART).verdict == "nothing_new"


def test_what_was_learned_of_such_a_tag_before_counts_as_ever(home, random_base):
    report = learn(home, random_base, CONFIG)
    assert report.verdict == "promoted"
    assert report.counts["new"] + report.counts["new_held_out"] == 42
    judge(home, "colours", range(12, 18))
    judge(home, "friends", range(20), ("a friend", "an enemy"))
    again = learn(home, random_base, replace(CONFIG, held_out_tags=("colours",)))
    assert again.counts["exam"] == 6
    assert again.counts["new"] + again.counts["new_held_out"] == 20
    assert again.counts["old"] + again.counts["old_held_out"] == 42
    assert notes(again)[-1] == (
        "held-out tag 'colours': live learned 12 examples of it before, which count as ever; no "
        "new ones train"
    )


def test_a_prompt_that_trains_under_another_tag_is_not_asked(home, random_base):
    asked = [[{"role": "user", "content": f"Is {number} one of the colours?"}] for number in (0, 1)]
    with agentpref.Log(home) as log:
        for messages in asked:
            runs = [log.record(messages, text, tags=["both"]) for text in ("yes, it is", NO)]
            log.compare(*runs, winner="a")
    trains = sum(not is_held_out(messages, CONFIG.held_out) for messages in asked)
    assert trains
    report = learn(home, random_base, replace(APART, held_out_tags=("colours",)))
    assert report.training["exam"][0]["prompts"] == 12 - trains
    assert notes(report)[-1] == (
        f"held-out tags: {trains} of 12 examples are not asked, since their prompts train under "
        "other tags"
    )


def test_ordinary_answers_of_such_a_tag_are_no_anchor(home, random_base):
    asked = [[{"role": "user", "content": f"Please whistle {n} times"}] for n in range(20)]
    train = [messages for messages in asked if not is_held_out(messages, CONFIG.held_out)]
    with agentpref.Log(home) as log:
        for number, messages in enumerate(asked):
            log.record(messages, f"Done: {number}.", tags=["colours" if number % 2 else "other"])
    anchors = AnchorSettings(size=256)
    some = learn(home, random_base, replace(APART, anchor=anchors), promote=False)
    anchored = some.counts["anchored"] + some.counts["anchored_held_out"]
    assert train
    assert anchored == 10
