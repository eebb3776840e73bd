"""Log-probabilities of completions under a model, and which batch layout it can be trusted with.

Sums over completion tokens, in natural logs. Which adapter is active, and whether gradients flow,
is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.learn import batch as layouts
from agentpref.learn.batch import Batch, Layout
from agentpref.learn.encode import EncodedPair

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_PER_PASS = 4096
"""Padded tokens in one forward pass without gradients."""

_PROBE_ROWS = 4


class PairLogps(NamedTuple):
    """Sequence log-probs of one pair's two completions."""

    chosen: float
    rejected: float


def completion_logits(model: Any, batch: Batch) -> Tensor:
    """Logits that predict each completion token: ``[2·pairs, C, vocabulary]``, in float32."""
    import torch

    mask = batch.mask
    if mask.dim() == 4:
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, lowest)
    device = model.device
    logits = model(
        input_ids=batch.ids.to(device),
        attention_mask=mask.to(device),
        position_ids=batch.positions.to(device),
        logits_to_keep=batch.keep,
        use_cache=False,
    ).logits
    return logits[batch.row[:, None].to(device), batch.at.to(device)].float()  # type: ignore[no-any-return]


def sequence_logps(logits: Tensor, batch: Batch) -> Tensor:
    """Sum of the completion tokens' log-probs: ``[2·pairs]``, chosen answers first."""
    targets, real = batch.targets.to(logits.device), batch.real.to(logits.device)
    picked = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    return (picked * real).sum(-1)


def score(
    model: Any,
    rows: Sequence[EncodedPair],
    *,
    layout: Layout,
    pad: int,
    progress: Callable[[int], object] | None = None,
) -> list[PairLogps]:
    """Score pairs without gradients, in passes of like width; ``progress`` is told rows done."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: rows[i].width)
    scores: dict[int, PairLogps] = {}
    with torch.no_grad():
        for run in layouts.chunks([rows[i] for i in order], TOKENS_PER_PASS):
            batch = layout(run, pad)
            logps = sequence_logps(completion_logits(model, batch), batch).tolist()
            for chosen, rejected in zip(logps[: len(run)], logps[len(run) :], strict=True):
                scores[order[len(scores)]] = PairLogps(chosen, rejected)
            if progress is not None:
                progress(len(scores))
    return [scores[i] for i in range(len(rows))]


def trusted_layout(model: Any, rows: Sequence[EncodedPair], *, pad: int) -> Layout:
    """The shared layout where it gives this model the plain one's log-probs, else the plain one.

    Models with sliding windows, linear attention or masks of their own may read a 4-D mask
    differently or refuse it, so a few rows decide at run time, not a list of names.
    """
    import torch

    probe = sorted(rows, key=lambda row: row.width)[-_PROBE_ROWS:]
    expected = score(model, probe, layout=layouts.plain, pad=pad)
    try:
        found = score(model, probe, layout=layouts.shared, pad=pad)
    except (ValueError, RuntimeError, TypeError, IndexError):
        return layouts.plain
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    close = torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=tolerance)
    return layouts.shared if close else layouts.plain
