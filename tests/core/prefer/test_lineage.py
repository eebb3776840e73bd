"""Everything that is known of one run, from the update that made its author to those it taught."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.errors import UnknownRun
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.prefer.lineage import Lineage, lineage
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.record.updates import Role, UpdateRow, Updates
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

ASKED = [{"role": "user", "content": "2 + 2?"}]
MODEL = {"name": "tiny", "digest": "0", "template_digest": "0"}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "home") as log:
        yield log


def read(home: Home, run: str) -> Lineage:
    with closing(connect(home, readonly=True)) as connection:
        return lineage(connection, run, held_out=0.5)


def publish(home: Home, folder: Path, seed: int, parent: str | None, update: str) -> str:
    made = write_adapter(folder / update, seed=seed)
    watermark = {"update_id": update}
    registry = Registry(home)
    return registry.publish(
        made, parent=parent, model=MODEL, training={}, watermark=watermark
    ).revision_id


def keep(home: Home, update: str, at: float, revision: str | None, role: Role) -> None:
    """Keep an update that used every example there is in one role."""
    with closing(connect(home)) as connection:
        found = read_examples(Store(connection), "default", held_out=0.5).examples
        row = UpdateRow(
            update, "default", at, at + 1, None, revision, "promoted", {"checks": []},
            {one.example_id: role for one in found},
            {one.example_id: one.provenance for one in found},
        )  # fmt: skip
        Updates(connection).add(row)


def test_lineage_runs_both_ways(log: Log, tmp_path: Path) -> None:
    author = publish(log.home, tmp_path, 0, None, "u0")
    keep(log.home, "u0", 1.0, author, "new")
    run = log.record(ASKED, "5", revision=author, user_id="ana")
    other = log.record(ASKED, "4")
    thumb = log.thumbs(run, up=False, user_id="ana", comment="wrong")
    log.thumbs(other, up=True, user_id="ana")
    neutral = log.feedback(run, key="latency", score=3)
    compared = log.compare(other, run, winner="a")
    found = read(log.home, run)
    assert (found.run.run_id, found.made_by, found.uses, found.learned) == (run, "u0", [], [])
    assert [row.feedback_id for row in found.feedback] == [thumb, neutral]
    assert [row.comparison_id for row in found.comparisons] == [compared]
    assert found.left_out == {neutral: "undeclared_key"}
    assert [found.side(one) for one in found.examples] == ["rejected"]
    assert [read(log.home, other).side(one) for one in found.examples] == ["chosen"]

    keep(log.home, "u1", 2.0, None, "held_out")
    pupil = publish(log.home, tmp_path, 1, author, "u2")
    keep(log.home, "u2", 3.0, pupil, "new")
    child = publish(log.home, tmp_path, 2, pupil, "u3")
    keep(log.home, "u3", 4.0, child, "left_out")
    found = read(log.home, run)
    assert [(use.update_id, use.trained) for use in found.uses] == [
        ("u1", False), ("u2", True), ("u3", False),
    ]  # fmt: skip
    assert found.learned == [pupil, child], "a child has what its parent learned"
    assert author not in found.learned

    value = found.to_mapping()
    assert value["run"]["messages"] == (ASKED[0],)
    assert value["revision"] == {"revision": author, "update": "u0"}
    assert [one["left_out"] for one in value["feedback"]] == [None, "undeclared_key"]
    assert value["examples"][0]["made_of"] == [*found.examples[0].provenance]
    assert value["updates"][1] == {
        "update_id": "u2", "created_at": 3.0, "verdict": "promoted", "revision": pupil,
        "roles": {found.examples[0].example_id: "new"}, "trained": True,
    }  # fmt: skip


def test_a_run_that_nobody_judged_has_no_lineage(log: Log) -> None:
    run = log.record(ASKED, "5")
    log.flush()
    found = read(log.home, run)
    assert (found.feedback, found.examples, found.uses, found.learned) == ([], [], [], [])
    assert (found.run.output["content"], found.made_by) == ("5", None)
    with pytest.raises(UnknownRun):
        read(log.home, "nowhere")


def test_only_examples_of_what_was_said_of_the_run_are_its_own(log: Log) -> None:
    liked, corrected, third = (log.record(ASKED, text) for text in ("4", "5", "6"))
    log.thumbs(liked, up=True)
    log.correct(corrected, "four")
    found = read(log.home, liked)
    assert [(one.origin, found.side(one)) for one in found.examples] == [("thumb", "liked")]
    found = read(log.home, corrected)
    assert [(one.origin, found.side(one)) for one in found.examples] == [("correction", "rejected")]
    assert read(log.home, third).examples == []


def test_an_update_is_shown_after_what_it_used_was_taken_back(log: Log) -> None:
    run = log.record(ASKED, "5")
    thumb = log.thumbs(run, up=False)
    keep(log.home, "u1", 1.0, None, "new")
    log.retract(run)
    found = read(log.home, run)
    assert found.examples == []
    assert found.left_out[thumb] == "retracted"
    assert [use.update_id for use in found.uses] == ["u1"]
