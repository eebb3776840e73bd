"""Which comparisons are worth a person's minute: rules that choose some of many.

A candidate is two answers to a prompt, and what a reward model makes of them. The rules are pure
functions of arrays. Where people err often, cleverness loses to chance: what a model is unsure of
is what people are unsure of, too. So :func:`rule_for` falls back to chance above a share of errors.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from agentpref.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.reward.heads import Heads

Rule = Literal["random", "entropy", "disagreement", "d_optimal", "evidence"]
RULES: tuple[Rule, ...] = get_args(Rule)[:-1]
"""Those of :func:`choose`."""

WITHOUT_REWARD: tuple[Rule, ...] = ("random", "evidence")
"""Those that need no reward model."""

DEFAULT: Rule = "entropy"
MOST_NOISE = 0.1
"""Above this share of wrong labels, questions are drawn at random."""

_POOL = 5  # entropy: of so many times the number wanted, the most uncertain, those far apart


@dataclass(frozen=True, slots=True)
class Candidates:
    """Questions to choose from.

    ``margins`` ``[n, K]`` are by each head of a reward model, in log-odds. ``kernel`` ``[n, n]``
    says how alike two of them are, and ``known`` ``[n, m]`` how alike they are to what was judged;
    ``judged`` ``[m, m]`` is the kernel of that.
    """

    margins: NDArray[Any]
    kernel: NDArray[Any]
    known: NDArray[Any]
    judged: NDArray[Any]

    def __len__(self) -> int:
        return len(self.margins)


def candidates(heads: Heads, at: NDArray[Any], said: NDArray[Any]) -> Candidates:
    """Questions as a reward model sees them.

    Args:
        heads: the model's.
        at: the features of the prompts, ``[n, d]``.
        said: the first answers' features less the others', ``[n, D]``.
    """
    places, measured = heads.space.place(at), heads.space.measure(said)

    def kernel(
        one: tuple[NDArray[Any], NDArray[Any]], other: tuple[NDArray[Any], NDArray[Any]]
    ) -> NDArray[Any]:
        found: NDArray[Any] = heads.space.kernel(one[0], other[0]) * (one[1] @ other[1].T)
        return found

    own, judged = (places, measured), (heads.at, heads.said)
    return Candidates(
        heads.margins(at, said), kernel(own, own), kernel(own, judged), kernel(judged, judged)
    )


def rule_for(noise: float | None, wanted: Rule = DEFAULT) -> Rule:
    """The rule to use where people are wrong about a share of their labels; ``None``: unknown.

    >>> rule_for(0.05), rule_for(0.2)
    ('entropy', 'random')
    """
    return "random" if noise is not None and noise > MOST_NOISE else wanted


def noise_of_agreement(agreement: float) -> float:
    """The share ε of wrong labels that explains how often two labels of one question agree.

    They agree if both are right or both are wrong: (1 − ε)² + ε².

    >>> round(noise_of_agreement(0.82), 2)
    0.1
    """
    return (1 - math.sqrt(max(0.0, 2 * agreement - 1))) / 2


def choose(some: Candidates, count: int, rule: Rule, *, seed: int = 0) -> list[int]:
    """The numbers of the questions to ask, the most telling first.

    Args:
        some: what to choose from.
        count: how many, at most.
        rule: by what. ``entropy`` takes those of which the model is least sure, far apart from one
            another; ``disagreement`` those about which its heads differ most; ``d_optimal`` those
            of which the least is known by the kernel, one given the others.
        seed: of what ``random`` draws.

    Raises:
        ConfigError: there is no such rule.
    """
    if rule not in RULES:
        raise ConfigError(f"{rule!r} is no rule; known: {', '.join(RULES)}")
    count = min(count, len(some))
    if rule == "random":
        return random.Random(seed).sample(range(len(some)), count)
    return _RULES[rule](some, count)


def _entropy(some: Candidates, count: int) -> list[int]:
    """The most uncertain ones, and of these k-centre greedily the farthest apart."""
    import numpy as np

    unsure = np.argsort(np.abs(some.margins.mean(1)), kind="stable")[: _POOL * count]
    kernel = some.kernel[np.ix_(unsure, unsure)]
    own = np.diag(kernel)
    chosen: list[int] = []
    distance = np.full(len(unsure), np.inf)
    for _ in range(min(count, len(unsure))):
        # The first one is the most uncertain; a square distance in the kernel's space.
        best = int(np.argmax(distance)) if chosen else 0
        chosen.append(best)
        distance = np.minimum(distance, own + own[best] - 2 * kernel[best])
        distance[chosen] = -np.inf
    return [int(unsure[number]) for number in chosen]


def _disagreement(some: Candidates, count: int) -> list[int]:
    """Those whose probabilities differ most between the heads."""
    import numpy as np

    apart = (1 / (1 + np.exp(-some.margins))).std(1)
    return [int(n) for n in np.argsort(-apart, kind="stable")[:count]]


def _d_optimal(some: Candidates, count: int) -> list[int]:
    """Greedily the largest variance given what was judged and chosen before.

    That maximises log det of the information (Krause et al. 2008); the noise is the kernel's mean.
    """
    import numpy as np

    noise = max(float(np.diag(some.kernel).mean()), 1e-9)
    covariance = some.kernel.astype(np.float64)
    if len(some.judged):
        whole = some.judged.astype(np.float64) + noise * np.eye(len(some.judged))
        known = some.known.astype(np.float64)
        covariance = covariance - known @ np.linalg.solve(whole, known.T)
    chosen: list[int] = []
    variance = np.diag(covariance).copy()
    for _ in range(count):
        best = int(np.argmax(variance))
        chosen.append(best)
        column = covariance[:, best]
        covariance = covariance - np.outer(column, column) / (covariance[best, best] + noise)
        variance = np.diag(covariance).copy()
        variance[chosen] = -np.inf
    return chosen


_RULES: Mapping[Rule, Callable[[Candidates, int], list[int]]] = {
    "entropy": _entropy,
    "disagreement": _disagreement,
    "d_optimal": _d_optimal,
}
