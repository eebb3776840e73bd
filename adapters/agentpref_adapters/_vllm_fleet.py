"""Several vLLM servers that serve the same base: who answers, and what each of them has loaded.

A request goes to the server that has the least to do. One that does not answer is passed over for a
moment; what is said to it meanwhile is lost on it, and made good when it is back: a revision is
loaded into a server at the latest when the first request for it arrives there. Knows nothing of
prompts and text: how a revision is checked and probed is passed in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from agentpref.errors import (
    GenerationFailed,
    RevisionError,
    ServerUnreachable,
    ServingError,
    SwapFailed,
)
from agentpref.serve.backend import Revision
from agentpref.types import BASE
from agentpref_adapters._vllm_server import Model, NotLoaded, Piece, Server, TooSlow

T = TypeVar("T")

Action = Callable[[Server, Model], T]
"""What is done with a server and the model of it that a request is for."""

_PASSED_OVER_SECONDS = 1.0


class _Member:
    """A server and what is known of it.

    Of one that does not answer it is forgotten what it serves, since it may restart as another.
    ``ready`` may then name what it lost: the request that meets this puts it right.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.loading = threading.Lock()
        self.base: Model | None = None
        self.max_loras: int | None = None
        self.ready: set[str] = set()
        self.passed_over_until = 0.0

    def forget(self) -> None:
        self.base = None
        self.max_loras = None
        self.passed_over_until = time.monotonic() + _PASSED_OVER_SECONDS


