"""The one thread that runs a model, and the queue in front of it.

Threads that share a model mix up its state. So one thread runs the model, step by step, and admits
waiting requests between two steps.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, Protocol, TypeVar

from agentpref.errors import BackendClosed, ServingError

_CLOSED = (
    "the backend was closed, or belongs to the process that this one was forked from; "
    "make a new one to continue serving"
)
_DIED = (
    "the thread that runs the model died of an error, which it printed; make a new backend to "
    "continue serving"
)


class Job(Protocol):
    """A request that waits for an answer."""

    def fail(self, error: ServingError) -> None:
        """Raise an error where the answer is waited for."""


J = TypeVar("J", bound=Job)


class Steps(Protocol[J]):
    """The engine that a :class:`ModelThread` drives, on that thread only. It may not raise."""

    @property
    def active(self) -> int:
        """How many admitted jobs have not ended."""

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has anything to do."""

    def admit(self, jobs: list[J]) -> None:
        """Take jobs in; the engine answers or fails each of them."""

    def step(self) -> None:
        """Advance all active jobs by one step."""

    def abandon(self) -> list[J]:
        """Remove all active jobs and return them."""


class ModelThread(Generic[J]):
    """Admits jobs to an engine, oldest first, and drives it on a thread of its own.

    Args:
        engine: answers the jobs.
        max_active: the most jobs to answer at the same time.
    """

    def __init__(self, engine: Steps[J], *, max_active: int) -> None:
        """Start the thread; it is a daemon and does not delay the end of the process."""
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
        """Check that jobs can be served.

        Raises:
            BackendClosed: the thread was closed, or this is a forked process, which has none.
        """
        if self._closed or not self._thread.is_alive():
            raise BackendClosed(_CLOSED)

    def submit(self, job: J) -> None:
        """Queue a job.

        Raises:
            BackendClosed: as :meth:`require_open`.
        """
        self.require_open()  # before the lock, which another thread may have held at a fork
        with self._arrived:
            self.require_open()
            self._waiting.append(job)
            self._arrived.notify()

    def close(self) -> None:
        """Fail the waiting jobs, finish the active ones, and end the thread."""
        self._fail_waiting()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (admitted := self._next()) is not None:
                if admitted:
                    self._engine.admit(admitted)
                self._engine.step()
        finally:
            self._fail_waiting()
            for job in self._engine.abandon():  # only where the engine raised after all
                job.fail(BackendClosed(_DIED))

    def _next(self) -> list[J] | None:
        """Wait for work; return the jobs to admit, or ``None`` at the end."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting or self._closed or self._engine.has_work)
            if self._closed and not self._engine.has_work:
                return None
            room = self._max_active - self._engine.active
            return [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]

    def _fail_waiting(self) -> None:
        with self._arrived:
            self._closed = True
            abandoned, self._waiting = self._waiting, deque()
            self._arrived.notify()
        for job in abandoned:
            job.fail(BackendClosed(_CLOSED))
