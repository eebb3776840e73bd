"""Puts records on disk, whatever the state of the database.

:class:`DurableWriter` tries the database first. While that is locked, full or otherwise in trouble,
records go to the spill, a file of the home, and from there to the database before any later ones.

The spill is append-only, one line a record: the hash of the rest, a space, JSON. So a line that is
cut off is recognised. One batch of lines is one fsync, and processes take turns by a lock file. The
store ignores ids that it has, and the file is removed only after the database has its records, so
a crash at any moment loses nothing and stores nothing twice. Records came through ``ingest``: the
file holds no text that was to be redacted and no user's own id.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import orjson

from agentpref.errors import AgentprefError, ForgottenUser, HomeError, NotKept, RecordError
from agentpref.home import Home, open_private, reading, sync, writing
from agentpref.record.database import (
    locked,
    require_known_schema,
    transaction,
    translated,
    warn,
)
from agentpref.record.messages import Linker, Node, RunRow, StoredRecord, plain
from agentpref.record.opened import Displaced, OpenDatabase
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback

PATIENCE_SECONDS = 2.0
"""How long a record waits for a lock of the database before it goes to the spill."""

REST_SECONDS = 1.0
"""How long a database in trouble is left alone; then it is tried without waiting for locks."""

BATCH = 1_000
"""How many records of the spill are written to the database at a time."""

LOCK_SECONDS = 10.0
"""How long a process waits for its turn with the spill."""

Outcomes: TypeAlias = "Sequence[RecordError | None]"


class Drained(NamedTuple):
    """What became of a spill: how many records were stored and refused, and how many lines torn."""

    stored: int
    refused: int
    torn: int


class AnotherDatabase(NotKept):
    """The home has another database now, which knows its users under other names."""


_inherited: list[OpenDatabase] = []
"""Keeps the connections of parents from being collected, and so closed."""


class DurableWriter:
    """Writes records to one home. Owns a connection; has one user at a time.

    Opening and draining raise ``HomeError`` if this agentpref must not write the database, and
    ``NotKept`` if the database cannot be written. Nothing is lost.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._spill = Spill(home)
        self._database = OpenDatabase(home)
        self._rest_until = 0.0
        self._is_said = False
        self._is_inherited = False
        self.trouble: AgentprefError | None = None
        """What keeps the database from taking records, while something does."""

    @property
    def generation(self) -> int:
        """Which database is open: another number after the path has got another database."""
        return self._database.generation

    def write(self, records: Sequence[StoredRecord], generation: int | None = None) -> Outcomes:
        """Put records on disk; return for each the error that refused it, or None.

        The spill refuses nothing: only the database knows whether a run exists that feedback names.

        Raises:
            AnotherDatabase: the records were made for another ``generation``; make them anew.
            NotKept: neither the database nor the spill can take them; none of them is on disk.
        """
        if not self._is_inherited and (
            self.trouble is None or time.monotonic() >= self._rest_until
        ):
            try:
                return self._to_database(records, generation)
            except AnotherDatabase:
                raise
            except (NotKept, HomeError) as trouble:
                self._rest(trouble)
        try:
            self._database.require_folder()
            self._spill.append(records)
        except NotKept:
            self._rest_until = 0.0  # who has nothing at all rests by itself, and then tries both
            raise
        if not self._is_said:
            self._is_said = True
            what = "%s. Until then, runs and feedback go to %s"
            warn(what, self.trouble, self._home.spill)
        return [None] * len(records)

    def waits(self) -> bool:
        """Return whether the spill has records that the database could not take."""
        return self.trouble is not None and not self._is_inherited and self._spill.waits()

    def recover(self) -> None:
        """Try to bring the spill to the database; without success, it keeps waiting."""
        try:
            self._to_database([])
        except (NotKept, HomeError) as trouble:
            self._rest(trouble)

    def drain(self) -> Drained:
        """Write the spill to the database."""
        return self._spill.drain(self._store)

    def close(self) -> None:
        """Close the connection; the next record opens it again."""
        if not self._is_inherited:
            self._database.close()

    def abandon(self) -> None:
        """Leave the database alone in this process, and give all records to the spill.

        For a child that was forked while the connection was open, or in the middle of a call:
        SQLite's own locks are then the parent's, and even closing is not safe.
        """
        _inherited.append(self._database)
        self._is_inherited = True
        self.trouble = NotKept(
            "this process was forked while its parent wrote to the database, because a signal "
            "handler raised an exception; open the log in the process that uses it"
        )

    def _rest(self, trouble: AgentprefError) -> None:
        self.trouble = trouble
        self._rest_until = time.monotonic() + REST_SECONDS

    def _to_database(
        self, records: Sequence[StoredRecord], generation: int | None = None
    ) -> Outcomes:
        if self._spill.waits():
            _report(self._home, self.drain())
        outcomes = self._store(records, generation)
        if self.trouble is not None:
            self.trouble, self._is_said = None, False
            warn("%s takes runs and feedback again", self._home.database)
        return outcomes

    def _store(self, records: Sequence[StoredRecord], generation: int | None = None) -> Outcomes:
        """Store records in one transaction; one that breaks the schema's rules is refused alone."""
        patience = PATIENCE_SECONDS if self.trouble is None else 0.0
        try:
            while True:
                with translated(self._home):
                    connection = self._database.open(patience)
                    if generation not in (None, self.generation):
                        raise AnotherDatabase(f"{self._home.database} is another database now")
                    try:
                        return self._transact(connection, records)
                    except Displaced:
                        self._database.let_go()
        except sqlite3.IntegrityError as error:
            if len(records) > 1:
                one_by_one = ([record] for record in records)
                return [each for one in one_by_one for each in self._store(one, generation)]
            refusal = NotKept(f"{self._home.database} refused a record: {error}; please report it")
            refusal.__cause__ = error
            return [refusal]

    def _transact(
        self, connection: sqlite3.Connection, records: Sequence[StoredRecord]
    ) -> Outcomes:
        store = Store(connection)
        with transaction(connection):
            self._database.require_in_place()
            require_known_schema(connection, self._home)
            # Runs come first: in a spill, feedback may come before its run.
            runs = [record for record in records if isinstance(record, RunRow)]
            refused = iter(store.add_runs(runs) if runs else ())
            outcomes = [
                next(refused) if isinstance(record, RunRow) else _judge(store, record)
                for record in records
            ]
            self._database.require_in_place()
        return outcomes


