"""Unites several judges into one, by weights learnt from a few dozen gold labels.

A majority lets five mediocre judges outvote a good one. This panel starts from the single judge
that is right most often on the gold, and gives the others a say as far as the gold speaks for it.

P(a is better) = 1 / (1 + exp(-w·x)), where x_j in [-1, 1] is the signed verdict of judge j over
both orders: 1 for a, -1 for b, 0 for a tie. There is no intercept, so that which answer is called a
means nothing. The weights minimise Σ log(1 + exp(-y w·x)) + strength / 2 · |w - m|² with y = 1
where a is better, else -1: a logistic regression whose prior mean m has all its weight on the judge
that is best on the gold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentpref.prefer.judges.calibration import library
from agentpref.types import Winner

STRENGTH = 3.0
"""How strongly the weights are held at the prior."""

WEIGHT = 2.0
"""The weight of the best judge before the gold is looked at: its verdicts are right in 88 %.

Both were chosen among others on LLMBar with 30 gold labels (``benchmarks/judges/statistics.py``).
The log-odds with which the best judge is right on the gold are a worse prior: where it is always
right, they leave nothing for the others to explain, so that these are weighted by noise.
"""

_DIGITS = 12  # a tie is a tie, whatever the last bits of a sum of weights say


@dataclass(frozen=True, slots=True)
class Panel:
    """The weight of each judge's verdict, in log-odds."""

    weights: Mapping[str, float]

    def vote(self, verdicts: Mapping[str, float]) -> tuple[Winner, float]:
        """The winner and its probability, .5 to 1, by signed verdicts of the judges.

        A judge that said nothing counts as a tie, as one does that the panel does not know.

        >>> Panel({"good": 3.0, "fair": 1.0}).vote({"good": 0, "fair": -1})[0]
        'b'
        """
        odds = sum(weight * verdicts.get(name, 0.0) for name, weight in self.weights.items())
        if round(odds, _DIGITS) == 0:
            return "tie", 0.5
        return ("a" if odds > 0 else "b"), 1 / (1 + math.exp(-abs(odds)))

    def to_mapping(self) -> dict[str, float]:
        """The weights as plain JSON values."""
        return dict(self.weights)

    @classmethod
    def from_mapping(cls, values: Mapping[str, float]) -> Panel:
        """Undo :meth:`to_mapping`."""
        return cls(dict(values))


def fit_panel(
    verdicts: Sequence[Mapping[str, float]],
    gold: Sequence[Literal["a", "b"]],
    *,
    strength: float = STRENGTH,
    weight: float = WEIGHT,
) -> Panel:
    """Learn the weights from questions whose better answer people know.

    Without gold there are no weights, and every vote is a tie.

    Args:
        verdicts: signed verdicts by judge, -1 to 1, for each question.
        gold: the better answer of each question.
        strength: of the prior, in 1 / (log-odds)².
        weight: of the best judge in the prior, in log-odds.

    Raises:
        MissingDependency: scipy is not installed.
    """
    names = [*dict.fromkeys(name for one in verdicts for name in one)]
    if not names:
        return Panel({})
    optimize = library("scipy.optimize")
    import numpy as np  # which scipy brings

    signs = np.array([1.0 if better == "a" else -1.0 for better in gold])  # (questions,)
    said = np.array([[one.get(name, 0.0) for name in names] for one in verdicts])
    towards = signs[:, None] * said  # (questions, judges): 1 where a judge is right, -1 where wrong
    prior = np.zeros(len(names))
    prior[np.sign(towards).sum(axis=0).argmax()] = weight  # right most often, a tie counting half

    def loss(weights: Any) -> tuple[float, Any]:
        margins = towards @ weights
        off = weights - prior
        slope = -towards.T @ np.exp(-np.logaddexp(0, margins))
        return np.logaddexp(0, -margins).sum() + strength / 2 * off @ off, slope + strength * off

    found = optimize.minimize(loss, prior, jac=True, method="L-BFGS-B", options={"gtol": 1e-9})
    return Panel(dict(zip(names, found.x.tolist(), strict=True)))


def cross_validated(
    verdicts: Sequence[Mapping[str, float]],
    gold: Sequence[Literal["a", "b"]],
    folds: int = 5,
) -> list[Winner]:
    """The votes of panels that have not seen the gold of what they vote on.

    Every ``folds``-th question is in the same fold, and a panel is fitted on all other folds. How
    right a panel is on its own gold would flatter it, so its noise is calibrated on these votes. A
    single question is a tie, because nothing is left to fit on.

    Raises:
        MissingDependency: scipy is not installed.
    """
    votes: list[Winner] = ["tie"] * len(gold)
    for fold in range(min(folds, len(gold))):
        rest = [number for number in range(len(gold)) if number % folds != fold]
        fitted = fit_panel([verdicts[number] for number in rest], [gold[number] for number in rest])
        for number in range(fold, len(gold), folds):
            votes[number] = fitted.vote(verdicts[number])[0]
    return votes
