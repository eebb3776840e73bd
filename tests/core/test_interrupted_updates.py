"""Updates that are interrupted: the next one goes on with the same update, or says why not."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

import agentpref
from agentpref.config import GateSettings, KLSettings, LossSettings, ReplaySettings, UpdateConfig
from agentpref.errors import TrainingDiverged, UpdateInterrupted
from agentpref.home import Home
from agentpref.learn import checkpoint
from agentpref.learn.process import Interrupts
from agentpref.record.deletion.forget import forget
from agentpref.serve.registry import Registry

pytestmark = pytest.mark.slow

CONFIG = UpdateConfig(
    held_out=0.4,
    batch_size=8,
    learning_rate=1e-2,
    epochs=6,
    kl=KLSettings(target=0.001),
    loss=LossSettings(beta=1.0, nll=1.0),
    replay=ReplaySettings(minimum=16),
    gate=GateSettings(
        cross_fit_below=0,
        retention_margin=1.0,  # what so small a model forgets differs from processor to processor
        kl_budget=1e3,
        distinct_floor=0.0,
        length_ratio=(1e-3, 1e3),
    ),
)
USER = "user-of-the-second-update"


def teach(home, numbers, chosen="yes", rejected="no, never", user=None, ask="Is {} a number?"):
    with agentpref.Log(home) as log:
        for number in numbers:
            asked = [{"role": "user", "content": ask.format(number)}]
            runs = [log.record(asked, text, user_id=user) for text in (chosen, rejected)]
            log.compare(*runs, winner="a", user_id=user)


def learn(home, base, config=CONFIG, **options):
    return agentpref.update(home, model=str(base), config=config, **{"checks": {}, **options})


def adapter(home, report):
    return (home / "adapters" / report.revision / "adapter_model.safetensors").read_bytes()


def signal_at(stage, done, signum=signal.SIGINT):
    def tell(now, at, total):
        if (now, at) == (stage, done):
            os.kill(os.getpid(), signum)

    return tell


def interrupt(home, base, stage="train", done=2, config=CONFIG, signum=signal.SIGINT):
    with pytest.raises(UpdateInterrupted) as caught:
        learn(home, base, config, progress=signal_at(stage, done, signum))
    assert caught.value.signum == signum
    return str(caught.value)


def states(home):
    return checkpoint.waiting(Home.open(home).training)


@pytest.fixture(scope="module")
def second_update(tmp_path_factory, random_base):
    """A home with a live revision, and new pairs to learn beside old ones to replay.

    They want what live would not say, so that there is much to gain.
    """
    home = tmp_path_factory.mktemp("second_update") / "home"
    teach(home, range(40))
    assert learn(home, random_base).verdict == "promoted"
    teach(home, range(40), "an enemy", "a friend", USER, "Who is {}?")
    return home


@pytest.fixture(scope="module")
def whole(second_update, tmp_path_factory, random_base):
    """What an uninterrupted update comes to: its report and the adapter's bytes."""
    home = shutil.copytree(second_update, tmp_path_factory.mktemp("whole") / "home")
    report = learn(home, random_base)
    assert not (home / "training").exists(), "nothing is left of it"
    return report, adapter(home, report)


@pytest.fixture
def home(second_update, tmp_path):
    return shutil.copytree(second_update, tmp_path / "home")


@pytest.fixture(scope="module")
def begun(second_update, tmp_path_factory, random_base):
    """The home with an update in it that was interrupted after two steps, and what was said."""
    home = shutil.copytree(second_update, tmp_path_factory.mktemp("begun") / "home")
    return home, interrupt(home, random_base)


@pytest.fixture
def waiting(begun, tmp_path):
    return shutil.copytree(begun[0], tmp_path / "home")


