"""Unites homes: every run and every judgement, exactly once by its id.

For each other home:

1. Copy it as it is at one moment; the home itself is only read. In the copy, bring the schema up to
   date and write what waits in the spill to the database.
2. Verify the copy. A home that fails gives nothing.
3. Unite the user keys, and forget here who was forgotten there.
4. Attach the copy and insert the rows that this home does not have: runs with their messages, then
   feedback, then comparisons. Rows of a user who was forgotten here stay out.

Each batch of rows is one transaction: writers of this home wait a fraction of a second, and a merge
may be interrupted anywhere and done again. Updates, revisions, what serves and what is known of
judges are not merged: calibrate a judge where its verdicts are to train.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from agentpref.errors import AgentprefError, ConfigError, CorruptHome
from agentpref.home import Home, StrPath, copy_file, own_folder, writing
from agentpref.record.database import connect, require_known_schema, transaction, translated
from agentpref.record.deletion.forget import Forgotten, adopt
from agentpref.record.deletion.removal import MERGE_COPY, merging
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.integrity import examine, examine_spill
from agentpref.record.keys import registered
from agentpref.record.messages import COMPARISON_COLUMNS, FEEDBACK_COLUMNS, IMPORT_ID, RUN_COLUMNS
from agentpref.record.seals import seal
from agentpref.record.spill import drain
from agentpref.record.sums import counted
from agentpref.record.transfer.backup import copy_database
from agentpref.types import Progress

BATCH = 2_000
"""Rows of one table that one transaction writes at most: some 50 ms of work."""

NAMED = 100
"""Rows in conflict that are named at most; all are counted."""


@dataclass(slots=True)
class Counts:
    """What became of the rows of one table.

    ``added`` are new here, ``known`` were here already. ``conflicts`` have the id of a different
    row, which was here first and stays, or judge such a run. ``forgotten`` are of a user who was
    forgotten here, or judge a run that was removed.
    """

    added: int = 0
    known: int = 0
    conflicts: int = 0
    forgotten: int = 0


@dataclass(slots=True)
class Merged:
    """What came of one other home.

    ``messages`` counts those that are new here, ``keys`` the user keys that are new here,
    ``tombstones`` the users who were forgotten there and not here; ``forgot`` is what was then
    removed here. ``conflicts`` names the first rows in conflict by ``table`` and ``key``.

    Of a place of segments, ``refused`` are those that gave nothing, or could not be searched for
    what was forgotten here, with the reason, ``waiting`` those that judge runs which are not here
    yet, and ``replaced`` those that held what was forgotten here.
    """

    home: str
    messages: int = 0
    runs: Counts = field(default_factory=Counts)
    feedback: Counts = field(default_factory=Counts)
    comparisons: Counts = field(default_factory=Counts)
    conflicts: list[dict[str, str]] = field(default_factory=list)
    keys: int = 0
    tombstones: int = 0
    forgot: Forgotten | None = None
    refused: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)

    def to_mapping(self) -> dict[str, Any]:
        """Return all of it as plain values, as ``--json`` prints it."""
        forgot = None if self.forgot is None else self.forgot.to_mapping()
        return {**asdict(self), "forgot": forgot}


def merge(
    home: Home | StrPath | None,
    others: Iterable[Home | StrPath],
    *,
    progress: Progress | None = None,
) -> list[Merged]:
    """Bring into a home what other homes logged.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``. While it
            runs, its disk also holds a copy of one other database at a time.
        others: the other homes, or their folders; or places of segments that homes have shipped
            to (:func:`agentpref.record.transfer.ship.ship`), by URL or folder.
        progress: called with ``(stage, done, total)`` during the work.

    Returns:
        What came of each other home, in their order.

    Raises:
        NotAHome, ConfigError: a folder is no home, or the home itself. Nothing was merged.
        CorruptHome: another home is damaged or fails verification, and gave nothing. The homes
            before it are merged, as with the errors below.
        NewerHome: a later agentpref has changed a database beyond what this one knows.
        UpdateRunning: another merge or a removal is running; or a user was forgotten elsewhere, and
            an update of this home is running.
        NotKept: a database cannot be written.
    """
    if isinstance(others, (str, os.PathLike)):
        raise ConfigError(f"others is one path, {str(others)!r}; pass a list of folders")
    place = Home.open(home)
    sources = [str(other) if _is_place(other) else Home.open(other) for other in others]
    for other in sources:
        if isinstance(other, Home) and os.path.samefile(other.database, place.database):
            raise ConfigError(f"{other.path} is the home itself; name the other homes")
    return [_merge_one(place, other, progress) for other in sources]


def _is_place(other: Home | StrPath) -> bool:
    from agentpref.record.transfer.places import holds_segments

    return not isinstance(other, Home) and holds_segments(other)


def _merge_one(home: Home, other: Home | str, progress: Progress | None) -> Merged:
    def tell(stage: str, done: int, total: int) -> None:
        if progress is not None:
            name = other if isinstance(other, str) else other.path.name
            progress(f"{name}: {stage}", done, total)

    if isinstance(other, str):
        from agentpref.record.transfer.gather import gather

        return gather(home, other, tell)
    merged = Merged(str(other.path))
    with _copied(home, other, tell) as copy:
        with _blaming(other, copy):
            theirs = _verified(copy, other, tell)
            their_keys = Pseudonyms.of(copy)
        with translated(home), closing(connect(home)) as connection:
            keys = registered(connection)
            together = keys.adopt(their_keys, home, copy.path)
            merged.keys = len(together.names("")) - len(keys.names(""))
            registered(connection)
            ours = dict(connection.execute("SELECT user_id, at FROM forgotten"))
        new = {name: at for name, at in theirs.items() if ours.get(name, float("-inf")) < at}
        merged.tombstones, merged.forgot = len(new), adopt(home, new, tell) if new else None
        with translated(home), closing(connect(home)) as connection:
            connection.execute("PRAGMA cache_size = -65536")
            connection.execute("ATTACH ? AS other", (str(copy.database),))
            connection.execute("CREATE TEMP TABLE batch (row INTEGER PRIMARY KEY, fate TEXT)")
            merged.runs = _insert(connection, home, _RUN, merged, tell)
            merged.feedback = _insert(connection, home, _FEEDBACK, merged, tell)
            merged.comparisons = _insert(connection, home, _COMPARISON, merged, tell)
            tables = ("feedback_scale", "user_key")
            with transaction(connection), counted(connection, *tables):
                connection.execute(_INSERT_SCALES)  # where both have one, new scores are on ours
                connection.execute(_INSERT_KEYS)  # also of a key that the other home has lost
    return merged


@contextmanager
def _copied(home: Home, other: Home, tell: Progress) -> Iterator[Home]:
    """Copy the other home's database, spill and user keys into this home, for a block."""
    copy = Home(home.path / MERGE_COPY)
    with merging(home):
        try:
            with writing(copy.path):
                copy.path.mkdir(mode=0o700)
                own_folder(copy.path)  # if it is killed, another user can remove it
                with translated(home), closing(connect(home)) as connection:
                    registered(connection)  # makes the keys that a home without its own gets
                keys = other.user_keys if other.user_keys.exists() else home.user_keys
                copy_file(keys, copy.user_keys)
                if other.spill.exists():  # before the database: an entry in both is stored once
                    copy_file(other.spill, copy.spill)
                with translated(other), closing(sqlite3.connect(other.database)) as connection:
                    connection.execute("BEGIN")
                    connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                    copy_database(connection, copy, lambda stage, *counts: tell("copy", *counts))
            yield copy
        finally:
            shutil.rmtree(copy.path, ignore_errors=True)


