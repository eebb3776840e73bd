"""The queue between the app's threads and the disk, and the thread that empties it.

A caller only appends to the queue, and waits if its entry must be durable. One thread of the log
does all else: it checks and redacts what is queued, and writes it in batches, one transaction each,
so that one sync serves all who wait. Signal handlers never run in it, so an exception that a
handler raises in the app leaves nothing half done and no lock taken. What cannot be written now
waits in the thread's backlog, and is tried again once a second. Runs that cannot be kept at all are
counted by reason and logged. The database is closed around a fork, because SQLite's locks do not
survive one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentpref.errors import AgentprefError, LogClosed, NotKept, RecordError
from agentpref.home import Home
from agentpref.record.database import diagnose, warn
from agentpref.record.forks import at_child_exit, guard, let_go
from agentpref.record.handover import Durable, Prepares, Queued, Signal, Tally, Ticket
from agentpref.record.ingest import FromApp, Ingest, RawRun
from agentpref.record.ingest.pseudonyms import UNNAMED
from agentpref.record.keys import names_of
from agentpref.record.spill import REST_SECONDS, AnotherDatabase, DurableWriter

BATCH = 1_000
"""How many entries one transaction writes at most."""

LINGER_SECONDS = 0.05
"""How long a run may wait in the queue for others to share its transaction."""

CLOCK_STEP_SECONDS = 1.0
"""By how much the clock may go back without a warning."""

_PATIENCE_SECONDS = 1.0
"""How often a caller who waits checks that there is a thread that writes, and it for callers."""


class Writer:
    """Writes to one home for any number of threads; raises ``LogClosed`` once it is closed."""

    def __init__(
        self,
        home: Home,
        ingest: Prepares,
        *,
        limit: int,
        limit_bytes: int,
        durable: Durable | None = None,
    ) -> None:
        """Open the home's database.

        ``limit`` is how many runs may wait in the queue, ``limit_bytes`` how many bytes of JSON
        they may take. ``ingest`` checks, redacts and pseudonymises each entry. ``durable`` takes
        the records instead of the database.
        """
        self._home = home
        self._ingest = ingest
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._closed = False
        self._durable = DurableWriter(home) if durable is None else durable
        self._generation = self._durable.generation
        self._begin()
        guard(self)

    def _begin(self) -> None:
        self._queue: deque[Queued] = deque()  # from the callers
        self._backlog: deque[Queued] = deque()  # the thread's: taken from the queue, not written
        self._bytes = 0
        self._latest = 0.0
        self._stuck: AgentprefError | None = None
        self._stuck_until = 0.0
        self._dropped = Tally("%d run(s) not kept (%s): %s")
        self._altered = Tally("%d run(s) kept with values changed (%s): %s")
        self._thread: threading.Thread | None = None
        self._is_storing = False
        self._is_over = False  # nobody writes what is queued from now on
        self._is_released = False
        self._role = threading.Lock()  # held by the thread that writes
        self._writing = threading.RLock()  # held by it in a transaction, and around a fork
        self._is_parted = False  # no connection is open, and none is opened
        self._wake, self._urgent, self._released = Signal(), Signal(), Signal()

    @property
    def dropped(self) -> dict[str, int]:
        """How many runs could not be kept, by reason."""
        self._sweep()
        return self._dropped.counts()

    @property
    def altered(self) -> dict[str, int]:
        """How many runs were kept with values changed, by the kind of the change."""
        return self._altered.counts()

    def offer(self, run: RawRun) -> None:
        """Queue a run; if the queue is full, count it as dropped."""
        if self._thread is None or self._closed:
            self._require_running()
        size = len(run.body)
        waiting = len(self._queue) + len(self._backlog)
        if waiting < self._limit and self._bytes + size <= self._limit_bytes:
            self._bytes += size
            self._queue.append(run)
            self._wake.set()
            if self._is_over:
                self._sweep()
        else:
            self.drop("queue-full", 1, self._stuck or f"{waiting:,} runs wait already")

    def commit(self, entry: FromApp) -> None:
        """Write an entry and everything queued before it; it is on disk when this returns.

        Raises ``RecordError`` if the store refused it, or it could not be kept.
        """
        (error,) = self.commit_all([entry])
        if error is not None:
            raise error.with_traceback(None)  # others may raise the same one

    def commit_all(self, entries: Sequence[FromApp]) -> list[AgentprefError | None]:
        """Like :meth:`commit` for many at once; return for each the error that it would raise."""
        tickets = [Ticket(entry) for entry in entries]
        self._hand_over(tickets, None)
        return [ticket.error for ticket in tickets]

    def flush(self, timeout: float | None) -> bool:
        """Wait until everything queued is written; return whether it was, in time.

        If the disk cannot take it now, return False at once.
        """
        ticket = Ticket(None)
        return self._hand_over([ticket], timeout) and ticket.error is None

    def close(self, timeout: float) -> None:
        """Write what is queued, for at most ``timeout`` seconds, and stop."""
        already, self._closed = self._closed, True
        if self._thread is threading.current_thread():  # collected by the writer itself
            self._hurry()
            return
        if self._thread is None and not self._queue:
            with self._writing:
                self._durable.close()
            return
        end = time.monotonic() + timeout
        while not self._is_released and (left := end - time.monotonic()) > 0:
            self._start()
            self._hurry()
            self._released.wait(min(left, _PATIENCE_SECONDS))
        self._released.set()  # others may close it too
        if not self._is_released and not already:
            self._abandon(f"closing took longer than {timeout:g} s")

    def drop(self, reason: str, count: int, why: object) -> None:
        """Count runs that are not kept; warn at the 1st, 10th, 100th, … run of a reason."""
        self._dropped.add(reason, count, why)

    def note_altered(self, run_id: str, changes: Mapping[str, int]) -> None:
        """Count a run whose values were changed to keep it; warn like :meth:`drop`."""
        for kind, count in changes.items():
            self._altered.add(kind, 1, f"{count} in run {run_id}")

    def before_fork(self) -> None:
        """Wait for the transaction that is being written, and close the connection."""
        self._writing.acquire()
        self._durable.close()
        self._is_parted = True

    def after_fork_in_parent(self) -> None:
        """Continue; the next batch opens a connection."""
        self._is_parted = False
        let_go(self._writing)

    def after_fork_in_child(self) -> None:
        """Start with an empty queue: the parent writes what was in it."""
        if not self._is_parted:
            self._durable.abandon()
        self._begin()

    # For the app's threads: an exception may end each of these between any two bytecodes.

    def _hand_over(self, tickets: Sequence[Ticket], timeout: float | None) -> bool:
        """Queue tickets and wait; return whether they were settled in time.

        Tickets have no limit: callers who wait are few.
        """
        self._require_running()
        if self._thread is threading.current_thread():  # the app's ``redact`` may judge a run
            for ticket in tickets:
                self._serve_itself(ticket)
            return True
        self._queue.extend(tickets)
        self._hurry()
        end = None if timeout is None else time.monotonic() + timeout
        for ticket in tickets:
            while not ticket.settled:
                left = _PATIENCE_SECONDS if end is None else end - time.monotonic()
                if left <= 0:
                    return False
                self._sweep()
                if not self._is_over:
                    self._start()
                ticket.wait(min(left, _PATIENCE_SECONDS))
        return True

    def _hurry(self) -> None:
        self._urgent.set()
        self._wake.set()

    def _require_running(self) -> None:
        """Start the thread at the first call, and again in a forked child."""
        if self._closed:
            raise LogClosed(f"the log of {self._home.path} was closed; open a new one")
        self._start()

    def _start(self) -> None:
        """Start a thread if none writes; of two that start at once, one ends at once."""
        if self._thread is None:
            threading.Thread(target=self._main, name="agentpref", daemon=True).start()
            at_child_exit(self.close)

    def _sweep(self) -> None:
        """Count what came after the end of the thread."""
        if self._is_over and self._queue:
            self._abandon(LogClosed(f"the log of {self._home.path} was closed"))

    def _abandon(self, why: object) -> None:
        """Count what is still queued as lost."""
        left = [*self._backlog, *self._queue]
        if runs := sum(isinstance(queued, RawRun) for queued in left):
            stuck = self._stuck
            trouble = diagnose(stuck.__cause__, self._home) if stuck else None
            reason = trouble.reason if trouble else type(stuck).__name__ if stuck else "unfinished"
            self.drop(reason, runs, why)
        self._backlog.clear()
        self._queue.clear()
        closed = LogClosed(f"the log of {self._home.path} was closed meanwhile; open a new one")
        _answer(left, closed)

    # For the thread

    def _main(self) -> None:
        if not self._role.acquire(blocking=False):
            return
        self._thread = threading.current_thread()
        try:
            closing = False
            while not closing:
                if self._wake.wait(_PATIENCE_SECONDS) or self._queue:
                    rests = self._stuck or self._durable.trouble
                    self._urgent.wait(REST_SECONDS if rests else LINGER_SECONDS)
                closing = self._closed  # read first: what is queued later is swept
                self._write_all(closing)
            self._is_over = True
            if self._queue or self._backlog:
                self._abandon(self._stuck)
        finally:
            self._thread = None
            with self._writing:
                self._durable.close()
            self._is_released = self._is_over
            self._role.release()
            self._released.set()

    def _write_all(self, closing: bool) -> None:
        """Write until nothing is left or nothing can be written now; wake again for the rest."""
        while self._queue or self._backlog:
            is_resting = self._stuck is not None and time.monotonic() < self._stuck_until
            if is_resting and not closing and not self._set_aside():
                break
            self._write(self._take())
            if self._stuck is not None:
                self._set_aside()
                break
        if self._durable.waits():
            with self._writing:
                self._durable.recover()
        if self._backlog or self._durable.waits():
            self._wake.set()

    def _serve_itself(self, ticket: Ticket) -> None:
        """Write the thread's own ticket, between the preparation and the writing of a batch."""
        if self._is_storing:
            what = "a finaliser judged a run while the log was writing; judge later"
            ticket.settle(NotKept(what))
        else:
            self._queue.append(ticket)
        while not ticket.settled:
            self._write(self._take())

    def _take(self) -> list[Queued]:
        batch: list[Queued] = []
        while len(batch) < BATCH and self._backlog:
            batch.append(self._backlog.popleft())
        while len(batch) < BATCH and self._queue:
            batch.append(self._admit(self._queue.popleft()))
        self._bytes -= sum(map(_size, batch))
        if not self._queue and not self._backlog:
            self._bytes = 0  # an exception in ``offer`` may have left it wrong
        return batch

    def _admit(self, queued: Queued) -> Queued:
        """Take an entry from the queue, once: watch the clock by a run's time."""
        if isinstance(queued, RawRun):
            now = queued.created_at
            step = self._latest - now
            if step > CLOCK_STEP_SECONDS:
                warn("the clock went back by %.0f s; runs keep the time at which they came", step)
            if step < 0 or step > CLOCK_STEP_SECONDS:
                self._latest = now
        return queued

    def _set_aside(self) -> bool:
        """Empty the queue while nothing can be written: runs wait, and who judges is told at once.

        Return whether a caller wants everything to be tried now.
        """
        waiting = len(self._queue)
        for queued in [self._queue.popleft() for _ in range(waiting)]:
            if isinstance(queued, Ticket) and queued.entry is not None:
                queued.settle(self._stuck)
            else:
                self._backlog.append(self._admit(queued))
        return any(isinstance(queued, Ticket) for queued in self._backlog)

    def _write(self, batch: Sequence[Queued]) -> None:
        """Write a batch, and tell the outcome to the callers who wait for it."""
        left, done = [*batch], False
        try:
            while not done:
                try:
                    if self._generation != self._durable.generation:
                        assert isinstance(self._ingest, Ingest)  # no other has such names
                        with self._writing:
                            self._ingest = replace(self._ingest, pseudonyms=names_of(self._home))
                        self._generation = self._durable.generation
                    pairs = [(queued, self._prepare(queued)) for queued in left]
                    ready = [(queued, record) for queued, record in pairs if record is not None]
                    left = [queued for queued, _ in ready]
                    self._is_storing = True
                    records = [record for _, record in ready]
                    with self._writing:  # not above: the app's ``redact`` may wait for a fork
                        outcomes = self._durable.write(records, self._generation)
                except AnotherDatabase:
                    continue
                except AgentprefError as trouble:
                    self._put_back(left, batch, trouble)
                else:
                    self._stuck = None
                    for (queued, record), error in zip(ready, outcomes, strict=True):
                        if error is not None:
                            self._settle(queued, error)
                        elif record.user_id == UNNAMED:
                            why = f"{self._home.user_keys} is lost; restore it from a backup"
                            self._altered.add("user", 1, why)
                    _answer(batch, None)
                finally:
                    self._is_storing = False
                done = True
        finally:
            if not done:
                self._lose(batch)

    def _prepare(self, queued: Queued) -> Any:
        """Make a record of an entry; None for no entry, and for one that is refused."""
        entry = queued.entry if isinstance(queued, Ticket) else queued
        if entry is None or (isinstance(queued, Ticket) and queued.settled):
            return None
        try:
            return self._ingest.prepare(entry)
        except RecordError as refusal:
            self._settle(queued, refusal)
            return None

    def _settle(self, queued: Queued, error: RecordError) -> None:
        if isinstance(queued, Ticket):
            queued.settle(error)
        else:
            self.drop(type(error).__name__, 1, error)

    def _put_back(
        self, ready: Sequence[Queued], batch: Iterable[Queued], trouble: AgentprefError
    ) -> None:
        """Leave the runs in the backlog for later; tell all callers who wait that it failed."""
        runs = [queued for queued in (*ready, *self._backlog) if isinstance(queued, RawRun)]
        waiting = [*batch, *self._backlog]
        self._bytes += sum(map(_size, ready))
        self._backlog = deque(runs)
        first, self._stuck = self._stuck is None, trouble
        self._stuck_until = time.monotonic() + REST_SECONDS
        _answer(waiting, trouble)
        if first:
            warn("nothing can be written now, so that runs wait in memory: %s", trouble)

    def _lose(self, batch: Sequence[Queued]) -> None:
        """Count the runs of a batch as lost after a bug of agentpref."""
        why = "the writer stopped unexpectedly; see its traceback, and please report it"
        _answer(batch, NotKept(why))
        if runs := sum(isinstance(queued, RawRun) for queued in batch):
            self.drop("unexpected", runs, why)


def _size(queued: Queued) -> int:
    return len(queued.body) if isinstance(queued, RawRun) else 0


def _answer(waiting: Iterable[Queued], error: AgentprefError | None) -> None:
    """Tell the outcome to the callers who have none yet."""
    for queued in waiting:
        if isinstance(queued, Ticket):
            queued.settle(error)
