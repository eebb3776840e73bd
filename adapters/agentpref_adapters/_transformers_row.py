"""One request while it is answered: what it was asked, what it has so far, and who waits for it.

A row is filled on the thread that owns the model and waited for on another. Knows nothing of
batches, caches and layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING

from agentpref.errors import GenerationFailed, ServingError
from agentpref.models.text_stream import TextStream
from agentpref.models.tool_calls import assistant_message
from agentpref.serve.backend import FinishReason, GenerationRequest, Reply

if TYPE_CHECKING:
    from torch import Generator

    from agentpref_adapters._transformers_adapters import Adapter


class NotFinite(GenerationFailed):
    """A revision gave a log-probability that is no number."""


class Row:
    """One request in a batch. ``done`` is set by whoever is first: the engine or the one who left.

    Args:
        key: the revision's id, or ``"base"``.
        adapter: the revision's matrices, which stay in memory as long as the row; ``None`` for the
            base.
        prompt: the token ids to go on from.
        text: what turns tokens into pieces of text.
        ends: the tokens that end a turn.
        room: how many tokens may be written.
        streaming: whether somebody waits for the pieces.
    """

    def __init__(
        self,
        key: str,
        adapter: Adapter | None,
        request: GenerationRequest,
        prompt: tuple[int, ...],
        text: TextStream,
        ends: frozenset[int],
        room: int,
        *,
        streaming: bool,
    ) -> None:
        """Nothing is written yet."""
        self.key = key
        self.adapter = adapter
        self.request = request
        self.prompt = prompt
        self.done = False
        self.generator = _generator(request)
        self._text = text
        self._ends = ends
        self._room = room
        self._streaming = streaming
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._outbox: SimpleQueue[str | Reply | ServingError] = SimpleQueue()

    @property
    def longest(self) -> int:
        """How many tokens there are at most in the end, those of the prompt included."""
        return len(self.prompt) + self._room

    def results(self) -> Iterator[str | Reply]:
        """Wait for what comes; leaving early, by whatever exception, tells the engine to stop."""
        try:
            item: str | Reply | ServingError = ""
            while not isinstance(item, Reply):
                item = self._outbox.get()
                if isinstance(item, ServingError):
                    raise item
                yield item
        finally:
            self.done = True

    def take(self, token: int, logprob: float) -> None:
        """Add a token; end the row if it was the last one."""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        if not math.isfinite(logprob):
            self.fail(NotFinite(f"{self.key} gave a logprob of {logprob}; roll it back"))
        elif token in self._ends:
            self._finish("stop", self._tokens[:-1])
        elif self._stopped(token):
            self._finish("stop", self._tokens)
        elif len(self._tokens) >= self._room:
            self._finish("length", self._tokens)

    def fail(self, error: ServingError) -> None:
        """Raise an error where the row is waited for, unless it has its reply."""
        if not self.done:
            self.done = True
            self._outbox.put(error)

    def _stopped(self, token: int) -> bool:
        """Turn the token into text as it comes, where somebody needs to see it so soon."""
        if self._streaming or self.request.stop:
            self._tell(self._text.push(token))
        return self._text.stopped

    def _finish(self, reason: FinishReason, tokens: list[int]) -> None:
        if not (self._streaming or self.request.stop):
            self._text.push(*tokens)
        self._tell(self._text.finish())
        self.done = True
        turn = len(self.request.messages)
        self._outbox.put(
            Reply(
                revision=self.key,
                message=assistant_message(self._text.text, turn=turn),
                token_ids=tuple(self._tokens),
                logprobs=tuple(self._logprobs),
                finish_reason=reason,
            )
        )

    def _tell(self, piece: str) -> None:
        if piece and self._streaming:
            self._outbox.put(piece)


def _generator(request: GenerationRequest) -> Generator | None:
    """A source of chance for one row alone, so that a seed means the same in every batch."""
    if request.temperature == 0:
        return None
    import torch

    generator = torch.Generator()
    if request.seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(request.seed)
