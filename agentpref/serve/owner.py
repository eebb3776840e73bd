"""One thread that owns a model, and the queue in front of it.

Engines that run inside a process are not safe to share: switching an adapter while another thread
generates mixes the two. Here everything that touches the model runs on one thread. Jobs of the same
key that wait at the same time are served together; a task, which changes the model, runs between
batches, after all jobs that were submitted before it. Knows nothing of models, text and revisions.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from agentpref.errors import BackendClosed, ServingError

T = TypeVar("T")


class Job(Protocol):
    """Something to serve: jobs of one ``key`` can be served together."""

    @property
    def key(self) -> str:
        """What has to be the same for all jobs of a batch."""

    def fail(self, error: ServingError) -> None:
        """Tell whoever waits that there will be no answer."""


J = TypeVar("J", bound=Job)


class Owner(Generic[J]):
    """Runs jobs in batches and tasks one by one, all on its own thread, oldest first.

    A process that was forked off has no such thread, and is told that the backend is closed.

    Args:
        serve: answers a batch. It must see to it that each job is answered or failed, and may not
            raise.
        max_batch: how many jobs are served together at most.
    """

    def __init__(self, serve: Callable[[list[J]], None], *, max_batch: int) -> None:
        """Start the thread; it is a daemon, so that a forgotten owner does not hold up an exit."""
        self._serve = serve
        self._max_batch = max_batch
        self._waiting: deque[J | _Task] = deque()
        self._arrived = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="agentpref-model", daemon=True)
        self._thread.start()

    def submit(self, job: J) -> None:
        """Queue a job.

        Raises:
            BackendClosed: the owner was closed before.
        """
        self._put(job)

    def call(self, change: Callable[[], T]) -> T:
        """Run a task on the owner's thread between batches; return or raise what it does."""
        task = _Task(change)
        self._put(task)
        result: T = task.future.result()
        return result

    def close(self) -> None:
        """Finish the batch at hand, fail what waits, and end the thread."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        self._thread.join()

    def _put(self, work: J | _Task) -> None:
        with self._arrived:
            if self._closed or not self._thread.is_alive():
                raise _closed()
            self._waiting.append(work)
            self._arrived.notify()

    def _run(self) -> None:
        try:
            while work := self._next():
                if isinstance(work, _Task):
                    work.run()
                else:
                    self._serve(work)
        finally:
            self._abandon()

    def _next(self) -> _Task | list[J] | None:
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            first = self._waiting.popleft()
            return first if isinstance(first, _Task) else [first, *self._companions(first)]

    def _companions(self, first: J) -> list[J]:
        """Take the waiting jobs that can go with the first one; none overtakes a task."""
        batch: list[J] = []
        passed: list[J] = []
        while self._waiting and len(batch) + 1 < self._max_batch:
            work = self._waiting[0]
            if isinstance(work, _Task):
                break
            (batch if work.key == first.key else passed).append(work)
            self._waiting.popleft()
        self._waiting.extendleft(reversed(passed))
        return batch

    def _abandon(self) -> None:
        with self._arrived:
            self._closed = True
            abandoned, self._waiting = self._waiting, deque()
        for work in abandoned:
            work.fail(_closed())


class _Task:
    """A change of the model, and the place where its outcome is waited for."""

    def __init__(self, change: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._change = change

    def run(self) -> None:
        try:
            self.future.set_result(self._change())
        except Exception as error:  # not swallowed: it is raised where the future is waited for
            self.future.set_exception(error)

    def fail(self, error: ServingError) -> None:
        self.future.set_exception(error)


def _closed() -> BackendClosed:
    return BackendClosed(
        "the backend was closed, or belongs to the process that this one was forked from; "
        "make a new one to go on serving"
    )
