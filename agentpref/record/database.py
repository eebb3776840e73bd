"""The database of a home: opening it at the schema of this version, writing to it, locking it.

A connection has the same settings everywhere and an up-to-date schema. It stays in autocommit until
:func:`transaction` opens a transaction. :func:`translated` turns SQLite's errors into agentpref's.

``PRAGMA user_version`` holds the version of the last breaking step that a database went through;
a program that does not know that step must not use the database. The table ``migration`` lists all
steps that were applied.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from agentpref.errors import (
    AgentprefError,
    CorruptHome,
    NewerHome,
    NotAHome,
    NotKept,
    UpdateRunning,
)
from agentpref.home import RESTORE, Home, is_of_system, open_private, tighten, writing
from agentpref.owners import access_cure, is_locked_out, join_group
from agentpref.record.connection import connection_to
from agentpref.record.migrations import STEPS
from agentpref.record.steps import MIGRATION

BUSY_SECONDS = 30.0
"""How long a connection waits for another one's lock."""

_WORKING_BYTES = 128 * 1024
"""How much room SQLite needs to open a database: 32 kB for the shared file, and some pages."""

PAGE_BYTES = 8192
"""The page of a new database: 1 kB messages fill it to 83 %, SQLite's 4096 to 76 %."""


class Trouble(NamedTuple):
    """One way in which SQLite fails that is not the caller's mistake."""

    reason: str
    error: type[AgentprefError]
    cure: str


_LOCKED = Trouble("locked", NotKept, "end the process that holds the database, then try again")
_CORRUPT = Trouble("corrupt", CorruptHome, RESTORE)
_FULL = Trouble("full", NotKept, "free space on its disk, then try again")
REMOVED = Trouble(
    "removed", NotKept, "put it back, or stop the app and restore a backup, then try again"
)

_NOT_DECODED = "Could not decode to UTF-8"

TROUBLES: dict[str, Trouble] = {
    "is locked": _LOCKED,
    "is full": _FULL,
    "readonly database": Trouble("read-only", NotKept, "let this user write the folder"),
    "unable to open": Trouble("unopenable", NotKept, "let this user read and write the folder"),
    "disk I/O error": Trouble("disk", NotKept, "check the disk and that the folder still exists"),
    "not a database": _CORRUPT,
    "unsupported file format": _CORRUPT,
    _NOT_DECODED: _CORRUPT,
    "malformed": _CORRUPT,
    "no such table": _CORRUPT,
    "no such column": _CORRUPT,
    "already exists": _CORRUPT,  # the list of steps is not what was applied
    "duplicate column": _CORRUPT,
}
"""What SQLite's messages mean (Python 3.10 gives no error code)."""


def diagnose(error: BaseException | None, home: Home | None = None) -> Trouble | None:
    """Say which trouble of the database an error means; None if it means none of them.

    SQLite calls a full disk an I/O error where it makes or grows the file beside the database that
    its processes share. With ``home``, its disk is looked at too.
    """
    if isinstance(error, OSError):
        return _SYSTEM_TROUBLES.get(error.errno or 0)
    if not isinstance(error, sqlite3.Error):
        return None
    message = str(error)
    found = next((trouble for part, trouble in TROUBLES.items() if part in message), None)
    is_of_the_disk = found is not None and found.reason in ("disk", "unopenable")
    return _FULL if is_of_the_disk and home is not None and _is_full(home.path) else found


_SYSTEM_TROUBLES = {
    errno.ENOENT: REMOVED,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: TROUBLES["readonly database"],
}


