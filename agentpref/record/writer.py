"""The background thread that puts what is logged on disk.

Runs are queued and written some at a time, in one transaction; a caller that waits (for feedback,
for a flush) shortens the pause before the next batch and gets its own answer. What cannot be kept
is counted by reason and said once. A writer owns one connection and lends it to nobody; around a
fork it is closed, since SQLite's locks do not survive one.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import TypeAlias

from agentpref.errors import AgentprefError, LogClosed, NotKept, RecordError
from agentpref.record.database import connect, diagnose, transaction, translated
from agentpref.record.forks import at_child_exit, guard
from agentpref.record.home import Home
from agentpref.record.snapshot import Snapshot
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback

BATCH = 1_000
"""Entries in one transaction at most."""

LINGER_SECONDS = 0.05
"""How long a run may wait in the queue for others to share its transaction."""

_PATIENCE_SECONDS = 1.0
"""How often a caller that waits looks whether there still is somebody to wait for."""

Entry: TypeAlias = "Snapshot | Feedback | Comparison"


class _Ticket:
    """An entry whose caller waits for the outcome; without an entry, it waits for its turn."""

    __slots__ = ("done", "entry", "error")

    def __init__(self, entry: Entry | None) -> None:
        self.entry = entry
        self.error: AgentprefError | None = None
        self.done = threading.Event()


class Writer:
    """Writes to one home, from one thread, for as many callers as there are."""

    def __init__(self, home: Home, *, limit: int) -> None:
        """Open the home's database; at most ``limit`` entries wait in the queue.

        Raises:
            HomeError: the database is not ours to write.
        """
        self._home = home
        self._limit = limit
        self._closed = False
        self._connection: sqlite3.Connection | None = connect(home)
        self._begin()
        guard(self)

    def _begin(self) -> None:
        self._queue: deque[Snapshot | _Ticket] = deque()
        self._dropped: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._gate = threading.RLock()  # a finaliser of the host's may log in mid-logging
        self._database = threading.Lock()
        self._wake = threading.Event()
        self._urgent = threading.Event()

    @property
    def dropped(self) -> dict[str, int]:
        """How many runs could not be kept, by reason."""
        with self._gate:
            return dict(self._dropped)

    def offer(self, snapshot: Snapshot) -> None:
        """Queue a run; where the queue is full, count it as dropped instead.

        Raises:
            LogClosed: the writer was closed.
        """
        with self._gate:
            self._require_running()
            room = len(self._queue) < self._limit
            if room:
                self._queue.append(snapshot)
        if not room:
            self._drop("queue-full", 1, f"{self._limit} runs are waiting to be written")
        elif not self._wake.is_set():
            self._wake.set()

    def commit(self, entry: Entry) -> None:
        """Write an entry and everything queued before it; return when it is on disk.

        Raises:
            RecordError: the store refused it, or it could not be kept.
            LogClosed: the writer was closed.
        """
        ticket = self._submit(entry)
        if not self._answered(ticket, None):
            raise NotKept("the writer of this log was stopped; open a new log and try again")
        if ticket.error is not None:
            raise ticket.error

    def flush(self, timeout: float | None) -> bool:
        """Wait until all that is queued was written or dropped; say whether it was, in time."""
        return self._answered(self._submit(None), timeout)

    def close(self, timeout: float) -> None:
        """Write what is queued, for at most ``timeout`` seconds, and stop."""
        with self._gate:
            already, self._closed = self._closed, True
            thread = self._thread
        self._urgent.set()
        self._wake.set()
        if thread is None:
            self._release()
        elif thread is not threading.current_thread():  # else: collected by the writer itself
            thread.join(timeout)
            if thread.is_alive() and not already:
                lost = len(self._queue)
                self._drop("unfinished", lost, f"closing took longer than {timeout:g} s")

    def before_fork(self) -> None:
        """Let a batch that is being written end, and close the connection."""
        self._database.acquire()
        self._disconnect()

    def after_fork_in_parent(self) -> None:
        """Go on; the next batch opens a connection."""
        self._database.release()

    def after_fork_in_child(self) -> None:
        """Begin with an empty queue: what was in it is the parent's to write."""
        self._begin()

    def _submit(self, entry: Entry | None) -> _Ticket:
        """Queue an entry that somebody waits for; callers are few, so that none is refused."""
        ticket = _Ticket(entry)
        with self._gate:
            self._require_running()
            self._queue.append(ticket)
        self._urgent.set()
        self._wake.set()
        return ticket

    def _require_running(self) -> None:
        """Start the thread where there is none: at the first call, and in a forked child."""
        if self._closed:
            raise LogClosed(f"the log of {self._home.path} was closed; open a new one")
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="agentpref", daemon=True)
            self._thread.start()
            at_child_exit(self.close)

    def _answered(self, ticket: _Ticket, timeout: float | None) -> bool:
        end = None if timeout is None else time.monotonic() + timeout
        thread = self._thread
        while thread is not None and thread.is_alive():
            left = _PATIENCE_SECONDS if end is None else end - time.monotonic()
            if ticket.done.wait(max(0.0, min(left, _PATIENCE_SECONDS))):
                return True
            if left <= 0:
                return False
        return ticket.done.is_set()

    def _main(self) -> None:
        try:
            closing = False
            while not closing:
                self._wake.wait()
                self._wake.clear()
                self._urgent.wait(LINGER_SECONDS)
                self._urgent.clear()
                closing = self._closed  # read first: nothing is queued once it is true
                while batch := self._take():
                    self._write(batch)
        finally:
            self._thread = None
            self._release()

    def _take(self) -> list[Snapshot | _Ticket]:
        return [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]

    def _write(self, batch: Sequence[Snapshot | _Ticket]) -> None:
        failure: AgentprefError = NotKept("the writer stopped unexpectedly; see its traceback")
        outcomes: list[AgentprefError | None] = [failure] * len(batch)
        try:
            with self._database, translated(self._home):
                outcomes = self._write_together(batch)
        except AgentprefError as error:
            outcomes = [error] * len(batch)
        except sqlite3.Error as error:
            failure = NotKept(f"{self._home.database}: {error}; please report this as a mistake")
            failure.__cause__ = error
            outcomes = [failure] * len(batch)
        finally:
            self._settle(batch, outcomes)

    def _write_together(self, batch: Sequence[Snapshot | _Ticket]) -> list[AgentprefError | None]:
        if self._connection is None:
            self._connection = connect(self._home)
        store = Store(self._connection)
        with transaction(self._connection):
            return [_write_one(store, _entry(queued)) for queued in batch]

    def _settle(
        self, batch: Sequence[Snapshot | _Ticket], outcomes: Sequence[AgentprefError | None]
    ) -> None:
        lost: list[AgentprefError] = []
        for queued, error in zip(batch, outcomes, strict=True):
            if isinstance(queued, _Ticket):
                queued.error = error
                queued.done.set()
            elif error is not None:
                lost.append(error)
        if lost:
            self._drop(_reason(lost[0]), len(lost), str(lost[0]))

    def _drop(self, reason: str, count: int, why: str) -> None:
        with self._gate:
            first = reason not in self._dropped
            self._dropped[reason] += count
        if first and count:
            import logging  # 10 ms, which a log that keeps everything never spends

            logging.getLogger("agentpref").warning(
                "%d run(s) not kept (%s): %s. Log.dropped counts on, silently.", count, reason, why
            )

    def _release(self) -> None:
        with self._database:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _entry(queued: Snapshot | _Ticket) -> Entry | None:
    return queued.entry if isinstance(queued, _Ticket) else queued


def _write_one(store: Store, entry: Entry | None) -> RecordError | None:
    """Write an entry; a refusal is its own, and keeps nothing else of the batch from the disk."""
    try:
        if isinstance(entry, Snapshot):
            store.add_run(entry.thaw())
        elif isinstance(entry, Feedback):
            store.add_feedback(entry)
        elif isinstance(entry, Comparison):
            store.add_comparison(entry)
    except RecordError as refusal:
        return refusal
    return None


def _reason(error: AgentprefError) -> str:
    trouble = diagnose(error.__cause__) if isinstance(error.__cause__, sqlite3.Error) else None
    return trouble.reason if trouble else type(error.__cause__ or error).__name__
