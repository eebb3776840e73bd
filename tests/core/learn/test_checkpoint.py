"""A state on disk is a whole old one or a whole new one, and a damaged one is not used."""

from __future__ import annotations

import os
from dataclasses import replace

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from agentpref import home
from agentpref.config import GateSettings, UpdateConfig
from agentpref.errors import UnusableState
from agentpref.learn import checkpoint as checkpoints
from agentpref.learn.checkpoint import FORMAT, Checkpoint, TrainingState, peek, training_settings
from agentpref.learn.objective import StepResult

TENSORS = {"weight.a": torch.arange(6.0).reshape(2, 3), "adamw.0.step": torch.tensor(3.0)}
STATE = TrainingState(
    fingerprint="f",
    step=2,
    planned=5,
    seconds=1.5,
    objective={"kl_is_due": 1.0},
    history=[StepResult(0.1 + 0.2, -1e-300, None), StepResult(1 / 3, 2.0, 0.25)],
    tensors=TENSORS,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "training" / "state.safetensors"


@pytest.fixture
def saved(path):
    Checkpoint(path, {"who": "me"}).save(STATE)
    return path


def same(found, expected):
    assert found is not None
    assert replace(found, tensors={}) == replace(expected, tensors={})
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], t) for name, t in expected.tensors.items())
    return True


def test_a_saved_state_is_loaded_to_the_last_bit(saved):
    assert same(Checkpoint(saved).load("f"), STATE)
    assert peek(saved).about == {"who": "me"}


