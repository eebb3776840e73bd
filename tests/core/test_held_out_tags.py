"""Tags that no update trains: what is said of them is told apart, and decides nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

import agentpref
from agentpref.config import AnchorSettings, UpdateConfig
from agentpref.prefer.examples import is_held_out
from agentpref.prove import exam
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
        "held-out tag 'colors': 0 examples, which train and prove nothing",
        "held-out tag 'colours': 12 examples, which train and prove nothing",
        f"held-out tag 'colours': .50 -> {told['after']:.2f} on 12 prompts that no update trains, "
        "12 better, 0 worse",
    ]
    again = learn(home, random_base, APART)
    assert (again.verdict, notes(again)) == ("nothing_new", notes(report)[:2])


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
    assert notes(again)[1] == (
        "held-out tag 'colours': live learned 12 examples of it before, which count as ever"
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


def test_each_tag_is_told_of_and_thumbs_of_one_kind_tell_nothing(home, random_base, monkeypatch):
    monkeypatch.setattr(exam, "MOST", 5)
    judge(home, "shapes", range(7))
    with agentpref.Log(home) as log:
        for number in range(3):
            asked = [{"role": "user", "content": f"Do you like {number}?"}]
            log.thumbs(log.record(asked, YES, tags=["likes"]), up=True)
    config = replace(CONFIG, held_out_tags=("shapes", "likes", "colours"))
    found = [note.partition(" that ")[0] for note in notes(learn(home, random_base, config))[3:]]
    assert [note.rpartition(" on ")[2] for note in found[:2]] == ["5 prompts", "5 prompts"]
    assert found[2].startswith("held-out tag 'likes': 3 examples tell nothing")


def test_a_list_of_tags_is_a_set():
    settings = UpdateConfig(held_out_tags=["b", "a", "b"])
    assert settings == UpdateConfig(held_out_tags=("a", "b"))
    assert settings.held_out_tags == ("a", "b")


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
