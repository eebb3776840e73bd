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

LEAST_POSITIONS = 96
"""Positions of a chunk, whatever the vocabulary: each chunk reads the whole output layer twice, and
with 150,000 rows of it, six positions at a time take eight times as long as 128."""


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
        step = max(1, min(size, max(LEAST_POSITIONS, LOGITS_PER_CHUNK // len(head.weight))))
        own = _Softmax(head, hidden, step)
        others = None if live is None else _Softmax(head, hidden, step)
        for at in (slice(start, start + step) for start in range(0, size, step)):
            logps[at] = own.of(hidden[at]).logps(targets[at])
            if collision is not None:
                collision[at] = own.collision()
            if live is not None and kl is not None and others is not None:
                kl[at] = others.of(live[at]).kl_from(own)
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
    """The softmax of one chunk at a time, in memory that is taken once.

    Logits less their largest, their exponentials and the sums of these are kept, never divided
    tables: everything asked for divides a vector in the end.
    """

    def __init__(self, head: Head, hidden: Tensor, positions: int) -> None:
        size = (positions, len(head.weight))
        self._head = head
        self._wide = [hidden.new_empty(size, dtype=torch.float32) for _ in range(2)]
        narrow = hidden.dtype != torch.float32
        self._narrow = hidden.new_empty(size) if narrow else self._wide[0]

    def of(self, hidden: Tensor) -> _Softmax:
        """Take in a chunk's hidden states."""
        self._shifted, self._exps = (wide[: len(hidden)] for wide in self._wide)
        logits = torch.mm(hidden, self._head.weight.T, out=self._narrow[: len(hidden)])
        if self._head.bias is not None:
            logits.add_(self._head.bias)
        self._shifted.copy_(logits)
        self._shifted.sub_(self._shifted.amax(-1, keepdim=True))
        self._sums = torch.exp(self._shifted, out=self._exps).sum(-1)
        return self

    def logps(self, targets: Tensor) -> Tensor:
        """Log-probs of the targets."""
        return self._shifted.gather(-1, targets[:, None])[:, 0] - self._sums.log()

    def collision(self) -> Tensor:
        """log Σ π²."""
        return _vecdot(self._exps, self._exps).log() - 2 * self._sums.log()

    def kl_from(self, other: _Softmax) -> Tensor:
        """KL of this policy from another; the shifted logits are used up."""
        apart = _vecdot(self._shifted.sub_(other._shifted), self._exps)
        return apart / self._sums - self._sums.log() + other._sums.log()

    def expected_rows(self) -> Tensor:
        """The output layer's rows, averaged under the policy: the gradient of log Σ exp."""
        dtype = self._head.weight.dtype
        exps = (
            self._exps
            if dtype == torch.float32
            else self._narrow[: len(self._exps)].copy_(self._exps)
        )
        return (exps @ self._head.weight) / self._sums[:, None].to(dtype)


def _vecdot(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(a, b)
    return products
