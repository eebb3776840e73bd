"""The sign test of a gain: how many prompts became better, how many worse, and is that chance?

Each prompt has one sign: that of the sum of the changes of its pairs, candidate against live. A sum
of 0 does not count. Where a candidate learned nothing of its labels, a sign is a fair coin, since a
label and its opposite are equally likely whatever the candidate does with the two answers. So the
number of prompts that became better is binomial, and the test is exact at any size (with a pair per
prompt it is McNemar's exact test). For thumbs see :meth:`~agentpref.prove.evaluate.Scores.paired`.

**Trained prompts as evidence.** On a small night the trained prompts are dealt into parts by hash.
A model trained on the parts before a part judges its prompts (prequential or forward validation:
Dawid 1984; Blum, Kalai & Langford 1999), and the candidate, trained on all parts, judges the
held-out ones. Given everything that a model was trained on, the labels of what it judges are still
fair coins if there is nothing to learn. So *all* these signs together are independent fair coins,
and may be added up. In ordinary cross-validation they may not: there, each label is trained on by
the models that judge the others. (The mean of such folds' e-values, times the held-out one, would
be valid too, and is much weaker: ``python -m benchmarks.false_promotions --compare``.)

**Looks.** Who looks every night until a test succeeds will see it succeed. So look number m (from
1) at judgements that the live revision has not learned may err with probability risk / (m·(m+1))
only. These add up to the risk, however many looks there are. A look at one of several candidates
that the same judgements might have led to is one of so many looks, which share what they may err.

Pure functions of numbers; scipy is imported when one is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from agentpref.prove.bootstrap import Paired, scipy

WORTH_RATE = 0.6
"""Of the prompts that change, at least this share becomes better in a gain worth having."""

WORTH_CHANGE = 0.1
"""In a gain worth having, at least this share of the prompts changes."""


@dataclass(frozen=True, slots=True)
class Signs:
    """How many prompts were judged, and how many of them became better and worse."""

    prompts: int = 0
    better: int = 0
    worse: int = 0

    @classmethod
    def of(cls, paired: Paired) -> Signs:
        """Count the prompts of some pairs by the sign of their change."""
        changes: Mapping[str, list[float]] = {prompt: [] for prompt in paired.prompts}
        for prompt, old, new in zip(paired.prompts, paired.live, paired.candidate, strict=True):
            changes[prompt].append(new - old)
        sums = [math.fsum(own) for own in changes.values()]
        return cls(len(sums), sum(s > 0 for s in sums), sum(s < 0 for s in sums))

    def __add__(self, other: Signs) -> Signs:
        return Signs(
            self.prompts + other.prompts, self.better + other.better, self.worse + other.worse
        )

    @property
    def changed(self) -> int:
        """How many prompts have a sign."""
        return self.better + self.worse

    def chance_of_gain(self) -> float:
        """P(at least so many better), were each sign a fair coin; 1 where nothing changed."""
        return sign_test(self.better, self.worse, one_sided=True)

    def chance_of_loss(self) -> float:
        """P(at least so many worse), were each sign a fair coin."""
        return sign_test(self.worse, self.better, one_sided=True)

    def chance_if_worth_having(self) -> float:
        """At most how probable so little is, were this a gain worth having.

        Such a gain changes at least :data:`WORTH_CHANGE` of the prompts, and :data:`WORTH_RATE` of
        these for the better. Twice the smaller of the probabilities of so few better ones among the
        changed and of so few changed ones (Bonferroni).
        """
        few_better = _at_most(self.better, self.changed, WORTH_RATE)
        few_changed = _at_most(self.changed, self.prompts, WORTH_CHANGE)
        return min(1.0, 2 * min(few_better, few_changed))


def sign_test(up: int, down: int, *, one_sided: bool = False) -> float:
    """The exact p-value of ``up`` against ``down`` changes of either sign; 1 of none at all.

    One-sided it is P(at least so many up), were each change a fair coin.

    Raises:
        MissingDependency: scipy is not installed.
    """
    if one_sided:
        return 1.0 if up <= 0 else float(_binomial("bdtrc", up - 1, up + down, 0.5))
    return min(1.0, 2 * sign_test(max(up, down), min(up, down), one_sided=True))


def allowed(look: int, risk: float, choices: int = 1) -> float:
    """The error that look number ``look`` (from 1) may make; over all looks it sums to ``risk``.

    With several ``choices`` it is the last of so many looks, of which any one might have been made,
    and each may err as much: the mean of what they may, one by one.

    >>> [round(1 / allowed(*look)) for look in ((3, 1.0), (4, 1.0), (4, 1.0, 2))]
    [12, 20, 15]
    """
    return risk / ((look - choices + 1) * (look + 1))


def can_decide(prompts: int, error: float) -> bool:
    """Whether so many prompts would prove a gain at this error, were all of them better."""
    return 0.5**prompts <= error


def prompts_needed(signs: Signs, error: float, *, power: float = 0.8) -> int | None:
    """Estimate how many prompts would prove a gain, were the shares so far the true ones.

    The normal sample size of a sign test: ((z_error/2 + z_power·√(q(1−q))) / (q − ½))² changed
    prompts at a share q of better ones. ``None`` if no more are better than worse.
    """
    if signs.better <= signs.worse:
        return None
    share = signs.better / signs.changed
    normal = NormalDist()
    spread = normal.inv_cdf(power) * math.sqrt(share * (1 - share))
    changed = ((-normal.inv_cdf(error) / 2 + spread) / (share - 0.5)) ** 2
    changed = max(changed, -math.log2(error))
    return math.ceil(changed * signs.prompts / signs.changed)


def _at_most(number: int, of: int, rate: float) -> float:
    return 1.0 if of == 0 else float(_binomial("bdtr", number, of, rate))


def _binomial(name: str, number: int, of: int, rate: float) -> float:
    return float(getattr(scipy("special"), name)(number, of, rate))
