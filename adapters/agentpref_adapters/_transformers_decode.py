"""Generating many requests together, each with its own revision, settings, beginning and end.

The loop is a plain one over the model's forward call, a token for every row at a time. Between two
tokens rows leave that have ended, and rows join that have come, after one pass over their prompts:
nobody waits for the end of somebody else's answer. Keys and values are cached for as long as their
row is there. Knows nothing of queues and threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agentpref.errors import ServingError
from agentpref.serve.backend import GenerationRequest
from agentpref_adapters import _transformers_cache as caches
from agentpref_adapters._transformers_adapters import Layers, shares_of
from agentpref_adapters._transformers_row import Row

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel

Failure = Callable[[Row, Exception], ServingError]


class Decoder:
    """The engine: all rows that are being answered.

    Args:
        model: what generates.
        layers: its layers, with the adapters that rows bring along.
        pad: the token to fill with.
        failure: what to raise for a row when the model raised.
    """

    def __init__(self, model: PreTrainedModel, layers: Layers, pad: int, failure: Failure) -> None:
        """Begin with no rows."""
        self._model = model
        self._layers = layers
        self._pad = pad
        self._failure = failure
        self._turning_point = _turning_point(model.config.get_text_config())
        self._rows: list[Row] = []  # all that were admitted and have not ended
        self._batches: list[_Batch] = []

    @property
    def active(self) -> int:
        """How many rows are being answered.

        A batch whose cache cannot be cut keeps its rows to the end of the last one; somebody else
        may have their places before.
        """
        return sum(not row.done for row in self._rows)

    @property
    def has_work(self) -> bool:
        """Whether there is a batch."""
        return bool(self._batches)

    def admit(self, rows: list[Row]) -> None:
        """Write the first token of each row, and let it go on with the others."""
        waiting = [row for row in rows if not row.done]
        self._rows += waiting
        together = [row for row in waiting if row.longest <= self._turning_point]
        if together:
            self._begin(together, alone=False)
        for row in waiting:
            if row.longest > self._turning_point:
                self._begin([row], alone=True)

    def step(self) -> None:
        """Write one more token of each row that has not ended."""
        batches, self._batches = self._batches, []
        for batch in batches:
            with _failing(batch.rows, self._failure):
                batch.drop_ended()
                if batch.rows:
                    self._advance(batch)
        self._rows = [row for row in self._rows if not row.done]

    def abandon(self) -> list[Row]:
        """Let go of every row, and give those that have not ended."""
        rows, self._rows, self._batches = self._rows, [], []
        return rows

    def _begin(self, rows: list[Row], *, alone: bool) -> None:
        with _failing(rows, self._failure):
            self._advance(_Batch(rows, self._pad, self._model.device, alone=alone))

    def _advance(self, batch: _Batch) -> None:
        batch.advance(self._model, self._layers, self._failure)
        batch.drop_ended()
        if batch.rows:
            self._place(batch)

    def _place(self, batch: _Batch) -> None:
        """Go on with a batch, as part of another one where the model's cache allows it."""
        other = next((other for other in self._batches if other.may_join(batch)), None)
        if other is None:
            self._batches.append(batch)
            return
        self._batches.remove(other)
        both = [*other.rows, *batch.rows]
        with _failing(both, self._failure):  # one that is half joined is no batch
            other.join(batch)
            self._batches.append(other)