def test_the_next_update_resumes_with_the_same_data_and_newer_feedback_waits(
    waiting, begun, whole, random_base
):
    planned = whole[0].training["planned_steps"]
    assert begun[1] == f"interrupted; the next `agentpref update` resumes at step 2 of {planned}"
    assert [found.state.step for found in states(waiting)] == [2]
    teach(waiting, range(100, 110))
    gate = replace(CONFIG.gate, confidence=0.9)  # which determines no training
    report = learn(waiting, random_base, replace(CONFIG, gate=gate))
    assert adapter(waiting, report) == whole[1]
    assert report.training["resumed_at"] == 2
    later = {"new": 8, "new_held_out": 2}
    counts = {name: n + later.get(name, 0) for name, n in whole[0].counts.items()}
    assert report.counts == {**counts, "waiting": 10, "waiting_thumbs": 0}
    assert report.verdict == whole[0].verdict == "promoted"
    assert report.notes == whole[0].notes
    assert not (waiting / "training").exists()
    with pytest.raises(UpdateInterrupted):
        learn(waiting, random_base, progress=signal_at("train", 1))
    (following,) = states(waiting)
    data = following.about["data"]
    assert len(data["new"]) + len(data["new_held_out"]) == 10


def test_an_update_interrupted_while_it_evaluates_does_not_train_again(home, whole, random_base):
    counts = whole[0].counts
    examined = counts["new_held_out"] + counts["old_evaluated"]
    interrupt(home, random_base, "score candidate", examined, signum=15)
    report = learn(home, random_base)
    assert adapter(home, report) == whole[1]
    assert report.training["resumed_at"] == report.training["planned_steps"]


def test_an_update_interrupted_before_training_starts_over(home, random_base):
    words = interrupt(home, random_base, "load model", 1)
    assert words == "interrupted; the next `agentpref update` starts over"
    assert not (home / "training").exists()


KILLED = """
import os, signal, sys
import agentpref
from agentpref.learn import checkpoint
from agentpref.learn.process import Interrupts
sys.path.insert(0, sys.argv[4])
from test_interrupted_updates import CONFIG
home, base, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpoint.Checkpoint.due = lambda self: True
def tell(stage, done, total):
    if stage == "train" and done == steps:
        os.kill(os.getpid(), signal.SIGKILL)
agentpref.update(home, model=base, config=CONFIG, checks={}, progress=tell)
"""


@pytest.mark.guarantee("learning")
def test_an_update_killed_at_any_step_ends_with_the_same_bytes(home, whole, random_base):
    for steps in (1, random.Random(os.getpid()).randrange(3, 8)):
        command = [sys.executable, "-c", KILLED, str(home), str(random_base), str(steps)]
        done = subprocess.run([*command, os.path.dirname(__file__)], check=False)
        assert done.returncode == -signal.SIGKILL
    (found,) = states(home)
    teach(home, range(100, 104))
    report = learn(home, random_base)
    assert report.training["resumed_at"] == found.state.step > 1
    assert adapter(home, report) == whole[1]


