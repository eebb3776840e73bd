"""What an interrupted update started with is found again, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

import agentpref
from agentpref.config import UpdateConfig
from agentpref.home import Home
from agentpref.learn import resume
from agentpref.learn.checkpoint import Checkpoint, TrainingState, path_of
from agentpref.learn.data import UpdateData
from agentpref.models.base import BaseModel
from tests.core.learn.examples import make_group, make_pair, make_thumb

EXAMPLES = (
    make_pair(0, "yes", "no", provenance=("c",)),
    make_thumb(1, "yes", provenance=("f",)),
    make_group(2, {"a": 1.0, "b": 0.5, "c": 0.0}, provenance=("j",)),
)
STARTED = resume.StartedUpdate("u-1", 5.0, UpdateData(new=EXAMPLES[:1], old=EXAMPLES[1:]))
STATE = TrainingState("f", 0, 3, 0.0, {}, [])


def base(digest="d", template="t"):
    return BaseModel("any", Path(), None, None, digest, template)


def needed(namespace="n", live=None, base=base(), config=UpdateConfig()):  # noqa: B008
    return resume.conditions(namespace, live, base, config)


@pytest.fixture
def checkpoint(tmp_path):
    """The checkpoint of an update that was interrupted."""
    found = Checkpoint(tmp_path / "training" / "s.safetensors", STARTED.freeze(needed()))
    found.save(STATE)
    return found


def find(checkpoint, conditions, examples=EXAMPLES, ended=lambda _update: False):
    return resume.find(checkpoint, conditions, lambda ids: examples, ended=ended)


def test_an_interrupted_update_is_found_under_the_same_conditions(checkpoint):
    assert find(checkpoint, needed()) == STARTED
    assert find(checkpoint, needed(config=UpdateConfig(max_minutes=5))) == STARTED
    assert resume.outlook(checkpoint.path).endswith("resumes at step 0 of 3")


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (needed("other"), "its namespace is not"),
        (needed(live="rev-1"), "its live revision is not"),
        (needed(base=base("e")), "its base model is not"),
        (needed(base=base(template="u")), "its base model is not"),
        (needed(config=UpdateConfig(seed=3)), "its config is not"),
    ],
)
def test_a_state_is_discarded_when_a_condition_changed(checkpoint, conditions, message):
    assert find(checkpoint, conditions) is None
    assert message in checkpoint.troubles[0]
    assert not checkpoint.path.exists()


def test_a_state_is_discarded_when_its_update_has_ended(checkpoint):
    assert find(checkpoint, needed(), ended=lambda update: update == "u-1") is None
    assert "has ended" in checkpoint.troubles[0]
    assert not checkpoint.path.exists()


def test_a_state_is_discarded_when_an_example_is_gone(checkpoint):
    assert find(checkpoint, needed(), examples=EXAMPLES[:2]) is None
    assert "no longer there" in checkpoint.troubles[0]


@pytest.mark.parametrize("name", ["update_id", "created_at", "data"])
@pytest.mark.parametrize("value", [None, 5, ["x"], {"new": 1}])
def test_a_state_with_damaged_values_is_discarded(checkpoint, name, value):
    checkpoint.about[name] = value
    checkpoint.save(STATE)
    assert find(checkpoint, needed()) is None
    assert "damaged" in checkpoint.troubles[0]


def test_nothing_is_found_and_nothing_reported_where_there_is_no_state(tmp_path):
    checkpoint = Checkpoint(tmp_path / "s.safetensors")
    assert find(checkpoint, needed()) is None
    assert checkpoint.troubles == []
    assert resume.outlook(checkpoint.path).endswith("starts over")


def test_the_outlook_of_a_damaged_state_is_to_start_over(checkpoint):
    checkpoint.path.write_bytes(b"?")
    assert "starts over; the saved state cannot be used" in resume.outlook(checkpoint.path)


def test_an_update_discards_a_state_of_format_1_and_its_report_says_why(
    tmp_path, random_base, monkeypatch
):
    home = tmp_path / "home"
    with agentpref.Log(home) as log:
        for number in range(12):
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            log.compare(*(log.record(asked, text) for text in ("yes", "no, never")), winner="a")
    path = path_of(Home.open(home).training, "default")
    with monkeypatch.context() as patch:
        patch.setattr("agentpref.learn.checkpoint.FORMAT", 1)
        Checkpoint(path, STARTED.freeze(needed("default"))).save(STATE)
    config = UpdateConfig(epochs=1, held_out=0.4)
    report = agentpref.update(home, model=str(random_base), config=config, checks={})
    assert report.training["resumed_at"] == 0
    assert report.counts["new"] > 0
    (note,) = [note for note in report.notes if "interrupted" in note]
    assert note == (
        "the state of an interrupted training was discarded: another version of agentpref wrote it"
    )
    assert not path.exists()
