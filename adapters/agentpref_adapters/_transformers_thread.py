"""One thread that owns a model, and the queue in front of it.

Models inside a process are not safe to share: two threads that generate at once mix what they do.
Here everything that runs the model runs on one thread, step by step. Whoever waits is admitted
between two steps, so that a short request does not wait for the end of a long one. Knows nothing of
models, text and revisions.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, Protocol, TypeVar

from agentpref.errors import BackendClosed, ServingError


class Job(Protocol):
    """Something to serve."""

    def fail(self, error: ServingError) -> None:
        """Tell whoever waits that there will be no answer."""


J = TypeVar("J", bound=Job)


class Engine(Protocol[J]):
    """What the owner drives. It is called on the owner's thread alone, and may not raise."""

    @property
    def active(self) -> int:
        """How many jobs were admitted and have not ended: there is room for that many less."""

    @property
    def has_work(self) -> bool:
        """Whether there is a step to take, be it only to clear up after jobs that have ended."""

    def admit(self, jobs: list[J]) -> None:
        """Take jobs in; each of them is answered or failed in the end."""

    def step(self) -> None:
        """Bring all that is active a step further."""

    def abandon(self) -> list[J]:
        """Let go of all that is active, and give it: the owner fails it."""


class Owner(Generic[J]):
    """Admits jobs to an engine, oldest first, and drives it, all on a thread of its own.

    A process that was forked off has no such thread, and is told that the backend is closed.

    Args:
        engine: what serves the jobs.
        max_active: how many jobs are served at the same time at most.
    """

    def __init__(self, engine: Engine[J], *, max_active: int) -> None:
        """Start the thread; it is a daemon, so that a forgotten owner does not hold up an exit."""
        self._engine = engine
        self._max_active = max_active
        self._waiting: deque[J] = deque()
        self._arrived = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="agentpref-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs were submitted and not yet admitted."""
        return len(self._waiting)

    def require_open(self) -> None:
        """Refuse to go on where nothing can be served any more.

        Raises:
            BackendClosed: the owner was closed, or its thread did not come along in a fork.
        """
        if self._closed or not self._thread.is_alive():
            raise _closed()

    def submit(self, job: J) -> None:
        """Queue a job.

        Raises:
            BackendClosed: the owner was closed before.
        """
        self.require_open()  # before the lock, too: another thread may have had it at a fork
        with self._arrived:
            self.require_open()
            self._waiting.append(job)
            self._arrived.notify()

    def close(self) -> None:
        """Fail what waits, finish what is active, and end the thread."""
        self._abandon()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (admitted := self._next()) is not None:
                if admitted:
                    self._engine.admit(admitted)
                self._engine.step()
        finally:
            self._abandon()
            for job in self._engine.abandon():  # only where the engine raised after all
                job.fail(_died())

    def _next(self) -> list[J] | None:
        """Wait until there is something to do; take who is to be admitted, ``None`` at the end."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting or self._closed or self._engine.has_work)
            if self._closed and not self._engine.has_work:
                return None
            room = self._max_active - self._engine.active
            return [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]

    def _abandon(self) -> None:
        with self._arrived:
            self._closed = True
            abandoned, self._waiting = self._waiting, deque()
            self._arrived.notify()
        for job in abandoned:
            job.fail(_closed())


def _died() -> BackendClosed:
    return BackendClosed(
        "the thread that runs the model died of an error, which it printed; make a new backend to "
        "go on serving"
    )


def _closed() -> BackendClosed:
    return BackendClosed(
        "the backend was closed, or belongs to the process that this one was forked from; "
        "make a new one to go on serving"
    )
