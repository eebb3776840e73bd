"""Updates with a limit of time: they keep it, say what waits for it, and get on from day to day.

The model is slow by a clock of its own: every token that it reads takes a millisecond of that
clock, three where it trains, and four where it writes. Nothing else takes any time.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import agentpref
from agentpref.errors import UpdateInterrupted
from agentpref.home import Home
from agentpref.models import base as models
from agentpref.prefer.examples import is_held_out
from agentpref.prove import gate
from agentpref.record.database import connect
from tests.core.test_interrupted_updates import adapter, signal_at
from tests.core.test_pipeline import CONFIG, learn, teach
from tests.core.test_pipeline_accounts import require_sums
from tests.core.test_pipeline_ordinary import wish

pytestmark = pytest.mark.slow

PROMPTS = 400
MINUTE = replace(CONFIG, held_out=0.2, epochs=2, max_minutes=1.0)
LOADING_SECONDS = 4.0


class SlowModel:
    """A clock that a base model moves on, from the time that it takes to load."""

    def __init__(self) -> None:
        self.now = 1e6
        self.seconds_per_token = 1e-3

    def __call__(self) -> float:
        return self.now

    def load(self, *arguments: Any, **options: Any) -> models.BaseModel:
        base = LOAD(*arguments, **options)
        self.now += LOADING_SECONDS
        base.model.model.register_forward_pre_hook(self._read, with_kwargs=True)
        return base

    def _read(self, module: Any, arguments: Any, inputs: Any) -> None:
        import torch

        writes = inputs.get("use_cache") and inputs["input_ids"].shape[1] == 1
        passes = 4 if writes else 3 if torch.is_grad_enabled() else 1
        self.now += passes * inputs["input_ids"].numel() * self.seconds_per_token


LOAD = models.load_base


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowModel:
    slow = SlowModel()
    monkeypatch.setattr(models, "load_base", slow.load)
    return slow


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("many") / "home"
    teach(home, range(PROMPTS))
    return home


@pytest.fixture
def home(many: Path, tmp_path: Path) -> Path:
    with closing(sqlite3.connect(many / "agentpref.db")) as source:
        place = Home.create(tmp_path / "home")
        with closing(sqlite3.connect(place.database)) as copy:
            source.backup(copy)
    return place.path


@pytest.fixture
def clock(slow: SlowModel, monkeypatch: pytest.MonkeyPatch) -> SlowModel:
    monkeypatch.setattr(time, "monotonic", slow)
    return slow


def scored(home: Path) -> float:
    """Of how many pairs there are scores of the base: two sums, and two of deciding tokens."""
    with closing(connect(Home.open(home))) as connection:
        query = "SELECT count(*) FROM logp WHERE policy LIKE '%:base'"
        return int(connection.execute(query).fetchone()[0]) / 4


@pytest.mark.guarantee("learning", "at most 1.1 × the limit")
def test_an_update_keeps_its_limit_and_says_what_waits(
    home: Path, clock: SlowModel, random_base: Path
) -> None:
    before = clock.now
    report = learn(home, random_base, MINUTE)
    assert 30 < report.seconds <= 66
    assert clock.now - before == report.seconds
    require_sums(report)
    waiting = report.counts["waiting"]
    assert waiting > PROMPTS / 2
    assert f"{waiting} new examples wait for the next update" in report.notes[-1]
    assert report.counts["trained"] > 16
    used = report.counts["trained"] + report.counts["new_evaluated"]
    assert scored(home) <= used * 1.2, "what waits was not scored"


def test_ordinary_answers_take_of_the_time_and_less_is_learned_beside_them(
    home: Path, clock: SlowModel, random_base: Path, tmp_path: Path
) -> None:
    beside = shutil.copytree(home, tmp_path / "beside")
    for number in range(200):
        wish(beside, number)
    alone, anchored = (learn(place, random_base, MINUTE) for place in (home, beside))
    assert anchored.counts["anchored"] > 0
    assert 30 < anchored.seconds <= 66
    assert CONFIG.batch_size < anchored.counts["trained"] < 0.8 * alone.counts["trained"]
    assert anchored.training["stopped"] == "end"


def test_updates_with_a_limit_learn_everything_in_the_end(
    home: Path, clock: SlowModel, random_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate is open, since what the first update taught leaves nothing to gain."""
    judge = gate.judge
    monkeypatch.setattr(
        gate, "judge", lambda *of, **seed: replace(judge(*of, **seed), verdict="passed")
    )
    clock.seconds_per_token /= 2
    learned = 0
    for _ in range(12):
        report = learn(home, random_base, MINUTE)
        assert report.seconds <= 66
        require_sums(report)
        old = report.counts["old"] + report.counts["old_held_out"]
        assert old == learned
        learned += report.counts["trained"] + report.counts["new_evaluated"]
        if "waiting" not in report.counts:
            break
    assert learned == PROMPTS
    assert learn(home, random_base, MINUTE).verdict == "nothing_new"


