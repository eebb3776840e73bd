"""The router: which revision answers a request, and how one takes over from another.

A request is bound to one revision at admission, by a lease, and keeps it to its last token. A swap
validates, loads and probes the new revision beside the old one, changes the registry by
compare-and-swap, and only then flips the route that later requests are admitted by; whatever fails
before that leaves the route as it was. A revision is held, for other processes to see, from before
it is validated until it is neither routed to, nor what was live just before, nor leased; it is then
unloaded, where nobody else holds it at the same place. Knows nothing of prompts and models.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType

from agentpref.errors import (
    AgentprefError,
    BackendClosed,
    RecordError,
    ServingError,
    UnknownRevision,
)
from agentpref.serve import loading
from agentpref.serve.admission import Lease, chosen
from agentpref.serve.backend import GenerationRequest, Reply, ServingBackend
from agentpref.serve.pins import Pins
from agentpref.serve.registry import Registry, ServingState
from agentpref.types import BASE

DRAIN_SECONDS = 30.0
"""How long a swap waits for requests in flight whose revision takes the room of the new one."""

_logger = logging.getLogger(__name__)


class Router:
    """Admits requests to the revision that serves, and swaps it without dropping any.

    A router serves what the registry says at the moment it is made; :meth:`sync` follows what
    other processes change later, and a :class:`~agentpref.serve.watch.Watcher` calls it by itself.
    All methods may be called from any thread. A router is a context manager that closes itself.
    It belongs to the process that made it: one that is forked off opens a router of its own.

    Args:
        registry: the revisions of one namespace, and which of them is live.
        backend: the engine; several routers, of several namespaces, may share one.

    Raises:
        RevisionError: what is live is broken, in quarantine, or made for another base.
        SwapFailed: what is live could not be loaded.
        NotKept: the home takes no files, so that nobody could see what is loaded.
    """

    def __init__(self, registry: Registry, backend: ServingBackend) -> None:
        """Load what is live, and tidy up what a router before left loaded."""
        self.registry = registry
        self.backend = backend
        self._route = ServingState(registry.namespace, None, None, 0.0, 0)
        self._last_live: str | None = None  # stays loaded, so that a rollback is instant
        self._leases: Counter[str] = Counter()
        self._held: set[str] = set()  # what the backend may have loaded in our name
        self._coming: set[str] = set()  # what the swap at hand is about to need
        self._pins = Pins(registry.home.pins, *backend.capabilities().places)
        # Three locks, taken in this order. Held for whole swaps and unloads, one at a time; while
        # the registry and then the route change, so that both do in one order; and for moments:
        # the route, the leases, what is held. The last is told when a revision is given back.
        self._swapping, self._flipping = threading.Lock(), threading.Lock()
        self._pointers = threading.Condition()
        self._closed = False
        self._process = os.getpid()
        self._at_close = ExitStack()
        self._at_close.callback(self._pins.close)
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._adopt()
            self._open()
            on_failure.pop_all()

    def __enter__(self) -> Router:
        """Serve for a block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the router."""
        self.close()

    def at_close(self, end: Callable[[], None]) -> None:
        """Have something ended when the router is closed; what was added last ends first."""
        self._at_close.callback(end)

    def close(self) -> None:
        """Admit nothing more, and end what belongs to the router; closing twice is harmless.

        The backend is closed too where ``open_router`` made it. What is loaded in an engine of
        another process stays loaded there. In a process that was forked off, this does nothing:
        all that there is to end is the parent's.
        """
        if self._is_foreign():
            return
        with self._pointers:
            self._closed = True
        with self._swapping, self._flipping:
            pass  # a swap under way is finished, and no other can begin
        self._at_close.close()

    @property
    def serving(self) -> ServingState:
        """What this router admits requests to at the moment."""
        return self._route

    def acquire(self, thread_id: str | None = None) -> Lease:
        """Admit a request: bind it to the revision that serves its thread now.

        Args:
            thread_id: the conversation. While there is a canary, a thread is served by it or by
                live, always the same one; requests that name no thread are served by live.

        Raises:
            BackendClosed: the router was closed before, or belongs to the process that this one
                was forked from.
        """
        self._require_open()
        with self._pointers:
            self._require_open()
            name = chosen(self._route, thread_id)
            self._leases[name] += 1
        return Lease(name, self._give_back)

    def generate(self, request: GenerationRequest, *, thread_id: str | None = None) -> Reply:
        """Answer a request with the revision that serves its thread at this moment."""
        with self.acquire(thread_id) as lease:
            return self.backend.generate(lease.revision, request)

    def stream(
        self, request: GenerationRequest, *, thread_id: str | None = None
    ) -> Iterator[str | Reply]:
        """Yield pieces of text as they come, then the whole reply; all from one revision.

        The request is admitted when the first piece is asked for.
        """
        with self.acquire(thread_id) as lease:
            yield from self.backend.stream(lease.revision, request)

    def activate(self, revision_id: str, *, expected_generation: int | None = None) -> ServingState:
        """Make a revision live: once this returns, new requests are served by it.

        Args:
            revision_id: the revision to serve, ``"base"`` for the bare base model.
            expected_generation: refuse if what is served has changed since that generation.

        Raises:
            UnknownRevision: the registry has none of that id.
            InvalidAdapter: its files are broken, edited or unsupported.
            WrongBase: it was trained on another base model.
            SwapFailed: it could not be loaded, or answered the probe with nonsense.
            GenerationConflict: somebody changed what is served in between.
        """
        with self._swap():
            self._prepare(None if revision_id == BASE else revision_id)
            with self._flipping:
                return self._flip(
                    self.registry.promote(revision_id, expected_generation=expected_generation)
                )

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
        """Undo the last promotion. The revision before is still loaded, so this is instant.

        It does not even wait for another revision that is being made ready.

        Raises:
            RevisionError: no promotion is left to undo.
            AgentprefError: as for :meth:`activate`, where the revision had to be loaded.
        """
        if (state := self._rolled_back()) is not None:
            return state  # what is idle now is unloaded by the next swap, look or end of a request
        with self._swap():
            generation = self.registry.state().generation
            self._prepare(self.registry.previous())
            with self._flipping:
                return self._flip(self.registry.rollback(expected_generation=generation))

    def sync(self) -> ServingState:
        """Follow what other processes made live; does nothing if nothing changed.

        Live is followed first: a canary that cannot be made ready gets no threads, and is tried
        again by the next call.

        Raises:
            AgentprefError: as for :meth:`activate`; what served before still serves, or the new
                live one without its canary.
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

    def _open(self) -> None:
        """Serve what is live, if need be without a canary."""
        before = self._route
        try:
            self.sync()
        except (AgentprefError, OSError):
            if self._route is before:
                raise
            words = "the canary of %r cannot be made ready, so live serves its threads"
            _logger.warning(words, self.registry.namespace, exc_info=True)

    def _rolled_back(self) -> ServingState | None:
        """Roll back if nothing has to be loaded for it.

        What is wanted stays loaded for as long as the flip lock is held: see :meth:`_make_room`.
        """
        self._require_open()
        with self._flipping:
            self._require_open()
            state, name = self.registry.state(), self.registry.previous()
            if name is not None and name not in self._wanted():
                return None
            return self._flip(self.registry.rollback(expected_generation=state.generation))

    @contextmanager
    def _swap(self) -> Iterator[None]:
        """One swap at a time; afterwards whatever is no longer wanted is unloaded.

        That includes a revision that was loaded for a swap which then failed.
        """
        self._require_open()
        try:
            with self._swapping:
                self._require_open()
                try:
                    yield
                finally:
                    self._coming = set()
        finally:
            self._sweep()

    def _is_foreign(self) -> bool:
        return os.getpid() != self._process

    def _require_open(self) -> None:
        """Refuse to go on; asked before a lock is taken, which another thread had at a fork."""
        if self._is_foreign():
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
        """Have revisions ready beside those that serve; ``None`` is the base, which always is."""
        ready = self._wanted()
        self._coming.update(name for name in names if name)
        new = [self.registry.get(name) for name in names if name and name not in ready]
        for revision in new:
            self._hold(revision.revision_id)
            self.registry.require_available(revision)
            loading.validate(self.backend, self.registry, revision)
        if new:
            self._make_room()
        for revision in new:
            loading.load(self.backend, self.registry, revision, serving=self._route.live)

    def _hold(self, name: str) -> None:
        self._pins.take(name)
        with self._pointers:
            self._held.add(name)

    def _adopt(self) -> None:
        """Hold what is loaded of this namespace, so that it is unloaded unless it is wanted."""
        for name in self.backend.list_loaded():
            with suppress(UnknownRevision):
                self._hold(self.registry.get(name).revision_id)

    def _make_room(self) -> None:
        """Where the engine would be too full, give up what is kept for a rollback, or by nobody.

        What then is in the way may still be answering: that is waited for.
        """
        if not self._is_full():
            return
        with self._flipping, self._pointers:
            if self._last_live not in self._coming:
                self._last_live = None
        self._adopt()
        self._unload_idle()
        if self._is_full():
            with self._pointers:
                self._pointers.wait_for(lambda: not self._leaving(), DRAIN_SECONDS)
            self._unload_idle()

    def _is_full(self) -> bool:
        room = self.backend.capabilities().max_loaded
        return room is not None and len(self._coming.union(self.backend.list_loaded())) > room

    def _leaving(self) -> set[str]:
        """What is loaded for the sake of requests in flight alone."""
        return self._held.intersection(self._leases) - self._wanted() - self._coming

    def _follow(self, state: ServingState, before: ServingState) -> ServingState:
        """Flip to what the registry said, unless a rollback has overtaken that."""
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
        if self._is_foreign():
            return
        with self._pointers:
            self._leases[name] -= 1
            if not self._leases[name]:
                del self._leases[name]
                self._pointers.notify_all()
        self._sweep()

    def _sweep(self) -> None:
        """Unload what is idle, unless a swap is under way: that sweeps when it ends.

        The one who finds the lock taken may leave: its pin comes here after giving it back.
        """
        while self._idle() and self._swapping.acquire(blocking=False):
            try:
                if self._closed or not self._unload_idle():
                    return
            finally:
                self._swapping.release()

    def _wanted(self) -> set[str | None]:
        """What is to stay loaded. All of it has passed the probe."""
        with self._pointers:
            return {self._route.live, self._route.canary, self._last_live}

    def _idle(self) -> set[str]:
        """Loaded revisions that no request uses, none will, and no rollback is likely to want."""
        with self._pointers:
            return self._held - self._wanted() - self._coming - self._leases.keys()

    def _unload_idle(self) -> bool:
        """Give up what is idle, and unload it unless it is used by others; say if that worked.

        A failure must not fail the request whose end came to be the occasion, so it is logged, and
        tried again on the next one.
        """
        for name in self._idle():
            try:
                with self._pins.drop(name) as places:
                    if places:
                        self.backend.unload(name, places)
            except (ServingError, RecordError):
                _logger.warning("%s could not be unloaded and stays loaded", name, exc_info=True)
                return False
            with self._pointers:
                self._held.discard(name)
        return True
