"""Training that is interrupted and resumed ends with the same bytes, and budgets end it early."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from agentpref.config import KLSettings, UpdateConfig
from agentpref.learn import trainer
from agentpref.learn.checkpoint import Checkpoint, peek
from agentpref.learn.learner import Learner
from agentpref.learn.schedule import rate_share
from agentpref.learn.trainer import Limits
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import load_base
from tests.core.learn.examples import make_group, make_pair, make_thumb, with_completions

STEPS = 6  # 12 pairs in batches of 4, passed over twice


@pytest.fixture
def path(tmp_path):
    return tmp_path / "training" / "state.safetensors"


def make(number, **changes):
    return make_pair(number, f"yes, {number} it is", "no" * (1 + number % 3), **changes)


PAIRS = [make(number) for number in range(12)]
MIXED = [
    *PAIRS[:6],
    *(make_thumb(n, f"yes, {n}", n % 2 == 0) for n in range(6, 9)),
    *(make_group(n, {f"{n}": 1.0, f"or {n}": 0.5, f"never {n}": 0.0}) for n in range(9, 12)),
]
CONFIG = UpdateConfig(batch_size=4, learning_rate=3e-3, epochs=2, kl=KLSettings(target=0.001))


def learner_of(base, live=None, config=CONFIG):
    files = None if live is None else read_adapter(live)
    return Learner(load_base(str(base)), files, config, caches={}, progress=lambda *_: None)


@pytest.fixture(scope="module")
def fit(random_base, tmp_path_factory):
    """Train and save anew: ``fit(checkpoint=…)`` gives the report and the adapter's bytes."""
    folder = tmp_path_factory.mktemp("adapter")

    def call(examples=PAIRS, observe=None, checkpoint=None, limits=None, live=None, **settings):
        learner = learner_of(random_base, live, replace(CONFIG, **settings))
        report = learner.fit(
            learner.encode(examples), new=12, observe=observe, checkpoint=checkpoint, limits=limits
        )
        learner.save(folder)
        return report, (folder / "adapter_model.safetensors").read_bytes()

    return call


@pytest.fixture(scope="module")
def whole(fit):
    """What an uninterrupted run comes to: its report and the adapter's bytes."""
    return fit()


def interrupt_at(step):
    """An observer that asks for the end, as a signal would, once so many steps are done."""
    limits, seen = Limits(), []

    def observe(result):
        seen.append(result)
        if len(seen) == step:
            limits.interrupts.signum = signal.SIGINT

    return {"limits": limits, "observe": observe}


def interrupted(fit, path, step, **options):
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint=Checkpoint(path), **interrupt_at(step), **options)


def timeless(report):
    return replace(report, seconds=0.0, resumed_at=0)


def test_an_interrupted_run_resumes_at_its_step_and_ends_with_the_same_bytes(fit, path, whole):
    assert (whole[0].steps, whole[0].planned_steps, whole[0].resumed_at) == (STEPS, STEPS, 0)
    for step in (1, 2, STEPS):
        interrupted(fit, path, step)
        seen = []
        report, found = fit(checkpoint=Checkpoint(path), observe=seen.append)
        assert found == whole[1], step
        assert report.resumed_at == step
        assert len(seen) == STEPS - step
        assert timeless(report) == timeless(whole[0])
        path.unlink()


def test_training_on_pairs_thumbs_and_groups_resumes_with_the_same_bytes(fit, path):
    expected = fit(examples=MIXED)[1]
    interrupted(fit, path, 3, examples=MIXED)
    report, found = fit(checkpoint=Checkpoint(path), examples=MIXED)
    assert (report.resumed_at, found) == (3, expected)


def test_a_run_that_is_interrupted_three_times_ends_with_the_same_bytes(fit, path, whole):
    for _ in range(3):
        interrupted(fit, path, 1)
    report, found = fit(checkpoint=Checkpoint(path))
    assert (report.resumed_at, found) == (3, whole[1])


class Keeping(Checkpoint):
    """Saves after every step, and keeps a copy of each state."""

    def due(self):
        return True

    def save(self, state):
        super().save(state)
        self.path.with_name(str(state.step)).write_bytes(self.path.read_bytes())


def test_saving_after_every_step_changes_nothing_and_each_state_leads_to_the_same_bytes(
    fit, path, whole
):
    assert fit(checkpoint=Keeping(path))[1] == whole[1]
    names = {file.name for file in path.parent.iterdir()} - {path.name}
    assert names == {str(step) for step in range(1, STEPS + 1)}
    for step in random.Random(os.getpid()).sample(range(1, STEPS), 2):
        path.write_bytes(path.with_name(str(step)).read_bytes())
        report, found = fit(checkpoint=Checkpoint(path))
        assert (report.resumed_at, found) == (step, whole[1])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_trainer import PAIRS, Checkpoint, learner_of
Checkpoint.due = lambda self: True
seen = []
def observe(result):
    seen.append(result)
    if len(seen) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
