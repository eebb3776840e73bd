"""The file that takes what the database cannot, until it can.

Append-only, one line an entry: the hash of the rest, a space, JSON. A line is whole or known not to
be; one batch of them is one fsync. Processes take turns by a lock file. An entry that comes back
twice is stored once, since the store goes by ids, so that a crash anywhere loses nothing: what the
file held is only gone when the database has it. Entries have come through ``intake.py``: the file
holds no text that was to be redacted and no user's id. Knows nothing of SQLite and threads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import orjson

from agentpref.errors import AgentprefError, ForgottenUser, NotKept, RecordError
from agentpref.home import Home, sync
from agentpref.record.ingest.intake import Entry
from agentpref.record.messages import plain
from agentpref.record.rows import RunRow, relinked
from agentpref.types import Comparison, Feedback

BATCH = 1_000
"""Entries that are handed back at a time."""

LOCK_SECONDS = 10.0
"""How long a process waits for another one's turn with the file."""

_HASH_BYTES = 16

Outcomes: TypeAlias = "Sequence[RecordError | None]"


class Drained(NamedTuple):
    """What came of a spill: entries stored, entries the store refused, lines cut off by a crash."""

    stored: int
    refused: int
    torn: int


class Spill:
    """The spill of one home. Calls are safe from any thread and process."""

    def __init__(self, home: Home) -> None:
        self._path = home.spill
        self._refused = home.refused
        self._lock_path = home.path / "spill.lock"

    def waits(self) -> bool:
        """Say whether there is anything to drain."""
        try:
            return os.stat(self._path).st_size > 0
        except FileNotFoundError:
            return False

    def append(self, entries: Iterable[Entry]) -> None:
        """Put entries on disk, all or none; they are there when this returns.

        Raises:
            NotKept: the file cannot be written.
        """
        lines = b"".join(map(_encode, entries))
        with self._turn():
            _append(self._path, lines)

    def drain(self, store: Callable[[list[Entry]], Outcomes]) -> Drained:
        """Hand all entries to ``store`` and remove the file when it has them.

        What the store refuses for good is kept in a file of its own, for the operator to look at;
        but what is of somebody who was forgotten since is kept nowhere.

        Raises:
            NotKept: the file cannot be read or removed; or what ``store`` raises. Nothing is lost.
        """
        counts = [0, 0, 0]
        with self._turn():
            if not self.waits():
                return Drained(0, 0, 0)
            with open(self._path, "rb") as file:
                for batch in _batches(file):
                    for n, more in enumerate(self._hand_over(batch, store)):
                        counts[n] += more
            self._path.unlink()
        return Drained(*counts)

    def _hand_over(
        self, lines: Sequence[bytes], store: Callable[[list[Entry]], Outcomes]
    ) -> Drained:
        whole = [line for line in lines if is_whole(line)]
        entries = [_decode(line) for line in whole]
        outcomes = store([entry for entry in entries if entry is not None])
        rest = iter(outcomes)
        refused = [
            line
            for line, entry in zip(whole, entries, strict=True)
            if entry is None or not _is_settled(next(rest))
        ]
        if refused:
            _append(self._refused, b"".join(refused))
        stored = sum(error is None for error in outcomes)
        return Drained(stored, len(refused), len(lines) - len(whole))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        if not self._path.parent.is_dir():  # which the lock would make anew
            raise NotKept(f"{self._path.parent} is gone; make a home with `agentpref init`")
        try:
            with FileLock(self._lock_path, timeout=LOCK_SECONDS):
                yield
        except Timeout as error:
            raise NotKept(
                f"{self._path} is in the hands of another process for more than {LOCK_SECONDS:g} s;"
                " end that process, then try again"
            ) from error
        except AgentprefError:
            raise  # some of ours are OSErrors too
        except OSError as error:
            raise NotKept(
                f"{self._path} cannot be written ({error.strerror}); free space on its disk and "
                "let this user write the folder"
            ) from error


def is_whole(line: bytes) -> bool:
    """Say whether a line is as it was written, to its end."""
    mark, _, body = line.partition(b" ")
    return body.endswith(b"\n") and mark == _hash(body)


def _batches(file: IO[bytes]) -> Iterator[list[bytes]]:
    while batch := list(islice(file, BATCH)):
        yield [line for line in batch if line != b"\n"]


def _append(path: Path, lines: bytes) -> None:
    """Append and sync; where that fails, cut the file back to what it was."""
    is_new = not path.exists()
    with open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            _write_all(file, lines if _ends_a_line(file, end) else b"\n" + lines)
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if is_new:
        sync(path.parent)


def _ends_a_line(file: IO[bytes], end: int) -> bool:
    """A crash may have left half a line, which must not swallow the next one."""
    if end == 0:
        return True
    file.seek(end - 1)
    return file.read(1) == b"\n"


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _hash(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_HASH_BYTES).hexdigest().encode()


def _encode(entry: Entry) -> bytes:
    body = orjson.dumps(_as_json(entry), default=plain, option=orjson.OPT_APPEND_NEWLINE)
    return _hash(body) + b" " + body


def _as_json(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, RunRow):
        return {"run": [*entry[:-1]], "bodies": [node.body.decode() for node in entry.nodes]}
    return {type(entry).__name__.lower(): entry}  # orjson writes dataclasses by their fields


def _decode(line: bytes) -> Entry | None:
    """Read an entry; None for one that another version of agentpref, or a hand, has written."""
    try:
        said = orjson.loads(line.partition(b" ")[2])
        if "run" in said:
            return relinked(said["run"], said["bodies"])
        if "feedback" in said:
            return Feedback(**said["feedback"])
        return Comparison(**said["comparison"])
    except (KeyError, TypeError, ValueError):
        return None


def _is_settled(error: RecordError | None) -> bool:
    """Stored, or of somebody who is to leave no trace."""
    return error is None or isinstance(error, ForgottenUser)