def drain(home: Home) -> Drained:
    """Write a home's spill to its database; see :meth:`DurableWriter.drain`."""
    if not Spill(home).waits():
        return Drained(0, 0, 0)
    with closing(DurableWriter(home)) as writer:
        return writer.drain()


def _judge(store: Store, judgement: Feedback | Comparison) -> RecordError | None:
    """Store a judgement; return its refusal, which does not stop the rest of the batch."""
    try:
        if isinstance(judgement, Feedback):
            store.add_feedback(judgement)
        else:
            store.add_comparison(judgement)
    except RecordError as refusal:
        return refusal
    return None


def _report(home: Home, drained: Drained) -> None:
    import logging  # takes 10 ms: only when needed

    what = "%s: %d entries went to the database"
    logging.getLogger("agentpref").info(what, home.spill, drained.stored)
    if drained.refused:
        what = "%d entries of %s name a run that is not here, or repeat one; they are kept in %s"
        warn(what, drained.refused, home.spill, home.refused)
    if drained.torn:
        what = (
            "%d lines of %s are not whole: a crash cut them off before they were acknowledged, or "
            "somebody edited the file; they are kept in %s"
        )
        warn(what, drained.torn, home.spill, home.refused)


class Spill:
    """The spill of one home. Calls are safe from any thread and process."""

    def __init__(self, home: Home) -> None:
        self._path = home.spill
        self._refused = home.refused

    def waits(self) -> bool:
        """Return whether there is anything to drain."""
        try:
            return os.stat(self._path).st_size > 0
        except FileNotFoundError:
            return False

    def append(self, records: Iterable[StoredRecord]) -> None:
        """Put records on disk, all or none; ``NotKept`` if the file cannot be written."""
        lines = b"".join(map(_encode, records))
        with taking_turns(self._path):
            append_lines(self._path, lines)

    def drain(self, store: Callable[[list[StoredRecord]], Outcomes]) -> Drained:
        """Hand all records to ``store``, and remove the file when it has them.

        What the store refuses for good, and lines that are not whole, go to the file
        ``refused.jsonl`` for the operator, except records of a user who was forgotten: these are
        dropped.

        Raises:
            NotKept: the file cannot be read or removed, or what ``store`` raises. Nothing is lost.
        """
        parts = [Drained(0, 0, 0)]
        with taking_turns(self._path):
            if self.waits():
                with reading(self._path) as file:
                    while batch := list(islice(file, BATCH)):
                        lines = [line for line in batch if line != b"\n"]
                        parts.append(self._hand_over(lines, store))
                self._path.unlink()
        return Drained(*map(sum, zip(*parts, strict=True)))

    def _hand_over(
        self, lines: Sequence[bytes], store: Callable[[list[StoredRecord]], Outcomes]
    ) -> Drained:
        whole = [line for line in lines if is_whole(line)]
        torn = [line for line in lines if not is_whole(line)]
        records = [_decode(line) for line in whole]
        outcomes = store([record for record in records if record is not None])
        rest = iter(outcomes)
        refused = [
            line
            for line, record in zip(whole, records, strict=True)
            if record is None or not isinstance(next(rest), ForgottenUser | None)
        ]
        if refused or torn:
            append_lines(self._refused, b"".join([*refused, *torn]))  # the last may lack its end
        stored = sum(error is None for error in outcomes)
        return Drained(stored, len(refused), len(torn))


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Write a file of the spill in a block, while no other process does; else raise ``NotKept``."""
    home = path.parent
    if not home.is_dir():  # the lock would make it again
        raise NotKept(f"{home} no longer exists; make a home with `agentpref init`")
    refusal = NotKept(
        f"{path} is locked by another process for more than {LOCK_SECONDS:g} s; end that process, "
        "then try again"
    )
    with writing(path), locked(home / "spill.lock", refusal, seconds=LOCK_SECONDS):
        yield


def is_whole(line: bytes) -> bool:
    """Return whether a line is as it was written, to its end."""
    mark, _, body = line.partition(b" ")
    return body.endswith(b"\n") and mark == _hash(body)


def append_lines(path: Path, lines: bytes) -> None:
    """Append and sync; if that fails, cut the file back to what it was."""
    is_new = not path.exists()
    with open(path, "a+b", buffering=0, opener=open_private) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a crash left half a line
                    lines = b"\n" + lines
            rest = memoryview(lines)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if is_new:
        sync(path.parent)


def marked(body: bytes) -> bytes:
    """A line of this body, which ends with a newline, under its hash."""
    return _hash(body) + b" " + body


def _hash(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).hexdigest().encode()


def _encode(record: StoredRecord) -> bytes:
    if isinstance(record, RunRow):
        bodies = [node.body.decode() for node in record.nodes]
        content: dict[str, Any] = {"run": [*record[:-1]], "bodies": bodies}
    else:
        content = {type(record).__name__.lower(): record}  # orjson writes dataclasses by fields
    body = orjson.dumps(content, default=plain, option=orjson.OPT_APPEND_NEWLINE)
    return marked(body)


def _decode(line: bytes) -> StoredRecord | None:
    """Read a record; None if this version of agentpref did not write it."""
    try:
        content = orjson.loads(line.partition(b" ")[2])
        if "run" in content:
            linker = Linker()
            nodes: list[Node] = []
            for body in content["bodies"]:
                nodes.append(linker.child(nodes[-1].id if nodes else None, orjson.loads(body)))
            return RunRow._make((*content["run"], tuple(nodes)))
        if "feedback" in content:
            return Feedback(**content["feedback"])
        return Comparison(**content["comparison"])
    except (KeyError, TypeError, ValueError):
        return None
