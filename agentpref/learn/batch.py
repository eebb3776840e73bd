"""Rows laid out as tensors, in one of two ways that give the same log-probs.

A row is a prompt and n completions of it. *Plain*: n sequences per row, the prompt before each.
*Shared*: one sequence per row, ``[prompt | c1 | … | cn]``, each part padded on the right. Position
ids continue from the prompt in every completion, and ``kernels.attention`` keeps the completions
apart. Both layouts name only the places that predict a token that counts, so the output layer
computes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, TypeVar

from agentpref.models.tokenizer import Ids, Mask

if TYPE_CHECKING:
    from torch import Tensor, device

T = TypeVar("T")

SHORTEST = 16
"""A KL is in nats per token, and an answer counts as this many tokens at least. A one-word answer
cannot change its mind without .26 nats on each of its two or three tokens; per answer that is less
than what a paragraph spends on .05 a token."""

_PADDING = 0.03
"""Share of padding that a width which suits the kernel may add. At 40 tokens and answers of one
word, padding all parts to such widths took 1.7 times as long; at 128:47, 6 % less (bfloat16)."""


class Sequences(Protocol):
    """A prompt and n ≥ 1 completions as token ids.

    Each completion has at least one token. ``masks`` has an entry per completion: which of its
    tokens count (at least one), or ``None`` where all do. ``width`` is the number of all tokens.
    """

    @property
    def prompt(self) -> Ids: ...  # noqa: D102
    @property
    def completions(self) -> tuple[Ids, ...]: ...  # noqa: D102
    @property
    def masks(self) -> tuple[Mask | None, ...]: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of a forward pass, and where its output predicts each completion token.

    Attributes:
        ids: token ids, ``[sequences, T]``.
        mask: true where there is a token, ``[sequences, T]``; of shared rows, true where there is
            a prompt token, ``[rows, n, 1, P]``.
        positions: position ids, ``[sequences, T]``.
        where: the place of each token that counts in the flattened output, ``[N]``.
        targets: these tokens, ``[N]``.
        owner: the completion of each, ``[N]``: its number × ``rows`` + the number of its row.
        rows: how many rows there are.
        n: how many completions each row has.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    where: Tensor
    targets: Tensor
    owner: Tensor
    rows: int
    n: int

    def sums(self, per_token: Tensor) -> Tensor:
        """Add up values per token, ``[N]``, by completion: ``[rows, n]``, in float64.

        Sums of a few hundred log-probs are in the thousands, where float32 has steps of 1e-4, and
        losses depend on small differences between two of them.
        """
        wide = per_token.double()
        sums = wide.new_zeros(self.n * self.rows).index_add(0, self.owner, wide)
        return sums.view(self.n, self.rows).T

    def spread(self, per_token: Tensor) -> Tensor:
        """Average values per token, ``[N]``, by completion: ``[rows, n]``, in float64.

        An answer counts as :data:`SHORTEST` tokens at least, so that one word may change.
        """
        return self.sums(per_token) / self.lengths().clamp(min=SHORTEST)

    def pick(self, per_token: Tensor, places: Sequence[int | None]) -> list[tuple[float, ...]]:
        """Values per token, ``[N]``, at one place of each row's completions: ``[rows][n]``.

        ``places`` says for each row which of the tokens that count in a completion is meant. A row
        without a place has NaN.
        """
        counts = self.owner.bincount(minlength=self.n * self.rows)
        starts = (counts.cumsum(0) - counts).view(self.n, self.rows).T.tolist()
        values = per_token.tolist()
        return [
            tuple(math.nan if place is None else values[start + place] for start in own)
            for own, place in zip(starts, places, strict=True)
        ]

    def lengths(self) -> Tensor:
        """Count the tokens that count: ``[rows, n]``."""
        return self.owner.bincount(minlength=self.n * self.rows).view(self.n, self.rows).T

    def to(self, place: device) -> Batch:
        """Copy the batch to another device."""
        moved = {field.name: getattr(self, field.name).to(place) for field in fields(self)[:-2]}
        return Batch(**moved, rows=self.rows, n=self.n)


Layout = Callable[[Sequence[Sequences], int], Batch]


def plain(rows: Sequence[Sequences], pad: int) -> Batch:
    """Lay out rows as n sequences each; works with every causal model."""
    import torch

    sides = list(_by_completion(rows))
    ids, mask = _padded([prompt + completion for prompt, completion, _ in sides], pad)
    width = ids.shape[1]
    places = [
        index * width + len(prompt) - 1 + at
        for index, (prompt, completion, _) in enumerate(sides)
        for at in range(len(completion))
    ]
    return _batch(rows, ids, mask, torch.arange(width).expand_as(ids), torch.tensor(places))


def shared(rows: Sequence[Sequences], pad: int) -> Batch:
    """Lay out rows as one sequence each; the model must use ``kernels.attention``.

    The prompt's last token moves to the start of every completion, whose own last token is left
    out because it predicts nothing. So the completions' parts make all predictions and the prompt's
    part makes none.
    """
    import torch

    n = len(rows[0].completions)
    prompts, mask = _padded([row.prompt[:-1] for row in rows], pad, for_kernel=True)
    answers = [prompt[-1:] + ids[:-1] for prompt, ids, _ in _by_completion(rows)]
    parts, real = _padded(answers, pad, for_kernel=True)
    (size, before), width = prompts.shape, parts.shape[1]
    ends = torch.tensor([[len(row.prompt) - 1] for row in rows])
    after = (ends + torch.arange(width)).repeat(1, n)
    starts = torch.arange(size).repeat(n) * (before + n * width) + before
    starts = starts + torch.arange(n).repeat_interleave(size) * width
    return _batch(
        rows,
        torch.cat([prompts, *parts.chunk(n)], 1),
        mask[:, None, None].expand(-1, n, -1, -1),
        torch.cat([torch.arange(before).expand_as(prompts), after], 1),
        (starts[:, None] + torch.arange(width))[real],
    )


def chunks(
    rows: Sequence[T],
    cost: Callable[[T], int],
    budget: int,
    *,
    n: Callable[[T], int],
    side_by_side: int = 1,
) -> Iterator[list[T]]:
    """Cut rows into chunks of rows with equal ``n`` that cost at most ``budget`` tokens padded.

    Rows with fewer completions come first; otherwise rows stay in order. ``side_by_side``
    processes share a chunk, and the share of each stays within the budget.
    """
    for count in sorted({n(row) for row in rows}):
        chunk: list[T] = []
        widest = 0
        for row in (row for row in rows if n(row) == count):
            widest = max(widest, cost(row))
            if chunk and widest * math.ceil((len(chunk) + 1) / side_by_side) > budget:
                yield chunk
                chunk, widest = [], cost(row)
            chunk.append(row)
        yield chunk


def _by_completion(rows: Sequence[Sequences]) -> Iterator[tuple[Ids, Ids, Mask | None]]:
    """Prompt, completion and mask: of all rows with the first completion, then the second, ….

    Raises:
        ValueError: the rows have different numbers of completions.
    """
    for column in zip(*(zip(r.completions, r.masks, strict=True) for r in rows), strict=True):
        for row, (completion, counts) in zip(rows, column, strict=True):
            yield row.prompt, completion, counts


def _batch(
    rows: Sequence[Sequences], ids: Tensor, mask: Tensor, positions: Tensor, places: Tensor
) -> Batch:
    """Keep those ``places``, one per completion token in order, whose token counts."""
    import torch

    sides = list(_by_completion(rows))
    targets = torch.tensor([token for _, completion, _ in sides for token in completion])
    lengths = torch.tensor([len(completion) for _, completion, _ in sides])
    owner = torch.arange(len(sides)).repeat_interleave(lengths)
    if any(counts is not None for _, _, counts in sides):
        flags = [counts or (True,) * len(completion) for _, completion, counts in sides]
        kept = torch.tensor([flag for own in flags for flag in own])
        places, targets, owner = places[kept], targets[kept], owner[kept]
    size = len(rows)
    return Batch(ids, mask, positions, places, targets, owner, rows=size, n=len(sides) // size)


def _padded(
    sequences: Sequence[Ids], pad: int, *, for_kernel: bool = False
) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right to the longest; also return where there is a token.

    The attention kernel is faster on some widths, but a layer takes as long for a token of padding
    as for any other: a part of such a width must not be much wider.
    """
    import torch

    from agentpref.learn.kernels.blocks import LANES

    lengths = torch.tensor([[len(ids)] for ids in sequences])
    width = max(1, int(lengths.max()))
    fast = LANES * math.ceil(width / LANES)
    if for_kernel and fast <= (1 + _PADDING) * width:
        width = fast
    ids = torch.tensor([list(ids) + [pad] * (width - len(ids)) for ids in sequences])
    return ids, torch.arange(width) < lengths
