"""The outbox of a remote log: rows on the sender's disk until the collector has them.

New rows are appended to ``outbox.jsonl``, one line a row under its hash, as in the spill of a home.
What is being sent was renamed before: ``sending-<id>.jsonl``. So whoever records and whoever sends
never wait for each other, and a kill leaves whole files, which are sent again under the same ids.
``later.jsonl`` has judgements whose run the collector does not know yet, ``refused.jsonl`` the rows
that it refused for good, after those in ``refused-older.jsonl``; the oldest of them go in time.

Any number of processes may record to one outbox; one of them sends. That it does is a lock, which
the system releases when the process dies. All of them have one key: each holds the note ``target``
with a lock that they share, so that none with another key opens the outbox meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import orjson

from agentpref.errors import AgentprefError, ConfigError, InvalidMessage, NotKept, RecordError
from agentpref.home import make_private_folder, open_private, reading, sync, writing
from agentpref.record.database import warn
from agentpref.record.ingest import FromApp, Ingest
from agentpref.record.ingest.pseudonyms import AsGiven
from agentpref.record.ingest.redaction import Redact
from agentpref.record.messages import new_id, plain
from agentpref.record.rows import row_of
from agentpref.record.spill import append_lines, is_whole, marked, taking_turns

FILE_BYTES = 16 * 1024 * 1024
"""From how many bytes on rows go to a new file, so that a long outage makes no giant one."""

REFUSED_SHARE = 8
"""Refused rows go to a new file from ``FILE_BYTES`` on, or from this part of an outbox's limit."""

BATCH = 500
BATCH_BYTES = 4 * 1024 * 1024
"""How many rows, and bytes of them, one request carries at most; a single row may be larger."""

ROW_BYTES = 60 * 1024 * 1024
"""The most bytes of one row, so that a collector takes it."""


class Line(NamedTuple):
    """A row as a line of the outbox."""

    line: bytes
    is_run: bool
    user_id: None = None


class Lines:
    """Makes lines of what an app records: checked and redacted as by a log of a home.

    Users keep their ids: the home's key, which makes pseudonyms of them, is not on this machine.
    """

    def __init__(self, redact: Redact | None) -> None:
        self._ingest = Ingest("", AsGiven(), redact)

    def prepare(self, given: FromApp) -> Line:
        """Check and redact an entry; raises as ``Ingest.prepare`` does."""
        row = row_of(self._ingest.prepare(given))
        body = orjson.dumps(row, default=plain, option=orjson.OPT_APPEND_NEWLINE)
        if len(body) > ROW_BYTES:
            raise InvalidMessage(
                f"{row['type']} {row['id']!r} takes {len(body):,} bytes, more than the "
                f"{ROW_BYTES:,} that a collector takes; record a shorter conversation"
            )
        return Line(marked(body), row["type"] == "run")