learner = learner_of(sys.argv[1])
checkpoint = Checkpoint(Path(sys.argv[2]))
learner.fit(learner.encode(PAIRS), new=12, observe=observe, checkpoint=checkpoint)
"""


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(fit, path, whole, random_base):
    steps = random.Random(os.getpid()).randrange(1, STEPS)
    command = [sys.executable, "-c", KILLED, str(random_base), str(path), str(steps)]
    done = subprocess.run([*command, os.path.dirname(__file__)], check=False)
    assert done.returncode == -signal.SIGKILL
    report, found = fit(checkpoint=Checkpoint(path))
    assert (report.resumed_at, found) == (steps, whole[1]), f"killed at step {steps}"


@pytest.fixture(scope="module")
def left(fit, tmp_path_factory):
    """The state of a run that was interrupted after two steps, as bytes."""
    path = tmp_path_factory.mktemp("left") / "state.safetensors"
    interrupted(fit, path, 2)
    return path.read_bytes()


@pytest.fixture
def waiting(path, left):
    path.parent.mkdir()
    path.write_bytes(left)
    return path


CHANGES = [
    {"seed": 1},
    {"learning_rate": 1e-3},
    {"epochs": 1},
    {"kl": KLSettings(weight=1.0)},
    {"examples": [*PAIRS[:-1], make(11, noise=0.4)]},
    {"examples": [*PAIRS[:-1], make(11, origin="correction")]},
    {"examples": [*PAIRS[:-1], make_pair(11, "oh", "nonono")]},
    {"examples": [*PAIRS[:-1], with_completions(PAIRS[-1], {"label": 0.9})]},
    {"examples": [*PAIRS[:-1], with_completions(PAIRS[-1], {"author": "rev-1"})]},
    {"examples": PAIRS[::-1]},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_state_of_another_run_is_not_used(fit, waiting, change):
    checkpoint = Checkpoint(waiting)
    report, _ = fit(checkpoint=checkpoint, **change)
    assert report.resumed_at == 0
    assert "not those of this run" in checkpoint.troubles[0]


def test_a_state_of_another_live_revision_is_not_used(fit, waiting, tmp_path, random_base):
    learner = learner_of(random_base)
    with learner.policy("candidate") as model, torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(0.01)
    learner.save(tmp_path / "live")
    assert fit(checkpoint=Checkpoint(waiting), live=tmp_path / "live")[0].resumed_at == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("missing", None),
        ("weight.extra", torch.zeros(1)),
        ("adamw.0.exp_avg", torch.zeros(1)),
        ("adamw.0.step", torch.tensor(float("nan"))),
        ("adamw.0.exp_avg_sq", None),
        ("generator.cpu", torch.zeros(3, dtype=torch.uint8)),
    ],
)
def test_a_state_with_a_right_digest_and_wrong_tensors_is_not_used(
    fit, waiting, whole, name, value
):
    state = Checkpoint(waiting).load(peek(waiting).state.fingerprint)
    tensors = dict(state.tensors)
    if name == "missing":
        name = next(name for name in tensors if name.startswith("weight."))
    tensors[name] = value
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    Checkpoint(waiting).save(replace(state, tensors=kept))
    checkpoint = Checkpoint(waiting)
    report, found = fit(checkpoint=checkpoint)
    assert report.resumed_at == 0
    assert "damaged" in checkpoint.troubles[0]
    assert found == whole[1], "nothing of it was used"


def test_a_state_without_the_numbers_of_the_losses_is_not_used(fit, waiting):
    state = Checkpoint(waiting).load(peek(waiting).state.fingerprint)
    Checkpoint(waiting).save(replace(state, objective={}))
    assert fit(checkpoint=Checkpoint(waiting))[0].resumed_at == 0


def test_training_does_not_change_the_hosts_random_numbers(fit):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit()
    assert torch.equal(torch.rand(3), expected)


class Clock:
    """Seconds that pass when a step is done, and at no other time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def tick(self, _result):
        self.now += 10.0


def budget(seconds):
    clock = Clock()
    return {"limits": Limits(seconds=seconds, clock=clock), "observe": clock.tick}


def test_a_budget_ends_training_between_two_steps(fit, whole):
    report, found = fit(**budget(35.0))
    assert (report.stopped, report.steps, report.planned_steps) == ("time", 4, STEPS)
    assert report.seconds == 40.0
    assert found != whole[1]


def test_a_budget_that_is_not_used_up_changes_nothing(fit, whole):
    report, found = fit(**budget(60.0))
    assert (report.stopped, found) == ("end", whole[1])
    assert timeless(report) == timeless(whole[0])


def test_one_step_is_done_whatever_the_budget(fit):
    report, _ = fit(**budget(0.0))
    assert (report.stopped, report.steps) == ("time", 1)


def test_under_a_budget_the_learning_rate_falls_with_time(fit, monkeypatch):
    used = []

    def record(position, steps):
        used.append(rate_share(position, steps))
        return used[-1]

    monkeypatch.setattr(trainer, "rate_share", record)
    fit(**budget(25.0))
    assert used == pytest.approx([rate_share(at * STEPS, STEPS) for at in (0, 0.4, 0.8)])


def test_a_run_that_its_budget_ended_can_be_continued(fit, path, whole):
    assert fit(checkpoint=Checkpoint(path), **budget(1.0))[0].steps == 1
    report, found = fit(checkpoint=Checkpoint(path))
    assert (report.resumed_at, report.steps, report.stopped) == (1, STEPS, "end")
    assert found == whole[1], "the first step had the rate that it always has"


def test_the_rate_rises_over_a_tenth_and_falls_to_zero():
    shares = [rate_share(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0 < shares[-1] < 0.02
    assert rate_share(0, 1) == 1.0