def test_an_update_that_proves_too_little_gets_further_the_next_time(
    home: Path, clock: SlowModel, random_base: Path
) -> None:
    strict = replace(MINUTE, gate=replace(CONFIG.gate, confidence=1 - 1e-15))
    first, second = (learn(home, random_base, strict) for _ in range(2))
    assert first.verdict == second.verdict == "insufficient"
    for group in ("trained", "new_evaluated"):
        assert second.counts[group] > first.counts[group]
    assert second.seconds <= 66


def test_where_nothing_fits_one_batch_is_learned_and_the_report_says_how_long_it_took(
    home: Path, clock: SlowModel, random_base: Path
) -> None:
    report = learn(home, random_base, replace(MINUTE, max_minutes=0.1))
    assert (report.training["steps"], report.training["stopped"]) == (1, "time")
    assert report.counts["trained"] == CONFIG.batch_size
    require_sums(report)
    assert "minutes instead of 0.1: to load the model" in report.notes[-1]


def test_examples_that_cannot_be_encoded_do_not_stand_in_the_way(
    home: Path, clock: SlowModel, random_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    teach(other, range(PROMPTS), chosen="word " * 600)
    teach(other, range(PROMPTS, PROMPTS + 40))
    report = learn(other, random_base, MINUTE)
    assert report.left_out == {"too_long": PROMPTS}
    assert report.counts["trained"] + report.counts["new_evaluated"] == 40


def test_without_a_limit_everything_is_learned(
    home: Path, clock: SlowModel, random_base: Path
) -> None:
    report = learn(home, random_base, replace(MINUTE, max_minutes=None, epochs=1))
    assert report.counts["trained"] + report.counts["new_evaluated"] == PROMPTS
    assert report.seconds > 66


def test_scores_of_an_update_that_was_ended_are_kept_to_the_bit(
    home: Path, tmp_path: Path, random_base: Path
) -> None:
    config = replace(CONFIG, epochs=1)
    whole = tmp_path / "whole"
    teach(whole, range(150))
    ended = tmp_path / "ended"
    teach(ended, range(150))
    stages: list[tuple[str, int, int]] = []
    report = learn(whole, random_base, config, progress=lambda *told: stages.append(told))
    passes = [done for stage, done, _ in stages if stage == "score base"]
    assert len(passes) >= 3
    with pytest.raises(UpdateInterrupted):
        learn(ended, random_base, config, progress=signal_at("score base", passes[1]))
    assert scored(ended) == passes[1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stages.clear()
    again = learn(ended, random_base, config, progress=lambda *told: stages.append(told))
    trained = report.counts["trained"]
    assert stages[2] == ("score base", passes[2] - passes[1], trained - passes[1])
    assert adapter(ended, again) == adapter(whole, report)


def test_an_update_with_a_limit_that_gets_no_further_is_not_repeated(
    home: Path, clock: SlowModel, random_base: Path
) -> None:
    strict = replace(MINUTE, gate=replace(CONFIG.gate, confidence=1 - 1e-15))
    reports = [learn(home, random_base, strict) for _ in range(6)]
    verdicts = [report.verdict for report in reports]
    end = verdicts.index("nothing_new")
    assert set(verdicts[:end]) == {"insufficient"}
    assert set(verdicts[end:]) == {"nothing_new"}, "it stays so until something changes"
    assert "raise max_minutes" in reports[end].notes[-1]
    fitted = reports[end - 1].counts["new_evaluated"]
    said = " ".join(reports[end - 1].notes)
    assert f"{fitted} new held-out examples fitted" in said
    longer = learn(home, random_base, replace(strict, max_minutes=1.5))
    assert longer.counts["new_evaluated"] > fitted


def test_many_held_out_examples_beside_few_others_keep_the_limit(
    tmp_path: Path, clock: SlowModel, random_base: Path
) -> None:
    home, side = tmp_path / "home", {True: list[int](), False: list[int]()}
    for number in range(1000):
        asked = [{"role": "user", "content": f"Is {number} a number?"}]
        side[is_held_out(asked, MINUTE.held_out)].append(number)
    teach(home, side[False][:7])
    teach(home, side[True][:180])
    slow = replace(MINUTE, max_minutes=0.4)
    report = learn(home, random_base, slow)
    assert report.seconds <= 1.1 * 24
    assert report.counts["trained"] == 7
    assert 0 < report.counts["new_evaluated"] < 180
    require_sums(report)


def test_where_nothing_that_fits_can_be_trained_others_take_its_place(
    tmp_path: Path, clock: SlowModel, random_base: Path
) -> None:
    """A lone thumb has nothing to be compared with, as the other one is held out."""
    home, side = tmp_path / "home", {True: list[int](), False: list[int]()}
    for number in range(1000):
        asked = [{"role": "user", "content": f"Is {number} a number?"}]
        side[is_held_out(asked, MINUTE.held_out)].append(number)
    with agentpref.Log(home) as log:
        for number, text in ((side[False][0], "yes"), (side[True][0], "yes I do")):
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            log.thumbs(log.record(asked, text), up=True)
    teach(home, side[True][1:63])
    teach(home, side[False][1:60])
    report = learn(home, random_base, replace(MINUTE, max_minutes=0.08))
    assert report.verdict != "nothing_usable"
    assert report.counts["trained"] > 0
