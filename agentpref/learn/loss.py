"""The objective of one update, as pure functions of log-probabilities.

Nothing here knows a model, a tokenizer or a batch layout, so that every number can be checked by
hand. Log-probabilities are natural logs; those of sequences are sums over completion tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def reward_margin(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """h = log[π_θ/π_0](y⁺) − log[π_θ/π_0](y⁻), one number per pair.

    All four are ``[pairs]``: sequence log-probs under the policy, then under the reference.
    Times β it is the implicit reward margin of DPO (2305.18290, section 4).
    """
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo_loss(margin: Tensor, *, beta: float, noise: Tensor | float = 0.0) -> Tensor:
    """(1 − ε)·ℓ(βh) + ε·ℓ(−βh) with ℓ(z) = −log σ(z), one number per pair.

    DPO (2305.18290, equation 7) with the conservative term for labels that are flipped with
    probability ``noise`` = ε (cDPO). At ε = ½ no label is believed; at h = 0 the loss is log 2.
    """
    from torch.nn.functional import logsigmoid

    z = beta * margin
    return -(1 - noise) * logsigmoid(z) - noise * logsigmoid(-z)


def nll_anchor(chosen: Tensor, lengths: Tensor) -> Tensor:
    """−log π_θ(y⁺) / |y⁺|, one number per pair: keeps the chosen answers likely (2404.19733).

    ``lengths`` counts the completion tokens of each chosen answer.
    """
    return -chosen / lengths


def token_kl(live_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(π_live ‖ π_θ) in nats at each position: ``[…, vocabulary]`` twice gives ``[…]``."""
    live = live_logits.log_softmax(-1)
    return (live.exp() * (live - logits.log_softmax(-1))).sum(-1)


def kl_excess(per_token: Tensor, real: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """max(0, KL − target) and KL itself, two scalars: what the penalty λ multiplies, and a figure.

    ``per_token`` and ``real`` are ``[sequences, C]``. The KL is the mean over sequences of each
    one's mean over its real tokens, so that long answers do not drown short ones. Below the target
    nothing pulls; above it the pull is λ times the gradient of the KL. A weight that is adapted to
    hold the target (1909.08593, section 2.2) was tried first: docs/LOG.md says what it did.
    """
    kl = ((per_token * real).sum(-1) / real.sum(-1)).mean()
    return (kl - target).clamp(min=0), kl