@contextmanager
def _blaming(other: Home, copy: Home) -> Iterator[None]:
    """Raise what is wrong with the copy as what is wrong with the other home."""
    try:
        with translated(copy):
            yield
    except AgentprefError as error:
        raise type(error)(str(error).replace(str(copy.path), str(other.path))) from error
    except sqlite3.Error as error:
        raise CorruptHome(
            f"{other.database} is not as agentpref makes it ({error}); restore a backup"
        ) from error


def _verified(copy: Home, other: Home, tell: Progress) -> dict[str, float]:
    """Bring the copy up to date, refuse it if it fails verification, and return its tombstones."""
    problems = examine_spill(copy).problems
    drain(copy)
    with closing(connect(copy, readonly=True)) as connection:
        # A view or a virtual table of the same name would run SQL of the file's maker.
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE TABLE %'"
        tables = {name for (name,) in connection.execute(query)}
        for table in ("message", "run", "feedback", "comparison", "forgotten"):
            if table not in tables:
                raise CorruptHome(f"{copy.database} has no table {table!r}; restore a backup")
        found = examine(connection, progress=lambda stage, *at: tell(f"verify {stage}", *at))
        problems += found.problems
        if problems:
            few = "; ".join(f"{table} {key}: {what}" for table, key, what in problems[:3])
            raise CorruptHome(
                f"{other.path} fails verification, so nothing of it was merged: {few}"
                f"{f'; and {len(problems) - 3:,} more' if len(problems) > 3 else ''}; look at it "
                f"with `agentpref verify --home {other.path}`, restore it from a backup, and merge "
                "again"
            )
        now = time.time()  # a clock that is ahead forgets nothing to come
        sound = "typeof(user_id) = 'text' AND typeof(at) = 'real'"
        query = f"SELECT user_id, at FROM forgotten WHERE {sound}"
        return {name: min(at, now) for name, at in connection.execute(query)}