def _is_full(folder: Path) -> bool:
    """Whether the disk of a folder has no room for what SQLite makes beside a database."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        if not is_of_system(error):
            raise
        return False
    has_files = disk.f_files == 0 or disk.f_favail > 0
    return disk.f_bavail * disk.f_frsize < _WORKING_BYTES or not has_files


@contextmanager
def translated(home: Home) -> Iterator[None]:
    """Raise SQLite's errors as ``CorruptHome`` or ``NotKept``, with the file and the cure.

    Errors that only a bug of agentpref can cause (bad SQL, a broken constraint) pass unchanged.
    """
    try:
        yield
    except sqlite3.Error as error:
        trouble = diagnose(error, home)
        if trouble is None:
            raise
        if _NOT_DECODED in str(error):  # it quotes the text, which may be anybody's
            raise CorruptHome(f"{home.database}: a text in it is not UTF-8; {RESTORE}") from None
        may_be_closed = trouble.reason in ("unopenable", "read-only")
        places = (*home.database_files, home.path) if may_be_closed else ()
        closed = next(filter(is_locked_out, places), None)
        place = closed if closed in home.database_files else home.database
        cure = trouble.cure if closed is None else access_cure(closed)
        raise trouble.error(f"{place}: {error}; {cure}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:  # damage that SQLite does not see
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise CorruptHome(f"{home.database}: a text in it is not {kind}; {RESTORE}") from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock for a block, and commit all of it or nothing.

    If a transaction is open already, the block joins it.
    """
    is_joined = connection.in_transaction
    if is_joined:
        yield
    else:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:  # after a full disk or an I/O error SQLite rolls back
                connection.execute("ROLLBACK")


def connect(home: Home, *, readonly: bool = False) -> sqlite3.Connection:
    """Open a home's database and bring its schema up to date.

    The connection may move from thread to thread, but has one user at a time. With ``readonly`` it
    refuses every write once the schema is up to date, and a full disk or a folder that this user
    may not write is no obstacle.

    Raises:
        NotAHome: there is no database, or it is another program's.
        CorruptHome: the file is not a SQLite database, or a damaged one, or it is lost.
        NewerHome: a later agentpref changed the schema in a way that this one cannot use.
        NotKept: the file cannot be opened, or stays locked.
    """
    home.require_database()
    try:
        with translated(home), ExitStack() as on_failure:
            for path in home.database_files:  # SQLite makes two of them with the database's mode
                tighten(path)
            connection = connection_to(home, home.database, BUSY_SECONDS)
            on_failure.callback(connection.close)
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            _migrate(connection, home)
            for end in ("-wal", "-shm"):  # which SQLite gives to nobody
                join_group(home.path / f"{home.database.name}{end}")
            if readonly:
                connection.execute("PRAGMA query_only = ON")
            on_failure.pop_all()
        return connection
    except NotKept as error:
        trouble = diagnose(error.__cause__, home)
        if not readonly or trouble is None or trouble is _LOCKED:
            raise
        return _connect_without_writing(home, error)


def _connect_without_writing(home: Home, why: NotKept) -> sqlite3.Connection:
    """Open a database where SQLite cannot make the files that its readers share.

    While there is a log of changes, these files must be there too. While there is none, nobody has
    the database open, and it is read as a file that does not change: who starts to write to it
    meanwhile is not seen.
    """
    log = home.database.with_name(home.database.name + "-wal")
    has_log = log.exists() and log.stat().st_size > 0
    place = f"{home.database.as_uri()}?mode=ro{'' if has_log else '&immutable=1'}"
    with ExitStack() as on_failure:
        try:
            connection = connection_to(home, place, BUSY_SECONDS, uri=True)
            on_failure.callback(connection.close)
            connection.execute("PRAGMA query_only = ON")
            connection.execute("PRAGMA temp_store = MEMORY")
            version = _version(connection, home)
        except sqlite3.Error:
            raise why from why.__cause__
        if version < len(STEPS):  # its tables are not those that are read here
            raise why
        require_known_schema(connection, home)
        on_failure.pop_all()
    return connection


