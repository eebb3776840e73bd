"""Clients that ask a router without a pause, and what they were told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle

from asked import QUESTIONS, ask

from agentpref.serve.backend import Reply, Revision
from agentpref.serve.router import Router

CLIENTS = 4


class Load:
    """Clients that ask without a pause; half of them stream, unless told not to.

    A stream that a server breaks off fails, since what was said cannot be taken back.
    """

    def __init__(self, router: Router, *, stream: bool = True) -> None:
        self.answered: list[tuple[str, Reply]] = []
        self.failed: list[Exception] = []
        self._router = router
        self._stream = stream
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the clients ask for as long as the block takes."""
        threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def more(self, replies: int) -> None:
        """Wait until so many more were answered, or one failed."""
        wanted = len(self.answered) + replies
        while len(self.answered) < wanted and not self.failed:
            threading.Event().wait(0.01)

    def _ask(self, client: int) -> None:
        for turn, question in enumerate(cycle(QUESTIONS)):
            if self._over.is_set():
                return
            request, thread_id = ask(question, max_tokens=12), f"{client}-{turn % 5}"
            try:
                if self._stream and client % 2:
                    *_, reply = self._router.stream(request, thread_id=thread_id)
                else:
                    reply = self._router.generate(request, thread_id=thread_id)
            except Exception as error:
                self.failed.append(error)
                return
            self.answered.append((question, reply))


def wrong(load: Load, revisions: Sequence[Revision], expected: Callable[..., Reply]) -> list[Reply]:
    """The replies that are not what the revision they name answers."""
    by_name = {revision.revision_id: revision for revision in revisions}
    right = {
        (name, question): expected(revision, ask(question, max_tokens=12)).token_ids
        for name, revision in by_name.items()
        for question in QUESTIONS
    }
    return [
        reply
        for question, reply in load.answered
        if reply.token_ids != right[reply.revision, question]
    ]
