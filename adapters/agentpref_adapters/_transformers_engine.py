"""Generates answers to many requests together, each with its own revision, settings and length.

1. ``admit`` runs one forward pass over the prompts of new requests and writes their first tokens.
2. ``step`` runs one forward pass per batch and writes one more token of each of its requests.
3. Between two passes, requests that have ended leave their batch, and new ones join it. So a short
   request never waits for the end of a long one.

A cache of keys and values grows and shrinks on the left, where prompts are padded. Caches of other
kinds (sliding windows, linear attention) cannot be cut or joined: such a batch stays as it is until
all its requests have ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from agentpref.errors import AgentprefError, GenerationFailed, ServingError
from agentpref.models.continuation import Continuation, Prefix, turning_point
from agentpref.models.text_stream import TextStream
from agentpref.models.tokenizer import Ids
from agentpref.serve.backend import FinishReason, GenerationRequest, Reply, read_answer
from agentpref_adapters._transformers_adapters import Adapter, Layers, shares_of
from agentpref_adapters._transformers_grammar import Constraint
from agentpref_adapters._transformers_prefixes import Prefixes

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel


class NotFinite(GenerationFailed):
    """A revision gave a log-probability that is infinite or NaN."""


@dataclass(eq=False)
class ActiveRequest:
    """A request while it is answered: the model's thread fills it, and another thread waits.

    ``adapter`` is kept in memory until the answer ends (``None``: the base). ``prompt`` are the
    token ids to continue, with at most ``room`` tokens and up to one of ``ends``. Where
    ``streaming``, the caller reads pieces of text. ``constraint`` holds the answer to a grammar, if
    it has one.
    """

    revision: str
    adapter: Adapter | None
    request: GenerationRequest
    prompt: tuple[int, ...]
    text: TextStream
    ends: frozenset[int]
    room: int
    streaming: bool
    constraint: Constraint | None = None
    done: bool = False
    """Set at the end of the answer, or when the caller leaves."""
    generator: Generator | None = None
    _tokens: list[int] = field(default_factory=list)
    _unread: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _outbox: SimpleQueue[str | Reply | ServingError] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        """Give a sampled request its own random numbers: a seed means the same in every batch."""
        if self.request.temperature == 0:
            return
        import torch

        self.generator = torch.Generator()
        if self.request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.request.seed)

    def results(self) -> Iterator[str | Reply]:
        """Wait for pieces of text and the reply; leaving early makes the engine stop."""
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
        """Add a token, and end the answer if it is the last one."""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        if not math.isfinite(logprob):
            self.fail(NotFinite(f"{self.revision} gave a logprob of {logprob}; roll it back"))
            return
        if token not in self.ends:
            self._unread.append(token)
            if self.constraint is not None:
                self.constraint.take(token)
        if self.streaming or self.request.stop:  # otherwise text is decoded once, at the end
            self._read()
        if token in self.ends or self.text.stopped:
            self._finish("stop")
        elif len(self._tokens) >= self.room:
            self._finish("length")

    def fail(self, error: ServingError) -> None:
        """Raise an error in the thread that waits, unless the answer has ended."""
        if not self.done:
            self.done = True
            self._outbox.put(error)

    def _read(self, last: bool = False) -> None:
        piece = self.text.push(*self._unread)
        self._unread.clear()
        if last:
            piece += self.text.finish()
        if piece and self.streaming:
            self._outbox.put(piece)

    def _finish(self, reason: FinishReason) -> None:
        self._read(last=True)
        self.done = True
        message = read_answer(self.request, self.text.text)
        tokens, logprobs = tuple(self._tokens), tuple(self._logprobs)
        read = len(self.prompt)
        self._outbox.put(Reply(self.revision, message, tokens, logprobs, reason, read))


class Engine:
    """Answers requests on one model. ``ModelThread`` calls it, always on the same thread."""

    def __init__(self, model: PreTrainedModel, layers: Layers, pad: int) -> None:
        self._model = model
        self._layers = layers
        self._pad = pad
        self._turning_point = turning_point(model)
        self._prefixes = Prefixes(model, layers)
        self._requests: list[ActiveRequest] = []  # those that were admitted and have not ended
        self._batches: list[_Batch] = []

    @property
    def active(self) -> int:
        """How many requests are being answered, without ended ones that stay in a batch."""
        return sum(not request.done for request in self._requests)

    @property
    def has_work(self) -> bool:
        """Whether there is a batch."""
        return bool(self._batches)

    def admit(self, requests: list[ActiveRequest]) -> None:
        """Write the first token of each request, and add it to the requests being answered."""
        waiting = [request for request in requests if not request.done]
        self._requests += waiting
        together = [r for r in waiting if len(r.prompt) + r.room <= self._turning_point]
        for (adapter, tokens), group in self._by_prefix(together).items():
            with _failing(group):
                prefix = self._prefixes.read(adapter, tokens)
                self._advance(_Batch(group, self._pad, self._model.device, prefix))
        for request in waiting:
            if request not in together:
                with _failing([request]):
                    self._advance(_Batch([request], self._pad, self._model.device, alone=True))

    def _by_prefix(
        self, requests: list[ActiveRequest]
    ) -> dict[tuple[Adapter | None, Ids], list[ActiveRequest]]:
        """Requests by what their prompts begin with and by revision; all others are together."""
        found: dict[tuple[Adapter | None, Ids], list[ActiveRequest]] = {}
        common = self._prefixes.common([(each.adapter, each.prompt) for each in requests])
        for request, tokens in zip(requests, common, strict=True):
            found.setdefault((request.adapter if tokens else None, tokens), []).append(request)
        return found

    def step(self) -> None:
        """Write one more token of each request that has not ended."""
        batches, self._batches = self._batches, []
        for batch in batches:
            with _failing(batch.requests):
                batch.drop_ended()
                if batch.requests:
                    self._advance(batch)
        self._requests = [request for request in self._requests if not request.done]

    def abandon(self) -> list[ActiveRequest]:
        """Remove every request, and return those that have not ended."""
        requests, self._requests, self._batches = self._requests, [], []
        return requests

    def _advance(self, batch: _Batch) -> None:
        """Write one token of each request, and join the batch to another one where possible."""
        batch.advance(self._model, self._layers)
        batch.drop_ended()
        if not batch.requests:
            return
        other = next((other for other in self._batches if other.may_join(batch)), None)
        if other is None:
            self._batches.append(batch)
            return
        self._batches.remove(other)
        with _failing([*other.requests, *batch.requests]):  # a half-joined batch is unusable
            other.join(batch)
            self._batches.append(other)


class _Batch(Continuation):
    """Requests that share a forward pass, a row each; rows of one adapter are neighbours."""

    def __init__(
        self,
        requests: list[ActiveRequest],
        pad: int,
        device: Any,
        prefix: Prefix | None = None,
        *,
        alone: bool = False,
    ):
        order, self.shares = shares_of([request.adapter for request in requests])
        self.requests = [requests[row] for row in order]
        super().__init__([request.prompt for request in self.requests], pad, device, prefix)
        self._alone = alone

    def advance(self, model: PreTrainedModel, layers: Layers) -> None:
        """Write one token of each request."""
        import torch

        with torch.inference_mode(), layers.answering(self.shares, *self.tokens.shape):
            self.append(_choose(self.logits(model), self.requests))

    def drop_ended(self) -> None:
        """Remove requests that have ended; a cache that cannot be cut waits for all of them."""
        import torch

        left = [row for row, request in enumerate(self.requests) if not request.done]
        if not left:
            self.requests = []
        elif len(left) < len(self.requests) and self.is_plain():
            with torch.inference_mode():
                self.keep(left)

    def may_join(self, other: _Batch) -> bool:
        """Whether another batch can become part of this one."""
        alone = self._alone or other._alone
        return not alone and self.is_plain() and other.is_plain()

    def join(self, other: _Batch) -> None:
        """Take in the requests of another batch, whose first tokens are written."""
        import torch
        from torch.nn.functional import pad

        def both(ours: Tensor, theirs: Tensor, dim: int) -> Tensor:
            """Rows of both, filled with zeros on the left to the same length along ``dim``."""
            wide = max(ours.shape[dim], theirs.shape[dim])
            sides = (0, 0) * (-1 - dim)
            filled = [
                pad(part, (*sides, wide - part.shape[dim], 0)) if part.shape[dim] < wide else part
                for part in (ours, theirs)
            ]
            return torch.cat(filled)

        with torch.inference_mode():
            for layer, their in zip(self.cache.layers, other.cache.layers, strict=True):
                layer.keys = both(layer.keys, their.keys, -2)
                layer.values = both(layer.values, their.values, -2)
            self.mask = both(self.mask, other.mask, -1)
            self.tokens = torch.cat([self.tokens, other.tokens])
            self.positions = torch.cat([self.positions, other.positions])
            self.requests = self.requests + other.requests
            order, self.shares = shares_of([request.adapter for request in self.requests])
            if order != sorted(order):
                self.keep(order)

    def keep(self, order: Sequence[int]) -> None:
        """Continue with these rows, and with the requests that they answer."""
        super().keep(order)
        self.requests = [self.requests[row] for row in order]
        _, self.shares = shares_of([request.adapter for request in self.requests])


@contextmanager
def _failing(requests: Sequence[ActiveRequest]) -> Iterator[None]:
    """Pass whatever is raised to each request, as an error of its own for the thread that waits."""
    try:
        yield
    except Exception as error:  # each request raises it where it is waited for
        cause = f"({type(error).__name__}: {error}); the backend stays usable, try again"
        if isinstance(error, AgentprefError):
            cause = f"({error})"
        for request in requests:
            failure = GenerationFailed(f"{request.revision} could not answer {cause}")
            failure.__cause__ = error
            request.fail(failure)


def _choose(logits: Tensor, requests: list[ActiveRequest]) -> Tensor:
    """Choose a token of each request from (rows, vocabulary), add it, and return the tokens.

    Log-probabilities are the model's own, also of a token that a grammar let it choose from few. An
    error in sampling or decoding for one request fails that request only.
    """
    totals = logits.logsumexp(-1)
    allowed = _allowed(logits, requests)
    chosen = allowed.argmax(-1)
    for row, request in enumerate(requests):
        if request.generator is not None and not request.done and totals[row].isfinite():
            with _failing([request]):
                chosen[row] = _sample(allowed[row].cpu(), request.request, request.generator)
    logprobs = logits.gather(-1, chosen[:, None])[:, 0] - totals
    for request, token, logprob in zip(requests, chosen.tolist(), logprobs.tolist(), strict=True):
        if not request.done:
            with _failing([request]):
                request.take(token, logprob)
    return chosen


def _allowed(logits: Tensor, requests: list[ActiveRequest]) -> Tensor:
    """The logits, where each request with a grammar has only the tokens that it allows."""
    held = {row: r.constraint for row, r in enumerate(requests) if r.constraint and not r.done}
    if not held:
        return logits
    allowed = logits.clone()
    for row, constraint in held.items():
        with _failing([requests[row]]):
            allowed[row] = constraint.allow(logits[row])
    return allowed


def _sample(logits: Tensor, request: GenerationRequest, generator: Generator) -> int:
    """Draw from the smallest set of tokens whose probability reaches ``top_p`` (1904.09751).

    The highest logit is shifted to 0, so that no temperature makes it infinite.
    """
    import torch

    scores = (logits.double() - logits.max()) / request.temperature
    probabilities, order = scores.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= request.top_p, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
