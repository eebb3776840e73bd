"""What another program, or a failing disk, changed in any table is found, whatever happens next."""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentpref.errors import HomeError
from agentpref.home import Home
from agentpref.learn.cache import LogpCache
from agentpref.learn.logps import Scored
from agentpref.prefer.catalog import Catalog
from agentpref.record.database import connect, transaction
from agentpref.record.deletion.removal import expire
from agentpref.record.integrity import examine
from agentpref.record.journal import Trace
from agentpref.record.judges import Judges, Version
from agentpref.record.log import Log
from agentpref.record.migrations import STEPS
from agentpref.record.seals import SEALED, last_seal, seal
from agentpref.record.sums import CHANGED, SUMMED, counted, resum
from agentpref.record.updates import Role, UpdateRow, Updates
from agentpref.serve.pruning import mark_pruned
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref.types import UpdateReport
from tests.core.learn.families import row

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
FLIPS = 300
USES: tuple[Role, ...] = ("new", "replay", "left_out")
UNDECIDED = "decide how `verify` finds a change of it: by a sum, by what it derives from, or not"
NOT_FOUND = {
    ("migration", "applied_at"): "nothing reads it",
    ("serving_history", "id"): "it only orders the rows, and their seals show another order",
    ("sqlite_sequence", "name"): "SQLite's own: the next number is above every id all the same",
    ("sqlite_sequence", "seq"): "SQLite's own, as above",
    ("sqlite_sequence", None): "SQLite's own, as above",
    ("logp", None): "a score that is gone is computed anew",
    **dict.fromkeys(
        [
            ("journal", name)
            for name in (
                "number",
                "update_id",
                "namespace",
                "started_at",
                "ended_at",
                "verdict",
                "report",
                "times",
                "first_at",
                None,
            )
        ],
        "it tells people what came of a night, and decides nothing",
    ),
}
"""Columns whose changed values, and tables (``None``) whose deleted rows, verification misses."""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with rows of every kind; tests change copies of it, or roll their change back."""
    folder = tmp_path_factory.mktemp("full")
    home = Home.create(folder / "home")
    said = _log(home)
    registry = Registry(home)
    revisions = []
    for n in range(4):
        adapter = write_adapter(folder / f"adapter-{n}", seed=n)
        revision = registry.publish(adapter, parent=None, model=IDENTITY, training={})
        revisions.append(revision.revision_id)
        registry.promote(revision.revision_id)
    registry.canary(revisions[1], 0.25)
    registry.quarantine(revisions[0], "it answers in verse")
    for reason in ("a holiday", "an incident"):
        registry.hold(reason)
        registry.lift()
    with closing(connect(home)) as connection:
        mark_pruned(connection, revisions[2], 5.0)
        _judge(connection)
        _learn(connection, revisions, said)
    with Log(home.path) as log:
        log.forget("gone")
        assert log.verify() == []
    return home


def _judge(connection: sqlite3.Connection) -> None:
    judges = Judges(connection)
    (prompt,) = connection.execute("SELECT prompt FROM run LIMIT 1").fetchone()
    for name in ("brief", "kind"):
        voter = judges.register(Version(name, "d" * 16, "---\n---\n"))
        judges.keep(voter, [(f"{name}-{n}", prompt, {"winner": "a"}) for n in range(3)])
        for noise in (0.1, 0.2):
            judges.calibrate("default", voter, {"untagged": noise}, {"gold": name})


def _log(home: Home) -> list[str]:
    with Log(home.path) as log:
        log.declare("length", low=1, high=5)
        for n in range(4):
            asked = [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{n}+1?"}]
            pair = [log.record(asked, text, user_id=f"u{n}") for text in ("few", "many")]
            said = [log.thumbs(run, up=run == pair[0], user_id=f"v{n}") for run in pair]
            log.feedback(pair[0], key="length", score=3)
            log.feedback(pair[1], key="note", value="too long")
            log.correct(pair[1], f"It is {n + 1}.")
            log.compare(*pair, winner="a")
        gone = log.record(asked, "none", user_id="gone")
        log.thumbs(gone, up=False, user_id="gone")
    return said


def _learn(connection: sqlite3.Connection, revisions: list[str], said: list[str]) -> None:
    query = "SELECT prompt FROM run WHERE user_id IS NOT NULL ORDER BY created_at LIMIT 1"
    ((asked,),) = connection.execute(query)
    for n, candidate in enumerate(revisions):
        pairs: dict[str, Role] = {f"pair-{n}-{m}": role for m, role in enumerate(USES)}
        sources = {pair: (source,) for pair, source in zip(pairs, said, strict=False)}
        Updates(connection).add(
            UpdateRow(
                f"u{n}",
                "default",
                9.0,
                10.0,
                None,
                candidate,
                "promoted",
                {},
                pairs,
                sources,
                [(asked, "before", f"after {n}")],
            )
        )
    rows = [row((1, n), (2, n), (3, n)) for n in range(10)]
    LogpCache(connection, "numbers", "base").remember(
        rows, [Scored((-1.0, -2.5), (-1.0, -2.5))] * len(rows)
    )
    Catalog(connection, "default", held_out=0.3).refresh()
    report = UpdateReport("night", "default", "tiny", 1.0, "nothing_new", None)
    with Trace(Home.of(connection), report) as trace:
        trace.begin(connection)
        trace.end(connection, report)
    with transaction(connection), counted(connection, "stale_prompt"):
        connection.execute("INSERT INTO stale_prompt SELECT namespace, prompt FROM run LIMIT 1")


@pytest.fixture
def home(full: Home, tmp_path: Path) -> Home:
    return Home.open(shutil.copytree(full.path, tmp_path / "home"))


@pytest.fixture
def connection(home: Home) -> Iterator[sqlite3.Connection]:
    """Every change is rolled back."""
    with closing(connect(home)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        yield connection


def tables(connection: sqlite3.Connection) -> list[str]:
    query = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
    return [name for (name,) in connection.execute(query)]


def is_found(connection: sqlite3.Connection, change: str, *values: object) -> bool:
    """Whether a full check finds one changed row; the change is rolled back."""
    connection.execute("BEGIN")
    try:
        assert connection.execute(change, values).rowcount == 1, change
        return examine(connection).problems != []
    finally:
        connection.execute("ROLLBACK")


def ends(connection: sqlite3.Connection, table: str) -> list[tuple[str, tuple[Any, ...]]]:
    """Conditions that are true of the first and of the last row of a table."""
    columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
    rows = connection.execute(f"SELECT * FROM {table}").fetchall()
    assert rows, f"the home of these tests has no row in {table}; {UNDECIDED}"
    condition = " AND ".join(f"{name} IS ?" for name in columns)
    return [(condition, rows[0]), (condition, rows[-1])]


def other(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    if isinstance(value, int | float):
        return value + 1_000
    return f"{value}x" if value else "x"


@pytest.mark.guarantee("verify", "the first and the last row of every table, by every column")
def test_a_changed_value_in_any_table_is_found(connection: sqlite3.Connection) -> None:
    missed = set()
    for table in tables(connection):
        for condition, values in ends(connection, table):
            columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
            for column, value in zip(columns, values, strict=True):
                change = f"UPDATE {table} SET {column} = ? WHERE {condition}"
                if not is_found(connection, change, other(value), *values):
                    missed.add((table, column))
    expected = {place for place in NOT_FOUND if place[1] is not None}
    assert missed == expected, UNDECIDED


@pytest.mark.guarantee("verify", "the first and the last row of every table")
def test_a_deleted_row_of_any_table_is_found(connection: sqlite3.Connection) -> None:
    missed = {
        (table, None)
        for table in tables(connection)
        for condition, values in ends(connection, table)
        if not is_found(connection, f"DELETE FROM {table} WHERE {condition}", *values)
    }
    assert missed == {place for place in NOT_FOUND if place[1] is None}, UNDECIDED


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE pair_source SET source = 'zz' || pair_id",
        "UPDATE update_pair SET role = 'left_out'",
        "DELETE FROM serving",
        "DELETE FROM forgotten",
        "UPDATE feedback_scale SET high = 9",
        "DELETE FROM user_key",
        "DELETE FROM example WHERE number > 1",
        "UPDATE revision SET quarantined_at = NULL",
        "DELETE FROM table_sum",
        "DELETE FROM run WHERE rowid = (SELECT max(rowid) FROM run)",
        "UPDATE table_sum SET rows = 1 WHERE name = 'run'",
        "UPDATE migration SET version = 99 WHERE version = 3",
        "DROP TRIGGER feedback_removed",
        "DROP INDEX run_in_time",
        "DROP VIEW run_text",
        "PRAGMA user_version = 3",
    ],
)
def test_one_statement_of_the_shell_is_found(connection: sqlite3.Connection, change: str) -> None:
    connection.execute(change)
    assert examine(connection).problems != []


LAST = "DELETE FROM feedback WHERE rowid = (SELECT max(rowid) FROM feedback)"


def say(log: Log, user: str = "later") -> None:
    run = log.record([{"role": "user", "content": "And now?"}], "Now.", user_id=user)
    log.thumbs(run, up=True, user_id=user)


def come_and_go(log: Log) -> None:
    say(log, "guest")
    log.forget("guest")


def wait(log: Log) -> None:
    """Remove everything that was logged until now, and log something new."""
    time.sleep(0.01)
    before = time.time()
    time.sleep(0.01)
    say(log)
    log.flush()
    expire(log.home, older_than=time.time() - before)


NEXT: dict[str, Callable[[Log], object]] = {
    "the next judgement": say,
    "a user is forgotten who judged last": lambda log: log.forget("last"),
    "everything older is removed": wait,
    "a user is forgotten who judged after it": come_and_go,
}


@pytest.mark.guarantee("verify", "more judgements, users who are forgotten, runs that expire")
@pytest.mark.parametrize("then", NEXT)
def test_deleted_feedback_is_found_whatever_comes_next(home: Home, then: str) -> None:
    with Log(home.path) as log:
        run = log.record([{"role": "user", "content": "And?"}], "So.", user_id="first")
        log.thumbs(run, up=True, user_id="first")
        with closing(sqlite3.connect(home.database)) as shell, shell:
            shell.execute(LAST)
        log.thumbs(run, up=True, user_id="last")
        assert log.verify() != []
        NEXT[then](log)
        found = {problem.table for problem in log.verify()}
        assert "feedback" in found


@pytest.mark.parametrize("then", NEXT)
def test_deleted_feedback_at_the_end_is_found_whatever_comes_next(home: Home, then: str) -> None:
    with Log(home.path) as log:
        say(log, "last")
        with closing(sqlite3.connect(home.database)) as shell, shell:
            shell.execute(LAST)
        NEXT[then](log)
        assert "feedback" in {problem.table for problem in log.verify()}


def test_an_edited_row_is_remembered_when_it_is_removed(home: Home) -> None:
    with Log(home.path) as log:
        say(log)
        with closing(sqlite3.connect(home.database)) as shell, shell:
            shell.execute(LAST.replace("DELETE FROM feedback", "UPDATE feedback SET score = 0"))
        log.forget("later")
        found = {problem.table: problem.what for problem in log.verify()}
    assert found["feedback"] == CHANGED


def test_a_deleted_run_is_remembered_when_the_one_after_it_is_removed(home: Home) -> None:
    """Nobody judged them, and they had no sum: only the seal of the next run shows it."""
    with Log(home.path) as log:
        for user in ("a", "deleted", "after"):
            log.record([{"role": "user", "content": "And now?"}], user, user_id=user)
        log.flush()
        with closing(sqlite3.connect(home.database)) as shell, shell:
            shell.execute("DELETE FROM run WHERE rowid = (SELECT max(rowid) - 1 FROM run)")
        assert [problem.table for problem in log.verify()] == ["run"]
        log.forget("after")
        (problem,) = log.verify()
        assert problem.what.startswith("1 of its rows, removed since, were not as they")
        log.forget("a")
        assert log.verify() == [problem]


def test_what_agentpref_itself_does_changes_no_sum(home: Home) -> None:
    """Taint, quarantine and its end, forgetting, expiry, the list of examples, more of each."""
    with Log(home.path) as log:
        log.forget("u0")
        assert log.verify() == []
        registry = Registry(home)
        (held, *_) = [one for one in registry.list() if one.quarantined_at is not None]
        registry.release(held.revision_id)
        say(log)
        assert log.verify() == []
    with closing(connect(home)) as connection:
        Catalog(connection, "default", held_out=0.3).refresh()
        assert examine(connection).problems == []
        kept = [*connection.execute("SELECT * FROM table_sum ORDER BY name")]
        resum(connection)
        assert [*connection.execute("SELECT * FROM table_sum ORDER BY name")] == kept


def test_a_check_while_others_write_finds_nothing(home: Home) -> None:
    """Another connection writes between the two reads of every sum."""
    with Log(home.path) as log, closing(connect(home)) as connection:

        def write(statement: str) -> None:
            if "FROM table_sum" in statement:
                written.append(statement)
                say(log)

        written: list[str] = []
        connection.set_trace_callback(write)
        assert examine(connection).problems == []
    assert len(written) == len(SUMMED) + 1, "what is counted of runs is one more"


def test_a_home_from_before_sums_keeps_what_its_last_seals_show(home: Home) -> None:
    """The step takes a home as it is, but one row more where the last one is gone."""
    with closing(connect(home)) as connection:
        for table in ("feedback", "comparison"):
            connection.execute(f"DELETE FROM table_sum WHERE name = '{table}'")
        ends = {table: last_seal(connection, table) for table in SEALED if table != "run"}
        connection.execute("DROP TABLE table_sum")
        connection.execute("DROP TABLE logp")
        STEPS[3].change(connection)
        connection.execute("INSERT INTO logp VALUES ('p', 'r', -1.5, 3)")
        connection.execute(
            "CREATE TABLE last_seal (name TEXT PRIMARY KEY NOT NULL, seal BLOB NOT NULL)"
            " WITHOUT ROWID"
        )
        connection.executemany("INSERT INTO last_seal VALUES (?, ?)", ends.items())
        connection.execute(LAST)
        later = ("answers", "judge", "verdict", "calibration")
        for table in later:
            connection.execute(f"DROP TABLE {table}")
        connection.execute(
            "DELETE FROM migration WHERE name IN ('sums_of_tables', 'answers', 'judges')"
        )
    with closing(connect(home)) as connection:
        (problem,) = examine(connection).problems
        assert problem.table == "feedback"
        assert "are there" in problem.what
        seal(connection, "feedback")
        assert examine(connection).problems == []


@pytest.mark.guarantee("verify", f"{FLIPS} flips in a file with rows of every kind")
def test_a_flipped_bit_is_found_or_changes_nothing(home: Home, tmp_path: Path) -> None:
    """Bits anywhere in the file, and as many in bytes that are not 0: there is much free space."""
    sound = tmp_path / "sound.db"
    with closing(connect(home)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(home.database, sound)
    true, rng, found = _everything(home), random.Random(0), 0
    written = [place for place, byte in enumerate(sound.read_bytes()) if byte]
    for n in range(FLIPS):
        data = bytearray(sound.read_bytes())
        place = rng.choice(written) if n % 2 else rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        for file in home.path.glob("agentpref.db*"):
            file.unlink()
        home.database.write_bytes(data)
        try:
            with closing(connect(home, readonly=True)) as connection:
                problems = examine(connection).problems
            if problems:
                found += 1
            else:
                assert _everything(home) == true
        except (HomeError, sqlite3.DatabaseError):
            found += 1
    assert found > FLIPS / 4  # else this has not tried what it is for


def _everything(home: Home) -> list[object]:
    """What reading every table row by row, and by its first column, gives."""
    found: list[object] = []
    with closing(connect(home, readonly=True)) as connection:
        for table in tables(connection):
            columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
            shown = ", ".join(name for name in columns if (table, name) not in NOT_FOUND)
            found.append([*connection.execute(f"SELECT {shown or 1} FROM {table}")])
            keys = [*connection.execute(f"SELECT {columns[0]} FROM {table}")]
            query = f"SELECT count(*) FROM {table} WHERE {columns[0]} = ?"
            found.append([connection.execute(query, key).fetchone() for key in keys])
    return found
