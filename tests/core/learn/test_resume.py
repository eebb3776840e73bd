"""What an interrupted update had begun with: found again, or refused for a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentpref.config import UpdateConfig
from agentpref.learn import resume
from agentpref.learn.state import Checkpoint, Snapshot
from agentpref.models.base import BaseModel
from agentpref.prefer.night import Agenda
from agentpref.types import Pair, Prompt

SAID = {"role": "assistant", "content": "yes"}
PAIR = Pair("p", "n", 1.0, Prompt("q", ()), SAID, SAID, "comparison", provenance=("c",))
BEGUN = resume.Begun("u-1", 5.0, Agenda((PAIR,), (), (), ()))
SNAPSHOT = Snapshot("f", 0, 3, 0.0, {}, [])


def base(digest="d", template="t"):
    return BaseModel("any", Path(), None, None, digest, template)


def needed(namespace="n", live=None, base=base(), config=UpdateConfig()):  # noqa: B008
    return resume.conditions(namespace, live, base, config)


@pytest.fixture
def checkpoint(tmp_path):
    """Where an update was interrupted that began with one pair."""
    found = Checkpoint(tmp_path / "training" / "s.safetensors", BEGUN.freeze(needed()))
    found.save(SNAPSHOT)
    return found


def find(checkpoint, conditions, pairs=(PAIR,), ended=lambda _update: False):
    return resume.find(checkpoint, conditions, pairs, ended=ended)


def test_it_is_found_again(checkpoint):
    assert find(checkpoint, needed()) == BEGUN
    assert find(checkpoint, needed(config=UpdateConfig(max_minutes=5))) == BEGUN
    assert resume.outlook(checkpoint.path).endswith("resumes at step 0 of 3")


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (needed("other"), "its namespace is not"),
        (needed(live="rev-1"), "its live revision is not"),
        (needed(base=base("e")), "its base model is not"),
        (needed(base=base(template="u")), "its base model is not"),
        (needed(config=UpdateConfig(seed=3)), "its config is not"),
    ],
)
def test_where_a_condition_changed_it_is_removed(checkpoint, conditions, words):
    assert find(checkpoint, conditions) is None
    assert words in checkpoint.troubles[0]
    assert not checkpoint.path.exists()


def test_an_update_that_ended_is_not_done_twice(checkpoint):
    assert find(checkpoint, needed(), ended=lambda update: update == "u-1") is None
    assert "has ended" in checkpoint.troubles[0]


def test_without_its_pairs_it_is_removed(checkpoint):
    assert find(checkpoint, needed(), pairs=()) is None
    assert "no longer there" in checkpoint.troubles[0]


@pytest.mark.parametrize("name", ["update_id", "created_at", "agenda"])
@pytest.mark.parametrize("value", [None, 5, ["x"], {"new": 1}])
def test_strange_words_are_refused(checkpoint, name, value):
    checkpoint.about[name] = value
    checkpoint.save(SNAPSHOT)
    assert find(checkpoint, needed()) is None
    assert "damaged" in checkpoint.troubles[0]


def test_nothing_waits(tmp_path):
    checkpoint = Checkpoint(tmp_path / "s.safetensors")
    assert find(checkpoint, needed()) is None
    assert checkpoint.troubles == []
    assert resume.outlook(checkpoint.path).endswith("starts anew")


def test_of_a_damaged_state_no_more_is_promised(checkpoint):
    checkpoint.path.write_bytes(b"?")
    assert "starts anew" in resume.outlook(checkpoint.path)
