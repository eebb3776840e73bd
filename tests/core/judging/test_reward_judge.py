"""The reward model of a namespace judges, and trains as far as its own fit has shown it right."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agentpref.errors import JudgeError
from agentpref.home import Home
from agentpref.judging import calibrate_judge, judge_runs
from agentpref.record.log import Log
from agentpref.reward import Shelf, fit_reward
from tests.core.reward.test_reward import answers, asked, fill


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """120 comparisons, and 30 pairs that nobody compared."""
    place = fill(tmp_path_factory.mktemp("bare") / "home")
    with Log(place.path) as log:
        for number in range(200, 230):
            for text in answers(number):
                log.record(asked(number), text, tags=["chat"])
    return place


@pytest.fixture(scope="module")
def fitted(bare: Home, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The same, with a reward model."""
    place = Path(shutil.copytree(bare.path, tmp_path_factory.mktemp("fitted") / "home"))
    fit_reward(place, model="tiny")
    return Home.open(place)


@pytest.fixture
def home(fitted: Home, tmp_path: Path) -> Home:
    """A copy of its own."""
    return Home.open(Path(shutil.copytree(fitted.path, tmp_path / "home")))


def test_it_judges_what_people_did_not_and_that_trains_with_its_measured_noise(home: Home) -> None:
    (name,) = Shelf(home, "default").names()
    done = judge_runs(home, "reward")
    assert (done.decided, done.ties, done.position) == (30, 0, 0)
    pairs = [pair for pair in home.pairs() if pair.origin == "judge"]
    assert len(pairs) == 30
    assert all(str(pair.completions[0].message["content"]).startswith("Just") for pair in pairs)
    assert {pair.noise for pair in pairs} == {0.05}
    assert {row.comment for row in home.comparisons() if row.source == "model"} == {
        f"the reward model {name}"
    }
    assert judge_runs(home, "reward").questions == 0


def test_another_fit_is_another_judge_and_what_the_older_one_said_stays(home: Home) -> None:
    judge_runs(home, "reward", limit=10)
    fit_reward(home, model="tiny", heads=3)
    done = judge_runs(home, "reward")
    assert done.questions == 30  # another voter
    assert len({row.user_id for row in home.comparisons() if row.source == "model"}) == 2


def test_it_is_trusted_only_where_held_out_pairs_show_it(home: Home) -> None:
    with Log(home.path) as log:
        for text in answers(900):
            log.record(asked(900), text, tags=["unheard of"])
    done = judge_runs(home, "reward")
    assert done.untrusted == {"unheard of": 1}


def test_without_a_reward_model_it_is_said_how_to_fit_one(bare: Home) -> None:
    with pytest.raises(JudgeError, match=r"has no reward model: .* run `agentpref reward fit`"):
        judge_runs(bare, "reward")


def test_it_is_not_calibrated_on_what_trained_it(home: Home) -> None:
    with pytest.raises(JudgeError, match="is measured by its own fit"):
        calibrate_judge(home, "reward")
