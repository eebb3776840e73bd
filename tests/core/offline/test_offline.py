"""Whole updates from conversations, on the bundled model: interrupted, resumed, and repeated."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import agentpref
from agentpref import Log
from agentpref.config import GateSettings, OfflineSettings, UpdateConfig
from agentpref.errors import ModelNotFound, UpdateInterrupted
from agentpref.home import Home
from agentpref.learn.process import Interrupts
from agentpref.record.database import connect
from agentpref.record.updates import Role, UpdateRow, Updates
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref.types import Message, UpdateReport

CONFIG = UpdateConfig(
    method="iql",
    epochs=1,
    offline=OfflineSettings(rewards={"won": 1.0}),
    gate=GateSettings(canary=0.0),
)
CONVERSATIONS = 40
GOOD, BAD = "Please try the next step.", "I offer to settle it."


def asked(number: int) -> Message:
    return {"role": "user", "content": f"Case {number}: my printer is broken."}


def write(folder: Path) -> None:
    """Conversations of two answers, of which those that go on win; and a pair of answers."""
    with Log(folder) as log:
        for number in range(CONVERSATIONS):
            text = GOOD if number % 2 else BAD
            name = f"t{number}"
            run = log.record([asked(number)], text, model="tiny", thread_id=name, user_id=name)
            if number % 2:
                before = [asked(number), {"role": "assistant", "content": text},
                          {"role": "user", "content": "Done."}]  # fmt: skip
                run = log.record(before, GOOD, model="tiny", thread_id=name, user_id=name)
            log.feedback(run, key="won", score=float(number % 2), source="code")
        run = log.record([asked(2000)], GOOD * 300, model="tiny", thread_id="long")
        log.feedback(run, key="won", score=1.0, source="code")  # it cannot be read, and is told
        pair = [log.record([asked(1000)], text, model="tiny") for text in (GOOD, BAD)]
        log.compare(*pair, winner="a")


class Learned:
    """A home whose first update was interrupted in training, and went on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stages = folder, list[str]()
        Home.create(folder)
        write(folder)
        interrupts = Interrupts()

        def stop(stage: str, done: int, total: int) -> None:
            self.stages.append(stage)
            if stage == "train" and done == 2:
                interrupts.ask(2)

        with pytest.raises(UpdateInterrupted, match="resumes at step 2 of"):
            agentpref.update(
                folder, model="tiny", config=CONFIG, progress=stop, interrupts=interrupts
            )
        self.report = self.update(CONFIG)

    def update(self, config: UpdateConfig, **more: bool) -> UpdateReport:
        return agentpref.update(self.folder, model="tiny", config=config, **more)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    return Learned(tmp_path_factory.mktemp("offline") / "home")


def test_an_interrupted_update_goes_on_where_it_was(learned: Learned) -> None:
    assert learned.report.training["resumed_at"] == 2
    assert not list(Home.open(learned.folder).training.glob("*.safetensors"))


def test_the_report_says_what_became_of_every_decision(learned: Learned) -> None:
    counts, training = learned.report.counts, learned.report.training
    there = sum(2 if n % 2 else 1 for n in range(CONVERSATIONS))
    used = counts["trained_decisions"] + counts["new_evaluated_decisions"]
    idle = counts.get("valued_decisions", 0)
    assert idle == training["valued"] - training["imitated"]
    assert used + idle == there
    assert training["method"] == "iql"
    assert training["conversations"] + training["held_out"] == CONVERSATIONS + 1
    assert learned.report.left_out["too_long"] == 1
    assert training["imitated"] == counts["trained_decisions"]
    assert "undeclared_key" not in learned.report.left_out
    assert training["expected"] >= training["earned"] - 0.05
    assert counts["waiting"] == 1  # the pair is for another update
    assert any(note.startswith("conversations that train earned") for note in learned.report.notes)


def test_the_gate_says_what_held_out_conversations_would_earn(learned: Learned) -> None:
    (check,) = (c for c in learned.report.checks if c["name"] == "new preferences")
    value = learned.report.training["value"]
    assert 0 < value["conversations"] < 20
    assert f"{value['conversations']} held-out conversations, of at least 20" in check["message"]
    assert learned.report.verdict in ("insufficient", "refused")
    assert learned.report.gain["look_counts"] is False


def test_the_ledger_names_the_runs_that_decided(learned: Learned) -> None:
    with connect(Home.open(learned.folder), readonly=True) as connection:
        data = learned.report.training["data"]
        ((name, _),) = Updates(connection).tried_on("default", None, data)
        runs = {run for (run,) in connection.execute(
            "SELECT source FROM pair_source JOIN update_pair USING (pair_id)"
            " WHERE update_id = ?", (learned.report.update_id,))}  # fmt: skip
    logged = {r.run_id for r in Home.open(learned.folder).runs() if r.user_id}
    assert logged <= runs
    assert name == learned.report.update_id