def test_a_state_of_format_1_is_discarded_and_said_to_be_of_another_version(saved, monkeypatch):
    """Version 0.1 wrote format 1, which had pairs and thumbs."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 1)
        Checkpoint(saved, {"who": "me"}).save(STATE)
    assert FORMAT == 2
    checkpoint = Checkpoint(saved)
    assert checkpoint.load("f") is None
    assert checkpoint.troubles == [
        "the state of an interrupted training was discarded: another version of agentpref wrote it"
    ]
    assert not saved.exists()


def test_loading_where_there_is_no_state_reports_nothing(path):
    checkpoint = Checkpoint(path)
    assert checkpoint.load("f") is None
    assert checkpoint.troubles == []
    assert not path.parent.exists()


def test_a_state_of_another_run_is_removed_and_reported(saved):
    checkpoint = Checkpoint(saved)
    assert checkpoint.load("g") is None
    (message,) = checkpoint.troubles
    assert message == (
        "the state of an interrupted training was discarded: its rows, model or settings are not "
        "those of this run"
    )
    assert not saved.parent.exists()


def test_the_state_of_an_attempt_that_ended_stays_until_the_next_one_saves(saved):
    checkpoint = Checkpoint(saved, {"who": "the next"})
    checkpoint.supersede()
    assert (checkpoint.load("g"), checkpoint.troubles) == (None, [])
    assert peek(saved).about == {"who": "me"}, "a kill here resumes the attempt before"
    checkpoint.save(replace(STATE, fingerprint="g"))
    assert peek(saved).about == {"who": "the next"}
    assert same(checkpoint.load("g"), replace(STATE, fingerprint="g"))


@pytest.mark.parametrize(("name", "call"), [("sync", 1), ("os.replace", 1), ("sync", 2)])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_during_a_save_leaves_the_old_state(saved, monkeypatch, name, call, error):
    """An error of the disk does not end training; a kill, which no handler catches, does."""
    calls = 0
    real = {"sync": home.sync, "os.replace": os.replace}[name]

    def fails(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(*arguments)

    monkeypatch.setattr(f"agentpref.home.{name}", fails)
    checkpoint, newer = Checkpoint(saved), replace(STATE, seconds=9.0)
    try:
        checkpoint.save(newer)
    except KeyboardInterrupt:
        assert isinstance(error, KeyboardInterrupt)
    else:
        assert "No space left on device" in checkpoint.troubles[0]
    assert calls == call
    monkeypatch.undo()
    assert same(Checkpoint(saved).load("f"), newer if call == 2 else STATE)
    checkpoints.sweep(saved.parent)
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_cannot_be_written_does_not_end_training(tmp_path):
    (tmp_path / "training").write_text("a file")
    checkpoint = Checkpoint(tmp_path / "training" / "state.safetensors")
    checkpoint.save(STATE)
    checkpoint.save(STATE)
    (message,) = checkpoint.troubles
    assert "could not be saved" in message


@given(st.data())
def test_a_damaged_state_is_discarded(tmp_path_factory, data):
    """A file that is cut anywhere, or has any byte changed, is refused without a crash."""
    path = tmp_path_factory.getbasetemp() / "damaged" / "s.safetensors"
    Checkpoint(path).save(STATE)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    change = data.draw(st.integers(1, 255))
    damaged = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :]
    path.write_bytes(damaged)
    checkpoint = Checkpoint(path)
    assert checkpoint.load("f") is None
    assert len(checkpoint.troubles) == 1
    assert not path.exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FIELDS = ("format", "fingerprint", "step", "planned", "seconds", "objective", "history", "about")


@given(st.sampled_from(FIELDS), json_values)
def test_a_header_with_any_values_is_refused_or_well_formed(tmp_path_factory, name, value):
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    body = {
        "format": FORMAT, "fingerprint": "f", "step": 1, "planned": 2, "seconds": 0.0,
        "objective": {}, "history": [[0.5, 0.0, None]], "about": {},
    }  # fmt: skip
    text = orjson.dumps({**body, name: value}).decode()
    save_file(TENSORS, path, metadata={"state": text, "digest": checkpoints._seal(text, TENSORS)})
    found = Checkpoint(path).load("f")
    if found is not None:
        assert 0 <= found.step <= found.planned
        assert len(found.history) == found.step
        assert all(isinstance(value, (int, float)) for value in found.objective.values())


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xff" * 64,
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (30_000).to_bytes(8, "little") + b"[" * 30_000,
    ],
    ids=["empty", "ones", "endless header", "no object", "deep"],
)
def test_bytes_that_are_no_state_are_refused(path, damaged):
    path.parent.mkdir()
    path.write_bytes(damaged)
    with pytest.raises(UnusableState):
        peek(path)
    assert checkpoints.waiting(path.parent) == []


def test_saves_are_due_by_time_and_cost_at_most_a_hundredth_of_it(path, monkeypatch):
    now = [0.0]
    checkpoint = Checkpoint(path, every=30.0, clock=lambda: now[0])
    now[0] = 29.0
    assert not checkpoint.due()
    now[0] = 30.0
    assert checkpoint.due()
    checkpoint.save(STATE)
    assert not checkpoint.due()

    def slow(*_):
        now[0] += 2.0

    monkeypatch.setattr("agentpref.learn.checkpoint._write", slow)
    checkpoint.save(STATE)
    now[0] += 199.0
    assert not checkpoint.due()
    now[0] += 1.0
    assert checkpoint.due()


def test_loading_restarts_the_time_to_the_next_save(path):
    now = [0.0]
    checkpoint = Checkpoint(path, every=30.0, clock=lambda: now[0])
    now[0] = 100.0
    checkpoint.load("f")
    assert not checkpoint.due()


@given(st.text(), st.text())
def test_every_namespace_has_its_own_file_inside_the_folder(tmp_path_factory, one, other):
    folder = tmp_path_factory.getbasetemp()
    paths = [checkpoints.path_of(folder, name) for name in (one, other)]
    assert (paths[0] == paths[1]) == (one == other)
    assert all(path.parent == folder and path.name.isascii() for path in paths)


def test_the_settings_of_training_are_all_but_gate_and_budget():
    plain = training_settings(UpdateConfig())
    changed = UpdateConfig(max_minutes=3, gate=GateSettings(folds=7))
    assert training_settings(changed) == plain
    assert training_settings(UpdateConfig(seed=1)) != plain
    assert orjson.loads(orjson.dumps(plain)) == plain


def test_a_state_that_was_cut_is_seen_without_its_tensors(saved):
    assert checkpoints.damaged(saved.parent) == {}
    os.truncate(saved, saved.stat().st_size - 1)
    with pytest.raises(UnusableState, match=r"it is damaged \(its length\)"):
        peek(saved)
    assert checkpoints.waiting(saved.parent) == []
    assert checkpoints.damaged(saved.parent) == {saved: "it is damaged (its length)"}


def test_a_time_out_of_the_app_discards_no_state(saved, monkeypatch):
    def late(*_):
        raise TimeoutError("the app's own")

    monkeypatch.setattr(checkpoints, "read_header", late)
    with pytest.raises(TimeoutError, match="the app's own"):
        Checkpoint(saved).load("f")
    assert saved.exists()
