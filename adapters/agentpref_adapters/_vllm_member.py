"""One vLLM server as a member of a fleet: whether it serves our base, and what is ready in it.

A server may restart at any moment, empty, or as another one. So nothing that is known of it
outlives a sign of that: an adapter that it does not know any more, or a call without an answer.
Knows nothing of other servers, and of prompts and text: how a revision is checked and probed is
passed in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from agentpref.errors import GenerationFailed, ServerUnreachable
from agentpref.serve.backend import Revision
from agentpref.types import BASE
from agentpref_adapters._vllm_server import Model, Piece, Server

LONGEST_PASS_SECONDS = 30.0


class Handling(NamedTuple):
    """What is done with servers and revisions.

    ``recognise`` refuses a server whose base is another one, ``check`` a revision whose files are
    no longer those that were published. ``path_of`` is where a server finds a revision's folder.
    ``probe`` asks a server one question of a revision, and raises ``SwapFailed`` if the answer is
    nonsense.
    """

    recognise: Callable[[Server, Model], None]
    check: Callable[[Revision], None]
    path_of: Callable[[Revision], str]
    probe: Callable[[Server, Model], Piece]


class Member:
    """A server, and what is known of it; may be used from any thread."""

    def __init__(self, server: Server, handling: Handling) -> None:
        """Ask nothing yet."""
        self.server = server
        self.passed_over_until = 0.0
        self._handling = handling
        self._base: Model | None = None
        self._max_loras: int | None = None
        self._ready: set[str] = set()
        self._failures = 0
        self._loading = threading.Lock()  # one thread loads and probes; the others wait for it

    def base(self) -> Model:
        """The base model as the server names it.

        Raises:
            WrongBase: it is not ours.
            ServerUnreachable: the server does not answer, or serves nothing.
        """
        known = self._base
        if known is None:
            known = next((m for m in self.server.models() if m.parent is None), None)
            if known is None:
                raise ServerUnreachable(
                    f"{self.server.url} serves no model; check how it was started"
                )
            self._handling.recognise(self.server, known)
            self._base = known
        return known

    def max_loras(self) -> int | None:
        """How many adapters it runs together, where it says so by now.

        Raises:
            ServerUnreachable: the server does not answer.
        """
        if self._max_loras is None:
            self._max_loras = self.server.max_loras()
        return self._max_loras

    def load(self, revision: Revision) -> None:
        """Load a revision, unless it is ready.

        Raises:
            RevisionError: its files are not those that were published, or the base is another.
            SwapFailed: the server refuses it.
            ServerUnreachable: the server does not answer.
        """
        self.base()
        with self._loading:
            if revision.revision_id not in self._ready:
                self._load(revision)

    def probe(self, name: str) -> Piece:
        """Probe a revision that is loaded; from then on it is ready.

        Raises:
            SwapFailed: the answer is nonsense.
            ServingError: there is none.
        """
        piece = self._handling.probe(self.server, self.base()._replace(name=name))
        self._ready.add(name)
        return piece

    def serving(self, name: str, revision: Revision | None) -> Model:
        """What a request for a revision names here, once that is ready; ``None`` is unknown.

        Raises:
            GenerationFailed: the revision is unknown, and not the base.
            AgentprefError: as :meth:`load` and :meth:`probe`.
        """
        base = self.base()
        if name == BASE:
            return base
        if revision is None:
            raise GenerationFailed(f"{name} is not loaded; load it first")
        if name not in self._ready:
            with self._loading:
                if name not in self._ready:
                    self._load(revision)
                    self.probe(name)
        return base._replace(name=name)

    def unload(self, name: str) -> None:
        """Unload a revision.

        Raises:
            ServingError: the server refuses to, or does not answer.
        """
        self._ready.discard(name)
        self.server.unload(name)

    def forget(self) -> None:
        """Know nothing of the server any more: it may be another one by now."""
        self._base = None
        self._max_loras = None
        self._ready = set()

    def pass_over(self) -> None:
        """Forget it, and ask others first for a while, the longer the more often this happens."""
        self.forget()
        self._failures += 1
        seconds = min(2.0 ** (self._failures - 1), LONGEST_PASS_SECONDS)
        self.passed_over_until = time.monotonic() + seconds

    def praise(self) -> None:
        """Take note that it answered."""
        self._failures = 0
        self.passed_over_until = 0.0

    def _load(self, revision: Revision) -> None:
        self._handling.check(revision)
        self.server.load(revision.revision_id, self._handling.path_of(revision))
