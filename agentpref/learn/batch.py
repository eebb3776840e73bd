"""Pairs laid out as tensors, in one of two ways that give the same log-probs.

*Plain*: two rows a pair, prompt+chosen and prompt+rejected. *Shared*: one row a pair, the prompt
once and both completions after it, with an attention mask that hides each from the other and
position ids that start both where the prompt ends. Prompts are padded on the left and completions
on the right, so that completions stand in the same columns and logits are needed only there.
Knows nothing of models, losses or labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentpref.learn.encode import EncodedPair, Ids

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Input of a forward pass, and where in its logits each completion token is predicted.

    ``ids``, ``positions``: ``[rows, T]``. ``mask``: true where a token may be looked at,
    ``[rows, T]`` (causal besides) or ``[rows, 1, T, T]``.
    ``keep``: how many trailing positions need logits. ``at``, ``targets``, ``real``:
    ``[2·pairs, C]``: index into the kept logits of the row in ``row``, the token to predict there,
    and whether it is a real token or padding. The first half are the chosen answers.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    keep: int
    row: Tensor
    at: Tensor
    targets: Tensor
    real: Tensor


Layout = Callable[[Sequence[EncodedPair], int], Batch]


def plain(rows: Sequence[EncodedPair], pad: int) -> Batch:
    """Lay pairs out as two rows each; works with every causal model."""
    import torch

    prompts = _left([r.prompt for r in rows] * 2)
    targets, real = _completions(rows, pad)
    present = torch.cat([prompts != -1, real], 1)
    width = targets.shape[1]
    return Batch(
        ids=torch.cat([prompts.masked_fill(prompts == -1, pad), targets], 1),
        mask=present,
        positions=(present.cumsum(1) - 1).clamp(min=0),
        keep=width + 1,
        row=torch.arange(len(targets)),
        at=torch.arange(width).expand_as(targets),
        targets=targets,
        real=real,
    )


def shared(rows: Sequence[EncodedPair], pad: int) -> Batch:
    """Lay pairs out as one row each, the prompt encoded once; the model must take 4-D masks."""
    import torch

    n = len(rows)
    prompts = _left([r.prompt for r in rows])
    targets, real = _completions(rows, pad)
    width = targets.shape[1]
    ends = (prompts != -1).sum(1, keepdim=True)
    columns = torch.arange(width)
    positions = torch.cat([(prompts != -1).cumsum(1).sub(1).clamp(min=0), *[ends + columns] * 2], 1)
    first = torch.zeros(1, dtype=torch.long)
    return Batch(
        ids=torch.cat([prompts.masked_fill(prompts == -1, pad), targets[:n], targets[n:]], 1),
        mask=_apart(prompts != -1, real[:n], real[n:]),
        positions=positions,
        keep=2 * width + 1,
        row=torch.arange(n).repeat(2),
        at=torch.cat(
            [columns.expand(n, -1), torch.cat([first, columns[1:] + width]).expand(n, -1)]
        ),
        targets=targets,
        real=real,
    )


def chunks(rows: Sequence[EncodedPair], budget: int) -> Iterator[list[EncodedPair]]:
    """Cut rows, in order, into runs whose padded width stays within ``budget`` tokens."""
    run: list[EncodedPair] = []
    widest = 0
    for row in rows:
        widest = max(widest, row.width)
        if run and widest * (len(run) + 1) > budget:
            yield run
            run, widest = [], row.width
        run.append(row)
    if run:
        yield run


def _left(prompts: Sequence[Ids]) -> Tensor:
    """Prompts padded on the left with −1, which no vocabulary has."""
    import torch

    width = max(map(len, prompts))
    return torch.tensor([[-1] * (width - len(ids)) + list(ids) for ids in prompts])


def _completions(rows: Sequence[EncodedPair], pad: int) -> tuple[Tensor, Tensor]:
    """All chosen, then all rejected completions, padded on the right; and which tokens are real."""
    import torch

    sides = [r.chosen for r in rows] + [r.rejected for r in rows]
    lengths = torch.tensor([[len(ids)] for ids in sides])
    width = int(lengths.max())
    targets = torch.tensor([list(ids) + [pad] * (width - len(ids)) for ids in sides])
    return targets, torch.arange(width) < lengths


def _apart(prompt: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mask ``[pairs, 1, T, T]``: causal, no padding, completions blind to each other."""
    import torch

    p, c = prompt.shape[1], chosen.shape[1]
    seen = torch.cat([prompt, chosen, rejected], 1)
    total = seen.shape[1]
    allowed = torch.ones(total, total, dtype=torch.bool).tril()
    allowed[p + c :, p : p + c] = False
    allowed = allowed & seen[:, None, :]
    allowed |= torch.eye(total, dtype=torch.bool)  # a row that sees nothing would give NaN
    return allowed[:, None]