class _Table(NamedTuple):
    """A table to merge: the columns that name runs it judges, and those that name messages."""

    name: str
    columns: tuple[str, ...]
    runs: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()

    def sort(self) -> str:
        """SQL that says what becomes of each row of the next batch."""
        ours, theirs = (
            ", ".join(f"{side}.{name}" for name in self.columns if name != "scale")
            for side in ("ours", "theirs")
        )
        is_gone = (
            f" OR NOT EXISTS (SELECT 1 FROM main.run WHERE run_id = theirs.{run})"
            for run in self.runs
        )
        is_another = (
            "OR EXISTS (SELECT 1 FROM main.run AS a JOIN other.run AS b USING (run_id)"
            f" WHERE run_id = theirs.{run} AND (a.namespace, a.prompt, a.output)"
            " IS NOT (b.namespace, b.prompt, b.output))"
            for run in self.runs
        )
        return f"""INSERT INTO batch SELECT theirs.rowid, CASE
            WHEN ours.rowid IS NOT NULL THEN iif(({ours}) IS ({theirs})
                OR {self.name}_id GLOB '{IMPORT_ID}*', 'known', 'conflicts')
            WHEN EXISTS (SELECT 1 FROM main.forgotten
                WHERE user_id = theirs.user_id AND at >= theirs.created_at)
                {"".join(is_gone)} THEN 'forgotten'
            WHEN false {"".join(is_another)} THEN 'conflicts'
            ELSE 'added' END
        FROM other.{self.name} AS theirs LEFT JOIN main.{self.name} AS ours USING ({self.name}_id)
        WHERE theirs.rowid > ? ORDER BY theirs.rowid LIMIT ?"""

    def insert_messages(self) -> str:
        """SQL that inserts the messages of the rows to add, with those before them.

        Sorted as they were logged, each comes after its parent. Otherwise SQLite would search whole
        tables for rows that wait for a parent.
        """
        named = " UNION ".join(
            f"SELECT {column} FROM other.{self.name} WHERE {column} IS NOT NULL AND {_ADDED}"
            for column in self.messages
        )
        return f"""INSERT OR IGNORE INTO main.message (id, parent, body)
        WITH RECURSIVE needed(id) AS ({named} UNION
            SELECT parent FROM needed CROSS JOIN other.message USING (id) WHERE parent IS NOT NULL
                AND NOT EXISTS (SELECT 1 FROM main.message AS known WHERE known.id = needed.id))
        SELECT id, parent, body FROM needed CROSS JOIN other.message USING (id)
        ORDER BY message.rowid"""

    def insert(self) -> str:
        """SQL that inserts the rows to add."""
        names = ", ".join(self.columns)
        return f"""INSERT OR IGNORE INTO main.{self.name} ({names})
        SELECT {names} FROM other.{self.name} WHERE {_ADDED} ORDER BY rowid"""


_INSERT_SCALES = """INSERT OR IGNORE INTO main.feedback_scale
SELECT * FROM other.feedback_scale WHERE typeof(low) = 'real' AND typeof(high) = 'real'"""

_INSERT_KEYS = """INSERT OR IGNORE INTO main.user_key
SELECT * FROM other.user_key WHERE typeof(fingerprint) = 'text'"""

_ADDED = "rowid IN (SELECT row FROM batch WHERE fate = 'added')"
_RUN = _Table("run", RUN_COLUMNS, messages=("prompt", "output"))
_FEEDBACK = _Table("feedback", FEEDBACK_COLUMNS, ("run_id",), ("correction",))
_COMPARISON = _Table("comparison", COMPARISON_COLUMNS, ("run_a", "run_b"))


def _insert(
    connection: sqlite3.Connection, home: Home, table: _Table, merged: Merged, tell: Progress
) -> Counts:
    """Insert the rows of a table that are new, in the order in which they were logged."""
    counts = Counts()
    (last,) = connection.execute(f"SELECT max(rowid) FROM other.{table.name}").fetchone()
    done = -(2**63)
    while last is not None and done < last:
        with transaction(connection):
            require_known_schema(connection, home)
            connection.execute("DELETE FROM batch")
            connection.execute(table.sort(), (done, BATCH))
            if table.messages:
                merged.messages += connection.execute(table.insert_messages()).rowcount
            newest = f"SELECT coalesce(max(rowid), 0) FROM main.{table.name}"
            (before,) = connection.execute(newest).fetchone()
            connection.execute(table.insert())
            seal(connection, table.name, after=before)
        (done,) = connection.execute("SELECT max(row) FROM batch").fetchone()
        for fate, count in connection.execute("SELECT fate, count(*) FROM batch GROUP BY fate"):
            setattr(counts, fate, getattr(counts, fate) + count)
        query = (
            f"SELECT {table.name}_id FROM other.{table.name} AS theirs JOIN batch"
            " WHERE theirs.rowid = row AND fate = 'conflicts' LIMIT ?"
        )
        room = NAMED - len(merged.conflicts)
        merged.conflicts += [
            {"table": table.name, "key": key} for (key,) in connection.execute(query, (room,))
        ]
        tell(table.name, done, last)
    return counts
