"""Forgetting a user and rebuilding without their text, end to end.

Real log, real training, real registry: the tests run the commands that ``forget`` prints.
"""

from __future__ import annotations

import shlex
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

import agentpref
from agentpref.config import GateSettings, KLSettings, LossSettings, ReplaySettings, UpdateConfig
from agentpref.errors import RevisionError
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget
from agentpref.record.updates import Updates
from agentpref.serve.registry import Registry
from agentpref_cli.main import app

CONFIG = UpdateConfig(
    held_out=0.3,
    batch_size=8,
    learning_rate=1e-2,
    epochs=2,
    kl=KLSettings(weight=0.0),
    loss=LossSettings(beta=1.0, nll=1.0),
    replay=ReplaySettings(minimum=8),
    gate=GateSettings(
        cross_fit_below=0,
        retention_margin=1.5,  # other tests check retention
        kl_budget=1e3,
        distinct_floor=0.0,
        length_ratio=(1e-3, 1e3),
    ),
)


QUESTIONS = 40
"""So many of each person: eight held-out ones were too few on one processor, by rounding."""


def teach(home: Path, user: str, question: str, answer: str) -> list[tuple[str, str]]:
    """Log two answers to each of some questions, of which the first is liked better."""
    runs = []
    with agentpref.Log(home) as log:
        for number in range(QUESTIONS):
            asked = [{"role": "user", "content": question.format(number)}]
            good, bad = (log.record(asked, text, user_id=user) for text in (answer, "never"))
            log.compare(good, bad, winner="a")
            runs.append((good, bad))
    return runs


def agree(home: Path, user: str, runs: list[tuple[str, str]]) -> set[str]:
    with agentpref.Log(home) as log:
        return {log.compare(good, bad, winner="a", user_id=user) for good, bad in runs}


def learn(home: Path, base: Path):
    return agentpref.update(home, model=str(base), config=CONFIG, checks={})


def trained_on(home: Path, revision: str) -> set[str]:
    """Ids of the feedback and comparisons that an update trained its candidate on."""
    query = (
        "SELECT source FROM updates JOIN update_pair USING (update_id)"
        " JOIN pair_source USING (pair_id) WHERE candidate = ? AND role <> 'held_out'"
    )
    with closing(connect(Home.open(home))) as connection:
        return {source for (source,) in connection.execute(query, (revision,))}


def said_of(home: Path, question: str) -> set[str]:
    query = (
        "SELECT comparison_id FROM comparison JOIN run ON run_id = run_a"
        " JOIN message ON id = prompt WHERE body LIKE ?"
    )
    with closing(connect(Home.open(home))) as connection:
        return {said for (said,) in connection.execute(query, (f"%{question}%",))}


@pytest.fixture(scope="module")
def first_update(tmp_path_factory, random_base):
    """An update on what Bob said: the home, the revision, and the runs."""
    home = tmp_path_factory.mktemp("updates") / "home"
    runs = teach(home, "bob", "Is {} a number?", "yes")
    report = learn(home, random_base)
    assert report.verdict == "promoted", report.reasons
    return home, report.revision, runs


@pytest.fixture(scope="module")
def two_updates(tmp_path_factory, first_update, random_base):
    """The same, and a second update on what Ada and Carol said."""
    home = shutil.copytree(first_update[0], tmp_path_factory.mktemp("updates") / "home")
    teach(home, "ada", "Is {} a secret?", "hush")
    teach(home, "carol", "Is {} a friend?", "a friend")
    report = learn(home, random_base)
    assert report.verdict == "promoted", report.reasons
    return home, first_update[1], report.revision


@pytest.fixture
def home(two_updates, tmp_path):
    return shutil.copytree(two_updates[0], tmp_path / "home")


def test_an_update_stores_the_feedback_that_each_pair_was_made_of(two_updates):
    home, first, second = two_updates
    bobs, adas, carols = (said_of(home, word) for word in ("number", "secret", "friend"))
    assert 0 < len(trained_on(home, first)) < QUESTIONS
    assert trained_on(home, first) < bobs
    assert trained_on(home, second) & adas
    assert trained_on(home, second) & carols
    assert trained_on(home, second) & bobs, "replayed"
    with closing(connect(Home.open(home))) as connection:
        updates = Updates(connection)
        assert updates.revisions_trained_on(bobs) == [first, second]
        assert updates.revisions_trained_on(adas) == [second]


def test_a_user_who_agreed_later_is_a_source_of_the_replayed_pair(
    first_update, tmp_path, random_base
):
    home = shutil.copytree(first_update[0], tmp_path / "home")
    eves = agree(home, "eve", first_update[2])
    teach(home, "carol", "Is {} a friend?", "a friend")
    report = learn(home, random_base)
    assert trained_on(home, report.revision) & eves
    assert report.revision in forget(home, "eve").revisions


def test_the_commands_of_forget_lead_to_weights_that_never_saw_the_text(
    two_updates, home, random_base
):
    _, first, second = two_updates
    adas, carols = said_of(home, "secret"), said_of(home, "friend")
    found = forget(home, "ada")
    assert found.revisions == (second,)
    promote, update = found.commands
    with pytest.raises(RevisionError, match=f"{second} is tainted.* promote {first} --home "):
        learn(home, random_base)

    done = CliRunner().invoke(app, shlex.split(promote)[1:])
    assert done.exit_code == 0, done.output
    assert Registry(home).live().revision_id == first
    assert shlex.split(update)[:4] == ["agentpref", "update", "--model", str(random_base)]
    report = learn(home, random_base)

    assert (report.verdict, report.parent) == ("promoted", first), report.reasons
    assert report.counts["new"] + report.counts["new_held_out"] == QUESTIONS, (
        "Carol's, and hers alone"
    )
    assert trained_on(home, report.revision) & carols
    assert not trained_on(home, report.revision) & adas
    assert Registry(home).live().tainted_at is None
    assert forget(home, "ada").rebuild == ()


def test_the_base_is_the_way_back_if_the_whole_line_saw_the_text(two_updates, home, random_base):
    _, first, second = two_updates
    found = forget(home, "bob")
    assert found.revisions == (first, second)
    assert [rebuild.clean for rebuild in found.rebuild] == ["base"]
    Registry(home).promote("base")
    report = learn(home, random_base)
    assert (report.verdict, report.parent) == ("promoted", None), report.reasons
    assert report.counts["new"] + report.counts["new_held_out"] == 2 * QUESTIONS
    assert report.counts["old"] == 0


def test_an_update_refuses_to_start_from_a_quarantined_revision(home, random_base):
    registry = Registry(home)
    live = registry.state().live
    registry.quarantine(live, "its weights are broken")
    with pytest.raises(RevisionError, match=f"{live} is in quarantine: its weights are broken"):
        learn(home, random_base)
