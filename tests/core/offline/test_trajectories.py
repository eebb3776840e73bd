"""Whole conversations as preferences: what was answered is trained, what was heard is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import agentpref
from agentpref import Log
from agentpref.config import GateSettings, OfflineSettings, UpdateConfig
from agentpref.home import Home
from agentpref.learn.learner import Learner
from agentpref.offline.trajectories import joined
from agentpref.record.database import connect
from agentpref.types import Example, UpdateReport

CONFIG = UpdateConfig(
    method="trajectory-dpo",
    epochs=2,
    offline=OfflineSettings(rewards={"won": 1.0}),
    gate=GateSettings(canary=0.0),
)
ON, OFF, HEARD = "Please try the next step.", "I offer to settle it.", "Zebra done."


class Row(NamedTuple):
    prompt: tuple[int, ...]
    own: tuple[tuple[int, ...], ...]


def test_what_was_heard_between_answers_is_masked() -> None:
    rows: Any = [Row((1, 2), ((5, 6),)), Row((1, 2, 5, 6, 3), ((7,),))]
    assert joined(rows) == ((5, 6, 3, 7), (True, True, False, True))
    assert joined(rows[:1]) == ((5, 6), (True, True))


def test_a_conversation_that_the_template_writes_anew_is_none_to_compare() -> None:
    rows: Any = [Row((1, 2), ((5, 6),)), Row((1, 2, 9, 6, 3), ((7,),))]
    assert joined(rows) is None


def write(folder: Path, count: int = 24) -> None:
    """Two conversations of each request, of which the longer one wins."""
    with Log(folder) as log:
        for number in range(count):
            first = {"role": "user", "content": f"Case {number}: my printer is broken."}
            long, short = f"on{number}", f"off{number}"
            log.record([first], ON, model="tiny", thread_id=long)
            heard = [first, {"role": "assistant", "content": ON},
                     {"role": "user", "content": HEARD}]  # fmt: skip
            run = log.record(heard, ON, model="tiny", thread_id=long)
            log.feedback(run, key="won", score=1.0, source="code")
            run = log.record([first], OFF, model="tiny", thread_id=short)
            log.feedback(run, key="won", score=0.0, source="code")


@pytest.fixture(scope="module")
def learned(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[UpdateReport, list[Example], dict[str, list[tuple[int, ...]]], Home]:
    """An update by pairs of conversations, the examples that it trained, and tokens of each."""
    folder = tmp_path_factory.mktemp("trajectories") / "home"
    write(folder)
    trained: list[Example] = []
    tokens: dict[str, list[tuple[int, ...]]] = {"trained": [], "text": []}
    real = Learner.fit

    def noted(self: Learner, rows: Any, **more: Any) -> Any:
        for row in rows:
            trained.append(row.example)
            for ids, mask in zip(row.completions, row.masks, strict=True):
                tokens["trained"].append(tuple(i for i, on in zip(ids, mask, strict=True) if on))
        tokens["text"] = [
            self.base.template.tokenizer.decode(ids)  # type: ignore[misc]
            for ids in tokens["trained"]
        ]
        return real(self, rows, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "fit", noted)
        report = agentpref.update(folder, model="tiny", config=CONFIG)
    return report, trained, tokens, Home.open(folder)


def test_the_answers_of_both_conversations_train_and_nothing_that_was_heard(learned: Any) -> None:
    _, trained, tokens, _ = learned
    assert len(trained) > 10
    for example in trained:
        better, worse = example.completions
        assert (better.label, worse.label) == (1.0, 0.0)
        assert HEARD in better.message["content"]
        assert OFF in worse.message["content"]
    assert not any("Zebra" in text for text in tokens["text"])
    assert sum(text.count(ON) == 2 for text in tokens["text"]) == len(trained)
    assert sum(text.count(OFF) == 1 for text in tokens["text"]) == len(trained)


def test_it_learns_to_prefer_the_conversation_that_won(learned: Any) -> None:
    report, trained, *_ = learned
    assert report.training["method"] == "trajectory-dpo"
    assert report.training["imitated"] == len(trained) == report.counts["trained"]
    assert report.training["pairs"] >= len(trained)
    assert not any("expects" in note for note in report.notes)
    assert all(count >= 0 for count in report.counts.values())
    assert report.training["last_loss"] < 0.9 * report.training["first_loss"]
    assert report.verdict in ("insufficient", "refused", "promoted", "passed")


def test_a_removal_finds_what_a_run_trained(learned: Any) -> None:
    report, trained, _, home = learned
    with connect(home, readonly=True) as connection:
        sources = {run for (run,) in connection.execute(
            "SELECT source FROM pair_source JOIN update_pair USING (pair_id)"
            " WHERE update_id = ?", (report.update_id,))}  # fmt: skip
    assert sources >= {run for example in trained for run in example.provenance}
    assert all(len(example.provenance) == 3 for example in trained)


def test_conversations_that_all_begin_differently_are_told(tmp_path: Path) -> None:
    with Log(tmp_path / "home") as log:
        for number in range(12):
            run = log.record([{"role": "user", "content": f"Case {number}"}], ON, model="tiny",
                             thread_id=f"t{number}")  # fmt: skip
            log.feedback(run, key="won", score=float(number % 2), source="code")
    report = agentpref.update(tmp_path / "home", model="tiny", config=replace(CONFIG, epochs=1))
    assert report.verdict == "nothing_usable"
    assert any("begin with the same prompt" in note for note in report.notes)
