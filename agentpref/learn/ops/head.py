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

LOGITS_PER_CHUNK = 1 << 21
"""Logits that exist at one time: 8 MB in float32, which stay in a processor's cache."""


class Head(NamedTuple):
    """A frozen output layer: ``weight`` is ``[vocabulary, d]``, ``bias`` ``[vocabulary]``."""

    weight: Tensor
    bias: Tensor | None = None


def token_logps(
    hidden: Tensor, head: Head, targets: Tensor, live: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of ``targets`` and, where the live policy's states are given, KL(π_live ‖ π_θ).

    Args:
        hidden: the policy's last hidden states, ``[N, d]``.
        head: the output layer of both policies.
        targets: the token to be predicted at each, ``[N]``.
        live: the live policy's hidden states at the same places, ``[N, d]``; no gradient flows
            into them.

    Returns:
        Two ``[N]`` in float32 and nats; the second is None without ``live``.
    """
    logps, kl = _TokenLogps.apply(hidden, head, targets, live)  # type: ignore[no-untyped-call]
    return logps, kl


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, live: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        size = len(hidden)
        logps = hidden.new_empty(size, dtype=torch.float32)
        kl = None if live is None else torch.empty_like(logps)
        grads = [torch.empty_like(hidden) for _ in range(1 + (kl is not None))]
        if not ctx.needs_input_grad[0]:
            grads = []
        step = max(1, LOGITS_PER_CHUNK // len(head.weight))
        for at in (slice(start, start + step) for start in range(0, size, step)):
            logits = _logits(hidden[at], head)
            lse = logits.logsumexp(-1, keepdim=True)
            logps[at] = (logits.gather(-1, targets[at, None]) - lse)[:, 0]
            probs = logits.sub_(lse).exp_() if live is None else logits.sub_(lse).exp()
            if live is not None and kl is not None:
                other = _logits(live[at], head).log_softmax(-1)
                theirs = other.exp()
                kl[at] = (other.sub_(logits)).mul_(theirs).sum(-1)
                if grads:
                    grads[1][at] = _back(theirs.neg_().add_(probs), head, hidden.dtype)
            if grads:
                grads[0][at] = head.weight[targets[at]] - _back(probs, head, hidden.dtype)
        ctx.save_for_backward(*grads)
        return logps, kl

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        for grad, scale in zip(ctx.saved_tensors, outer, strict=False):
            if scale is not None:
                part = grad * scale[:, None].to(grad.dtype)
                total = part if total is None else total.add_(part)
        return total, None, None, None


def _logits(hidden: Tensor, head: Head) -> Tensor:
    return torch.nn.functional.linear(hidden, head.weight, head.bias).float()


def _back(grad: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """From a gradient of logits to one of hidden states."""
    return grad.to(dtype) @ head.weight.to(dtype)
