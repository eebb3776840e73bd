"""The database that a log keeps open, and whether it is still the one in the home.

A database that is open goes on taking rows when somebody removes, moves or replaces its file, and
nobody finds them. So the files are known by device and inode, which no other file can get while
this one is open, and are looked up by their path in every transaction. That takes 4 µs.

SQLite applies a write-ahead log to any database that it lies beside. When the database at the path
is no longer the open one, the log of the open one is written back to it and removed from the path.

SQLite trusts the two files beside an open database. A log that somebody cut would take changes that
nobody can read again, and a cut index, which is mapped into memory, ends the process. So the length
of both is looked at before each transaction. The index can be made anew, the log cannot.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import suppress
from typing import TypeAlias, cast

from agentpref.errors import CorruptHome, NotKept
from agentpref.home import RESTORE, Home
from agentpref.record.database import BUSY_SECONDS, REMOVED, connect, warn

_SETTINGS = (
    "PRAGMA temp_store = MEMORY",
    "PRAGMA cache_size = -8192",
    "PRAGMA wal_autocheckpoint = 4000",
)
"""Settings of a connection that writes what is logged; they halve the bytes of a batch.

A message's id is a hash, so each message changes another page of the index of ids. Until a
statement that inserts many rows ends, SQLite keeps a copy of each page that it changes, by default
in a temporary file. The copies fit into memory: the statement inserts at most 256 messages. The
cache (8 MB) holds what one batch changes. A page that changes often is copied from the WAL into the
database once per 4,000 pages of the WAL (32 MB on disk), not per 1,000; a commit that copies takes
some 15 ms.
"""

_REGION = 32 * 1024
"""SQLite maps the index in regions of this many bytes."""

_HEAD = 32
"""The bytes that a log begins with; SQLite changes them when it begins the log again."""

_Identity: TypeAlias = "tuple[int, int] | None"


class Displaced(NotKept):
    """The open database is not the one in the home any more; nothing was written."""


class OpenDatabase:
    """A home's database, open for writing while nobody moves it. Has one user at a time."""

    def __init__(self, home: Home) -> None:
        """Open the database; raises like ``connect``."""
        self._home = home
        self._path = str(home.database)
        self._wal = self._shm = ""
        self._patience = BUSY_SECONDS
        self._known = self._log = self._index = self._folder = cast(_Identity, None)
        self._size = self._log_size = self._index_size = 0
        self._log_head = b""
        self._connection: sqlite3.Connection | None = None
        self.generation = 0
        """Rises when the path gets another database: its users have other keys, its runs others."""
        self.open(BUSY_SECONDS)

    def open(self, patience: float) -> sqlite3.Connection:
        """Return the connection, which waits ``patience`` seconds for locks; open it if needed.

        Raises:
            NotKept: the database was removed or moved, or cannot be opened, or its log was cut.
            HomeError: this agentpref cannot use it.
        """
        if self._connection is None:
            self._size = self._log_size = self._index_size = 0
            self._connection = self._connected()
            self._patience = BUSY_SECONDS
        self._restore_index()
        self._require_whole(self._connection)
        self._require_whole_log(self._connection)
        if patience != self._patience:
            self._connection.execute(f"PRAGMA busy_timeout = {1000 * patience:.0f}")
            self._patience = patience
        return self._connection

    def require_folder(self) -> None:
        """Raise ``NotKept`` if the home is another folder, or gone: nobody would look there."""
        if _identity(str(self._home.path)) != self._folder:
            what = f"{self._home.path} was removed or moved while a log has it open"
            raise NotKept(f"{what}; {REMOVED.cure}") from _missing()

    def require_in_place(self) -> None:
        """Raise ``Displaced`` if the path leads to another file, or to none. Call it in writing."""
        if _identity(self._path) != self._known or _identity(self._wal) != self._log:
            raise Displaced(f"{self._home.database} was removed, moved or replaced")

    def let_go(self) -> None:
        """Close a displaced database, complete in its file, and clear the path of its log."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._restore_index()
        is_ours = _identity(self._path) == self._known
        log = _identity(self._wal)
        if log == self._log or (is_ours and log is None):
            with suppress(sqlite3.Error):  # without its log, the file has what it had before
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with suppress(sqlite3.Error):
            connection.close()
        if not is_ours:
            for path, known in ((self._wal, self._log), (self._shm, self._index)):
                if known is not None and _identity(path) == known:
                    os.unlink(path)

    def _restore_index(self) -> None:
        """Give a cut index its length back, without content: SQLite then makes it anew."""
        if _identity(self._shm) == self._index and self._index is not None:
            size = os.stat(self._shm).st_size
            if size < self._index_size or size % _REGION:
                os.truncate(self._shm, 0)
                os.truncate(self._shm, max(_REGION, self._index_size))
                warn("%s was cut while a log has it open; it is made anew", self._shm)
            self._index_size = max(size, self._index_size)

    def _require_whole(self, connection: sqlite3.Connection) -> None:
        """Raise ``CorruptHome`` if the database was cut; a removal makes it shorter, but whole."""
        if _identity(self._path) != self._known:
            return
        size = os.stat(self._path).st_size
        if size < self._size:
            query = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
            (needed,) = connection.execute(query).fetchone()
            if size < needed and connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                what = f"{self._home.database} was cut while a log has it open"
                raise CorruptHome(f"{what}; stop the app, then {RESTORE}")
        self._size = size

    def _require_whole_log(self, connection: sqlite3.Connection) -> None:
        """Raise ``NotKept`` if the log was cut: what is written to it now could not be read again.

        A removal empties it too, and then SQLite knows of no change in it, or begins it again.
        """
        if _identity(self._wal) != self._log or self._log is None:
            return  # not the log of this database: see ``require_in_place``
        with open(self._wal, "rb") as file:
            head, size = file.read(_HEAD), os.fstat(file.fileno()).st_size
        is_cut = size < self._log_size and head == self._log_head
        if size == 0 < self._log_size:
            try:
                (_, changes, _) = connection.execute("PRAGMA wal_checkpoint").fetchone()
            except sqlite3.OperationalError:
                changes = 1
            is_cut = changes > 0
        if is_cut:
            raise NotKept(
                f"{self._wal} was cut while a log has it open, so changes are lost; stop the app, "
                "restore a backup of the home beside its spill.jsonl, then start again"
            )
        self._log_head, self._log_size = head, size

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        if self._connection is not None:
            self._restore_index()
            try:
                self.require_in_place()
            except Displaced:
                self.let_go()
            else:  # first forgotten: an exception of a signal handler may come in between
                connection, self._connection = self._connection, None
                connection.close()

    def _connected(self) -> sqlite3.Connection:
        before, found = self._known, _identity(self._path)
        if found is None and before is not None:
            what = f"{self._home.database} was removed or moved while a log has it open"
            raise NotKept(f"{what}; {REMOVED.cure}") from _missing()
        while True:
            connection = connect(self._home)
            for setting in _SETTINGS:
                connection.execute(setting)
            connection.execute("SELECT 1 FROM migration LIMIT 1").fetchone()  # makes the log
            opened, found = found, _identity(self._path)
            if opened == found:
                break
            connection.close()  # replaced while it was being opened
        self._known = found
        real = os.path.realpath(self._path)  # if it is a link, SQLite's files lie where it leads
        self._wal, self._shm = real + "-wal", real + "-shm"
        self._log, self._index = _identity(self._wal), _identity(self._shm)
        self._folder = _identity(str(self._home.path))
        if before is not None and before != found:
            self.generation += 1
            warn(
                "%s was replaced while a log had it open; runs and feedback go to the new one, and "
                "what the old one holds stays there",
                self._home.database,
            )
        return connection


def _missing() -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _identity(path: str) -> _Identity:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino
