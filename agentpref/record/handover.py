"""What the app's threads share with the thread of a log, safe at every bytecode.

Python runs signal handlers in the app's main thread, between any two bytecodes, and they may raise:
Ctrl-C, a worker's time-out, ``sys.exit``. Then a lock that was taken for a moment stays taken, as
in ``threading.Event`` and ``Condition``, and what was halfway done is lost. What the app's threads
change here, they change in one call into C, which an exception can come before or after.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

from agentpref.errors import AgentprefError, RecordError
from agentpref.record.database import warn
from agentpref.record.ingest import FromApp, RawRun


class Signal:
    """Wakes one thread that waits, now or when it waits next; waiting takes the signal back."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Give the signal; it is given once until somebody takes it."""
        if self._lock.locked():
            with suppress(RuntimeError):  # another thread has given it meanwhile
                self._lock.release()

    def wait(self, seconds: float) -> bool:
        """Wait for the signal and take it; False if it does not come in time."""
        return self._lock.acquire(timeout=max(seconds, 0.0))


class Ticket:
    """An entry whose caller waits for the outcome, or, without an entry, a place in the queue."""

    __slots__ = ("_signal", "entry", "error", "settled")

    def __init__(self, entry: FromApp | None) -> None:
        self.entry = entry
        self.settled = False
        self.error: AgentprefError | None = None
        self._signal = Signal()

    def settle(self, error: AgentprefError | None) -> None:
        """Tell the caller the outcome, if it has none yet."""
        if not self.settled:
            self.error = error
            self.settled = True
            self._signal.set()

    def wait(self, seconds: float) -> None:
        """Wait until the ticket is settled, for at most some seconds."""
        self._signal.wait(seconds)


Queued: TypeAlias = "RawRun | Ticket"


class Tally:
    """Counts by name, for any number of threads; warns at the 1st, 10th, 100th, … of a name.

    A count is the length of a byte string, because growing one cannot be interrupted, and ``+=`` of
    a number can. It takes a byte for each.
    """

    def __init__(self, what: str) -> None:
        """``what`` is the warning, with places for the count, the name and the reason."""
        self._what = what
        self._cells: dict[str, bytearray] = {}
        self._digits: dict[str, int] = {}

    def add(self, name: str, count: int, why: object) -> None:
        """Count, and warn with the reason."""
        cell = self._cells.setdefault(name, bytearray())
        cell.extend(bytes(count))
        if len(str(len(cell))) > self._digits.get(name, 0):
            self._digits[name] = len(str(len(cell)))
            warn(self._what, len(cell), name, why)

    def counts(self) -> dict[str, int]:
        """Return the counts so far."""
        return {name: len(cell) for name, cell in tuple(self._cells.items())}


# What the thread of a log hands entries to


class Prepares(Protocol):
    """Makes of an entry what is written; raises a ``RecordError`` for one that cannot be kept."""

    def prepare(self, given: FromApp) -> Any:
        """Return the record; it has a ``user_id``."""


class Durable(Protocol):
    """Where records become durable; see :class:`agentpref.record.spill.DurableWriter`."""

    trouble: AgentprefError | None

    @property
    def generation(self) -> int:
        """Another number after the names of users have changed."""

    def write(
        self, records: Sequence[Any], generation: int | None = None
    ) -> Sequence[RecordError | None]:
        """Put records on disk; return for each the error that refused it, or None."""

    def waits(self) -> bool:
        """Whether there is something for ``recover`` to do."""

    def recover(self) -> None:
        """Try to bring what waits to where it belongs."""

    def close(self) -> None:
        """Let go of what must not cross a fork; the next record takes it up again."""

    def abandon(self) -> None:
        """Never use again what the parent of this process was using as it forked."""
