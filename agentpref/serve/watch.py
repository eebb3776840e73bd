"""Following what other processes make live, from a thread of the router's own.

The watcher reads the registry's state regularly, which costs one small query, and calls the
router's ``sync`` when it has changed. If a revision cannot be made ready, what served still serves,
and the watcher tries again later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic

from agentpref.errors import AgentprefError, BackendClosed, ConfigError
from agentpref.home import Home
from agentpref.serve.backend import ServingBackend
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router

_LONGEST_WAIT = 30.0

_logger = logging.getLogger(__name__)


class Watcher:
    """Keeps a router at what the registry says, until the router or the watcher is closed.

    A swap that fails, if only for the canary, is logged once per generation, and tried again after
    waits that double, up to half a minute. A newer generation is tried at once.

    Args:
        router: the router to update; closing it closes the watcher first.
        every: seconds between two reads of the registry.
        clock: a monotonic clock, in seconds, which measures the waits.

    Raises:
        ConfigError: ``every`` is not above 0.
    """

    def __init__(
        self, router: Router, every: float = 1.0, *, clock: Callable[[], float] = monotonic
    ) -> None:
        if not every > 0:
            raise ConfigError(
                f"every is {every!r} seconds, but must be above 0, or None to follow by sync() only"
            )
        self._router, self._every, self._clock = router, every, clock
        self._failed: int | None = None  # the generation that could not be followed
        self._wait, self._next_try = every, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agentpref-watch", daemon=True)
        router.at_close(self.close)
        self._thread.start()

    def close(self) -> None:
        """Stop, after a swap that is under way. Closing twice is harmless."""
        self._ended.set()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with suppress(BackendClosed):
            while not self._ended.wait(self._every):
                self._look()

    def _look(self) -> None:
        """Swap if the registry has changed, unless it is too soon to try that again."""
        generation = -1  # until the registry is read
        try:
            state = self._router.registry.state()
            generation = state.generation
            if state == self._router.serving:
                self._failed = None
            elif generation != self._failed or self._clock() >= self._next_try:
                self._router.sync()
                self._failed = None
        except BackendClosed:
            raise
        except Exception as error:  # any other: without this thread, nothing follows the registry
            if generation == self._failed:
                self._wait = min(2 * self._wait, _LONGEST_WAIT)
            else:
                self._failed, self._wait = generation, self._every
                _logger.warning(
                    "generation %d of %r cannot be served yet and is tried again; %s still serves: "
                    "%s",
                    generation,
                    self._router.registry.namespace,
                    self._router.serving.live or "the base model",
                    error,
                    exc_info=None if isinstance(error, AgentprefError) else error,
                )
            self._next_try = self._clock() + self._wait


def open_router(
    home: Home | str | Path | None,
    make_backend: Callable[[], ServingBackend],
    *,
    namespace: str = "default",
    follow: float | None = 1.0,
) -> Router:
    """Open a router over a new backend; closing the router closes the backend, too.

    Args:
        home: the home, its folder, or ``None`` for ``AGENTPREF_HOME`` or ``./.agentpref``.
        make_backend: makes the engine, once the home is found.
        namespace: serve the revisions of this namespace.
        follow: seconds between two looks at what other processes made live; ``None``: never.

    Raises:
        NotAHome: there is no home in the folder.
        ConfigError: ``follow`` is not above 0.
        AgentprefError: the backend cannot be made, or cannot serve the live revision.
    """
    registry = Registry(home, namespace=namespace)
    with ExitStack() as on_failure:
        backend = make_backend()
        on_failure.callback(backend.close)
        router = Router(registry, backend)
        router.at_close(backend.close)
        on_failure.callback(router.close)
        if follow is not None:
            Watcher(router, follow)
        on_failure.pop_all()
    return router
