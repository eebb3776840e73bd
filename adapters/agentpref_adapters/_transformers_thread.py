"""The one thread that runs a model, and the queue in front of it.

Threads that share a model mix up its state. So one thread runs the model, step by step, and admits
waiting requests between two steps.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from agentpref.errors import BackendClosed

if TYPE_CHECKING:
    from agentpref_adapters._transformers_engine import ActiveRequest, Engine

_CLOSED = (
    "the backend was closed, or belongs to the process that this one was forked from; "
    "make a new one to continue serving"
)
_DIED = (
    "the thread that runs the model died of an error, which it printed; make a new backend to "
    "continue serving"
)


class ModelThread:
    """Admits requests to an engine, oldest first, and drives it on a thread of its own.

    Args:
        engine: answers the requests.
        max_active: the most requests to answer at the same time.
    """

    def __init__(self, engine: Engine, *, max_active: int) -> None:
        """Start the thread; it is a daemon and does not delay the end of the process."""
        self._engine = engine
        self._max_active = max_active
        self._waiting: deque[ActiveRequest] = deque()
        self._arrived = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="agentpref-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests were submitted and not yet admitted."""
        return len(self._waiting)

    def require_open(self) -> None:
        """Check that requests can be answered.

        Raises:
            BackendClosed: the thread was closed, or this is a forked process, which has none.
        """
        if self._closed or not self._thread.is_alive():
            raise BackendClosed(_CLOSED)

    def submit(self, request: ActiveRequest) -> None:
        """Queue a request.

        Raises:
            BackendClosed: as :meth:`require_open`.
        """
        self.require_open()  # before the lock, which another thread may have held at a fork
        with self._arrived:
            self.require_open()
            self._waiting.append(request)
            self._arrived.notify()

    def close(self) -> None:
        """Fail the waiting requests, finish the active ones, and end the thread."""
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
            for request in self._engine.abandon():  # only where the engine raised after all
                request.fail(BackendClosed(_DIED))

    def _next(self) -> list[ActiveRequest] | None:
        """Wait for work; return the requests to admit, or ``None`` at the end."""
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
        for request in abandoned:
            request.fail(BackendClosed(_CLOSED))
