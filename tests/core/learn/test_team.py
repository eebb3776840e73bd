"""Two processes train what one would, step by step, and end together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import team_runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from agentpref.config import UpdateConfig
from agentpref.errors import AgentprefError, UpdateError, UpdateInterrupted
from agentpref.learn.checkpoint import fingerprint
from agentpref.learn.follower import follow
from agentpref.learn.learner import Learner
from agentpref.learn.objective import TrainingRow
from agentpref.learn.team import Team, assembled, follows
from agentpref.models.base import load_base

pytestmark = pytest.mark.slow

PROGRAM = Path(team_runs.__file__)
RUNS = ("pairs", "uneven", "mixed", "groups", "resumed", "budgeted", "on live", "many passes")


@pytest.fixture(scope="module")
def alone(random_base, tmp_path_factory):
    """What one process makes of the runs, in this process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team_runs.Learner, "train", team_runs.Learner.train)
        team_runs.main(random_base, folder, *RUNS)
    return folder


@pytest.fixture(scope="module")
def together(random_base, tmp_path_factory, launch):
    """What two processes make of them."""
    folder = tmp_path_factory.mktemp("together")
    done = launch(PROGRAM, random_base, folder, *RUNS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{{'runs': {len(RUNS)}}}\n", "followers get the outcome"
    return folder


def read(folder, run):
    return orjson.loads((folder / f"{run}.json").read_bytes())


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_take_the_steps_that_one_takes(alone, together, run):
    expected, found = read(alone, run), read(together, run)
    assert (expected["processes"], found["processes"]) == (1, 2)
    assert len(found["steps"]) == len(expected["steps"])
    for one, two in zip(expected["steps"], found["steps"], strict=True):
        assert [value is None for value in one] == [value is None for value in two]
        numbers = [value for value in one if value is not None]
        assert [v for v in two if v is not None] == pytest.approx(numbers, abs=3e-5)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_end_with_the_weights_of_one(alone, together, run):
    (expected, found) = (
        load_file(folder / f"{run}-0" / "adapter_model.safetensors") for folder in (alone, together)
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.norm(found[name] - tensor) <= 1e-4 * torch.norm(tensor), name


@pytest.mark.guarantee("learning")
@pytest.mark.parametrize("run", RUNS)
def test_processes_that_train_together_end_with_the_same_bytes(together, run):
    one, two = (
        (together / f"{run}-{rank}" / "adapter_model.safetensors").read_bytes() for rank in (0, 1)
    )
    assert one == two


def test_all_processes_take_the_smallest_room_of_any(together):
    assert read(together, "many passes")["tokens_per_pass"] == 40


def test_a_resumed_team_ends_with_the_same_bytes(together):
    assert read(together, "resumed")["resumed_at"] == 2
    whole, resumed = (
        (together / f"{run}-0" / "adapter_model.safetensors").read_bytes()
        for run in ("pairs", "resumed")
    )
    assert whole == resumed


@pytest.mark.parametrize("run", RUNS)
def test_scores_of_two_processes_come_back_in_the_order_of_the_rows(alone, together, run):
    expected, found = read(alone, run)["scores"], read(together, run)["scores"]
    assert [len(logps) for logps in found] == [len(logps) for logps in expected]
    for logps, wanted in zip(found, expected, strict=True):
        assert logps == pytest.approx(wanted, abs=1e-3)


def test_the_main_process_ends_with_a_message_when_a_follower_dies(
    random_base, tmp_path, pair_of_processes
):
    main, follower = pair_of_processes(PROGRAM, random_base, tmp_path, "dies")
    assert follower[0] == -9
    assert main[0] == 1
    assert main[2].startswith("another process of this update ended")


def test_processes_that_end_with_different_weights_fail(random_base, tmp_path, pair_of_processes):
    for code, _, message in pair_of_processes(PROGRAM, random_base, tmp_path, "differs"):
        assert code == 1
        assert message.startswith("the 2 processes ended with different weights")
    assert not (tmp_path / "differs.json").exists()


def test_a_process_without_a_launcher_is_a_team_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert assembled().size == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert assembled().size == 1
    assert not follows()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not follows()
    monkeypatch.setenv("RANK", "1")
    assert follows()


@given(st.lists(st.floats(), max_size=5), st.binary(max_size=5))
def test_a_team_of_one_gets_its_own_numbers_and_messages_back(numbers, message):
    team = Team()
    assert team.main
    for found in (team.agree(numbers), team.sum(numbers), team.least(numbers)):
        assert [number.hex() for number in found] == [number.hex() for number in numbers]
    assert team.broadcast(message) == message
    assert team.gather(message) == [message]
    assert team.deal([1, 2, 3]) == [1, 2, 3]


@given(st.integers(1, 5), st.lists(st.integers()))
def test_every_row_is_dealt_to_exactly_one_process(size, rows):
    shares = [Team(rank, size).deal(rows) for rank in range(size)]
    assert sorted(row for share in shares for row in share) == sorted(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("run", ["mixed", "groups"])
def test_rows_reach_followers_without_a_text_and_train_the_same(run):
    encoded = team_runs.rows_of(run)
    references = [tuple(-(at + 1) / 3 for at in range(len(row.completions))) for row in encoded]
    references[:2] = [(-0.1, -math.inf, *found[2:]) for found in references[:2]]
    lives = [None, *((-2e-300, *found[1:]) for found in references[1:])]
    rows = list(map(TrainingRow, encoded, references, lives))
    frozen = orjson.dumps([row.freeze() for row in rows])
    thawed = [TrainingRow.thaw(row) for row in orjson.loads(frozen)]
    assert fingerprint([thawed]) == fingerprint([rows]), "it covers all that a loss reads"
    assert b"assistant" not in frozen
    assert [row.encoded.width for row in thawed] == [row.encoded.width for row in rows]
    assert [row[1:] for row in thawed] == [row[1:] for row in rows]


def test_the_fingerprint_covers_all_that_training_reads():
    (row,) = [TrainingRow(team_runs.group(0), (-1.0, -2.0, -3.0, -4.0))]
    example = row.encoded.example
    first, *others = example.completions

    def changed(**fields):
        return row._replace(encoded=replace(row.encoded, **fields))

    def told(**fields):
        return changed(example=replace(example, **fields))

    different = [
        row,
        row._replace(reference=(-1.0, -2.0, -3.0, -4.0 - 1e-15)),
        row._replace(live=row.reference),
        changed(prompt=(9, 9)),
        changed(completions=(*row.encoded.completions[:3], (7, 7))),
        changed(masks=(None,) * 4),
        told(weight=0.5),
        told(noise=0.4),
        told(origin="correction"),
        told(completions=(replace(first, label=0.5), *others)),
        told(completions=(replace(first, author="rev-1"), *others)),
    ]
    found = [fingerprint([[each]]) for each in different]
    assert len(set(found)) == len(different)
    text = {"role": "assistant", "content": "another"}
    assert fingerprint([[told(completions=(replace(first, message=text), *others))]]) == found[0]


class Recorded(Team):
    """A team that keeps its one message, so that the follower of another one can receive it."""

    def broadcast(self, message):
        self.message = message or self.message
        return self.message


def kinds(kind):
    return [kind, *(one for under in kind.__subclasses__() for one in kinds(under))]


ERRORS = [kind for kind in kinds(AgentprefError) if kind.__module__ == AgentprefError.__module__]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_followers_end_with_the_error_that_the_main_process_ends_with(kind):
    error = kind("why", 15) if kind is UpdateInterrupted else kind("why")
    main, follower = Recorded(0, 2), Recorded(1, 2)
    with pytest.raises(kind), main:
        raise error
    follower.message = main.message
    with pytest.raises(kind, match="why") as caught, follower:
        follower.receive()
    assert type(caught.value) is kind
    assert getattr(caught.value, "signum", None) == getattr(error, "signum", None)


def test_an_error_of_another_library_reaches_followers_as_a_message():
    main, follower = Recorded(0, 2), Recorded(1, 2)
    with pytest.raises(ZeroDivisionError), main:
        raise ZeroDivisionError("by zero")
    follower.message = main.message
    with pytest.raises(UpdateError, match="ZeroDivisionError: by zero"):
        follower.receive()


def test_a_follower_with_different_weights_is_detected():
    class Differing(Team):
        def gather(self, message):
            return [message, b"another"]

    with pytest.raises(UpdateError, match="different weights"):
        Differing(0, 2).conclude("one")


class Told(Team):
    """A process that gets these orders and keeps its messages; the other sends ``beside``."""

    def __init__(self, rank, told=(), beside=b""):
        super().__init__(rank, 2)
        self._told, self._beside, self.said = iter(told), beside, []

    def broadcast(self, message):
        self.said.append(message)
        return message or orjson.dumps(next(self._told))

    def gather(self, message):
        self.said.append(message)
        return [message, self._beside]


def test_a_follower_with_a_different_model_reports_it(random_base):
    leading = Told(0)
    Learner(
        load_base(str(random_base)), None, UpdateConfig(), caches={}, progress=print, team=leading
    )
    attach = orjson.loads(leading.said[0])
    right, wrong = ({**attach, "numbers": n} for n in (attach["numbers"], "another"))
    team = Told(1, [right, wrong, {"outcome": {"all": "done"}}])
    assert follow(team) == {"all": "done"}
    messages = [message.decode() for message in team.said if message]
    assert len(messages) == 1
    assert str(random_base) in messages[0]
    assert "different model here" in messages[0]


def test_a_follower_gives_the_chat_template_the_same_arguments(random_base):
    arguments = {"message": "x"}
    base = load_base(str(random_base), chat_template_kwargs=arguments)
    leading, config = Told(0), UpdateConfig(chat_template_kwargs=arguments)
    Learner(base, None, config, caches={}, progress=print, team=leading)
    team = Told(1, [orjson.loads(leading.said[0]), {"outcome": {"all": "done"}}])
    assert follow(team) == {"all": "done"}
    assert not any(team.said), "it has the same model"


def test_the_main_process_ends_when_a_follower_has_a_different_model(random_base):
    with pytest.raises(UpdateError, match="process 1 of the team: no such model"):
        Learner(
            load_base(str(random_base)),
            None,
            UpdateConfig(),
            caches={},
            progress=print,
            team=Told(0, beside=b"no such model"),
        )
