"""Opening the database of a home, at the schema this version knows.

Sets what every connection needs, brings an older schema up to date, refuses a newer one that breaks
with this one, and turns SQLite's errors into ours. Knows nothing of runs or feedback. Transactions
are explicit: a connection stays in autocommit until :func:`transaction` opens one.

``PRAGMA user_version`` holds the last breaking step of a database: what a program must know to use
it. All steps that were applied are in the table ``migration``.
"""

from __future__ import annotations

import functools
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from agentpref.errors import AgentprefError, CorruptHome, NewerHome, NotAHome, NotKept
from agentpref.home import Home
from agentpref.record.migrations import STEPS, Step

BUSY_SECONDS = 30.0
"""How long a connection waits for a lock that another one holds."""

PAGE_BYTES = 8192
"""The page of a new database: 1 kB messages fill it to 83 %, SQLite's 4096 to 76 %."""


class Trouble(NamedTuple):
    """One way in which SQLite fails through no fault of the caller's."""

    reason: str
    error: type[AgentprefError]
    cure: str


_RESTORE = "restore a backup, or move the file away and start a new home"
_LOCKED = Trouble("locked", NotKept, "end the process that holds the database, then try again")
_CORRUPT = Trouble("corrupt", CorruptHome, _RESTORE)

TROUBLES: dict[str, Trouble] = {
    "is locked": _LOCKED,
    "is full": Trouble("full", NotKept, "free space on its disk, then try again"),
    "readonly database": Trouble("read-only", NotKept, "let this user write the folder"),
    "unable to open": Trouble("unopenable", NotKept, "let this user read and write the folder"),
    "disk I/O error": Trouble("disk", NotKept, "check the disk and that the folder still exists"),
    "not a database": _CORRUPT,
    "malformed": _CORRUPT,
    "no such table": _CORRUPT,
    "no such column": _CORRUPT,
}
"""SQLite's words (Python 3.10 gives no error code) and what is meant by them."""


def diagnose(error: sqlite3.Error) -> Trouble | None:
    """Say what went wrong, or None where the error is a mistake in our own SQL."""
    words = str(error)
    return next((trouble for part, trouble in TROUBLES.items() if part in words), None)


def translation(home: Home, error: sqlite3.Error) -> AgentprefError | None:
    """Say SQLite's error as one of ours, naming the file and the cure; None as in ``diagnose``."""
    trouble = diagnose(error)
    if trouble is None:
        return None
    return trouble.error(f"{home.database}: {error}; {trouble.cure}")


@contextmanager
def translated(home: Home) -> Iterator[None]:
    """Raise SQLite's errors as ours: ``CorruptHome`` or ``NotKept``.

    Errors that only a mistake of ours can cause (bad SQL, a broken constraint) pass unchanged.
    """
    try:
        yield
    except sqlite3.Error as error:
        ours = translation(home, error)
        if ours is None:
            raise
        raise ours from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock for a block: all of it is committed, or none.

    Inside a transaction that is already open, the block joins it.
    """
    if connection.in_transaction:
        yield
    else:
        connection.execute("BEGIN IMMEDIATE")
        with ExitStack() as on_failure:
            on_failure.callback(_roll_back, connection)
            yield
            connection.execute("COMMIT")
            on_failure.pop_all()


def _roll_back(connection: sqlite3.Connection) -> None:
    """Undo what is open; SQLite has done so itself after a full disk or an I/O error."""
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def connect(home: Home, *, readonly: bool = False) -> sqlite3.Connection:
    """Open a home's database and bring its schema up to date.

    The connection may be handed from thread to thread, but has one user at a time. ``readonly``
    refuses every write after the schema is known to be current.

    Raises:
        NotAHome: there is no database, or it is another program's.
        CorruptHome: the file is no SQLite database, or a damaged one.
        NewerHome: the schema is of a later agentpref, and breaks with this one's.
        NotKept: the file cannot be opened, or stays locked.
    """
    if not home.database.is_file():
        raise NotAHome(f"{home.database} does not exist; make the home with `agentpref init`")
    with translated(home), ExitStack() as on_failure:
        connection = sqlite3.connect(
            home.database, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        on_failure.callback(connection.close)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        _migrate(connection, home)
        if readonly:
            connection.execute("PRAGMA query_only = ON")
        on_failure.pop_all()
    return connection


def require_known_schema(connection: sqlite3.Connection, home: Home) -> None:
    """Refuse a schema that breaks with the one this agentpref knows.

    ``connect`` has asked already; a writer that stays open asks again in every transaction, since a
    newer agentpref may have come to the home meanwhile. It costs a microsecond.

    Raises:
        NewerHome: a breaking step was applied that is not among ours.
    """
    (needed,) = connection.execute("PRAGMA user_version").fetchone()
    if needed > len(STEPS):
        raise NewerHome(
            f"{home.database} needs an agentpref that knows schema {needed}, this one knows "
            f"{len(STEPS)}; upgrade with `pip install --upgrade agentpref`, then start again"
        )


def _migrate(connection: sqlite3.Connection, home: Home) -> None:
    version = _version(connection, home)
    if version < len(STEPS):
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        _use_wal(connection)
        while _apply_next(connection, home):
            pass
    require_known_schema(connection, home)
    if version > len(STEPS):
        _warn_of_newer(home, version, len(STEPS))


@functools.cache
def _warn_of_newer(home: Home, version: int, known: int) -> None:
    """Say once in a process that a home is ahead of it."""
    import logging  # 10 ms, which a home of our own schema never costs

    logging.getLogger("agentpref").warning(
        "%s has schema %d, this agentpref knows %d and leaves the rest alone; upgrade with "
        "`pip install --upgrade agentpref`",
        home.database,
        version,
        known,
    )


def _version(connection: sqlite3.Connection, home: Home) -> int:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if "migration" in tables:
        (version,) = connection.execute(
            "SELECT coalesce(max(version), 0) FROM migration"
        ).fetchone()
        return int(version)
    if tables:
        raise NotAHome(
            f"{home.database} is another program's database (it holds {min(tables)!r}); "
            "choose an empty or a new folder"
        )
    return 0


def _apply_next(connection: sqlite3.Connection, home: Home) -> bool:
    """Apply one missing step with the record of it; say whether there was one.

    Which one is read under the write lock: other processes may be doing the same.
    """
    with transaction(connection):
        step = next(iter(STEPS[_version(connection, home) :]), None)
        if step is not None:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS migration "
                "(version INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at REAL NOT NULL)"
            )
            _apply(connection, step)
    return step is not None


def _apply(connection: sqlite3.Connection, step: Step) -> None:
    step.change(connection)
    connection.execute(
        "INSERT INTO migration (version, name, applied_at) VALUES (?, ?, ?)",
        (step.version, step.name, time.time()),
    )
    if step.breaking:
        connection.execute(f"PRAGMA user_version = {step.version}")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging; SQLite does not wait for this lock by itself."""
    deadline = time.monotonic() + BUSY_SECONDS
    while not _wal_taken(connection, last_try=time.monotonic() > deadline):
        time.sleep(0.01)


def _wal_taken(connection: sqlite3.Connection, *, last_try: bool) -> bool:
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if diagnose(error) is not _LOCKED or last_try:
            raise
        return False
    return True
