"""The queue between the host's threads and the disk, and the thread that empties it.

Runs are queued and written some at a time, in one transaction, by a thread of our own. A caller
whose entry must be durable writes it itself, with all that is queued before it, if nobody else is
writing just then; else it waits for the next batch, which one sync makes durable for all who wait.
What cannot be kept now stays in the queue; what cannot be kept at all is counted by reason and
said. Around a fork the database is closed, since SQLite's locks do not survive one.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from agentpref.errors import AgentprefError, LogClosed, NotKept, RecordError
from agentpref.home import Home
from agentpref.record.database import diagnose
from agentpref.record.forks import at_child_exit, guard
from agentpref.record.ingest.intake import Entry, Intake, Said
from agentpref.record.ingest.snapshot import Snapshot
from agentpref.record.keeper import REST_SECONDS, Keeper

BATCH = 1_000
"""Entries in one transaction at most."""

LINGER_SECONDS = 0.05
"""How long a run may wait in the queue for others to share its transaction."""

CLOCK_STEP_SECONDS = 1.0
"""By how much the clock may go back before somebody is told."""

_PATIENCE_SECONDS = 1.0
"""How often a caller that waits looks whether there still is somebody to wait for."""


class _Ticket:
    """An entry whose caller waits for the outcome; without an entry, it waits for its turn.

    Who writes it himself has nobody to be woken by, and needs no event.
    """

    __slots__ = ("_event", "error", "said", "settled")

    def __init__(self, said: Said | None, event: threading.Event | None = None) -> None:
        self.said = said
        self.settled = False
        self.error: AgentprefError | None = None
        self._event = event

    def settle(self, error: AgentprefError | None) -> None:
        self.error = error
        self.settled = True
        if self._event is not None:
            self._event.set()

    def wait(self, seconds: float) -> None:
        assert self._event is not None
        self._event.wait(seconds)


_Queued: TypeAlias = "Snapshot | _Ticket"


class Writer:
    """Writes to one home, for as many callers as there are."""

    def __init__(self, home: Home, intake: Intake, *, limit: int, limit_bytes: int) -> None:
        """Open the home's database.

        Args:
            home: where to write.
            intake: what each entry goes through first.
            limit: how many runs wait in the queue at most.
            limit_bytes: how many bytes they take at most, as JSON.

        Raises:
            HomeError: the database is not ours to write.
        """
        self._home = home
        self._intake = intake
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._closed = False
        self._keeper = Keeper(home)
        self._begin()
        guard(self)

    def _begin(self) -> None:
        self._queue: deque[_Queued] = deque()
        self._bytes = 0
        self._latest = 0.0
        self._stuck: AgentprefError | None = None
        self._dropped: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._gate = threading.RLock()  # a finaliser of the host's may log in mid-logging
        self._writing = threading.RLock()  # and the host's ``redact`` may judge a run
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
        size = len(snapshot.body)
        with self._gate:
            if self._thread is None or self._closed:
                self._require_running()
            room = len(self._queue) < self._limit and self._bytes + size <= self._limit_bytes
            if room:
                self._queue.append(snapshot)
                self._bytes += size
        if not room:
            self.drop("queue-full", 1, self._stuck or f"{len(self._queue):,} runs wait already")
        elif not self._wake.is_set():
            self._wake.set()

    def commit(self, said: Said) -> None:
        """Write an entry and everything queued before it; return when it is on disk.

        Raises:
            RecordError: the store refused it, or it could not be kept.
            LogClosed: the writer was closed.
        """
        if self._writing.acquire(blocking=False):
            ticket = _Ticket(said)
            try:
                self._submit(ticket)
                self._write_until(ticket)
            finally:
                self._writing.release()
            if self._queue:
                self._wake.set()
        else:
            ticket = _Ticket(said, threading.Event())
            self._submit(ticket)
            self._hurry()
        if not self._answered(ticket, None):
            raise NotKept("the writer of this log was stopped; open a new log and try again")
        if ticket.error is not None:
            raise ticket.error

    def flush(self, timeout: float | None) -> bool:
        """Wait until all that is queued was written; say whether it was, in time.

        Where the disk cannot take it now, the answer is no, without waiting for a better time.
        """
        ticket = _Ticket(None, threading.Event())
        self._submit(ticket)
        self._hurry()
        return self._answered(ticket, timeout) and ticket.error is None

    def close(self, timeout: float) -> None:
        """Write what is queued, for at most ``timeout`` seconds, and stop."""
        with self._gate:
            already, self._closed = self._closed, True
            thread = self._thread
        self._hurry()
        if thread is None:
            self._release()
        elif thread is not threading.current_thread():  # else: collected by the writer itself
            thread.join(timeout)
            if thread.is_alive() and not already:
                self._abandon(f"closing took longer than {timeout:g} s")

    def drop(self, reason: str, count: int, why: object) -> None:
        """Count runs that are not kept; say so at the first of a reason, the tenth, and so on."""
        with self._gate:
            before = self._dropped[reason]
            after = self._dropped[reason] = before + count
        if before == 0 or len(str(after)) > len(str(before)):
            _warn("%d run(s) not kept (%s): %s", after, reason, why)

    def before_fork(self) -> None:
        """Let a batch that is being written end, and close the connection."""
        self._writing.acquire()
        self._keeper.disconnect()

    def after_fork_in_parent(self) -> None:
        """Go on; the next batch opens a connection."""
        self._writing.release()

    def after_fork_in_child(self) -> None:
        """Begin with an empty queue: what was in it is the parent's to write."""
        self._begin()

    def _submit(self, ticket: _Ticket) -> None:
        """Queue an entry that somebody waits for; callers are few, so that none is refused."""
        with self._gate:
            self._require_running()
            self._queue.append(ticket)

    def _hurry(self) -> None:
        self._urgent.set()
        self._wake.set()

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
        while not ticket.settled and thread is not None and thread.is_alive():
            left = _PATIENCE_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                return False
            ticket.wait(min(left, _PATIENCE_SECONDS))
        return ticket.settled

    def _main(self) -> None:
        try:
            closing = False
            while not closing:
                self._wake.wait()
                self._wake.clear()
                self._urgent.wait(REST_SECONDS if self._keeper.trouble else LINGER_SECONDS)
                self._urgent.clear()
                closing = self._closed  # read first: nothing is queued once it is true
                self._write_all()
            self._abandon(self._stuck)
        finally:
            self._thread = None
            self._release()

    def _write_all(self) -> None:
        """Write until the queue is empty or nothing can be written now; then come back, later."""
        while self._queue:
            with self._writing:
                self._write(self._take())
            if self._stuck is not None:
                break
        if self._keeper.waits():
            with self._writing:
                self._keeper.recover()
        if self._queue or self._keeper.waits():
            self._wake.set()

    def _write_until(self, ticket: _Ticket) -> None:
        while not ticket.settled:
            self._write(self._take())

    def _take(self) -> list[_Queued]:
        with self._gate:
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._bytes -= sum(map(_size, batch))
        return batch

    def _write(self, batch: Sequence[_Queued]) -> None:
        """Write a batch, and answer those who wait for one of its entries."""
        done = False
        try:
            admitted = [(queued, entry) for queued in batch if (entry := self._admit(queued))]
            try:
                outcomes = self._keeper.keep([entry for _, entry in admitted])
            except AgentprefError as trouble:
                self._put_back([queued for queued, _ in admitted], batch, trouble)
            else:
                self._stuck = None
                for (queued, _), error in zip(admitted, outcomes, strict=True):
                    if error is not None:
                        self._settle(queued, error)
                _answer(batch, None)
            done = True
        finally:
            if not done:
                self._lose(batch)

    def _admit(self, queued: _Queued) -> Entry | None:
        """Make an entry of what was said; None where there is none, or it cannot be one."""
        said = queued.said if isinstance(queued, _Ticket) else queued
        if said is None:
            return None
        if isinstance(said, Snapshot):
            self._watch_the_clock(said.created_at)
        try:
            return self._intake.admit(said)
        except RecordError as refusal:
            self._settle(queued, refusal)
            return None

    def _settle(self, queued: _Queued, error: RecordError | None) -> None:
        if isinstance(queued, _Ticket):
            queued.settle(error)
        elif error is not None:
            self.drop(type(error).__name__, 1, error)

    def _put_back(
        self, admitted: Iterable[_Queued], batch: Iterable[_Queued], trouble: AgentprefError
    ) -> None:
        """Leave the runs in the queue for later; tell all who wait that it cannot be done now."""
        with self._gate:
            runs = [queued for queued in admitted if isinstance(queued, Snapshot)]
            later = [queued for queued in self._queue if isinstance(queued, Snapshot)]
            waiting = [*batch, *self._queue]
            self._queue = deque([*runs, *later])
            self._bytes += sum(map(_size, runs))
            first, self._stuck = self._stuck is None, trouble
        _answer(waiting, trouble)
        if first:
            _warn("nothing can be written now, so that runs wait in memory: %s", trouble)

    def _lose(self, batch: Sequence[_Queued]) -> None:
        """Account for a batch that a mistake of ours has spoilt."""
        why = "the writer stopped unexpectedly; see its traceback, and please report it"
        _answer(batch, NotKept(why))
        if runs := sum(isinstance(queued, Snapshot) for queued in batch):
            self.drop("unexpected", runs, why)

    def _watch_the_clock(self, now: float) -> None:
        step = self._latest - now
        if step > CLOCK_STEP_SECONDS:
            _warn("the clock went back by %.0f s; runs keep the time that they were given", step)
        if step < 0 or step > CLOCK_STEP_SECONDS:
            self._latest = now

    def _abandon(self, why: object) -> None:
        """Count what is still queued as lost."""
        with self._gate:
            left = [queued for queued in self._queue if isinstance(queued, Snapshot)]
            self._queue.clear()
        if left:
            self.drop(_reason(self._stuck), len(left), why)

    def _release(self) -> None:
        with self._writing:
            self._keeper.disconnect()


def _size(queued: _Queued) -> int:
    return len(queued.body) if isinstance(queued, Snapshot) else 0


def _answer(waiting: Iterable[_Queued], error: AgentprefError | None) -> None:
    """Answer those who have no answer yet."""
    for queued in waiting:
        if isinstance(queued, _Ticket) and not queued.settled:
            queued.settle(error)


def _reason(error: AgentprefError | None) -> str:
    """Name a trouble in a word."""
    if error is None:
        return "unfinished"
    cause = error.__cause__
    trouble = diagnose(cause) if isinstance(cause, sqlite3.Error) else None
    return trouble.reason if trouble else type(error).__name__


def _warn(message: str, *values: object) -> None:
    import logging  # 10 ms, which a log that keeps everything never spends

    logging.getLogger("agentpref").warning(message, *values)
