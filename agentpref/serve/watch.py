"""Following what other processes make live, from a thread of a router's own.

The registry is asked for its generation every now and then, which costs one small read; a router
that has fallen behind swaps as if it had been told to. Knows nothing of how a swap is made, and
decides nothing: whatever cannot be made ready is left alone for a while, and what served still
serves.
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

    A swap that fails, if only for the canary, is logged once for each generation, and tried again
    after waits that double, up to half a minute. A newer generation is tried at once.

    Args:
        router: what is to follow; closing it ends the watcher first.
        every: seconds between two looks.
        clock: seconds that only ever grow, by which the waits are measured.

    Raises:
        ConfigError: ``every`` is not above 0.
    """

    def __init__(
        self, router: Router, every: float = 1.0, *, clock: Callable[[], float] = monotonic
    ) -> None:
        """Start looking; the thread is a daemon, so that a forgotten one holds up no exit."""
        if not every > 0:
            raise ConfigError(
                f"a router cannot look every {every!r} seconds; give some above 0, or None"
            )
        self._router = router
        self._every = every
        self._clock = clock
        self._failed: int | None = None  # the generation that could not be followed
        self._wait = every
        self._next_try = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agentpref-watch", daemon=True)
        router.at_close(self.close)
        self._thread.start()

    def close(self) -> None:
        """Stop looking; a swap that is under way is finished first. Closing twice is harmless."""
        self._ended.set()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with suppress(BackendClosed):
            while not self._ended.wait(self._every):
                self._look()

    def _look(self) -> None:
        """Swap if the registry has moved on, unless it is too soon to try that again."""
        generation: int | None = None
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
        except Exception as error:  # of whichever kind: without this thread nobody follows any more
            self._put_off(generation if generation is not None else -1, error)

    def _put_off(self, generation: int, error: Exception) -> None:
        if generation == self._failed:
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        else:
            self._failed, self._wait = generation, self._every
            _logger.warning(
                "generation %d of %r cannot be followed, and is tried again from time to time; "
                "%s still serves: %s",
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
