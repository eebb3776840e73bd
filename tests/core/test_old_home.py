"""A home that version 0.1.0 wrote opens, updates and serves.

``tests/data/home-0.1.0`` holds 300 runs with comparisons, corrections and thumbs, a promoted
revision, the state of an interrupted update, and a forgotten user. Its base is the model that was
bundled then, ``tests/data/tiny-0.1.0``.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

import agentpref
from agentpref.config import UpdateConfig
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.judges import Judges
from agentpref.record.store import Store
from agentpref.record.updates import Updates
from agentpref_adapters.transformers import open_router

pytestmark = pytest.mark.slow

OLD = Path(__file__).parents[1] / "data" / "home-0.1.0"
BASE = str(OLD.with_name("tiny-0.1.0"))
LIVE = "rev-000001-a1850639a4fd"
CONFIG = UpdateConfig.from_mapping(
    {
        "precision": "float32",
        "held_out": 0.3,
        "lora": {"rank": 8, "alpha": 16},
    }
)
QUESTION = [{"role": "user", "content": "Switch the alarm in the kitchen off."}]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "home"))


def trust_its_judges(home: Path) -> None:
    """Calibrate what judged beside people, which no version before had to be."""
    query = """SELECT DISTINCT user_id FROM comparison WHERE source = 'model' AND user_id NOT NULL
        UNION SELECT DISTINCT user_id FROM feedback WHERE source = 'model' AND user_id NOT NULL"""
    with closing(connect(Home.open(home))) as connection:
        tags = {run.tag for run in Store(connection).runs("support")}
        for (voter,) in connection.execute(query).fetchall():
            Judges(connection).calibrate("support", voter, dict.fromkeys(tags, 0.05), {})


def test_an_old_home_opens_with_all_its_rows_and_verifies(home: Path) -> None:
    with agentpref.Log(home, namespace="support") as log:
        assert log.verify() == []
    trust_its_judges(home)
    with closing(connect(Home.open(home))) as connection:
        store = Store(connection)
        assert sum(1 for _ in store.runs("support")) == 404
        found = read_examples(store, "support", held_out=0.3)
        learned = Updates(connection).learned_by(LIVE)
    ids = {example.example_id for example in found.examples}
    assert len(learned) == 158
    assert learned <= ids, "examples keep the ids under which they were learned"


def test_a_new_run_with_feedback_is_logged_to_an_old_home(home: Path) -> None:
    with agentpref.Log(home, namespace="support") as log:
        run = log.record(QUESTION, "The alarm is off.", user_id="user-1")
        log.flush()
        log.thumbs(run, up=True, user_id="user-1")
        assert log.verify() == []


def test_an_old_home_updates_and_discards_the_state_of_the_old_form(home: Path) -> None:
    with agentpref.Log(home, namespace="support") as log:  # else live knows all that is new
        for number in range(30):
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            log.compare(log.record(asked, "Sure!"), log.record(asked, "It is."), winner="b")
    trust_its_judges(home)
    report = agentpref.update(home, model=BASE, config=CONFIG, namespace="support")
    assert report.parent == LIVE
    assert report.verdict != "nothing_to_gain", report.notes
    assert report.training["resumed_at"] == 0
    assert report.notes[0] == (
        "the state of an interrupted training was discarded: another version of agentpref wrote it"
    )
    assert not (home / "training").exists()
    assert report.counts["old"] == 91
    assert report.counts["replayed"] == 91
    assert report.counts["new"] > 0
    assert report.revision is not None
    registry = agentpref.Registry(home, namespace="support")
    registry.promote(report.revision)
    assert registry.rollback().live == LIVE


def test_the_live_revision_of_an_old_home_serves(home: Path) -> None:
    with open_router(home, model=BASE, namespace="support") as router:
        assert router.serving.live == LIVE
        with agentpref.Log(home, namespace="support") as log:
            reply = agentpref.Chat(log, router).reply(QUESTION, max_tokens=16)
            assert reply.revision == LIVE
            assert reply.text == "The alarm is off."
