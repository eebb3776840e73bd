"""Deletes runs, their judgements, and their bytes on disk.

A removal has three steps. :func:`choose` collects the rows in temporary tables. :func:`delete`
deletes them and each message that nothing refers to any more. At the end VACUUM rewrites the whole
database, even if no row was deleted: no free page keeps deleted text, and each removal completes
one that was interrupted. ``forget`` removes by user, :func:`expire` by age.

References to messages have no index on purpose, which would slow down every write. So each question
below is one pass over a table, however many runs are deleted.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import orjson

from agentpref.errors import ConfigError, ImplausibleClock, NotKept, UpdateRunning
from agentpref.home import Home, StrPath, reading, replacing, writing
from agentpref.leftovers import clear_drafts
from agentpref.record.database import connect, diagnose, exclusive, locked, transaction, translated
from agentpref.record.messages import RunRow
from agentpref.record.seals import resealing
from agentpref.record.spill import drain, is_whole, taking_turns
from agentpref.record.sums import LISTED, counted
from agentpref.types import COMMENT_ID, REVISED_FROM, SAMPLED_FOR, Progress

CLOCK_TOLERANCE_SECONDS = 3600.0
"""How far in the future the newest run may be, since the clocks of machines differ."""

MERGE_COPY = "merging"
"""In a home: the folder for the copy of another home while it is merged."""


@dataclass(frozen=True, slots=True)
class Removed:
    """How many rows were removed.

    ``shared`` counts the messages of the removed runs that stay because other runs contain them
    too, such as a system prompt or a question that somebody else also asked.
    """

    runs: int = 0
    feedback: int = 0
    comparisons: int = 0
    messages: int = 0
    shared: int = 0


def expire(
    home: Home | StrPath | None,
    *,
    older_than: float,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Removed:
    """Remove the runs that are older than ``older_than`` seconds, with their judgements.

    A comparison is removed with the older of its runs. Messages that younger runs contain stay. No
    revision is tainted: it was fine to train on these runs while they were kept.

    >>> expire("./.agentpref", older_than=90 * 86_400)  # doctest: +SKIP
    Removed(runs=2, feedback=2, comparisons=2, messages=4, shared=1)

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        older_than: the age in seconds, above 0.
        force: remove even if the clock looks wrong or no run would be left.
        dry_run: change nothing; say what would be removed. What waits in the spill is not counted.
        progress: called with ``(stage, done, total)`` during the work.

    Raises:
        NotAHome: the folder is no home.
        ConfigError: ``older_than`` is not a finite number above 0.
        ImplausibleClock: the newest run lies in the future, or no run would be left.
        UpdateRunning: an update, a merge or another removal of this home is running.
        NotKept: as for :func:`~agentpref.record.deletion.forget.forget`.
    """
    if not 0 < older_than < float("inf"):
        raise ConfigError(f"older_than is {older_than!r}, but must be above 0, in seconds")
    place = Home.open(home)
    now = time.time()
    before = now - older_than
    with rehearsal(place) if dry_run else removal(place, progress) as connection:
        if not force:
            _require_plausible_clock(connection, now, before)
        if not dry_run:
            purge_refused(place, lambda fields: fields["created_at"] < before)
        with transaction(connection):
            choose(connection, "created_at < :before", "0", {"before": before})
            if not dry_run:
                remove_derived(connection, place)
            return delete(connection)


def _require_plausible_clock(connection: sqlite3.Connection, now: float, before: float) -> None:
    (newest,) = connection.execute("SELECT max(created_at) FROM run").fetchone()
    if newest is None:
        return
    if newest > now + CLOCK_TOLERANCE_SECONDS:
        problem = f"was recorded {newest - now:,.0f} s after this clock's present time"
    elif newest < before:
        problem = f"is {now - newest:,.0f} s old by this clock, so no run would be left"
    else:
        return
    raise ImplausibleClock(
        f"the newest run {problem}; nothing was removed; set the clock, or force the removal "
        "(--force)"
    )


@contextmanager
def removal(
    home: Home, progress: Progress | None = None, *, of_a_merge: bool = False
) -> Iterator[sqlite3.Connection]:
    """Lock a home, write its spill to the database, run the block, then scrub the database.

    No merge runs meanwhile: its copy of another home may hold what is to be removed. With
    ``of_a_merge``, the caller is that merge, and has :func:`merging`. What killed processes left of
    the drafts of files goes, too.

    The connection overwrites what it deletes. It does not enforce foreign keys: SQLite would search
    the whole table of messages for the children of each deleted one. :func:`delete` leaves no
    reference to a deleted row.

    Raises:
        HomeError: the home cannot be read.
        UpdateRunning: an update, a merge or another removal of this home is running.
        NotKept: the database or its spill cannot be written; or, by the message, the rows are
            deleted but their bytes are not overwritten yet.
    """
    tell: Progress = progress or (lambda stage, done, total: None)
    with nullcontext() if of_a_merge else merging(home), exclusive(home):
        drain(home)
        with writing(home.path):
            clear_drafts(home.path)
        with translated(home), closing(connect(home)) as connection:
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute("PRAGMA secure_delete = ON")
            tell("remove", 0, 1)
            yield connection
            tell("remove", 1, 1)
            tell("scrub", 0, 1)
            _scrub(home, connection)
            tell("scrub", 1, 1)


@contextmanager
def rehearsal(home: Home) -> Iterator[sqlite3.Connection]:
    """Open a home for a removal that is taken back after the block: a dry run.

    The block deletes in a transaction, as a removal does, so what it counts is what a removal would
    remove. Logs of the home wait meanwhile, and spill what they cannot keep.
    """
    with translated(home), closing(connect(home)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("BEGIN IMMEDIATE")  # the block's own transactions join this one
        try:
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def choose(
    connection: sqlite3.Connection, runs: str, judgements: str, values: Mapping[str, Any]
) -> None:
    """Choose the runs and the judgements for which these SQL conditions on their columns are true.

    Every judgement of a chosen run is chosen too, and so are further answers to the prompt of one,
    which the home drew or revised itself, and what was revised by a chosen comment: nobody is their
    user. Call it in the transaction that deletes; what was chosen before is not chosen any more.
    """
    _run_script(connection, _CHOOSE.format(runs=runs, judgements=judgements), values)


def chosen_runs(connection: sqlite3.Connection) -> list[str]:
    """Return the ids of the chosen runs."""
    return [key for (key,) in connection.execute("SELECT id FROM gone_run")]


def chosen_judgements(connection: sqlite3.Connection) -> list[str]:
    """Return the ids of the chosen feedback and comparisons."""
    query = "SELECT id FROM gone_feedback UNION ALL SELECT id FROM gone_comparison"
    return [key for (key,) in connection.execute(query)]


def remove_derived(connection: sqlite3.Connection, home: Home) -> None:
    """Remove what was made of the home's texts and names none, if anything is chosen.

    Those are reward models, the features that they were fitted on, and which questions people
    skipped. They go before the rows: what a crash leaves then has not seen less than it should.
    """
    if not (chosen_runs(connection) or chosen_judgements(connection)):
        return
    with writing(home.path):
        if home.rewards.exists():
            shutil.rmtree(home.rewards)
        home.skipped.unlink(missing_ok=True)


def delete(connection: sqlite3.Connection) -> Removed:
    """Delete the chosen rows, and each message that no remaining row refers to."""
    _run_script(connection, _CANDIDATES)
    tables = ("comparison", "feedback", "run")
    query = "SELECT EXISTS (SELECT 1 FROM gone_{})"
    with counted(connection, "verdict"):
        connection.execute(_DELETE_VERDICTS)
    touched = [table for table in tables if connection.execute(query.format(table)).fetchone()[0]]
    by_triggers = LISTED if touched else ()
    with resealing(connection, touched), counted(connection, *by_triggers):
        counts = {name: connection.execute(query).rowcount for name, query in _DELETE.items()}
    _run_script(connection, _KEPT)
    messages = connection.execute(_DELETE_MESSAGES).rowcount
    with counted(connection, "answers"):
        connection.execute("DELETE FROM answers WHERE prompt NOT IN (SELECT id FROM message)")
    (shared,) = connection.execute(_COUNT_SHARED).fetchone()
    return Removed(**counts, messages=messages, shared=shared)


def purge_refused(home: Home, is_gone: Callable[[Mapping[str, Any]], bool]) -> None:
    """Delete lines of ``refused.jsonl``, where the spill keeps entries that the database refused.

    ``is_gone`` decides by the fields of a run, of feedback or of a comparison. Lines that cannot be
    read are deleted too: they may hold anybody's text. Raises ``NotKept`` if the file cannot be
    written.
    """
    path = home.refused
    with taking_turns(path):
        if not path.exists():
            return
        with replacing(path) as draft, reading(path) as old, draft.open("wb") as new:
            for line in old:
                fields = _fields(line)
                if fields is not None and not is_gone(fields):
                    new.write(line)
        if path.stat().st_size == 0:
            path.unlink()


def _fields(line: bytes) -> Mapping[str, Any] | None:
    try:
        entry = orjson.loads(line.partition(b" ")[2]) if is_whole(line) else {}
        if "run" in entry:
            return dict(zip(RunRow._fields, entry["run"], strict=False))
        (fields,) = entry.values()
        return {**fields, "created_at": float(fields["created_at"])}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


@contextmanager
def merging(home: Home) -> Iterator[None]:
    """Lock a home for one merge, or for a removal; remove the copy that a killed merge left.

    Raises:
        UpdateRunning: a merge or a removal is running.
    """
    what = f"another merge into {home.path}, or a removal from it, is running"
    refusal = UpdateRunning(f"{what}; wait for it to end, then try again")
    copy = home.path / MERGE_COPY
    with locked(home.path / "merge.lock", refusal):
        with writing(copy):
            if copy.is_symlink():
                copy.unlink()
            elif copy.exists():
                shutil.rmtree(copy)
        yield


def _scrub(home: Home, connection: sqlite3.Connection) -> None:
    """Rewrite the database and empty its write-ahead log."""
    why = cause = None
    try:
        connection.execute("VACUUM")
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            why = "a process is reading an older state of it; let it finish"
    except sqlite3.Error as error:
        trouble = diagnose(error)
        if trouble is None:
            raise
        why, cause = f"{error}; {trouble.cure}", error
    if why is not None:
        raise NotKept(
            f"the rows are deleted, but free pages of {home.database} may still hold their text: "
            f"{why}. Then run the same command again to complete the removal"
        ) from cause


def _run_script(
    connection: sqlite3.Connection, script: str, values: Mapping[str, Any] | None = None
) -> None:
    """Run statements one by one: ``executescript`` would commit the transaction."""
    for statement in script.split(";"):
        connection.execute(statement, values or {})


_CHOOSE = f"""
DROP TABLE IF EXISTS temp.gone_run;
DROP TABLE IF EXISTS temp.gone_feedback;
DROP TABLE IF EXISTS temp.gone_comparison;
CREATE TEMP TABLE gone_run (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE gone_feedback (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE gone_comparison (id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO gone_run SELECT run_id FROM run WHERE {{runs}};
INSERT INTO gone_feedback SELECT feedback_id FROM feedback
    WHERE run_id IN gone_run OR ({{judgements}});
INSERT OR IGNORE INTO gone_run
    WITH RECURSIVE made(id, about) AS (
        SELECT run_id, CASE WHEN json_valid(metadata) THEN metadata ELSE '{{{{}}}}' END FROM run
        WHERE instr(metadata, '{REVISED_FROM}') OR instr(metadata, '{SAMPLED_FOR}')),
    line(id) AS (
        SELECT id FROM made WHERE json_extract(about, '$.{COMMENT_ID}') IN gone_feedback
            OR json_extract(about, '$.{REVISED_FROM}') IN gone_run
            OR json_extract(about, '$.{SAMPLED_FOR}') IN gone_run
        UNION SELECT made.id FROM line CROSS JOIN made
            ON line.id IN (json_extract(about, '$.{REVISED_FROM}'),
                json_extract(about, '$.{SAMPLED_FOR}')))
    SELECT id FROM line;
INSERT OR IGNORE INTO gone_feedback SELECT feedback_id FROM feedback WHERE run_id IN gone_run;
INSERT INTO gone_comparison SELECT comparison_id FROM comparison
    WHERE run_a IN gone_run OR run_b IN gone_run OR ({{judgements}})
"""

# Candidates: the messages of the chosen rows (chosen = 1), and messages that nothing refers to
# (chosen = 0), each with its ancestors. The latter come from runs recorded twice under one id.
# The ids are sorted first, because they then enter a table five times faster.
_CANDIDATES = """
CREATE TEMP TABLE referred (id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT OR IGNORE INTO referred
    SELECT prompt FROM run UNION ALL SELECT output FROM run
    UNION ALL SELECT correction FROM feedback WHERE correction IS NOT NULL
    UNION ALL SELECT parent FROM message WHERE parent IS NOT NULL
    ORDER BY 1;
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
        SELECT id FROM message WHERE id NOT IN referred
        UNION SELECT parent FROM message JOIN line USING (id) WHERE parent IS NOT NULL)
    SELECT id, 0 FROM line
"""
_DELETE = {
    "comparisons": "DELETE FROM comparison WHERE comparison_id IN gone_comparison",
    "feedback": "DELETE FROM feedback WHERE feedback_id IN gone_feedback",
    "runs": "DELETE FROM run WHERE run_id IN gone_run",
}
# Candidates that stay: a remaining row or message refers to them or to one of their descendants.
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
# A judge's words may quote any answer to their prompt, and those of a prompt that is gone.
_DELETE_VERDICTS = """
DELETE FROM verdict WHERE prompt NOT IN (SELECT id FROM message) OR prompt IN (
    SELECT prompt FROM run WHERE run_id IN gone_run
    UNION SELECT prompt FROM feedback CROSS JOIN run USING (run_id)
        WHERE feedback_id IN gone_feedback)
"""
_DELETE_MESSAGES = "DELETE FROM message WHERE id IN (SELECT id FROM candidate) AND id NOT IN kept"
_COUNT_SHARED = "SELECT count(*) FROM candidate WHERE chosen AND id IN kept"
