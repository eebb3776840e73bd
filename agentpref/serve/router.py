"""The router: which revision answers a request, and how one replaces another.

A request is bound to one revision at admission, by a lease, and keeps it to its last token. A swap
validates, loads and probes the new revision beside the old one, changes the registry by
compare-and-swap, and then changes the route by which later requests are admitted. A failure before
that leaves the route as it was.

A revision is pinned, visibly for other processes, from before it is validated until the route, the
rollback and every lease are done with it. It is then unloaded at the places where nobody else uses
it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from agentpref.errors import (
    AgentprefError,
    BackendClosed,
    RecordError,
    RevisionError,
    ServingError,
    SwapFailed,
    UnknownRevision,
)
from agentpref.home import is_of_system
from agentpref.serve.backend import GenerationRequest, Reply, ServingBackend
from agentpref.serve.pins import Pins
from agentpref.serve.quarantine import intact_previous, quarantining
from agentpref.serve.registry import Registry, ServingState
from agentpref.types import BASE

DRAIN_SECONDS = 30.0
"""How long a swap waits for requests whose revision takes the room of the new one."""

_logger = logging.getLogger(__name__)


class Lease(ExitStack):
    """The right to use one revision until it is released; a context manager.

    ``revision`` is the id to generate with and to record, ``"base"`` for the bare base model.
    """

    def __init__(self, revision: str, give_back: Callable[[str], None]) -> None:
        super().__init__()
        self.revision = revision
        self.callback(give_back, revision)

    def release(self) -> None:
        """Give the revision back; a second call does nothing."""
        self.close()


class Router:
    """Admits requests to the revision that serves, and swaps it without dropping any.

    A new router serves what the registry says. :meth:`sync` follows later changes by other
    processes, and a :class:`~agentpref.serve.watch.Watcher` calls it regularly. All methods may be
    called from any thread. A router is a context manager that closes itself. It belongs to the
    process that made it: a forked process opens a router of its own.

    Args:
        registry: the revisions of one namespace, and which of them is live.
        backend: the engine; several routers, of several namespaces, may share one.

    Raises:
        RevisionError: the live revision is broken, in quarantine, or made for another base model.
        SwapFailed: the live revision could not be loaded.
        NotKept: the home cannot be written, so no other process could see what is loaded.
    """

    def __init__(self, registry: Registry, backend: ServingBackend) -> None:
        self.registry = registry
        self.backend = backend
        self._route = ServingState(registry.namespace, None, None, 0.0, 0)
        self._last_live: str | None = None  # stays loaded, so that a rollback is instant
        self._leases: Counter[str] = Counter()
        self._coming: set[str] = set()  # what the current swap needs
        self._pins = Pins(registry.home.pins, *backend.capabilities().places)
        # Three locks, taken in this order. `_swapping` is held for a whole swap or unloading;
        # `_flipping` while the registry and then the route change, so that both change in the same
        # order; `_pointers` for moments, to read or change the route and the leases. The last is
        # notified when a revision has no lease any more.
        self._swapping, self._flipping = threading.Lock(), threading.Lock()
        self._pointers = threading.Condition()
        self._closed = False
        self._process = os.getpid()
        self._at_close = ExitStack()
        self._at_close.callback(self._pins.close)
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._pin_loaded()
            try:
                self.sync()
            except (AgentprefError, OSError) as error:
                is_known = isinstance(error, AgentprefError) or is_of_system(error)
                if not (is_known and self._route.generation):  # not even the live one is ready
                    raise
                message = "the canary of %r cannot be made ready; live serves its threads"
                _logger.warning(message, registry.namespace, exc_info=True)
            on_failure.pop_all()

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def at_close(self, end: Callable[[], None]) -> None:
        """Call ``end`` when the router is closed; the last one added is called first."""
        self._at_close.callback(end)

    def close(self) -> None:
        """Admit no more requests, and close what belongs to the router. Closing twice is harmless.

        This closes the backend if ``open_router`` made it. What is loaded in an engine of another
        process stays loaded there. In a forked process this does nothing.
        """
        if os.getpid() != self._process:
            return
        with self._pointers:
            self._closed = True
        with self._swapping, self._flipping:
            pass  # a swap under way ends first, and no other can begin
        self._at_close.close()

    @property
    def serving(self) -> ServingState:
        """What this router admits requests to now."""
        return self._route

    def acquire(self, thread_id: str | None = None) -> Lease:
        """Admit a request: bind it to the revision that serves its thread now.

        Args:
            thread_id: the conversation. During a canary, a thread is served by the canary or by the
                live revision, always by the same one. Requests without a thread are served by live.

        Raises:
            BackendClosed: the router was closed, or belongs to another process.
        """
        self._require_open()
        with self._pointers:
            self._require_open()
            name = self._route.revision_for(thread_id)
            self._leases[name] += 1
        return Lease(name, self._give_back)

    def generate(self, request: GenerationRequest, *, thread_id: str | None = None) -> Reply:
        """Answer a request with the revision that serves its thread now."""
        with self.acquire(thread_id) as lease:
            return self.backend.generate(lease.revision, request)

    def stream(
        self, request: GenerationRequest, *, thread_id: str | None = None
    ) -> Iterator[str | Reply]:
        """Yield pieces of text, then the whole reply; admitted when the first is asked for."""
        with self.acquire(thread_id) as lease:
            yield from self.backend.stream(lease.revision, request)

    def activate(self, revision_id: str, *, expected_generation: int | None = None) -> ServingState:
        """Make a revision live: once this returns, it serves new requests.

        Args:
            revision_id: the revision to serve, ``"base"`` for the bare base model.
            expected_generation: refuse if what is served has changed since that generation.

        Raises:
            RevisionError: it is unknown, broken, edited, or was trained on another base model.
            SwapFailed: it could not be loaded, or its answer to the probe is not finite.
            GenerationConflict: another process changed what is served in between.
        """
        expected = expected_generation
        with self._swap():
            self._prepare(None if revision_id == BASE else revision_id)
            with self._flipping:
                return self._flip(self.registry.promote(revision_id, expected_generation=expected))

    def canary(self, revision_id: str | None, weight: float) -> ServingState:
        """Let a revision serve a share of the threads; ``canary(None, 0)`` ends that.

        Raises:
            RevisionError: the weight is out of range.
            AgentprefError: as for :meth:`activate`.
        """
        with self._swap():
            state = self.registry.state()
            self._prepare(state.live, revision_id)
            with self._flipping:
                return self._flip(
                    self.registry.canary(revision_id, weight, expected_generation=state.generation)
                )

    def rollback(self) -> ServingState:
        """Undo the last promotion. The revision before it is still loaded, so this is instant.

        It does not wait for a swap under way, unless the revision has to be loaded again. A
        revision that is damaged is put into quarantine, and the one before it serves.

        Raises:
            RevisionError: no promotion is left to undo.
            AgentprefError: as for :meth:`activate`.
        """
        self._require_open()
        with self._flipping:
            self._require_open()
            expected, name = self.registry.state().generation, intact_previous(self.registry)
            # What is wanted stays loaded while the flip lock is held: see `_make_room`.
            if name is None or name in self._wanted():
                done = self.registry.roll_back_to(name, expected_generation=expected)
                if done is not None:
                    return self._flip(done)
        with self._swap():
            expected = self.registry.state().generation
            while True:
                name = intact_previous(self.registry)
                try:
                    self._prepare(name)
                except (RevisionError, SwapFailed):
                    if name == intact_previous(self.registry):
                        raise  # else it is in quarantine now, and passed over
                    continue
                with self._flipping:
                    done = self.registry.roll_back_to(name, expected_generation=expected)
                    if done is not None:
                        return self._flip(done)

    def sync(self) -> ServingState:
        """Follow what other processes made live; does nothing if nothing changed.

        The live revision is followed first. A canary that cannot be made ready gets no threads, and
        the next call tries it again.

        Raises:
            AgentprefError: as for :meth:`activate`. What served before still serves, or the new
                live revision without its canary.
        """
        with self._swap():
            before = self._route
            state = self.registry.state()
            if state == before:
                return state
            self._prepare(state.live)
            if state.canary is not None and state.canary not in self._wanted():
                alone = state._replace(canary=None, weight=0.0)
                self._follow(alone, before)
                self._prepare(state.canary)
                before = alone
            return self._follow(state, before)

    @contextmanager
    def _swap(self) -> Iterator[None]:
        """Run one swap at a time; then unload what is not wanted, also if the swap failed."""
        self._require_open()
        with ExitStack() as at_end:
            at_end.callback(self._sweep)
            at_end.enter_context(self._swapping)
            at_end.callback(self._coming.clear)
            self._require_open()
            yield

    def _require_open(self) -> None:
        """Refuse a closed router. Call it before taking a lock too: a fork may have copied it."""
        if os.getpid() != self._process:
            raise BackendClosed(
                f"the router of {self.registry.namespace!r} belongs to process {self._process}, "
                f"which this one was forked from; open a router after the fork, as gunicorn does "
                f"without --preload"
            )
        if self._closed:
            raise BackendClosed(
                f"the router of {self.registry.namespace!r} was closed; open another one"
            )

    def _prepare(self, *names: str | None) -> None:
        """Make revisions ready beside those that serve; ``None`` is the base, which always is."""
        ready = self._wanted()
        self._coming.update(name for name in names if name)
        new = [self.registry.get(name) for name in names if name and name not in ready]
        for revision in new:
            self._pins.take(revision.revision_id)
            self.registry.require_fit(revision, untainted=False)
            with quarantining(self.registry, revision):
                self.backend.validate(revision)
        if new:
            self._make_room()
        try:
            for revision in new:
                with quarantining(self.registry, revision):
                    self.backend.load(revision)
                    self.backend.probe(revision.revision_id)
        except BackendClosed:
            raise
        except ServingError as error:
            raise SwapFailed(
                f"{revision.revision_id} could not be made ready: {error}; "
                f"{self._route.live or 'the base model'} still serves"
            ) from error

    def _pin_loaded(self) -> None:
        """Pin what the engine has loaded of this namespace, so that it is unloaded when idle."""
        for name in self.backend.list_loaded():
            with suppress(UnknownRevision):
                self._pins.take(self.registry.get(name).revision_id)

    def _make_room(self) -> None:
        """If the engine would be too full, unload what is kept for a rollback, or for nobody.

        If that is not enough, wait for the requests in flight whose revision is going.
        """
        if not self._is_full():
            return
        with self._flipping, self._pointers:
            if self._last_live not in self._coming:
                self._last_live = None
        self._pin_loaded()
        self._unload_idle()
        if self._is_full():
            with self._pointers:
                self._pointers.wait_for(
                    lambda: not self._unwanted().intersection(self._leases), DRAIN_SECONDS
                )
            self._unload_idle()

    def _is_full(self) -> bool:
        room = self.backend.capabilities().max_loaded
        return room is not None and len(self._coming.union(self.backend.list_loaded())) > room

    def _follow(self, state: ServingState, before: ServingState) -> ServingState:
        """Change the route to what the registry said, unless a rollback changed it in between."""
        with self._flipping:
            return self._flip(state) if self._route is before else self._route

    def _flip(self, state: ServingState) -> ServingState:
        """Admit by a state from now on. Call it with the flip lock held."""
        with self._pointers:
            if state.live != self._route.live:
                self._last_live = self._route.live
            self._route = state
        return state

    def _give_back(self, name: str) -> None:
        if os.getpid() != self._process:
            return
        with self._pointers:
            self._leases[name] -= 1
            if not self._leases[name]:
                del self._leases[name]
                self._pointers.notify_all()
        self._sweep()

    def _sweep(self) -> None:
        """Unload what is idle, unless a swap is under way: it sweeps when it ends.

        A caller that finds the lock taken returns: its holder comes here after releasing it.
        """
        while self._idle() and self._swapping.acquire(blocking=False):
            try:
                if self._closed or not self._unload_idle():
                    return
            finally:
                self._swapping.release()

    def _wanted(self) -> set[str | None]:
        """What stays loaded. All of it has passed the probe."""
        with self._pointers:
            return {self._route.live, self._route.canary, self._last_live}

    def _unwanted(self) -> set[str]:
        """Loaded revisions that get no new request, now or by a rollback or the current swap."""
        return self._pins.names - self._wanted() - self._coming

    def _idle(self) -> set[str]:
        with self._pointers:
            return self._unwanted() - self._leases.keys()

    def _unload_idle(self) -> bool:
        """Unpin what is idle, and unload it where nobody else uses it; say whether that worked.

        A failure is logged and tried again later: it must not fail the request that just ended.
        """
        name = None
        try:
            for name in self._idle():
                with self._pins.drop(name) as places:
                    if places:
                        self.backend.unload(name, places)
        except (ServingError, RecordError):
            _logger.warning("%s could not be unloaded and stays loaded", name, exc_info=True)
            return False
        return True
