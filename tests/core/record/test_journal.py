"""The journal of updates, over a real database: what is kept, counted, listed and found."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import replace

import pytest

from agentpref.errors import ConfigError, UpdateError, UpdateInterrupted, UpdateRunning
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.journal import Journal, Trace, find, last_trained, listed
from agentpref.record.messages import new_id
from agentpref.record.updates import UpdateRow, Updates
from agentpref.types import UpdateReport


@pytest.fixture
def home(tmp_path):
    return Home.create(tmp_path / "home")


@pytest.fixture
def connection(home):
    with closing(connect(home)) as connection:
        yield connection


def report(verdict="nothing_new", *notes, namespace="default", at=1.0):
    return UpdateReport(new_id(), namespace, "tiny", at, verdict, None, notes=[*notes])


def train(connection, found, candidate=None):
    """End an update in the ledger."""
    row = UpdateRow(
        found.update_id,
        found.namespace,
        found.created_at,
        time.time(),
        None,
        candidate,
        found.verdict,
        found.to_mapping(),
    )
    Updates(connection).add(row)


def verdicts(connection, namespace=None):
    return [(entry.verdict, entry.times) for entry in listed(connection, namespace)]


def test_an_update_that_runs_is_listed_until_the_ledger_has_it(connection):
    found = report("refused")
    number, notes = Journal(connection).begin(found)
    assert (notes, verdicts(connection)) == ([], [("running", 1)])
    shown = find(connection, found.update_id).report
    assert (shown["verdict"], shown["notes"], shown["seconds"]) == ("running", [], None)
    train(connection, found)
    assert verdicts(connection) == [("refused", 1)]
    assert number == 1


def test_many_nights_with_nothing_new_are_one_row_with_the_first_id(connection):
    journal, ids = Journal(connection), set()
    for minute in range(50):
        found = report(at=float(minute))
        number, _ = journal.begin(found)
        ids.add(journal.end(found, number).update_id)
    assert connection.execute("SELECT count(*) FROM journal").fetchone() == (1,)
    (entry,) = listed(connection)
    assert (entry.times, entry.first_at, entry.created_at) == (50, 0.0, 49.0)
    assert ids == {entry.update_id}, "so every id that was printed can be asked for"
    assert entry.report["update_id"] == entry.update_id


def test_alternating_ends_do_not_fill_the_journal_and_other_words_are_kept(connection):
    journal = Journal(connection)
    for _ in range(3):
        journal.end(report("busy", "another runs"))
        journal.end(report())
        journal.end(report("failed", "no such model"))
        journal.end(report(namespace="other"))
    journal.end(report("failed", "the disk is full"))
    assert verdicts(connection, "default") == [
        ("failed", 1),
        ("failed", 3),
        ("nothing_new", 3),
        ("busy", 3),
    ]
    assert verdicts(connection, "other") == [("nothing_new", 3)]


def test_an_update_in_the_ledger_begins_a_new_count(connection):
    journal = Journal(connection)
    journal.end(report())
    train(connection, report("refused"))
    journal.end(report())
    journal.end(report(at=7.0))
    assert sorted(verdicts(connection)) == [("nothing_new", 1), ("nothing_new", 2), ("refused", 1)]


def test_a_killed_update_is_named_by_the_next_one_of_its_namespace(connection):
    journal, killed = Journal(connection), report(namespace="shop")
    journal.begin(killed)
    assert journal.begin(report())[1] == [], "another namespace"
    assert [entry.verdict for entry in listed(connection, "shop")] == ["interrupted"]
    journal.begin(replace(killed, update_id=new_id()))
    _, notes = journal.begin(report(namespace="shop"))
    assert "kill -9" in notes[0]
    assert find(connection, killed.update_id).report["notes"] == [notes[0].split(": ", 1)[1]]


def test_the_ledger_and_the_seals_are_not_touched(connection):
    train(connection, replace(report("insufficient"), training={"steps": 1}))
    before = connection.execute("SELECT * FROM updates").fetchall()
    journal = Journal(connection)
    for verdict in ("busy", "failed", "interrupted", "nothing_new"):
        journal.end(report(verdict))
    assert connection.execute("SELECT * FROM updates").fetchall() == before
    assert Updates(connection).report("default")["verdict"] == "insufficient"
    assert last_trained(connection, "default").verdict == "insufficient"
    assert examine(connection).problems == []


# How an update ends


@pytest.mark.parametrize(
    ("error", "verdict", "words"),
    [
        (UpdateRunning("another update runs"), "busy", "another update runs"),
        (UpdateInterrupted("interrupted; resumes", 2), "interrupted", "interrupted; resumes"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt in test_journal.py"),
        (ConfigError("no check 'polite'"), "failed", "no check 'polite'"),
        (ValueError("it said: call Ada"), "failed", "ValueError in test_journal.py, line "),
    ],
)
def test_what_an_update_raises_is_kept_and_quotes_nothing(home, connection, error, verdict, words):
    def update():
        with Trace(home, report()) as trace:
            trace.begin(connection)
            raise error

    with pytest.raises(type(error)):
        update()
    (entry,) = listed(connection)
    (note,) = entry.report["notes"]
    assert entry.verdict == entry.report["verdict"] == verdict
    assert note.startswith(words)
    assert "Ada" not in note


def test_a_busy_update_leaves_the_row_of_the_one_that_runs(home, connection):
    Journal(connection).begin(report())
    with pytest.raises(UpdateRunning), Trace(home, report()):
        raise UpdateRunning("another update runs")
    assert verdicts(connection) == [("running", 1), ("busy", 1)]


def test_a_trace_that_cannot_be_written_hides_no_error(home, connection, caplog):
    connection.execute("DROP TABLE journal")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ConfigError, match="the first"),
        Trace(home, report()),
    ):
        raise ConfigError("the first")
    assert "failed is not in the journal: " in caplog.text


def test_an_update_that_resumes_another_has_its_id(home, connection):
    first, second = report(), report()

    def update(found):
        with Trace(home, found) as trace:
            trace.begin(connection)
            trace.resume(connection, first.update_id)
            raise UpdateInterrupted(f"at {found.update_id}", 2)

    for found in (first, second):
        with pytest.raises(UpdateInterrupted):
            update(found)
    assert {entry.update_id for entry in listed(connection)} == {first.update_id}
    assert find(connection, first.update_id).report["notes"] == [f"at {second.update_id}"]
    train(connection, replace(first, verdict="refused"))
    assert find(connection, first.update_id).verdict == "refused", "its end"


# Finding by id


def test_an_update_is_found_by_its_id_its_revision_and_how_they_begin(connection):
    found = replace(report("refused"), update_id="0123-4567", revision="rev-000003-abcdefabcdef")
    train(connection, found, candidate="rev-000003-abcdefabcdef")
    for name in ("0123-4567", "0123", "rev-000003-abcdefabcdef", "rev-000003"):
        assert find(connection, name).update_id == "0123-4567"
        assert find(connection, name, "default").update_id == "0123-4567"


def test_an_id_that_is_unknown_or_not_unique_is_refused_with_the_cure(connection):
    for name in ("0123-4567", "0123-9999", "0123"):
        train(connection, replace(report("refused"), update_id=name))
    assert find(connection, "0123").update_id == "0123", "the whole id comes first"
    with pytest.raises(UpdateError, match=r"3 updates of the home begin with '01'.*give more"):
        find(connection, "01")
    with pytest.raises(UpdateError, match=r"has no update 'zz'; `agentpref updates` lists"):
        find(connection, "zz")
    with pytest.raises(UpdateError, match="namespace 'shop' has no update '0123'"):
        find(connection, "0123", "shop")
    with pytest.raises(UpdateError, match=r"`agentpref adapters show rev-1`"):
        find(connection, "rev-1")


def test_a_list_is_limited_and_has_updates_of_any_age(connection):
    connection.execute("INSERT INTO updates (update_id, namespace, created_at) VALUES ('u','a', 1)")
    Journal(connection).end(report())
    assert [entry.update_id for entry in listed(connection, "a")] == ["u"]
    assert len(listed(connection)) == 2
    assert len(listed(connection, limit=1)) == 1
    assert listed(connection, limit=0) == []
