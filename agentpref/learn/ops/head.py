"""The language model's head, fused with the log-softmax, a few hundred positions at a time.

Of each position only one log-probability, and where asked for one KL, is ever wanted; the logits
behind them are made, used and dropped chunk by chunk, and what the gradient needs is kept as a
vector of the hidden size. So no ``[positions, vocabulary]`` tensor outlives its chunk, and nothing
is computed a second time in the backward pass. The head itself is frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_PER_CHUNK = 1 << 20
"""Logits that exist at one time: 4 MB in float32, which stay in a processor's cache."""


class Head(NamedTuple):
    """A frozen output layer: ``weight`` is ``[vocabulary, d]``, ``bias`` ``[vocabulary]``."""

    weight: Tensor
    bias: Tensor | None = None


class Reading(NamedTuple):
    """What is found at each position, ``[N]`` each, in float32 and nats.

    ``logps`` are those of the targets, ``kl`` is KL(π_live ‖ π_θ), and ``collision`` log Σ π_θ²,
    which carries no gradient; the last two where they were asked for.
    """

    logps: Tensor
    kl: Tensor | None = None
    collision: Tensor | None = None


def read(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    live: Tensor | None = None,
    collision: bool = False,
) -> Reading:
    """Read last hidden states through the output layer.

    Args:
        hidden: the policy's last hidden states, ``[N, d]``.
        head: the output layer of both policies.
        targets: the token to be predicted at each, ``[N]``.
        live: the live policy's hidden states at the same places, ``[N, d]``, for the KL; no
            gradient flows into them.
        collision: whether the probability that two draws are the same token is wanted.
    """
    return Reading(*_Read.apply(hidden, head, targets, live, collision))  # type: ignore[no-untyped-call]


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, live: Tensor | None, collide: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        size = len(hidden)
        logps = hidden.new_empty(size, dtype=torch.float32)
        kl = None if live is None else torch.empty_like(logps)
        collision = torch.empty_like(logps) if collide else None
        wanted = (1 + (live is not None)) * ctx.needs_input_grad[0]
        grads = [torch.empty_like(hidden) for _ in range(wanted)]
        step = max(1, LOGITS_PER_CHUNK // len(head.weight))
        for at in (slice(start, start + step) for start in range(0, size, step)):
            logprobs = _logprobs(hidden[at], head)
            logps[at] = logprobs.gather(-1, targets[at, None])[:, 0]
            probs = logprobs.exp()
            if collision is not None:
                collision[at] = probs.square().sum(-1).log()
            if live is not None and kl is not None:
                other = _logprobs(live[at], head)
                theirs = other.exp()
                kl[at] = other.sub_(logprobs).mul_(theirs).sum(-1)
                if grads:
                    grads[1][at] = _back(theirs.neg_().add_(probs), head, hidden.dtype)
            if grads:
                grads[0][at] = head.weight[targets[at]] - _back(probs, head, hidden.dtype)
        ctx.save_for_backward(*grads)
        if collision is not None:
            ctx.mark_non_differentiable(collision)
        return logps, kl, collision

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        for grad, scale in zip(ctx.saved_tensors, outer, strict=False):
            if scale is not None:
                part = grad * scale[:, None].to(grad.dtype)
                total = part if total is None else total.add_(part)
        return total, None, None, None, None


def _logprobs(hidden: Tensor, head: Head) -> Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _back(grad: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """From a gradient of logits to one of hidden states."""
    return grad.to(dtype) @ head.weight.to(dtype)