def test_the_same_again_is_nothing_new_unless_it_is_asked_for(learned: Learned) -> None:
    again = learned.update(CONFIG)
    assert again.verdict == "nothing_new"
    assert learned.report.update_id in again.notes[-1]
    assert "the same command with --again" in again.notes[-1]
    with pytest.raises(ModelNotFound):
        agentpref.update(learned.folder, model="nowhere", config=CONFIG)


def test_without_scored_conversations_nothing_is_usable(tmp_path: Path) -> None:
    Home.create(tmp_path / "home")
    write(tmp_path / "home")
    config = UpdateConfig(method="awr")
    report = agentpref.update(tmp_path / "home", model="tiny", config=config)
    assert report.verdict == "nothing_usable"
    assert "has a score under 'thumbs'" in report.notes[-1]
    assert report.left_out["conversation_without_reward"] == CONVERSATIONS + 3


def test_where_all_earned_the_same_nothing_is_trained_but_by_cloning(tmp_path: Path) -> None:
    Home.create(tmp_path / "home")
    with Log(tmp_path / "home") as log:
        for number in range(30):
            run = log.record([asked(number)], GOOD, model="tiny", thread_id=f"t{number}")
            log.feedback(run, key="won", score=-1.0, source="code")
    report = agentpref.update(tmp_path / "home", model="tiny", config=CONFIG)
    assert report.verdict == "nothing_usable"
    assert "all 30 conversations earned -1, so nothing says which" in report.notes[-1]
    few = replace(CONFIG, offline=replace(CONFIG.offline, conversations=7))
    report = agentpref.update(tmp_path / "home", model="tiny", config=few)
    assert "all 7 conversations earned -1" in report.notes[-1]


@pytest.mark.parametrize(
    ("method", "scores", "why"),
    [
        ("mopo", (0.0, 1e300), r"a conversation earned or lost 1e\+300, and more than 1e\+09"),
        ("iql", (0.0, -1e10), r"a conversation earned or lost 1e\+10, and more than 1e\+09"),
        ("airl", (0.0, -1.0), "learns from demonstrations.*none of 30 does: name the key"),
    ],
)
def test_rewards_that_a_method_can_do_nothing_with_are_named_before_any_work(
    tmp_path: Path, method: str, scores: tuple[float, float], why: str
) -> None:
    Home.create(tmp_path / "home")
    with Log(tmp_path / "home") as log:
        for number in range(30):
            run = log.record([asked(number)], GOOD, model="tiny", thread_id=f"t{number}")
            log.feedback(run, key="won", score=scores[number % 2], source="code")
    config = replace(CONFIG, method=method)
    report = agentpref.update(tmp_path / "home", model="tiny", config=config)
    assert report.verdict == "nothing_usable"
    assert re.search(why, report.notes[-1])


def test_what_was_learned_is_known_by_the_method_and_settings_that_learned_it(
    tmp_path: Path,
) -> None:
    registry = Registry(Home.create(tmp_path / "home"))
    folder = write_adapter(tmp_path / "adapter")
    name = registry.publish(folder, parent=None, model={"name": "tiny"}, training={}).revision_id
    roles: dict[str, Role] = {"a": "new", "b": "held_out", "c": "anchor", "d": "waiting"}
    row = UpdateRow(
        "u1", "default", 1.0, 1.0, None, name, "promoted", {"config": CONFIG.to_mapping()}, roles
    )
    with connect(registry.home) as connection:
        Updates(connection).add(row)
        known = Updates(connection).learned_by_method
        usual = CONFIG.to_mapping()["offline"]
        assert known(name, "iql", usual, ("new", "held_out")) == {"a", "b"}
        assert known(name, "iql", usual, ("new", "held_out", "anchor")) == {"a", "b", "c"}
        assert known(name, "awr", usual, ("new",)) == set()
        assert known(name, "iql", {**usual, "gamma": 0.5}, ("new",)) == set()
        assert known(None, "iql", usual, ("new",)) == set()


def test_so_many_answers_are_drawn_as_the_setting_says(
    learned: Learned, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = list[int]()

    def draw(learner, policy, rows, *, each, **more):
        asked_for.append(each)
        raise KeyboardInterrupt

    monkeypatch.setattr("agentpref.offline.answers.draw", draw)
    for draws in (2, 5):
        config = replace(CONFIG, method="bcq", offline=replace(CONFIG.offline, draws=draws))
        with pytest.raises(UpdateInterrupted):
            learned.update(config)
    assert asked_for == [2, 5]
