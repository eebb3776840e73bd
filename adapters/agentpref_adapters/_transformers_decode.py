"""Generating a batch of requests together, each row with its own settings and its own end.

The loop is a plain one over the model's forward call, since each row may be sampled, limited and
stopped differently, and is answered the moment it ends. Keys and values are cached for the batch
alone. Knows nothing of adapters: whatever is on in the model answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from agentpref.errors import GenerationFailed, ServingError
from agentpref.serve.backend import FinishReason, GenerationRequest, Reply
from agentpref.serve.text import TextStream
from agentpref.serve.toolcalls import assistant_message

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel


class Row:
    """One request in a batch: what it was asked, what it has so far, and who waits for it."""

    def __init__(
        self,
        key: str,
        request: GenerationRequest,
        prompt: tuple[int, ...],
        text: TextStream,
        ends: frozenset[int],
        room: int,
        *,
        streaming: bool,
    ) -> None:
        """``room`` is how many tokens may be written, ``ends`` are the tokens that end a turn."""
        self.key = key
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

    def results(self) -> Iterator[str | Reply]:
        """Wait for what comes; leaving early tells the owner to stop."""
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
            self.fail(GenerationFailed(f"{self.key} gave a logprob of {logprob}; roll it back"))
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


def generate(model: PreTrainedModel, rows: list[Row], pad: int) -> None:
    """Generate all rows to their ends, one token of each at a time."""
    import torch

    with torch.inference_mode():
        tokens, mask = _left_padded(rows, pad, model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache: Any = None
        while not all(row.done for row in rows):
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            chosen = _step(output.logits[:, -1].float(), rows)
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)


def _left_padded(rows: list[Row], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (rows, longest prompt), so that all rows end where generation begins."""
    import torch

    width = max(len(row.prompt) for row in rows)
    gaps = [width - len(row.prompt) for row in rows]
    tokens = [[pad] * gap + list(row.prompt) for gap, row in zip(gaps, rows, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _step(logits: Tensor, rows: list[Row]) -> Tensor:
    """Choose a token for each row from (rows, vocabulary) and hand it over; return the tokens."""
    totals = logits.logsumexp(-1)
    chosen = logits.argmax(-1)
    for index, row in enumerate(rows):
        if row.generator is not None and not row.done and totals[index].isfinite():
            chosen[index] = _sample(logits[index].cpu(), row.request, row.generator)
    logprobs = logits.gather(-1, chosen[:, None])[:, 0] - totals
    for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True):
        if not row.done:
            row.take(token, logprob)
    return chosen


def _sample(logits: Tensor, request: GenerationRequest, generator: Generator) -> int:
    """Draw from the smallest set of tokens whose probability reaches ``top_p`` (1904.09751)."""
    import torch

    probabilities, order = (logits / request.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= request.top_p, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


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
