"""Two processes train what one would, step by step, and end together whatever happens."""

from __future__ import annotations

import math
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
from agentpref.learn import orders
from agentpref.learn.follower import follow
from agentpref.learn.learner import Learner
from agentpref.learn.logps import PairLogps
from agentpref.learn.objective import TrainingRow
from agentpref.learn.state import fingerprint
from agentpref.learn.team import Team, assembled, follows
from agentpref.models.base import load_base

PROGRAM = Path(team_runs.__file__)
RUNS = ("pairs", "uneven", "mixed", "resumed", "budgeted", "on live", "many passes")


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
    assert done.stdout == f"{{'runs': {len(RUNS)}}}\n", "followers are told the outcome"
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
def test_they_end_with_the_weights_that_one_ends_with(alone, together, run):
    (expected, found) = (
        load_file(folder / f"{run}-0" / "adapter_model.safetensors") for folder in (alone, together)
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.norm(found[name] - tensor) <= 1e-4 * torch.norm(tensor), name


@pytest.mark.parametrize("run", RUNS)
def test_they_end_with_the_same_weights_to_the_last_bit(together, run):
    one, two = (
        (together / f"{run}-{rank}" / "adapter_model.safetensors").read_bytes() for rank in (0, 1)
    )
    assert one == two


def test_the_least_room_of_any_process_is_that_of_all(together):
    assert read(together, "many passes")["tokens_per_pass"] == 40


def test_a_resumed_team_ends_with_the_bytes_of_one_that_was_not_interrupted(together):
    assert read(together, "resumed")["resumed_at"] == 2
    whole, resumed = (
        (together / f"{run}-0" / "adapter_model.safetensors").read_bytes()
        for run in ("pairs", "resumed")
    )
    assert whole == resumed


@pytest.mark.parametrize("run", RUNS)
def test_scores_come_back_in_order(alone, together, run):
    expected, found = read(alone, run)["scores"], read(together, run)["scores"]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-3)


def test_where_a_follower_dies_the_main_process_says_so_and_ends(
    random_base, tmp_path, pair_of_processes
):
    main, follower = pair_of_processes(PROGRAM, random_base, tmp_path, "dies")
    assert follower[0] == -9
    assert main[0] == 1
    assert main[2].startswith("another process of this update ended")


def test_weights_that_came_apart_are_no_result(random_base, tmp_path, pair_of_processes):
    for code, _, words in pair_of_processes(PROGRAM, random_base, tmp_path, "differs"):
        assert code == 1
        assert words.startswith("the 2 processes ended with different weights")
    assert not (tmp_path / "differs.json").exists()


def test_without_a_launcher_a_process_is_alone(monkeypatch):
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
def test_alone_everything_is_ones_own(numbers, message):
    team = Team()
    assert team.main
    for found in (team.agree(numbers), team.sum(numbers), team.least(numbers)):
        assert [number.hex() for number in found] == [number.hex() for number in numbers]
    assert team.tell(message) == message
    assert team.gather(message) == [message]
    assert team.deal([1, 2, 3]) == [1, 2, 3]


@given(st.integers(1, 5), st.lists(st.integers()))
def test_every_row_is_dealt_to_one_process(size, rows):
    shares = [Team(rank, size).deal(rows) for rank in range(size)]
    assert sorted(row for share in shares for row in share) == sorted(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_arrive_as_they_were_for_all_that_trains_and_without_a_text():
    references = [PairLogps(-0.1, -math.inf), PairLogps(1 / 3, -2e-300)] * 6
    rows = list(map(TrainingRow, team_runs.rows_of("mixed"), references))
    frozen = orjson.dumps(orders.freeze_training(rows))
    thawed = orders.thaw_training(orjson.loads(frozen))
    assert fingerprint([thawed]) == fingerprint([rows]), "which covers all that a loss reads"
    assert b"assistant" not in frozen
    assert [row.encoded.width for row in thawed] == [row.encoded.width for row in rows]


class Recorded(Team):
    """A team whose one message is kept, to be heard by the follower of another."""

    def tell(self, message):
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
        follower.hear()
    assert type(caught.value) is kind
    assert getattr(caught.value, "signum", None) == getattr(error, "signum", None)


def test_a_stranger_s_error_reaches_followers_as_words():
    main, follower = Recorded(0, 2), Recorded(1, 2)
    with pytest.raises(ZeroDivisionError), main:
        raise ZeroDivisionError("by zero")
    follower.message = main.message
    with pytest.raises(UpdateError, match="ZeroDivisionError: by zero"):
        follower.hear()


def test_a_follower_that_has_other_weights_is_found_out():
    class Differing(Team):
        def gather(self, message):
            return [message, b"another"]

    with pytest.raises(UpdateError, match="different weights"):
        Differing(0, 2).conclude("one")


class Told(Team):
    """A process that is told these orders, and whose words are kept; others say ``beside``."""

    def __init__(self, rank, told=(), beside=b""):
        super().__init__(rank, 2)
        self._told, self._beside, self.said = iter(told), beside, []

    def tell(self, message):
        self.said.append(message)
        return message or orjson.dumps(next(self._told))

    def gather(self, message):
        self.said.append(message)
        return [message, self._beside]


def test_a_follower_with_another_model_says_so(random_base):
    leading = Told(0)
    Learner(
        load_base(str(random_base)), None, UpdateConfig(), caches={}, progress=print, team=leading
    )
    attach = orjson.loads(leading.said[0])
    right, wrong = ({**attach, "numbers": n} for n in (attach["numbers"], "another"))
    team = Told(1, [right, wrong, {"outcome": {"all": "done"}}])
    assert follow(team) == {"all": "done"}
    words = [message.decode() for message in team.said if message]
    assert len(words) == 1
    assert str(random_base) in words[0]
    assert "another model here" in words[0]


def test_the_main_process_ends_where_a_follower_has_another_model(random_base):
    with pytest.raises(UpdateError, match="process 1 of the team: no such model"):
        Learner(
            load_base(str(random_base)),
            None,
            UpdateConfig(),
            caches={},
            progress=print,
            team=Told(0, beside=b"no such model"),
        )
