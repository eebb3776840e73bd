"""How far a reward model can be followed before answers become worse: the KL–reward frontier.

The more freely answers are chosen by a reward model, the more of its errors are chosen with them:
the proxy goes on rising while what people want falls (Gao, Schulman & Hilton 2023, 2210.10760).
Here a base has answered prompts many times. For each n, how often does the answer that the reward
model likes best of n beat one answer, in its own eyes and in those of another scorer? All n are
estimated from the same answers without bias, and the best of n lies log n − (n − 1)/n nats from the
base at most. Revisions that were trained stand beside.

Pure functions of what scorers saw; :mod:`agentpref.evaluation.overoptimisation` draws the answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.prefer.judges.hearing import Spending
from agentpref.prove.bootstrap import Paired, lower_bound
from agentpref.reward.heads import Heads
from agentpref.reward.model import kl_of_best
from agentpref.types import BASE

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95
FEWEST = 20
"""With fewer prompts nothing is proven by resampling them."""


@dataclass(frozen=True, slots=True)
class Point:
    """A policy on the way from the base: the best of ``n`` answers, or a ``revision``.

    ``kl`` is in nats per answer. ``proxy`` and ``gold`` say how often its answer is better than one
    of the base's, by the model that chooses and by the other scorer.
    """

    policy: str
    n: int | None
    kl: float
    proxy: float
    gold: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """What is gained on the way from the base, and how far it pays to go.

    ``gold`` names the other scorer. ``tokens`` is the mean length of the base's answers. ``turns``
    says that by the other scorer the best of the largest n is proven worse than that of another n;
    then ``best_n`` is where it is best, and ``kl_budget`` how far that goes, in nats per token.
    Else ``best_n`` is the largest n. A budget is never less than the best of two takes.
    """

    reward: str
    namespace: str
    gold: str
    prompts: int
    samples: int
    tokens: float
    points: tuple[Point, ...]
    best_n: int
    turns: bool
    kl_budget: float | None
    spending: Spending = field(default_factory=Spending)
    notes: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """The frontier as plain values: what ``--json`` prints."""
        found = {name: getattr(self, name) for name in self.__slots__}
        found |= {"points": [asdict(one) for one in self.points], "notes": [*self.notes]}
        return found | {"spending": self.spending.to_mapping()}


class Read(NamedTuple):
    """Features of a prompt ``[d]``, and of answers ``[n, D]``: the base's, and each revision's."""

    prompt: NDArray[Any]
    base: NDArray[Any]
    others: Mapping[str, NDArray[Any]]


class Seen(NamedTuple):
    """Answers to one prompt, in a scorer's eyes.

    ``better`` ``[N]`` is how often each of the base's answers is better than another one of them,
    and ``others`` how often a revision's is. ``score`` ``[N]`` is what the best is chosen by.
    """

    score: NDArray[Any]
    better: NDArray[Any]
    others: Mapping[str, float]


def frontier(
    sides: Sequence[tuple[Sequence[Seen], Sequence[Seen]]],
    tokens: Sequence[float],
    kls: Mapping[str, float],
    *,
    seed: int = 0,
) -> Frontier:
    """The frontier, from what was seen of the same prompts.

    Args:
        sides: pairs of scorers, the one that chooses first: what each saw of each prompt. Curves
            are means over all pairs.
        tokens: the mean length of the base's answers to each prompt.
        kls: how far revisions are from the base, in nats per token, by name.
        seed: of the bootstrap over prompts, which says whether answers become worse.
    """
    import numpy as np

    samples = len(sides[0][0][0].score)
    ns = [2**k for k in range(samples.bit_length()) if 2**k < samples] + [samples]
    rows = np.array([  # [sides, prompts, ns, 2]
        [[(at_best_of(n, a.score, a.better), at_best_of(n, a.score, b.better)) for n in ns]
         for a, b in zip(first, second, strict=True)]
        for first, second in sides
    ])  # fmt: skip
    by_prompt = rows.mean(0)
    proxy, gold = by_prompt.mean(0).T
    best, length = int(gold.argmax()), float(np.mean(tokens))
    points = [
        Point(f"best of {n}" if n > 1 else BASE, n, kl_of_best(n), float(p), float(g))
        for n, p, g in zip(ns, proxy, gold, strict=True)
    ]
    for name, kl in kls.items():
        means = (
            np.mean([one.others[name] for side in sides for one in side[which]])
            for which in (0, 1)
        )  # fmt: skip
        points.append(Point(name, None, kl * length, *map(float, means)))
    turns = False
    if best < len(ns) - 1 and len(by_prompt) >= FEWEST:
        last, there = (np.clip(by_prompt[:, place, 1], 0, 1).tolist() for place in (-1, best))
        paired = Paired(tuple(last), tuple(there), tuple(map(str, range(len(by_prompt)))))
        turns = lower_bound(paired, confidence=CONFIDENCE, seed=seed).lower > 0
    reach = kl_of_best(max(ns[best], 2)) / max(length, 1.0) if turns else None
    best = best if turns else len(ns) - 1
    return Frontier(
        "", "", "", len(by_prompt), samples, length, tuple(points), ns[best], turns, reach
    )


def at_best_of(n: int, score: NDArray[Any], value: NDArray[Any]) -> float:
    """The expected value of the best by score of n answers that are drawn among these.

    Unbiased, whichever n of them are drawn (Nakano et al. 2021, 2112.09332, appendix I).

    >>> from numpy import array
    >>> score, value = array([0.2, 0.9, 0.4]), array([0.0, 0.0, 1.0])
    >>> [round(at_best_of(n, score, value), 3) for n in (1, 2, 3)]
    [0.333, 0.333, 0.0]
    """
    order, total = score.argsort(kind="stable"), math.comb(len(score), n)
    return sum(math.comb(k, n - 1) * float(value[place]) for k, place in enumerate(order)) / total


def seen_by(heads: Heads, features: Read) -> Seen:
    """Answers to one prompt, in the eyes of a reward model."""
    import numpy as np

    names = [*features.others]
    answers = np.concatenate([features.base, *(features.others[name] for name in names)])
    rewards = heads.rewards(features.prompt, answers)
    rewards = rewards - rewards[: len(features.base)].mean(0)
    mean, own = rewards.mean(1), len(features.base)
    beats = 1 / (1 + np.exp(-np.clip(mean[:, None] - mean[None, :own], -500, 500)))
    better = (beats[:own].sum(1) - 0.5) / (own - 1)  # itself is no other one
    others, start = dict[str, float](), own
    for name in names:
        end = start + len(features.others[name])
        others[name] = float(beats[start:end].mean())
        start = end
    return Seen((mean - rewards.var(1))[:own], better, others)
