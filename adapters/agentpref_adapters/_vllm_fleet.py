"""Several vLLM servers that serve the same base: who answers, and where a revision is loaded.

A request goes to the server that has the least to do, and to the next one where that is gone or
cannot be given the revision. What is loaded while a server is away is made good when it is back: a
revision is loaded into a server at the latest when the first request for it arrives there. Knows
nothing of prompts and text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    stop_any,
    wait_random_exponential,
)
from tenacity.stop import stop_base

from agentpref.errors import (
    GenerationFailed,
    RevisionError,
    ServerUnreachable,
    ServingError,
    SwapFailed,
)
from agentpref.serve.backend import Revision
from agentpref_adapters._vllm_member import Handling, Member
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

Action = Callable[[Server, Model], T]
"""What is done with a server and the model of it that a request is for."""

_FAILING_ROUNDS = 8
"""How often a request is put to servers that answer 500: it may be what breaks them."""


class _Trouble(NamedTuple):
    """Why a server could not do what it was asked; another one may."""

    error: ServingError | RevisionError


class Fleet:
    """Loads into all servers, and finds one for each request.

    Args:
        servers: clients of the servers.
        handling: how they and revisions are checked.
        patience: seconds for which a request waits for any server to answer.
    """

    def __init__(self, servers: Sequence[Server], handling: Handling, *, patience: float) -> None:
        """Meet the servers when they are first needed."""
        self._members = [Member(server, handling) for server in servers]
        self._patience = patience
        self._revisions: dict[str, Revision] = {}

    def greet(self) -> None:
        """Wait for a first server that answers.

        Raises:
            ServerUnreachable: none does.
            WrongBase: it serves another base.
        """
        self._patiently(lambda: self._everywhere(Member.base))

    def load(self, revision: Revision) -> None:
        """Load a revision into every server that answers.

        Raises:
            SwapFailed: one refuses it. Others may have it by then, and are to unload it.
            ServerUnreachable: none answers.
        """
        name = revision.revision_id
        self._revisions[name] = revision
        try:
            self._everywhere(lambda member: member.load(revision))
        except (ServingError, RevisionError):
            self._revisions.pop(name, None)
            raise

    def probe(self, name: str) -> Piece:
        """Probe a revision in every server that answers; from then on they are ready to serve it.

        Returns:
            What one of them answered.

        Raises:
            SwapFailed: an answer is nonsense.
            ServerUnreachable: none answers.
        """
        revision = self._revisions[name]

        def probe(member: Member) -> Piece:
            try:
                return member.probe(name)
            except NotLoaded:  # it was away a moment ago
                member.load(revision)
                return member.probe(name)

        return self._everywhere(probe)[0]

    def unload(self, name: str, places: Collection[str]) -> None:
        """Unload a revision from some servers; one where nobody listens holds nothing.

        Raises:
            ServingError: one refuses to unload it, or does not say; the others have.
        """
        self._revisions.pop(name, None)
        troubles = [self._unload(m, name) for m in self._members if m.server.place in places]
        for trouble in troubles:
            if trouble is not None:
                raise trouble.error

    def loaded(self) -> tuple[str, ...]:
        """The adapters that any server that answers has, as each of them tells it."""
        names: dict[str, None] = {}
        for models in self._wherever(lambda member: member.server.models()):
            names |= {model.name: None for model in models if model.parent is not None}
        return tuple(names)

    def max_loras(self) -> int | None:
        """The smallest number of adapters that a server says it runs together, where any says."""
        known = self._wherever(Member.max_loras)
        return min((number for number in known if number is not None), default=None)

    def call(self, name: str, action: Action[T]) -> T:
        """Do something with a server that is ready to serve a revision, or the base.

        Raises:
            GenerationFailed: the request is refused, or no server can be given the revision.
            ServerUnreachable: no server answered as long as patience lasted, or one that did was
                too slow.
        """
        try:
            return self._patiently(lambda: self._round(name, action))
        except (RevisionError, SwapFailed, NotLoaded) as error:
            raise GenerationFailed(f"{name} is in no server any more: {error}") from error

    def close(self) -> None:
        """Close all connections."""
        for member in self._members:
            member.server.close()

    def _round(self, name: str, action: Action[T]) -> T:
        """Ask one server after the other; raise what may pass, if anything may."""
        now = time.monotonic()
        errors: list[ServingError | RevisionError] = []
        for member in sorted(
            self._members, key=lambda m: (m.passed_over_until > now, m.server.busy)
        ):
            answer = self._ask(member, name, action)
            if not isinstance(answer, _Trouble):
                return answer
            errors.append(answer.error)
        raise next((error for error in errors if _passes(error)), errors[0])

    def _ask(self, member: Member, name: str, action: Action[T]) -> T | _Trouble:
        try:
            answer = action(member.server, member.serving(name, self._revisions.get(name)))
        except TooSlow:
            member.pass_over()
            raise
        except NotLoaded as error:
            member.forget()
            return _Trouble(error)
        except (ServerUnreachable, SwapFailed, RevisionError) as error:
            member.pass_over()
            return _Trouble(error)
        member.praise()
        return answer

    def _unload(self, member: Member, name: str) -> _Trouble | None:
        try:
            member.unload(name)
        except NobodyListens:
            member.pass_over()
        except ServingError as error:
            return _Trouble(error)
        return None

    def _everywhere(self, act: Callable[[Member], T]) -> list[T]:
        """Act on all servers at once. Those that do not answer are left out, unless all are."""
        found = _Reached.by(self._members, act)
        if not found.done:
            raise found.away[0]
        return found.done

    def _wherever(self, act: Callable[[Member], T]) -> list[T]:
        """Act on all servers that answer, if any does."""
        return _Reached.by(self._members, act).done

    def _patiently(self, attempt: Callable[[], T]) -> T:
        retrying = Retrying(
            retry=retry_if_exception(_passes),
            wait=wait_random_exponential(multiplier=0.1, max=2),
            stop=stop_any(stop_after_delay(self._patience), _FailsTooOften()),
            reraise=True,
        )
        return retrying(attempt)


class _Reached(NamedTuple, Generic[T]):
    """What servers that answered gave, and why others did not."""

    done: list[T]
    away: list[ServerUnreachable]

    @classmethod
    def by(cls, members: Sequence[Member], act: Callable[[Member], T]) -> _Reached[T]:
        """Act on all at once; any other error than that one does not answer is raised."""

        def reach(member: Member) -> T | ServerUnreachable:
            try:
                return act(member)
            except ServerUnreachable as error:
                member.pass_over()
                return error

        with ThreadPoolExecutor(len(members)) as pool:
            found = list(pool.map(reach, members))
        return cls(
            [one for one in found if not isinstance(one, ServerUnreachable)],
            [one for one in found if isinstance(one, ServerUnreachable)],
        )


def _passes(error: BaseException) -> bool:
    """Whether it may be gone in a moment; one who is too slow is not to be asked twice."""
    lasting = isinstance(error, TooSlow | Misaddressed)
    return isinstance(error, ServerUnreachable | NotLoaded) and not lasting


class _FailsTooOften(stop_base):
    """The end of trying where servers answer, and answer 500."""

    def __call__(self, retry_state: RetryCallState) -> bool:
        """Say whether that was once too often."""
        outcome = retry_state.outcome
        error = outcome.exception() if outcome is not None else None
        return isinstance(error, Failing) and retry_state.attempt_number >= _FAILING_ROUNDS
