"""Several vLLM servers with the same base model: which one answers, and where a revision is loaded.

A request goes to the server with the fewest active requests, and to the next one if that fails. A
server may restart at any moment, and is empty then, or serves another base. So what is known of a
server is forgotten when a call fails or an adapter is unknown there. A revision that a server lacks
is checked, loaded and probed there when the next request for it arrives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import tenacity

from agentpref.errors import (
    GenerationFailed,
    RevisionError,
    ServerUnreachable,
    ServingError,
    SwapFailed,
    WrongBase,
)
from agentpref.models.base_files import BaseFiles, read_base
from agentpref.serve.backend import Revision
from agentpref.serve.validate import check_published
from agentpref.types import BASE
from agentpref_adapters._vllm_server import (
    Failing,
    Misaddressed,
    Model,
    NobodyListens,
    NotLoaded,
    Piece,
    Server,
    TooSlow,
)

T = TypeVar("T")

LONGEST_PASS_SECONDS = 30.0

PATIENCE_SECONDS = 180.0
"""How long a request waits by default while no server answers: a restart of vLLM takes 90 s."""

CONNECT_SECONDS = 30.0
"""The most that a new backend waits for a first answer, since the address may be wrong."""
_FAILING_ROUNDS = 8
"""How often a request is sent to servers that answer 500: the request may be what breaks them."""


@dataclass(eq=False)
class Member:
    """A server of a fleet, and what is known of it; may be used from any thread.

    ``expected`` is the base model that the server must have. ``ask_probe`` asks the server one
    question of a revision, and raises ``SwapFailed`` if the answer is invalid. ``adapters_at`` is
    the folder in which the server sees the home's ``adapters/``; ``None``: the same as here.
    """

    server: Server
    expected: BaseFiles
    ask_probe: Callable[[Server, Model], Piece]
    adapters_at: str | None = None
    passed_over_until: float = field(default=0.0, init=False)
    _base: Model | None = field(default=None, init=False)
    _ready: set[str] = field(default_factory=set, init=False)
    _failures: int = field(default=0, init=False)
    _loading: Any = field(default_factory=threading.RLock, init=False)

    def base(self) -> Model:
        """The base model as the server names it; ``WrongBase`` if it is another model."""
        known = self._base
        if known is None:
            known = next((m for m in self.server.models() if m.parent is None), None)
            if known is None:
                raise ServerUnreachable(
                    f"{self.server.url} serves no model; check how it was started"
                )
            # It is compared where this machine can see the served folder.
            base, root = self.expected, Path(known.root)
            if known.root != base.name and root.is_dir() and not root.samefile(base.path):
                arguments = base.identity.get("chat_template_kwargs")
                found = read_base(known.root, arguments).identity
                if any(found[key] != base.identity[key] for key in ("digest", "template_digest")):
                    raise WrongBase(
                        f"{self.server.url} serves {root}, whose weights, tokenizer or template "
                        f"are not those of {base.name!r}; give the base that it serves"
                    )
            self._base = known
        return known

    def load(self, revision: Revision) -> None:
        """Load a revision, unless it is ready; ``RevisionError`` if its files were edited.

        The server reads the files by itself, so they are checked again once it has: a revision
        whose files changed meanwhile is unloaded.
        """
        self.base()
        name, path = revision.revision_id, str(revision.path)
        with self._loading:  # one thread loads and probes; others wait for it
            if name not in self._ready:
                check_published(revision)
                if self.adapters_at is not None:
                    path = str(PurePosixPath(self.adapters_at) / name)
                self.server.load(name, path)
                try:
                    check_published(revision)
                except RevisionError:
                    self.server.unload(name)
                    raise

    def probe(self, revision: Revision) -> Piece:
        """Probe a revision, which is loaded if it is not; it is ready to serve from then on."""
        name = revision.revision_id
        try:
            piece = self.ask_probe(self.server, self.base()._replace(name=name))
        except NotLoaded:  # the server did not answer when it was loaded, or restarted
            self.load(revision)
            piece = self.ask_probe(self.server, self.base()._replace(name=name))
        self._ready.add(name)
        return piece

    def serving(self, name: str, revision: Revision | None) -> Model:
        """Get a revision ready if it is not; return the model to name in a request."""
        base = self.base()
        if name == BASE:
            return base
        if revision is None:
            raise GenerationFailed(f"{name} is not loaded; load it first")
        if name not in self._ready:
            with self._loading:
                if name not in self._ready:
                    self.load(revision)
                    self.ask_probe(self.server, base._replace(name=name))
                    self._ready.add(name)
        return base._replace(name=name)

    def unload(self, name: str) -> None:
        """Unload a revision."""
        self._ready.discard(name)
        self.server.unload(name)

    def forget(self) -> None:
        """Forget what is known of the server, since it may have restarted."""
        self._base = None
        self._ready = set()

    def pass_over(self) -> None:
        """Forget the server, and prefer others for a while: 1 s, then 2 s, 4 s and so on."""
        self.forget()
        self._failures += 1
        seconds = min(2.0 ** (self._failures - 1), LONGEST_PASS_SECONDS)
        self.passed_over_until = time.monotonic() + seconds

    def answered(self) -> None:
        """Note that the server answered: it is no longer passed over."""
        self._failures = 0
        self.passed_over_until = 0.0


class Fleet:
    """Acts on all servers, and chooses one for each request, which waits ``patience`` seconds."""

    def __init__(self, members: Sequence[Member], *, patience: float) -> None:
        self._members = members
        self._patience = patience

    def connect(self) -> None:
        """Wait until a server answers; ``WrongBase`` if one has another base."""
        self._patiently(lambda: self.everywhere(Member.base), min(self._patience, CONNECT_SECONDS))

    def everywhere(self, act: Callable[[Member], T]) -> list[T]:
        """Act on all servers that answer; ``ServerUnreachable`` if none does."""
        done, errors = self.reach(act)
        if not done:
            raise errors[0]
        return done

    def reach(self, act: Callable[[Member], T]) -> tuple[list[T], list[ServerUnreachable]]:
        """Act on all servers at once; return the results, and the errors of unreachable ones."""
        errors: list[ServerUnreachable] = []

        def one(member: Member) -> list[T]:
            try:
                return [act(member)]
            except ServerUnreachable as error:
                member.pass_over()
                errors.append(error)
                return []

        with ThreadPoolExecutor(len(self._members)) as pool:
            return [result for found in pool.map(one, self._members) for result in found], errors

    def unload(self, name: str, places: Collection[str]) -> None:
        """Unload a revision at some places; where nobody listens, it is unloaded already.

        Where a server refuses or does not answer, the error is raised after all were asked.
        """
        errors = []
        for member in self._members:
            if member.server.place in places:
                try:
                    member.unload(name)
                except NobodyListens:
                    member.pass_over()
                except ServingError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def call(self, act: Callable[[Member], T]) -> T:
        """Act on the server with the fewest active requests that can do it.

        Raises:
            GenerationFailed: the request is refused, or no server can load the revision.
            ServerUnreachable: no server answered within ``patience``, or one was too slow.
        """
        try:
            return self._patiently(lambda: self._round(act), self._patience)
        except (RevisionError, SwapFailed, NotLoaded) as error:
            raise GenerationFailed(f"no server can serve the revision: {error}") from error

    def close(self) -> None:
        """Close all connections."""
        for member in self._members:
            member.server.close()

    def _round(self, act: Callable[[Member], T]) -> T:
        """Try one server after the other; raise a temporary error if there is one."""
        now = time.monotonic()
        errors: list[ServingError | RevisionError] = []
        order = sorted(self._members, key=lambda m: (m.passed_over_until > now, m.server.busy))
        for member in order:
            try:
                answer = act(member)
            except TooSlow:  # noqa: PERF203
                member.pass_over()
                raise
            except NotLoaded as error:
                member.forget()
                errors.append(error)
            except (ServerUnreachable, SwapFailed, RevisionError) as error:
                member.pass_over()
                errors.append(error)
            else:
                member.answered()
                return answer
        raise next((error for error in errors if _is_temporary(error)), errors[0])

    def _patiently(self, attempt: Callable[[], T], seconds: float) -> T:
        out_of_time = tenacity.stop_after_delay(seconds)
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_temporary),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=2),
            stop=lambda state: out_of_time(state) or _fails_too_often(state),
            reraise=True,
        )(attempt)


def _is_temporary(error: BaseException) -> bool:
    """Whether another attempt may succeed. A request that took too long is not sent twice."""
    lasting = isinstance(error, TooSlow | Misaddressed)
    return isinstance(error, ServerUnreachable | NotLoaded) and not lasting


def _fails_too_often(state: tenacity.RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome is not None else None
    return isinstance(error, Failing) and state.attempt_number >= _FAILING_ROUNDS