class Outbox:
    """One outbox. Appending is safe from any thread and process; sending is one process's."""

    def __init__(self, folder: Path, target: str, limit_bytes: int) -> None:
        """Open an outbox, or make one.

        Args:
            folder: where it is.
            target: what tells this collector and its key from others.
            limit_bytes: from how many bytes on runs are dropped; judgements are not.

        Raises:
            ConfigError: rows for another target wait in it, or a log of another one has it open.
            NotKept: the folder cannot be made or written.
        """
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._new = folder / "outbox.jsonl"
        self._later = folder / "later.jsonl"
        self.refused = folder / "refused.jsonl"
        self._older = folder / "refused-older.jsonl"
        self._claim: int | None = None
        self._mark = hashlib.blake2b(target.encode(), digest_size=16).hexdigest().encode()
        self._make()
        self._aimed: int | None = self._aim()

    def _make(self) -> None:
        with writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            make_private_folder(self.folder)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.folder))

    def _aim(self) -> int:
        """Note where the rows go, and hold the note; return its descriptor.

        Refuse if rows wait for another key or place, or a log with another one is open: whoever
        sends would send the rows of both under its own key.
        """
        note = self.folder / "target"
        with taking_turns(self._new):
            descriptor = open_private(note)
            try:
                if (found := os.read(descriptor, 256).strip()) != self._mark:
                    self._require_free(descriptor, note, is_noted=bool(found))
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, self._mark + b"\n", 0)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def _require_free(self, descriptor: int, note: Path, *, is_noted: bool) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"a log with another url or key has {self.folder} open; give each key an outbox of "
                "its own (outbox=…), or close that log first"
            ) from None
        if is_noted and self.waits():
            raise ConfigError(
                f"rows for another url or key wait in {self.folder}; give each key an outbox "
                "of its own (outbox=…); if the url or key was changed, close the logs of the old "
                f"one, remove {note}, and the rows are sent with the new one"
            )

    def leave(self) -> None:
        """Let logs with another key open the outbox, when no rows wait."""
        if self._aimed is not None:
            descriptor, self._aimed = self._aimed, None
            os.close(descriptor)  # unlocking it would also unlock a forked child's

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the note in a block, also after :meth:`leave`: a thread may outlive its log."""
        descriptor = self._aim() if self._aimed is None else None
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    # For those who record

    def append(self, lines: Sequence[Line]) -> list[RecordError | None]:
        """Put lines on disk; return for each the error that refused it, or None."""
        self._make()
        with self._held(), taking_turns(self._new):
            is_full = self.size() > self._limit_bytes
            taken = [line for line in lines if not (is_full and line.is_run)]
            append_lines(self._new, b"".join(line.line for line in taken))
            if _size(self._new) > FILE_BYTES:
                self._rotate(self._new)
        full = NotKept(
            f"{self.folder} holds more than {self._limit_bytes:,} bytes that the collector has not "
            "taken, or has refused; see whether it runs, remove refused*.jsonl there, or raise "
            "outbox_bytes"
        )
        return [full if is_full and line.is_run else None for line in lines]

    def size(self) -> int:
        """How many bytes wait, or were refused."""
        return self._waiting() + _size(self.refused) + _size(self._older)

    def waits(self) -> bool:
        """Whether there is anything that the collector has not answered."""
        return self._waiting() > 0

    def _waiting(self) -> int:
        return sum(map(_size, (self._new, self._later, *self._sealed())))

    def seal(self) -> set[Path]:
        """The files that hold everything recorded until now, without what waits for its run."""
        if _size(self._new):
            with taking_turns(self._new):
                self._rotate(self._new)
        return {*self._sealed()}

    def problems(self) -> Iterator[tuple[Path, int]]:
        """The lines that are not as they were written, by file and number."""
        for path in (self._new, self._later, *self._sealed()):
            if _size(path):
                with reading(path) as file:
                    for number, line in enumerate(file, 1):
                        if not is_whole(line) and line != b"\n":
                            yield path, number

    # For the one who sends

    def claim(self) -> bool:
        """Become the one who sends; False while another process is."""
        if self._aimed is None:  # a flush may outlive its log
            self._make()
            self._aimed = self._aim()
        if self._claim is None:
            self._make()
            descriptor = os.open(self.folder / "send.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            self._claim = descriptor
        return True

    def release(self) -> None:
        """Let another process send."""
        if self._claim is not None:
            descriptor, self._claim = self._claim, None
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def disinherit(self) -> None:
        """In a forked child: leave the lock to the parent, whose it is."""
        if self._claim is not None:
            descriptor, self._claim = self._claim, None
            os.close(descriptor)  # unlocking it would unlock the parent's

    def ready(self, *, later: bool) -> list[Path]:
        """The files to send, oldest first; with ``later``, also what waited for its run."""
        if later and _size(self._later):
            with taking_turns(self._new):
                self._rotate(self._later)
        self.seal()
        return self._sealed()

    def torn(self, path: Path) -> list[bytes]:
        """The lines of a file that a crash cut off, or somebody edited."""
        with reading(path) as file:
            return [line for line in file if not is_whole(line) and line != b"\n"]

    def batches(self, path: Path) -> Iterator[list[bytes]]:
        """The rows of a file as JSON, in batches, without those that are torn."""
        batch: list[bytes] = []
        size = 0
        with reading(path) as file:
            while lines := list(islice(file, BATCH)):
                for line in filter(is_whole, lines):
                    body = line.partition(b" ")[2].rstrip(b"\n")
                    if batch and (len(batch) == BATCH or size + len(body) > BATCH_BYTES):
                        yield batch
                        batch, size = [], 0
                    batch.append(body)
                    size += len(body)
        if batch:
            yield batch

    def postpone(self, rows: Iterable[bytes]) -> None:
        """Keep rows until the run is known that they name."""
        self._keep(self._later, rows)

    def refuse(self, rows: Iterable[tuple[bytes, str]]) -> None:
        """Keep rows for the operator, each with the reason why the collector did not take it."""
        told = [orjson.dumps({"why": why, "row": row.decode(errors="replace")})
                for row, why in rows]  # fmt: skip
        if told:
            self._make_room()
            self._keep(self.refused, told)

    def _make_room(self) -> None:
        """Begin another file of refused rows when the last one is full; the one before goes."""
        full = min(FILE_BYTES, self._limit_bytes // REFUSED_SHARE)
        with taking_turns(self._new):
            if not 0 < _size(self.refused) >= full:
                return
            if _size(self._older):
                warn("%s is removed for newer ones: its rows were refused long ago", self._older)
            os.replace(self.refused, self._older)
            sync(self.folder)

    def done(self, path: Path) -> None:
        """Remove a file of which the collector has everything."""
        with writing(path):
            path.unlink(missing_ok=True)
            sync(self.folder)

    def _keep(self, path: Path, rows: Iterable[bytes]) -> None:
        if lines := b"".join(marked(row + b"\n") for row in rows):
            with taking_turns(self._new):
                append_lines(path, lines)

    def _rotate(self, path: Path) -> None:
        with writing(path):
            if _size(path):  # else another process was faster
                os.rename(path, self.folder / f"sending-{new_id()}.jsonl")
                sync(self.folder)

    def _sealed(self) -> list[Path]:
        return sorted(self.folder.glob("sending-*.jsonl"))


class Delivery:
    """Where the thread of a remote log writes: the outbox, and then it wakes the sender."""

    generation = 0
    trouble: AgentprefError | None = None

    def __init__(self, outbox: Outbox, wake: Callable[[], object]) -> None:
        self._outbox, self._wake = outbox, wake

    def write(
        self, records: Sequence[Line], generation: int | None = None
    ) -> list[RecordError | None]:
        """Put lines on disk; see :meth:`Outbox.append`."""
        outcomes = self._outbox.append(records) if records else []
        self._wake()
        return outcomes

    def waits(self) -> bool:
        """Nothing waits here: what is in the outbox is the sender's."""
        return False

    def recover(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """No file is open between two calls."""

    def abandon(self) -> None:
        """Nothing is inherited."""


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
