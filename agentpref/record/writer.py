"""The queue between the app's threads and the disk, and the thread that empties it.

A thread of the log writes queued runs in batches, one transaction each. A caller whose entry must
be durable writes it itself, with everything queued before it; while another thread is writing, it
waits for the next batch, and one sync makes that durable for all who wait. Entries that cannot be
written now stay in the queue. Runs that cannot be kept at all are counted by reason and logged.
The database is closed around a fork, because SQLite's locks do not survive one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from agentpref.errors import AgentprefError, LogClosed, NotKept, RecordError
from agentpref.home import Home
from agentpref.record.database import diagnose, warn
from agentpref.record.forks import at_child_exit, guard
from agentpref.record.ingest import FromApp, Ingest, RawRun
from agentpref.record.messages import StoredRecord
from agentpref.record.spill import REST_SECONDS, DurableWriter

BATCH = 1_000
"""How many entries one transaction writes at most."""

LINGER_SECONDS = 0.05
"""How long a run may wait in the queue for others to share its transaction."""

CLOCK_STEP_SECONDS = 1.0
"""By how much the clock may go back without a warning."""

_PATIENCE_SECONDS = 1.0
"""How often a waiting caller checks that the writing thread is alive."""


class _Ticket:
    """An entry whose caller waits, or a place in the queue; a caller who writes needs no event."""

    __slots__ = ("_event", "entry", "error", "settled")

    def __init__(self, entry: FromApp | None, event: threading.Event | None = None) -> None:
        self.entry = entry
        self.settled = False
        self.error: AgentprefError | None = None
        self._event = event

    def settle(self, error: AgentprefError | None) -> None:
        self.error = error
        self.settled = True
        if self._event is not None:
            self._event.set()

    def wait(self, seconds: float) -> None:
        if self._event is not None:
            self._event.wait(seconds)


_Queued: TypeAlias = "RawRun | _Ticket"


class Writer:
    """Writes to one home for any number of threads; raises ``LogClosed`` once it is closed."""

    def __init__(self, home: Home, ingest: Ingest, *, limit: int, limit_bytes: int) -> None:
        """Open the home's database.

        ``limit`` is how many runs may wait in the queue, ``limit_bytes`` how many bytes of JSON
        they may take. ``ingest`` checks, redacts and pseudonymises each entry.
        """
        self._home = home
        self._ingest = ingest
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._closed = False
        self._durable = DurableWriter(home)
        self._begin()
        guard(self)

    def _begin(self) -> None:
        self._queue: deque[_Queued] = deque()
        self._bytes = 0
        self._latest = 0.0
        self._stuck: AgentprefError | None = None
        self._dropped: Counter[str] = Counter()
        self._altered: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # a finaliser of the app may log in mid-logging
        self._writing = threading.RLock()  # and the app's ``redact`` may judge a run
        self._wake = threading.Event()
        self._urgent = threading.Event()

    @property
    def dropped(self) -> dict[str, int]:
        """How many runs could not be kept, by reason."""
        with self._lock:
            return dict(self._dropped)

    @property
    def altered(self) -> dict[str, int]:
        """How many runs were kept with values changed, by the kind of the change."""
        with self._lock:
            return dict(self._altered)

    def offer(self, run: RawRun) -> None:
        """Queue a run; if the queue is full, count it as dropped."""
        size = len(run.body)
        with self._lock:
            if self._thread is None or self._closed:
                self._require_running()
            room = len(self._queue) < self._limit and self._bytes + size <= self._limit_bytes
            if room:
                self._queue.append(run)
                self._bytes += size
        if not room:
            self.drop("queue-full", 1, self._stuck or f"{len(self._queue):,} runs wait already")
        elif not self._wake.is_set():
            self._wake.set()

    def commit(self, entry: FromApp) -> None:
        """Write an entry and everything queued before it; it is on disk when this returns.

        Raises ``RecordError`` if the store refused it, or it could not be kept.
        """
        if self._writing.acquire(blocking=False):
            ticket = _Ticket(entry)
            try:
                self._submit(ticket)
                while not ticket.settled:
                    self._write(self._take())
            finally:
                self._writing.release()
            if self._queue:
                self._wake.set()
        else:
            ticket = _Ticket(entry, threading.Event())
            self._submit(ticket)
            self._hurry()
        if not self._answered(ticket, None):
            raise NotKept("the writer of this log was stopped; open a new log and try again")
        if ticket.error is not None:
            raise ticket.error

    def flush(self, timeout: float | None) -> bool:
        """Wait until everything queued is written; return whether it was, in time.

        If the disk cannot take it now, return False at once.
        """
        ticket = _Ticket(None, threading.Event())
        self._submit(ticket)
        self._hurry()
        return self._answered(ticket, timeout) and ticket.error is None

    def close(self, timeout: float) -> None:
        """Write what is queued, for at most ``timeout`` seconds, and stop."""
        with self._lock:
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
        """Count runs that are not kept; warn at the 1st, 10th, 100th, … run of a reason."""
        self._tally(self._dropped, reason, count, "%d run(s) not kept (%s): %s", why)

    def note_altered(self, run_id: str, changes: Mapping[str, int]) -> None:
        """Count a run whose values were changed to keep it; warn like :meth:`drop`."""
        for kind, count in changes.items():
            what = "%d run(s) kept with values changed that JSON cannot hold (%s): %s"
            self._tally(self._altered, kind, 1, what, f"{count} in run {run_id}")

    def _tally(self, tally: Counter[str], name: str, count: int, what: str, why: object) -> None:
        with self._lock:
            before = tally[name]
            after = tally[name] = before + count
        if before == 0 or len(str(after)) > len(str(before)):
            warn(what, after, name, why)

    def before_fork(self) -> None:
        """Wait for the batch that is being written, and close the connection."""
        self._writing.acquire()
        self._durable.close()

    def after_fork_in_parent(self) -> None:
        """Continue; the next batch opens a connection."""
        self._writing.release()

    def after_fork_in_child(self) -> None:
        """Start with an empty queue: the parent writes what was in it."""
        self._begin()

    def _submit(self, ticket: _Ticket) -> None:
        """Queue an entry that a caller waits for; such entries have no limit: callers are few."""
        with self._lock:
            self._require_running()
            self._queue.append(ticket)

    def _hurry(self) -> None:
        self._urgent.set()
        self._wake.set()

    def _require_running(self) -> None:
        """Start the thread at the first call, and again in a forked child."""
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
                self._urgent.wait(REST_SECONDS if self._durable.trouble else LINGER_SECONDS)
                self._urgent.clear()
                closing = self._closed  # read first: nothing is queued once it is true
                self._write_all()
            self._abandon(self._stuck)
        finally:
            self._thread = None
            self._release()

    def _write_all(self) -> None:
        """Write until the queue is empty or nothing can be written now; wake again for the rest."""
        while self._queue:
            with self._writing:
                self._write(self._take())
            if self._stuck is not None:
                break
        if self._durable.waits():
            with self._writing:
                self._durable.recover()
        if self._queue or self._durable.waits():
            self._wake.set()

    def _take(self) -> list[_Queued]:
        with self._lock:
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._bytes -= sum(map(_size, batch))
        return batch

    def _write(self, batch: Sequence[_Queued]) -> None:
        """Write a batch, and tell the outcome to the callers who wait for it."""
        done = False
        try:
            ready = [(queued, record) for queued in batch if (record := self._prepare(queued))]
            try:
                outcomes = self._durable.write([record for _, record in ready])
            except AgentprefError as trouble:
                self._put_back([queued for queued, _ in ready], batch, trouble)
            else:
                self._stuck = None
                for (queued, _), error in zip(ready, outcomes, strict=True):
                    if error is not None:
                        self._settle(queued, error)
                _answer(batch, None)
            done = True
        finally:
            if not done:
                self._lose(batch)

    def _prepare(self, queued: _Queued) -> StoredRecord | None:
        """Make a record of an entry; None for no entry, and for one that is refused."""
        entry = queued.entry if isinstance(queued, _Ticket) else queued
        if entry is None:
            return None
        if isinstance(entry, RawRun):
            self._watch_the_clock(entry.created_at)
        try:
            return self._ingest.prepare(entry)
        except RecordError as refusal:
            self._settle(queued, refusal)
            return None

    def _settle(self, queued: _Queued, error: RecordError) -> None:
        if isinstance(queued, _Ticket):
            queued.settle(error)
        else:
            self.drop(type(error).__name__, 1, error)

    def _put_back(
        self, ready: Iterable[_Queued], batch: Iterable[_Queued], trouble: AgentprefError
    ) -> None:
        """Leave the runs in the queue for later; tell all callers who wait that it failed."""
        with self._lock:
            runs = [queued for queued in ready if isinstance(queued, RawRun)]
            later = [queued for queued in self._queue if isinstance(queued, RawRun)]
            waiting = [*batch, *self._queue]
            self._queue = deque([*runs, *later])
            self._bytes += sum(map(_size, runs))
            first, self._stuck = self._stuck is None, trouble
        _answer(waiting, trouble)
        if first:
            warn("nothing can be written now, so that runs wait in memory: %s", trouble)

    def _lose(self, batch: Sequence[_Queued]) -> None:
        """Count the runs of a batch as lost after a bug of agentpref."""
        why = "the writer stopped unexpectedly; see its traceback, and please report it"
        _answer(batch, NotKept(why))
        if runs := sum(isinstance(queued, RawRun) for queued in batch):
            self.drop("unexpected", runs, why)

    def _watch_the_clock(self, now: float) -> None:
        step = self._latest - now
        if step > CLOCK_STEP_SECONDS:
            warn("the clock went back by %.0f s; runs keep the time that they were given", step)
        if step < 0 or step > CLOCK_STEP_SECONDS:
            self._latest = now

    def _abandon(self, why: object) -> None:
        """Count what is still queued as lost."""
        with self._lock:
            left = [queued for queued in self._queue if isinstance(queued, RawRun)]
            self._queue.clear()
        if left:
            stuck = self._stuck
            trouble = diagnose(stuck.__cause__) if stuck else None
            reason = trouble.reason if trouble else type(stuck).__name__ if stuck else "unfinished"
            self.drop(reason, len(left), why)

    def _release(self) -> None:
        with self._writing:
            self._durable.close()


def _size(queued: _Queued) -> int:
    return len(queued.body) if isinstance(queued, RawRun) else 0


def _answer(waiting: Iterable[_Queued], error: AgentprefError | None) -> None:
    """Tell the outcome to the callers who have none yet."""
    for queued in waiting:
        if isinstance(queued, _Ticket) and not queued.settled:
            queued.settle(error)
