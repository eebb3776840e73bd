"""Rows laid out as tensors, in one of two ways that give the same log-probs.

A row is a prompt and two completions of it. *Plain*: two sequences a row, the prompt before each.
*Shared*: one sequence a row, ``[prompt | first | second]``, each part padded on the right, with
position ids that go on from the prompt in both completions; who may look at whom is the business of
``ops.attention``. Either way only the places that predict a completion token are named: nothing
is computed for padding behind the last layer. Knows nothing of models, losses or labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from agentpref.learn.encode import Encoded, Ids

if TYPE_CHECKING:
    from torch import Tensor, device

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """Input of a forward pass, and where in its output each completion token is predicted.

    ``ids``, ``positions``: ``[sequences, T]``. ``mask``: true where there is a token, ``[sequences,
    T]``, or for shared rows where there is a prompt token, ``[sequences, 1, 1, P]``. ``where``,
    ``targets``, ``owner``: ``[N]``, one for each completion token: its place in the flattened
    output, itself, and the completion that it belongs to. ``completions``: how many there are, two
    a row; the first half are the rows' first ones.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    where: Tensor
    targets: Tensor
    owner: Tensor
    completions: int

    def sums(self, per_token: Tensor) -> Tensor:
        """Add up what was found for each token: ``[N]`` to ``[completions]``, in float64.

        A sum of a few hundred log-probs lies in the thousands, where float32 is 1e-4 coarse, and
        what is wanted of two such sums is their small difference.
        """
        wide = per_token.double()
        return wide.new_zeros(self.completions).index_add(0, self.owner, wide)

    def means(self, per_token: Tensor) -> Tensor:
        """Average what was found for each token: ``[N]`` to ``[completions]``."""
        import torch

        return self.sums(per_token) / self.sums(torch.ones_like(per_token))

    def to(self, place: device) -> Batch:
        """The batch on another device."""
        moved = {field.name: getattr(self, field.name).to(place) for field in fields(self)[:-1]}
        return Batch(**moved, completions=self.completions)


Layout = Callable[[Sequence[Encoded], int], Batch]


def plain(rows: Sequence[Encoded], pad: int) -> Batch:
    """Lay rows out as two sequences each; works with every causal model."""
    import torch

    sides = [(row.prompt, row.completions[half]) for half in (0, 1) for row in rows]
    ids, mask = _padded([prompt + completion for prompt, completion in sides], pad)
    width = ids.shape[1]
    places = [
        index * width + len(prompt) - 1 + at
        for index, (prompt, completion) in enumerate(sides)
        for at in range(len(completion))
    ]
    return Batch(
        ids=ids,
        mask=mask,
        positions=torch.arange(width).expand_as(ids),
        where=torch.tensor(places),
        **_targets([completion for _, completion in sides]),
    )


def shared(rows: Sequence[Encoded], pad: int) -> Batch:
    """Lay rows out as one sequence each; the model must take ``ops.attention``.

    The prompt's last token stands before both completions instead, whose own last tokens predict
    nothing and are left out: so all predictions are made in the two parts, and none in the prompt.
    """
    import torch

    from agentpref.learn.kernels.blocks import LANES

    prompts, mask = _padded([row.prompt[:-1] for row in rows], pad, multiple=LANES)
    sides = [row.completions[half] for half in (0, 1) for row in rows]
    starts = [row.prompt[-1:] for row in rows] * 2
    answers = [start + ids[:-1] for start, ids in zip(starts, sides, strict=True)]
    parts, real = _padded(answers, pad, multiple=LANES)
    first, second = parts.chunk(2)
    ends = torch.tensor([[len(row.prompt) - 1] for row in rows])
    after = ends + torch.arange(parts.shape[1])
    return Batch(
        ids=torch.cat([prompts, first, second], 1),
        mask=mask[:, None, None],
        positions=torch.cat([torch.arange(prompts.shape[1]).expand_as(prompts), after, after], 1),
        where=_predicting(real, prompts.shape[1]),
        **_targets(sides),
    )


def chunks(
    rows: Sequence[T], cost: Callable[[T], int], budget: int, *, side_by_side: int = 1
) -> Iterator[list[T]]:
    """Cut rows, in order, into runs whose padded cost stays within ``budget`` tokens.

    Where a run is dealt out to several processes, ``side_by_side``, each one's share does.
    """
    run: list[T] = []
    widest = 0
    for row in rows:
        widest = max(widest, cost(row))
        if run and widest * math.ceil((len(run) + 1) / side_by_side) > budget:
            yield run
            run, widest = [], cost(row)
        run.append(row)
    if run:
        yield run


def _predicting(real: Tensor, prompt: int) -> Tensor:
    """Places of the parts' tokens in the flattened rows; ``real`` is ``[2·rows, C]``."""
    import torch

    size, width = len(real) // 2, real.shape[1]
    row = torch.arange(size).repeat(2)[:, None] * (prompt + 2 * width)
    part = prompt + torch.arange(2).repeat_interleave(size)[:, None] * width
    return (row + part + torch.arange(width))[real]


def _targets(completions: Sequence[Ids]) -> dict[str, Any]:
    import torch

    lengths = torch.tensor([len(ids) for ids in completions])
    return {
        "targets": torch.tensor([token for ids in completions for token in ids]),
        "owner": torch.arange(len(completions)).repeat_interleave(lengths),
        "completions": len(completions),
    }


def _padded(sequences: Sequence[Ids], pad: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Sequences padded on the right to a multiple of some width, and where there is a token."""
    import torch

    lengths = torch.tensor([[len(ids)] for ids in sequences])
    width = multiple * max(1, math.ceil(int(lengths.max()) / multiple))
    ids = torch.tensor([list(ids) + [pad] * (width - len(ids)) for ids in sequences])
    return ids, torch.arange(width) < lengths
