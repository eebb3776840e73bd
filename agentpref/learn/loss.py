"""The objective of one update, as pure functions of log-probabilities.

Nothing here knows a model, a tokenizer, a batch layout or a setting, so that every number can be
checked by hand. Log-probabilities are natural logs; those of sequences are sums over completion
tokens. A *log-ratio* is log[π_θ/π_0](y) of one answer, and the margin h is the chosen answer's
log-ratio less the rejected one's. Which loss an update takes is criterion.py's affair.
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


def robust_loss(margin: Tensor, *, beta: float, noise: Tensor | float) -> Tensor:
    """[(1 − ε)·ℓ(βh) − ε·ℓ(−βh)] / (1 − 2ε), one number per pair.

    Robust DPO (2403.00409): where labels are flipped with probability ``noise`` = ε,
    its expectation over the flips is the loss of the true labels. That needs ε < ½, and the nearer
    ε is to ½ the more it varies from one pair to the next. It may be negative.
    """
    from torch.nn.functional import logsigmoid

    z = beta * margin
    return (noise * logsigmoid(-z) - (1 - noise) * logsigmoid(z)) / (1 - 2 * noise)


def ipo_loss(margin: Tensor, *, beta: float) -> Tensor:
    """(h − 1/(2β))², one number per pair (IPO: 2310.12036, equation 17; its τ is our β).

    The margin is driven to 1/(2β) and no further, however sure the label. The paper writes h as a
    difference of sums over tokens; its authors trained on means (``per_token``), as TRL does.
    """
    return (margin - 1 / (2 * beta)) ** 2


def hinge_loss(margin: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 − βh), one number per pair: the calibration loss of SLiC-HF (2305.10425).

    With log-ratios in place of log-probs, as in RSO (2309.06657). A pair whose margin has reached
    1/β pulls no more.
    """
    return (1 - beta * margin).clamp(min=0)


def apo_zero_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """1 − σ(β·chosen) + σ(β·rejected), one number per pair, of the two answers' log-ratios.

    APO-zero (2408.06266, equation 7): anchored at the reference, it makes the chosen answer
    likelier *and* the rejected one less likely, where DPO asks only for the gap to grow.
    """
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def kto_loss(
    ratio: Tensor, desirable: Tensor, *, beta: float, reference_point: Tensor | float
) -> Tensor:
    """1 − σ(±β(r − z₀)), one number per answer: + where it was liked, − where it was not.

    KTO (2402.01306, equation 7) is λ times this: λ less the value λ·σ(±β(r − z₀)), so ½·λ where
    r = z₀. ``ratio`` is r, the log-ratio of each judged answer, and ``desirable`` a mask over
    them; ``reference_point`` is z₀ in nats, a constant (kto.py).
    """
    return (-beta * kto_margin(ratio, desirable, reference_point=reference_point)).sigmoid()


def kto_margin(ratio: Tensor, desirable: Tensor, *, reference_point: Tensor | float) -> Tensor:
    """±(r − z₀), one number per answer: above zero where the policy agrees with the thumb."""
    return (ratio - reference_point).where(desirable, reference_point - ratio)


def per_token(ratio: Tensor, lengths: Tensor) -> Tensor:
    """Log-ratios as means over the tokens of each answer; ``lengths`` counts those."""
    return ratio / lengths


def wpo_weight(logps: Tensor, lengths: Tensor, collision: Tensor | float = 0.0) -> Tensor:
    """How far each answer is the policy's own: a weight in (0, 1], detached (WPO: 2406.11827).

    exp of the mean over tokens of log π_θ(y_t), at most 1; ``logps`` are the sums and ``lengths``
    count the tokens. The paper's sampled alignment divides π_θ(y_t) by Σ_v π_θ(v)², which is what
    a token that the policy draws itself can expect, so that its own answers weigh about 1:
    ``collision`` is the sum over tokens of log Σ_v π_θ(v)², see ``kernels.head.log_collision``.
    Without it all answers weigh less, the less sure the model is.
    """
    return ((logps - collision) / lengths).exp().clamp(max=1).detach()


def nll_anchor(chosen: Tensor, lengths: Tensor) -> Tensor:
    """−log π_θ(y⁺) / |y⁺|, one number per pair: keeps the chosen answers likely (2404.19733).

    ``lengths`` counts the completion tokens of each chosen answer.
    """
    return -chosen / lengths


def kl_penalty(kl: Tensor, *, weight: float, target: float) -> Tensor:
    """λ·max(0, KL − target), a scalar from a scalar in nats per token.

    Below the target nothing pulls; above it the pull is λ times the gradient of the KL. A weight
    that is adapted to hold the target (1909.08593, section 2.2) was tried first: docs/LOG.md says
    what it did.
    """
    return weight * (kl - target).clamp(min=0)