@pytest.mark.parametrize("stage", ["score base", "train"])
def test_an_update_in_a_thread_ends_when_it_is_asked_and_is_resumed(
    home, whole, random_base, stage
):
    interrupts, ended = Interrupts(), []

    def ask(now, done, total):
        if now == stage:
            interrupts.ask(signal.SIGTERM)

    def work():
        with pytest.raises(UpdateInterrupted) as caught:
            learn(home, random_base, progress=ask, interrupts=interrupts)
        ended.append(caught.value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (error,) = ended
    assert error.signum == signal.SIGTERM
    outlook = "resumes at step 1 of " if stage == "train" else "starts over"
    assert f"the next `agentpref update` {outlook}" in str(error)
    assert adapter(home, learn(home, random_base)) == whole[1]


def test_forgetting_a_user_removes_training_states_that_saw_them(waiting, random_base):
    kept = shutil.copytree(waiting / "training", waiting.parent / "kept")
    forget(waiting, USER)
    assert not (waiting / "training").exists()
    shutil.copytree(kept, waiting / "training")  # as a restored folder would bring it back
    report = learn(waiting, random_base)
    assert report.verdict == "nothing_new"
    assert "no longer there" in report.notes[0]
    assert not (waiting / "training").exists()


def test_a_state_holds_no_text(waiting):
    (file,) = (waiting / "training").iterdir()
    found = file.read_bytes()
    assert all(word not in found for word in (b"friend", b"enemy", b"number", USER.encode()))


@pytest.mark.parametrize("change", ["config", "live", "damage"])
def test_an_unusable_state_is_reported_and_the_update_starts_over(waiting, random_base, change):
    config, words = CONFIG, {"config": "its config", "live": "its live", "damage": "damaged"}
    if change == "config":
        config = replace(CONFIG, seed=7)
    elif change == "live":
        Registry(waiting).rollback()
    else:
        (file,) = (waiting / "training").iterdir()
        file.write_bytes(file.read_bytes()[:-1])
    teach(waiting, range(100, 103))
    report = learn(waiting, random_base, config)
    assert words[change] in report.notes[0]
    assert (report.training["resumed_at"], "waiting" in report.counts) == (0, False)
    assert not (waiting / "training").exists()


def test_training_that_diverged_is_not_resumed(home, random_base):
    wild = replace(CONFIG, learning_rate=1e30)
    with pytest.raises(TrainingDiverged):
        learn(home, random_base, wild)
    assert states(home) == []


def test_each_namespace_has_its_own_interrupted_state(waiting, random_base):
    with agentpref.Log(waiting, namespace="../other") as log:
        log.record([{"role": "user", "content": "Hello!"}], "Hi!")
    assert learn(waiting, random_base, namespace="../other").verdict == "nothing_new"
    assert len(states(waiting)) == 1


def test_a_budget_stops_training_and_the_gate_still_decides(home, whole, random_base):
    report = learn(home, random_base, replace(CONFIG, max_minutes=1e-6))
    assert (report.training["stopped"], report.training["steps"]) == ("time", 1)
    assert report.training["planned_steps"] < whole[0].training["planned_steps"]
    assert report.counts["waiting"] > 0
    assert report.checks
    assert states(home) == []


def test_an_update_encodes_a_bounded_number_of_old_pairs(home, random_base, monkeypatch):
    """It encodes no more than it asks about and draws, and evaluates no more than the limit."""
    from agentpref.learn import encode

    seen = []
    real = encode.encode

    def counted(examples, *arguments, **options):
        seen.extend(example.example_id for example in examples)
        return real(examples, *arguments, **options)

    monkeypatch.setattr(encode, "encode", counted)
    monkeypatch.setattr("agentpref.changes.MOST_OLD", 3)
    few = replace(CONFIG.gate, max_old_pairs=2)
    config = replace(CONFIG, replay=ReplaySettings(minimum=0), gate=few)
    report = learn(home, random_base, config)
    new = report.counts["new"] + report.counts["new_held_out"]
    asked, chosen = seen[: new + 3], seen[new + 3 :]
    assert len(asked) == len(set(asked))
    assert len(chosen) == len(set(chosen)) == new + 2
    assert report.counts["old_held_out"] > report.counts["old_evaluated"] == 2
    assert (
        sum(tag["pairs"] for tag in report.accuracy.values()) == report.counts["new_held_out"] + 2
    )


def test_an_ample_budget_changes_nothing(home, whole, random_base):
    report = learn(home, random_base, replace(CONFIG, max_minutes=1e4))
    assert (report.training["stopped"], report.counts) == ("end", whole[0].counts)
    assert report.verdict == whole[0].verdict
    mine, theirs = ([re.sub(r"[\d.]+", "#", note) for note in r.notes] for r in (report, whole[0]))
    assert mine == theirs, "but for the last digits of scores, which it computes in other batches"


@pytest.fixture
def with_threads():
    """Call it to give torch a number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_resumed_update_computes_with_the_threads_that_it_started_with(
    home, random_base, with_threads
):
    """Their number may decide about last bits; a machine that is restarted may have another."""
    with_threads(2)
    interrupt(home, random_base)
    with_threads(1)
    seen = set()
    report = learn(home, random_base, progress=lambda *_: seen.add(torch.get_num_threads()))
    assert 2 in seen
    assert report.training["resumed_at"] == 2
    assert report.training["threads"] == 2
    assert torch.get_num_threads() == 1


def test_a_state_without_a_number_of_threads_is_resumed_with_those_of_today(
    begun, tmp_path, random_base, monkeypatch
):
    """As versions before it wrote them."""
    home = shutil.copytree(begun[0], tmp_path / "home")
    (path,) = Home.open(home).training.glob("*.safetensors")
    saved = checkpoint.read(path)
    about = {name: value for name, value in saved.about.items() if name != "threads"}
    checkpoint.Checkpoint(path, about).save(saved.state)
    report = learn(home, random_base)
    assert report.training["resumed_at"] == 2
    assert report.training["threads"] == torch.get_num_threads()
