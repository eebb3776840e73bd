"""What answers are worth by an update's critic chooses among several, and goes with a removal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_offline import BAD, CONFIG, GOOD, asked, write

import agentpref
from agentpref.config import GateSettings
from agentpref.errors import GenerationFailed, RewardError
from agentpref.home import Home
from agentpref.offline import values
from agentpref.offline.values import ValueFollower
from agentpref.record.deletion.forget import forget
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.best import BestOf
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref.types import BASE

LENIENT = GateSettings(canary=0.0, kl_budget=20.0, distinct_floor=0.0, length_ratio=(0.2, 5.0))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A home in which going on wins, and the revision that an update by IQL published."""
    folder = tmp_path_factory.mktemp("values") / "home"
    Home.create(folder)
    write(folder)
    report = agentpref.update(folder, model="tiny", config=replace(CONFIG, gate=LENIENT))
    assert report.revision is not None, report.checks
    return folder, report.revision


def request(number: int = 500) -> GenerationRequest:
    return GenerationRequest((asked(number),), temperature=0.8, best_of=2)


def reply(revision: str, text: str) -> Reply:
    return Reply(revision, {"role": "assistant", "content": text}, (1,), (0.0,), "stop")


def test_the_answer_that_leads_on_is_worth_more(learned: tuple[Path, str]) -> None:
    folder, revision = learned
    follower = ValueFollower(folder)
    good, bad, unreadable = follower.rank(
        request(), [reply(revision, text) for text in (GOOD, BAD, GOOD * 400)]
    )
    assert good > bad
    assert follower.rank(request(), []) == []
    assert unreadable == -math.inf


def test_the_best_of_several_is_given_with_its_worth(learned: tuple[Path, str]) -> None:
    folder, revision = learned
    texts = iter((BAD, GOOD))

    class Engine:
        def generate(self, name: str, wanted: GenerationRequest) -> Reply:
            return reply(name, next(texts))

    engine: Any = Engine()
    best = BestOf(engine, ValueFollower(folder).rank).generate(revision, request())
    assert best.message["content"] == GOOD
    assert best.score is not None
    texts = iter((BAD, GOOD))
    with pytest.raises(GenerationFailed, match="nothing says what answers of base are worth"):
        BestOf(engine, ValueFollower(folder).rank).generate(BASE, request())


def test_a_later_revision_goes_by_its_ancestor(learned: tuple[Path, str], tmp_path: Path) -> None:
    folder, revision = learned
    registry = Registry(Home.open(folder))
    adapter = write_adapter(tmp_path / "adapter")
    later = registry.publish(adapter, parent=revision, model={"name": "tiny"}, training={})
    found = [
        ValueFollower(folder).rank(request(), [reply(name, GOOD)])
        for name in (revision, later.revision_id)
    ]
    assert found[0] == found[1]


def test_those_of_pruned_revisions_go_and_a_changed_file_is_refused(
    learned: tuple[Path, str], tmp_path: Path
) -> None:
    home = Home.create(tmp_path)
    opened = values._open(next(iter(values._kept(Home.open(learned[0]), "default"))), None)
    registry, names = Registry(home), list[str]()
    for number in range(3):
        adapter = write_adapter(tmp_path / f"adapter-{number}", seed=number)
        one = registry.publish(adapter, parent=None, model={"name": "tiny"}, training={})
        values.keep(
            home, "default", one.revision_id, opened.basis, opened.theta, opened.reader.base
        )
        names.append(one.revision_id)
    assert [values._revision_of(path) for path in values._kept(home, "default")] == names
    registry.prune(keep=1)
    values.keep(home, "default", names[2], opened.basis, opened.theta, opened.reader.base)
    kept = values._kept(home, "default")
    assert [values._revision_of(path) for path in kept] == names[2:]
    again = values._open(kept[0], None)
    assert np.array_equal(again.theta, opened.theta)
    assert np.array_equal(again.basis.landmarks, opened.basis.landmarks)
    kept[0].write_bytes(kept[0].read_bytes() + b" ")
    with pytest.raises(RewardError, match="is not the file that was written"):
        values._open(kept[0], None)


def test_a_removal_deletes_them(learned: tuple[Path, str]) -> None:
    folder, revision = learned
    forget(Home.open(folder), "t1")
    with pytest.raises(RewardError, match="or a removal deleted this"):
        ValueFollower(folder).rank(request(), [reply(revision, GOOD)])
