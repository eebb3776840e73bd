"""The output layer fused with the log-softmax, a few hundred positions at a time.

Training needs one log-probability of each position, and sometimes one KL. So the logits are made,
used and overwritten chunk by chunk, and the gradient is kept as a vector of the hidden size: no
``[positions, vocabulary]`` tensor outlives its chunk, and the backward pass recomputes nothing. The
output layer itself is frozen. The plain formulas are here too: :func:`read_logits` is the oracle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_PER_CHUNK = 1 << 21
"""Logits that exist at one time: 8 MB in float32, which stay in a processor's cache."""

LEAST_POSITIONS = 96
"""Positions of a chunk, whatever the vocabulary. Each chunk reads the whole output layer twice;
with a vocabulary of 150,000, chunks of 6 positions take eight times as long as chunks of 128."""


class Head(NamedTuple):
    """A frozen output layer: ``weight`` is ``[vocabulary, d]``, ``bias`` ``[vocabulary]``."""

    weight: Tensor
    bias: Tensor | None = None


class Reading(NamedTuple):
    """Values at each position, ``[N]`` each, in float32 and nats.

    ``logps`` are those of the targets, ``kl`` is KL(π_live ‖ π_θ), and ``collision`` is
    log Σ_v π_θ(v)², without a gradient. The last two are ``None`` unless they were asked for.
    """

    logps: Tensor
    kl: Tensor | None = None
    collision: Tensor | None = None


def token_kl(live_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(π_live ‖ π_θ) in nats at each position: ``[…, vocabulary]`` twice gives ``[…]``."""
    live = live_logits.log_softmax(-1)
    return (live.exp() * (live - logits.log_softmax(-1))).sum(-1)


def log_collision(logits: Tensor) -> Tensor:
    """log Σ_v π(v)² at each position: ``[…, vocabulary]`` gives ``[…]``; minus Rényi's entropy."""
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


def read_logits(
    logits: Tensor, targets: Tensor, *, live: Tensor | None = None, collision: bool = False
) -> Reading:
    """Read ``[N, vocabulary]`` logits by the plain formulas; ``live`` are the live policy's."""
    logits = logits.float()
    return Reading(
        logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0],
        None if live is None else token_kl(live.float(), logits),
        log_collision(logits.detach()) if collision else None,
    )


def read(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    live: Tensor | None = None,
    collision: bool = False,
) -> Reading:
    """Read hidden states through the output layer, with the fused kernel.

    Args:
        hidden: the policy's last hidden states, ``[N, d]``, in the head's dtype or wider.
        head: the output layer of both policies.
        targets: the token to predict at each, ``[N]``.
        live: the live policy's hidden states at the same places, ``[N, d]``, for the KL. They get
            no gradient.
        collision: whether to compute the probability that two draws are the same token.
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
        step = max(1, min(size, max(LEAST_POSITIONS, LOGITS_PER_CHUNK // len(head.weight))))
        own = _Softmax(head, hidden, step)
        others = None if live is None else _Softmax(head, hidden, step)
        for at in (slice(start, start + step) for start in range(0, size, step)):
            logps[at] = own.of(hidden[at], targets[at]).logps(targets[at])
            if collision is not None:
                collision[at] = own.collision()
            if live is not None and kl is not None and others is not None:
                kl[at] = others.of(live[at], targets[at]).kl_from(own)
            if not grads:
                continue
            expected = own.expected_rows()
            grads[0][at] = head.weight[targets[at]] - expected
            if others is not None:
                grads[1][at] = expected - others.expected_rows()
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


class _Softmax:
    """The softmax of one chunk at a time, in memory that is allocated once.

    It keeps the logits less their maximum, their exponentials and the sums of these. It never
    divides a whole table: each result divides a vector at the end.
    """

    def __init__(self, head: Head, hidden: Tensor, positions: int) -> None:
        size = (positions, len(head.weight))
        self._head = head
        self._wide = [hidden.new_empty(size, dtype=torch.float32) for _ in range(2)]
        dtype = head.weight.dtype
        self._narrow = self._wide[0]
        if dtype != torch.float32:
            self._narrow = hidden.new_empty(size, dtype=dtype)

    def of(self, hidden: Tensor, targets: Tensor) -> _Softmax:
        """Compute the softmax of a chunk's hidden states, whose targets are to be read.

        A product in bfloat16 rounds each logit, and what is read is the difference of the target's
        and all others'. So the target's logit is computed anew in float32.
        """
        self._shifted, self._exps = (wide[: len(hidden)] for wide in self._wide)
        weight = self._head.weight
        logits = torch.mm(hidden.to(weight.dtype), weight.T, out=self._narrow[: len(hidden)])
        if self._head.bias is not None:
            logits.add_(self._head.bias)
        self._shifted.copy_(logits)
        if self._narrow is not self._wide[0]:
            rows = self._head.weight[targets].float()
            exactly = torch.linalg.vecdot(hidden.float(), rows)
            if self._head.bias is not None:
                exactly += self._head.bias[targets]
            self._shifted.scatter_(1, targets[:, None], exactly[:, None])
        self._shifted.sub_(self._shifted.amax(-1, keepdim=True))
        self._sums = torch.exp(self._shifted, out=self._exps).sum(-1)
        return self

    def logps(self, targets: Tensor) -> Tensor:
        """Log-probs of the targets."""
        return self._shifted.gather(-1, targets[:, None])[:, 0] - self._sums.log()

    def collision(self) -> Tensor:
        """log Σ π²."""
        squares: Tensor = torch.linalg.vecdot(self._exps, self._exps)
        return squares.log() - 2 * self._sums.log()

    def kl_from(self, other: _Softmax) -> Tensor:
        """KL(self ‖ other); overwrites the shifted logits."""
        apart: Tensor = torch.linalg.vecdot(self._shifted.sub_(other._shifted), self._exps)
        return apart / self._sums - self._sums.log() + other._sums.log()

    def expected_rows(self) -> Tensor:
        """The output layer's rows averaged under the policy: the gradient of log Σ exp."""
        exps, dtype = self._exps, self._head.weight.dtype
        if dtype != torch.float32:
            exps = self._narrow[: len(exps)].copy_(exps)
        return (exps @ self._head.weight).to(self._sums.dtype) / self._sums[:, None]
