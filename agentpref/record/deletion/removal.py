"""Taking runs out of the record, with all that hangs on them, and their bytes off the disk.

What is to go is chosen first, in temporary tables; :func:`delete` removes it, and then every
message that nothing refers to any more. There is deliberately no index on what refers to messages,
so each question is one pass over a table, whatever the number of runs that go. At last the database
is written anew, whether or not anything went, so that no page keeps what was deleted and a removal
that was interrupted is completed by the next. Knows nothing of users, ages and why a run goes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from agentpref.errors import NotKept
from agentpref.home import Home
from agentpref.record.database import connect, diagnose, exclusive, translated
from agentpref.record.spill import drain
from agentpref.types import Progress


@dataclass(frozen=True, slots=True)
class Removed:
    """How much was removed.

    ``shared`` counts the messages of the removed runs that stay, since other runs hold the same
    text: a system prompt, or a question that somebody else has asked too.
    """

    runs: int = 0
    feedback: int = 0
    comparisons: int = 0
    messages: int = 0
    shared: int = 0


@contextmanager
def removal(home: Home, tell: Progress) -> Iterator[sqlite3.Connection]:
    """Hold a home, with nothing left in its spill, for a block that removes; then scrub it.

    The connection overwrites what it deletes. It does not follow foreign keys, since for each
    message that goes SQLite would look through all others for its children; :func:`delete` leaves
    no reference to what is gone.

    Raises:
        HomeError: the home cannot be read.
        UpdateRunning: an update or another removal holds it.
        NotKept: the database or its spill cannot be written; or, where it says so, the rows are
            deleted but their bytes are not overwritten yet.
    """
    with exclusive(home):
        drain(home)
        with translated(home), closing(connect(home)) as connection:
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute("PRAGMA secure_delete = ON")
            with _stage(tell, "look for stray text"):
                _find_strays(connection)
            with _stage(tell, "remove"):
                yield connection
            with _stage(tell, "scrub"):
                _scrub(home, connection)


def choose(
    connection: sqlite3.Connection, runs: str, judgements: str, values: Mapping[str, Any]
) -> None:
    """Choose the runs and the judgements of which these SQL conditions on their columns hold.

    Whatever was said of a chosen run is chosen too. Call it in the transaction that deletes.
    """
    for statement in _CHOOSE.format(runs=runs, judgements=judgements).split(";"):
        connection.execute(statement, values)


def chosen_judgements(connection: sqlite3.Connection) -> list[str]:
    """Name the chosen feedback and comparisons."""
    query = "SELECT id FROM gone_feedback UNION ALL SELECT id FROM gone_comparison"
    return [key for (key,) in connection.execute(query)]


def delete(connection: sqlite3.Connection) -> Removed:
    """Delete what was chosen, and the messages that only it referred to."""
    _run_script(connection, _CANDIDATES)
    counts = {name: connection.execute(query).rowcount for name, query in _DELETE.items()}
    _run_script(connection, _KEPT)
    messages = connection.execute(_DELETE_MESSAGES).rowcount
    (shared,) = connection.execute(_COUNT_SHARED).fetchone()
    return Removed(**counts, messages=messages, shared=shared)


@contextmanager
def _stage(tell: Progress, name: str) -> Iterator[None]:
    tell(name, 0, 1)
    yield
    tell(name, 1, 1)


def _find_strays(connection: sqlite3.Connection) -> None:
    """Look for messages that nothing refers to, so that they go too.

    A run that is recorded twice under one id leaves such: the first stays, and the second's text.
    Of all questions this takes longest, and it needs no lock: what is found is asked about again.
    """
    _run_script(connection, _STRAYS)


def _scrub(home: Home, connection: sqlite3.Connection) -> None:
    """Write the database anew and empty its log."""
    try:
        connection.execute("VACUUM")
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error as error:
        trouble = diagnose(error)
        if trouble is None:
            raise
        raise _unfinished(home, f"{error}; {trouble.cure}") from error
    if busy:
        raise _unfinished(home, "a process is reading an older state of it; let it finish")


def _unfinished(home: Home, why: str) -> NotKept:
    return NotKept(
        f"the rows are deleted, but free pages of {home.database} may still hold their text: {why}."
        " Then run the same command again, which finishes it"
    )


def _run_script(connection: sqlite3.Connection, script: str) -> None:
    """Run statements one by one: ``executescript`` would commit the transaction."""
    for statement in script.split(";"):
        connection.execute(statement)


_CHOOSE = """
CREATE TEMP TABLE gone_run (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE gone_feedback (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE gone_comparison (id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO gone_run SELECT run_id FROM run WHERE {runs};
INSERT INTO gone_feedback SELECT feedback_id FROM feedback
    WHERE run_id IN gone_run OR ({judgements});
INSERT INTO gone_comparison SELECT comparison_id FROM comparison
    WHERE run_a IN gone_run OR run_b IN gone_run OR ({judgements})
"""

_STRAYS = """
CREATE TEMP TABLE referred (id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT OR IGNORE INTO referred
    SELECT prompt FROM run UNION ALL SELECT output FROM run
    UNION ALL SELECT correction FROM feedback WHERE correction IS NOT NULL
    UNION ALL SELECT parent FROM message WHERE parent IS NOT NULL
    ORDER BY 1;
CREATE TEMP TABLE stray (id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO stray SELECT id FROM message WHERE id NOT IN referred;
DROP TABLE referred
"""
# Sorted, ids go into a table five times faster than as they come.

_CANDIDATES = """
CREATE TEMP TABLE candidate (id TEXT PRIMARY KEY, chosen INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO candidate
    WITH RECURSIVE line(id) AS (
        SELECT prompt FROM run WHERE run_id IN gone_run
        UNION SELECT output FROM run WHERE run_id IN gone_run
        UNION SELECT correction FROM feedback
            WHERE feedback_id IN gone_feedback AND correction IS NOT NULL
        UNION SELECT parent FROM message JOIN line USING (id) WHERE parent IS NOT NULL)
    SELECT id, 1 FROM line;
INSERT OR IGNORE INTO candidate
    WITH RECURSIVE line(id) AS (
        SELECT id FROM stray
        UNION SELECT parent FROM message JOIN line USING (id) WHERE parent IS NOT NULL)
    SELECT id, 0 FROM line
"""
_DELETE = {
    "comparisons": "DELETE FROM comparison WHERE comparison_id IN gone_comparison",
    "feedback": "DELETE FROM feedback WHERE feedback_id IN gone_feedback",
    "runs": "DELETE FROM run WHERE run_id IN gone_run",
}
_KEPT = """
CREATE TEMP TABLE kept (id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO kept
    WITH RECURSIVE line(id) AS (
        SELECT prompt FROM run WHERE prompt IN (SELECT id FROM candidate)
        UNION SELECT output FROM run WHERE output IN (SELECT id FROM candidate)
        UNION SELECT correction FROM feedback WHERE correction IN (SELECT id FROM candidate)
        UNION SELECT parent FROM message
            WHERE parent IN (SELECT id FROM candidate) AND id NOT IN (SELECT id FROM candidate)
        UNION SELECT parent FROM message JOIN line USING (id) WHERE parent IS NOT NULL)
    SELECT id FROM line
"""
_DELETE_MESSAGES = """
DELETE FROM message WHERE id IN (SELECT id FROM candidate) AND id NOT IN kept
"""
_COUNT_SHARED = "SELECT count(*) FROM candidate WHERE chosen AND id IN kept"
