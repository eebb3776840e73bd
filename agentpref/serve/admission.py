"""Admission: which revision a request is bound to, and the lease that binds it.

Knows nothing of what is loaded, and of how one revision takes over from another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import TracebackType

from agentpref.serve.status import ServingState
from agentpref.types import BASE


class Lease:
    """The right to use one revision until it is released; a context manager.

    ``revision`` is the id to generate with and to log, ``"base"`` for the bare base model.
    """

    def __init__(self, revision: str, release: Callable[[str], None]) -> None:
        """Hold a revision; the router makes leases."""
        self.revision = revision
        self._release: Callable[[str], None] | None = release

    def __enter__(self) -> Lease:
        """Hold the revision for a block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the revision."""
        self.release()

    def release(self) -> None:
        """Give the revision back; a second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release(self.revision)


def chosen(route: ServingState, thread_id: str | None) -> str:
    """Name the revision that serves a thread, ``"base"`` for the bare base model.

    While there is a canary, a thread is served by it or by live, always the same one; a growing
    weight keeps the threads that it had. Requests of no thread are served by live.
    """
    if route.canary is not None and thread_id is not None:
        # Any string may name a thread, half a surrogate pair of somebody's JSON too.
        key = f"{route.canary}\n{thread_id}".encode(errors="surrogatepass")
        digest = hashlib.blake2b(key, digest_size=8).digest()
        if int.from_bytes(digest, "big") < route.weight * 2**64:
            return route.canary
    return route.live or BASE