class Fleet:
    """Loads into all servers, and finds one for each request.

    Args:
        servers: clients of the servers.
        recognise: refuses a server whose base is another one; called when a server is new.
        check: refuses a revision whose files are no longer those that were published.
        path_of: where a server finds a revision's folder.
        probe: asks a server one question of a revision, and raises ``SwapFailed`` if the answer
            is nonsense.
        patience: seconds for which a request waits for any server to answer.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        recognise: Callable[[Server, Model], None],
        check: Callable[[Revision], None],
        path_of: Callable[[Revision], str],
        probe: Callable[[Server, Model], Piece],
        patience: float,
    ) -> None:
        """Meet the servers when they are first needed."""
        self._members = [_Member(server) for server in servers]
        self._recognise, self._check, self._path_of = recognise, check, path_of
        self._probe, self._patience = probe, patience
        self._revisions: dict[str, Revision] = {}

    def greet(self) -> None:
        """Wait for a first server that answers.

        Raises:
            ServerUnreachable: none does.
            WrongBase: it serves another base.
        """
        self._patiently(lambda: self._everywhere(self._base))

    def load(self, revision: Revision) -> None:
        """Load a revision into every server that answers.

        Raises:
            SwapFailed: one refuses it; then none keeps it.
            ServerUnreachable: none answers.
        """
        name = revision.revision_id
        self._revisions[name] = revision
        try:
            self._everywhere(lambda member: self._load(member, revision))
        except ServingError:
            self.unload(name)
            raise

    def probe(self, name: str) -> Piece:
        """Probe a revision in every server that answers; from then on they are ready to serve it.

        Returns:
            What one of them answered.

        Raises:
            SwapFailed: an answer is nonsense.
            ServerUnreachable: none answers.
        """
        return self._everywhere(lambda member: self._prepare(member, name))[0]

    def unload(self, name: str) -> None:
        """Unload a revision everywhere; a server that is gone holds nothing.

        Raises:
            ServingError: a server refuses to unload it.
        """
        self._revisions.pop(name, None)
        for member in self._members:
            member.ready.discard(name)
            try:
                member.server.unload(name)
            except TooSlow:
                raise
            except ServerUnreachable:
                member.forget()

    def loaded(self) -> tuple[str, ...]:
        """The adapters that any server that answers has, as each of them tells it."""
        names: dict[str, None] = {}
        for member in self._members:
            try:
                models = member.server.models()
            except ServerUnreachable:
                member.forget()
                continue
            names |= {model.name: None for model in models if model.parent is not None}
        return tuple(names)

    def max_loras(self) -> int | None:
        """The smallest number of adapters that a server says it runs together, where any says."""
        for member in self._members:
            if member.max_loras is None and member.base is not None:
                self._count(member)
        known = [member.max_loras for member in self._members if member.max_loras is not None]
        return min(known, default=None)

    def call(self, name: str, action: Action[T]) -> T:
        """Do something with a server that is ready to serve a revision, or the base.

        It is tried again, with another server where there is one, as long as patience lasts.

        Raises:
            GenerationFailed: the revision is not loaded, or cannot be loaded again.
            ServerUnreachable: no server answers, or the one that does is too slow.
        """
        try:
            return self._patiently(lambda: self._try(name, action))
        except (RevisionError, SwapFailed, NotLoaded) as error:
            raise GenerationFailed(f"{name} is in no server any more: {error}") from error

    def close(self) -> None:
        """Close all connections."""
        for member in self._members:
            member.server.close()

    def _count(self, member: _Member) -> None:
        try:
            member.max_loras = member.server.max_loras()
        except ServerUnreachable:
            member.forget()

    def _try(self, name: str, action: Action[T]) -> T:
        member = self._least_busy()
        try:
            return action(member.server, self._model(member, name))
        except ServerUnreachable:
            member.forget()
            raise
        except NotLoaded:
            member.ready.discard(name)
            raise

    def _least_busy(self) -> _Member:
        now = time.monotonic()
        return min(self._members, key=lambda m: (m.passed_over_until > now, m.server.busy))

    def _model(self, member: _Member, name: str) -> Model:
        """What a request names in this server, once that is ready there."""
        base = self._base(member)
        if name == BASE:
            return base
        if name not in member.ready:
            revision = self._revisions.get(name)
            if revision is None:
                raise GenerationFailed(f"{name} is not loaded; load it first")
            self._load(member, revision)
            self._prepare(member, name)
        return base._replace(name=name)

    def _base(self, member: _Member) -> Model:
        if member.base is None:
            base = next((m for m in member.server.models() if m.parent is None), None)
            if base is None:
                raise ServerUnreachable(
                    f"{member.server.url} serves no model; check how it was started"
                )
            self._recognise(member.server, base)
            member.base = base
        return member.base

    def _load(self, member: _Member, revision: Revision) -> None:
        self._base(member)
        with member.loading:
            if revision.revision_id not in member.ready:
                self._check(revision)
                member.server.load(revision.revision_id, self._path_of(revision))

    def _prepare(self, member: _Member, name: str) -> Piece:
        piece = self._probe(member.server, self._base(member)._replace(name=name))
        member.ready.add(name)
        return piece

    def _everywhere(self, act: Callable[[_Member], T]) -> list[T]:
        """Act on all servers at once. Those that do not answer are left out, unless all are."""

        def reach(member: _Member) -> T | ServerUnreachable:
            try:
                return act(member)
            except ServerUnreachable as error:
                member.forget()
                return error

        with ThreadPoolExecutor(len(self._members)) as pool:
            found = list(pool.map(reach, self._members))
        done = [one for one in found if not isinstance(one, ServerUnreachable)]
        if not done:
            raise next(one for one in found if isinstance(one, ServerUnreachable))
        return done

    def _patiently(self, attempt: Callable[[], T]) -> T:
        retrying = Retrying(
            retry=retry_if_exception(_passes),
            wait=wait_random_exponential(multiplier=0.1, max=2),
            stop=stop_after_delay(self._patience),
            reraise=True,
        )
        return retrying(attempt)


def _passes(error: BaseException) -> bool:
    """Whether it may be gone in a moment. A server that is too slow is not to be asked twice."""
    return isinstance(error, ServerUnreachable | NotLoaded) and not isinstance(error, TooSlow)