class _Batch:
    """Rows that take their steps in one forward pass; those of one revision stand together.

    ``tokens`` and ``positions`` (rows, n) are what the next pass is given; ``mask`` (rows, all
    tokens so far) is 0 where a row has nothing yet, on its left.
    """

    def __init__(self, rows: list[Row], pad: int, device: Any, *, alone: bool) -> None:
        """Begin with the prompts, padded on the left, so that all rows end together."""
        order, self.shares = shares_of([row.adapter for row in rows])
        self.rows = [rows[row] for row in order]
        self.tokens, self.mask = _left_padded(self.rows, pad, device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.cache: Any = None
        self._alone = alone

    def advance(self, model: PreTrainedModel, layers: Layers, failure: Failure) -> None:
        """Write one token of each row."""
        import torch

        with torch.inference_mode(), layers.answering(self.shares, *self.tokens.shape):
            output = model(
                input_ids=self.tokens,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            chosen = _step(output.logits[:, -1].float(), self.rows, failure)
            self.cache = output.past_key_values
            self.tokens, self.positions = chosen[:, None], self.positions[:, -1:] + 1
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)

    def drop_ended(self) -> None:
        """Let go of rows that have ended; a cache that cannot be cut goes when all of them have."""
        import torch

        left = [index for index, row in enumerate(self.rows) if not row.done]
        if not left:
            self.rows = []
        elif len(left) < len(self.rows) and caches.is_plain(self.cache):
            with torch.inference_mode():
                self._keep(left)

    def may_join(self, other: _Batch) -> bool:
        """Whether another batch can become part of this one."""
        if self._alone or other._alone:
            return False
        return caches.is_plain(self.cache) and caches.is_plain(other.cache)

    def join(self, other: _Batch) -> None:
        """Take in the rows of another batch, which have been given their first token."""
        import torch

        with torch.inference_mode():
            caches.join(self.cache, other.cache)
            wide = max(self.mask.shape[1], other.mask.shape[1])
            self.mask = torch.cat([_filled(self.mask, wide), _filled(other.mask, wide)])
            self.tokens = torch.cat([self.tokens, other.tokens])
            self.positions = torch.cat([self.positions, other.positions])
            self.rows = self.rows + other.rows
            self._sort()

    def _sort(self) -> None:
        order, self.shares = shares_of([row.adapter for row in self.rows])
        if order != sorted(order):
            self._keep(order)

    def _keep(self, order: list[int]) -> None:
        """Go on with these rows, in this order."""
        import torch

        rows = torch.tensor(order, device=self.mask.device)
        mask = self.mask.index_select(0, rows)
        begin = int(mask.argmax(-1).min())  # where the first of the rows begins
        caches.keep(self.cache, rows, begin)
        self.mask = mask[:, begin:]
        self.tokens = self.tokens.index_select(0, rows)
        self.positions = self.positions.index_select(0, rows)
        self.rows = [self.rows[row] for row in order]
        _, self.shares = shares_of([row.adapter for row in self.rows])


def _turning_point(config: Any) -> float:
    """From how many tokens on a row is rotated otherwise, and its whole batch with it (longrope).

    So a row that may come to lie beyond that has a batch of its own.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    kinds = [settings, *(kind for kind in settings.values() if isinstance(kind, dict))]
    longropes = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((kind["original_max_position_embeddings"] for kind in longropes), default=math.inf)


@contextmanager
def _failing(rows: Sequence[Row], failure: Failure) -> Iterator[None]:
    """Fail rows with whatever is raised, be it only where their caches are copied."""
    try:
        yield
    except Exception as error:  # not swallowed: every row that still waits raises it
        for row in rows:
            row.fail(failure(row, error))


def _left_padded(rows: list[Row], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (rows, longest prompt)."""
    import torch

    width = max(len(row.prompt) for row in rows)
    gaps = [width - len(row.prompt) for row in rows]
    tokens = [[pad] * gap + list(row.prompt) for gap, row in zip(gaps, rows, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _filled(mask: Tensor, wide: int) -> Tensor:
    from torch.nn.functional import pad

    return pad(mask, (wide - mask.shape[1], 0))


def _step(logits: Tensor, rows: list[Row], failure: Failure) -> Tensor:
    """Choose a token for each row from (rows, vocabulary) and hand it over; return the tokens.

    What is raised for one row, in sampling or in making text of it, is that row's alone.
    """
    totals = logits.logsumexp(-1)
    chosen = logits.argmax(-1)
    for index, row in enumerate(rows):
        if row.generator is not None and not row.done and totals[index].isfinite():
            with _failing([row], failure):
                chosen[index] = _sample(logits[index].cpu(), row.request, row.generator)
    logprobs = logits.gather(-1, chosen[:, None])[:, 0] - totals
    for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True):
        if not row.done:
            with _failing([row], failure):
                row.take(token, logprob)
    return chosen


def _sample(logits: Tensor, request: GenerationRequest, generator: Generator) -> int:
    """Draw from the smallest set of tokens whose probability reaches ``top_p`` (1904.09751).

    The likeliest token's score is made 0, so that no temperature makes it an infinity.
    """
    import torch

    scores = (logits.double() - logits.max()) / request.temperature
    probabilities, order = scores.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= request.top_p, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