def require_known_schema(connection: sqlite3.Connection, home: Home) -> None:
    """Raise ``NewerHome`` if the database went through a breaking step that is not known here.

    ``connect`` calls this. A writer that stays open calls it again in every transaction, because a
    newer agentpref may have changed the home meanwhile. It costs a microsecond.
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
        _warn_of_newer(home, version)


@functools.cache
def _warn_of_newer(home: Home, version: int) -> None:
    """Warn once in a process that a home is ahead of it."""
    warn(
        "%s has schema %d, this agentpref knows %d and leaves the rest alone; upgrade with "
        "`pip install --upgrade agentpref`",
        home.database,
        version,
        len(STEPS),
    )


def warn(message: str, *values: object) -> None:
    """Log a warning to the logger ``agentpref``."""
    import logging  # takes 10 ms: only when needed

    logging.getLogger("agentpref").warning(message, *values)


def _version(connection: sqlite3.Connection, home: Home) -> int:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if "migration" in tables:
        query = "SELECT coalesce(max(version), 0) FROM migration"
        (version,) = connection.execute(query).fetchone()
        return int(version)
    if tables:
        raise NotAHome(
            f"{home.database} is another program's database (it holds {min(tables)!r}); "
            "choose an empty or a new folder"
        )
    return 0


def _apply_next(connection: sqlite3.Connection, home: Home) -> bool:
    """Apply one missing step and record it; return whether there was one.

    The version is read under the write lock, because other processes may be doing the same.
    """
    with transaction(connection):
        step = next(iter(STEPS[_version(connection, home) :]), None)
        if step is not None:
            if step.version == 1 and (beside := home.made_later()) is not None:
                raise CorruptHome(
                    f"{home.database} has no tables, but {beside} is there: the home has lost what "
                    f"it held; {RESTORE}"
                )
            connection.execute(MIGRATION)
            step.change(connection)
            connection.execute(
                "INSERT INTO migration (version, name, applied_at) VALUES (?, ?, ?)",
                (step.version, step.name, time.time()),
            )
            if step.breaking:
                connection.execute(f"PRAGMA user_version = {step.version}")
    return step is not None


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging; SQLite does not wait for this lock by itself."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if diagnose(error) is not _LOCKED or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


# Inserting many rows with few statements
#
# Python releases the interpreter's lock for every statement, and a busy app takes up to 5 ms (the
# switch interval) to give it back. Row by row, a thread that computes would starve the thread that
# writes. So rows are inserted by hundreds, with many VALUES in one statement.

MAX_PARAMETERS = 900
"""How many values one statement binds at most; every build of SQLite allows 999."""


def insert_or_ignore(
    connection: sqlite3.Connection,
    table: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
) -> int:
    """Insert rows in their order, and count them; a row whose key is taken changes nothing."""
    start = inserted = 0
    while start < len(rows):
        most = min(len(rows) - start, MAX_PARAMETERS // len(columns))
        count = 1 << (most.bit_length() - 1)  # a power of two: few sizes, reused statements
        values = tuple(chain.from_iterable(rows[start : start + count]))
        inserted += connection.execute(statement(table, tuple(columns), count), values).rowcount
        start += count
    return inserted


@functools.lru_cache(maxsize=64)
def statement(table: str, columns: tuple[str, ...], count: int = 1) -> str:
    """Write the statement that inserts ``count`` rows and ignores those whose key is taken."""
    row = f"({', '.join('?' * len(columns))})"
    return f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES {', '.join([row] * count)}"


def exclusive(home: Home) -> AbstractContextManager[None]:
    """Lock a home for one update or one removal; recording continues meanwhile.

    An update reads the record, trains for minutes and then publishes: text that is removed
    meanwhile would come back in its weights. If another process has the lock, this raises
    ``UpdateRunning`` and does not wait.
    """
    what = f"another update of {home.path}, or a removal from it, is running"
    refusal = UpdateRunning(f"{what}; wait for it to end, then try again")
    return locked(home.path / "update.lock", refusal)


@contextmanager
def locked(path: Path, refusal: AgentprefError, *, seconds: float = 0) -> Iterator[None]:
    """Hold a lock file for a block; raise ``refusal`` if another process keeps it for longer.

    The system releases the lock when the process dies.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with writing(path):  # a disk that is full or read-only has another cure than a foreign lock
        try:
            os.close(open_private(path))
            lock.acquire(timeout=seconds)
        except Timeout as error:
            raise refusal from error
        except PermissionError as error:
            why = f"{error.strerror}); {access_cure(path)}"
            raise NotKept(f"{path} cannot be locked ({why}") from error
    try:
        yield
    finally:
        lock.release()
