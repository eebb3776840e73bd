"""Best-of-N: a backend that draws several answers, and gives the one that is scored best.

It wraps any backend, so a router, a gateway or a chat model asks for it by ``best_of`` alone. All
answers are of one revision. What it gives is no sample of that revision: it lies at most
log n − (n − 1)/n nats from it, which :func:`agentpref.reward.kl_of_best` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from agentpref.errors import GenerationFailed, RewardError
from agentpref.serve.backend import (
    Capabilities,
    GenerationRequest,
    Reply,
    Revision,
    ServingBackend,
)

Rank = Callable[[GenerationRequest, Sequence[Reply]], Sequence[float]]
"""Scores replies to a request; larger is better. It may raise ``RewardError``."""


class BestOf:
    """A serving backend that answers ``best_of`` requests by another one, and a score.

    >>> backend = BestOf(backend, open_reward(home).rank)      # doctest: +SKIP
    >>> router.generate(GenerationRequest(messages, temperature=0.8, best_of=8))  # doctest: +SKIP

    Args:
        backend: what generates; closing this closes it.
        rank: scores the answers, such as :meth:`agentpref.reward.RewardModel.rank`.
    """

    def __init__(self, backend: ServingBackend, rank: Rank) -> None:
        self._backend, self._rank = backend, rank

    def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
        """Answer a request, with the best of several answers if it asks for that.

        Raises:
            GenerationFailed: the answers cannot be scored, or none could be generated.
        """
        n = request.best_of
        if n == 1:
            return self._backend.generate(revision_id, request)
        with ThreadPoolExecutor(n) as pool:  # an engine answers them together
            replies = [
                *pool.map(
                    lambda place: self._backend.generate(revision_id, _numbered(request, place)),
                    range(n),
                )
            ]
        try:
            scores = self._rank(request, replies)
        except RewardError as error:
            raise GenerationFailed(f"the best of {n} cannot be chosen: {error}") from error
        best = max(range(n), key=scores.__getitem__)
        return replace(replies[best], score=scores[best])

    def stream(self, revision_id: str, request: GenerationRequest) -> Iterator[str | Reply]:
        """Yield pieces as they come; the best of several answers comes in one."""
        if request.best_of == 1:
            yield from self._backend.stream(revision_id, request)
            return
        reply = self.generate(revision_id, request)
        text = reply.message.get("content")
        if isinstance(text, str) and text:
            yield text
        yield reply

    def capabilities(self) -> Capabilities:
        """Those of the backend."""
        return self._backend.capabilities()

    def validate(self, revision: Revision) -> None:
        """As the backend does."""
        self._backend.validate(revision)

    def load(self, revision: Revision) -> None:
        """Load a revision into the backend."""
        self._backend.load(revision)

    def probe(self, revision_id: str) -> Reply:
        """Probe a revision in the backend."""
        return self._backend.probe(revision_id)

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        """Unload a revision from the backend."""
        self._backend.unload(revision_id, places)

    def list_loaded(self) -> tuple[str, ...]:
        """What the backend has loaded."""
        return self._backend.list_loaded()

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()


def _numbered(request: GenerationRequest, place: int) -> GenerationRequest:
    """The request of one of several answers: with a seed, each has one of its own."""
    seed = None if request.seed is None else request.seed + place
    return replace(request, best_of=1, seed=seed)
