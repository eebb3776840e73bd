"""Values of conversations, fitted on logged decisions: how good a state is, and an answer in it.

Both are kernel ridge regressions on what the frozen base model makes of a state and of an answer
in it (:mod:`agentpref.learn.features`), so a critic takes seconds and is the same each time. The
kernel is Gaussian, at up to 256 landmarks (Williams & Seeger 2001): what is far from everything
that was logged has the mean value. Its width and the penalty decide how far two conversations that
came to the same point by different ways are alike, so that the value of the one's end is carried to
the other's beginning. They are those that tell best what decisions led to in threads that were left
out of the fit.

The arrays are over n decisions, of S states, with C answers that were given or may be given there.
Pure functions of arrays; numpy and scipy are imported when one is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.learn.features import squared_distances

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[Any]

RIDGES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
"""The penalties that are tried, per unit of weight."""

WIDTHS = (1.0, 0.3, 0.1)
"""The widths that are tried, in medians of the squared distance of two landmarks."""

FOLDS = 4
"""Into so many parts threads are dealt, each of which is left out once."""

_SWEEPS, _CLOSE = 200, 1e-4
_REWEIGHINGS = 20
_COLUMNS, _SAMPLED = 256, 1000
_UNTAUGHT = 0.02  # what an answer counts that nobody imitates: training starts from live


@dataclass(frozen=True, slots=True)
class Decisions:
    """What was logged, as arrays.

    Attributes:
        turn: what the base makes of each state, at the end of its last turn, ``[S, d]``.
        answer: and of each answer after it, ``[C, D]``.
        of: the state of each answer, ``[C]``.
        likely: the mean log-probability of a token of each answer under live; NaN if not known.
        state: of each decision, ``[n]``.
        taken: the answer that was given, ``[n]``.
        reward: what it earned at once, ``[n]``.
        after: the number of the decision after it, ``[n]``; −1 where the conversation ended.
        weight: how much it counts, ``[n]``: 1, or less where conversations share it.
        trace: the number of its conversation, ``[n]``; the forks of one are several.
        thread: the number of the thread that it is of, ``[n]``: what is drawn together.
        gamma: the discount of each later decision.
    """

    turn: Numbers
    answer: Numbers
    of: Numbers
    likely: Numbers
    state: Numbers
    taken: Numbers
    reward: Numbers
    after: Numbers
    weight: Numbers
    trace: Numbers
    thread: Numbers
    gamma: float

    def __len__(self) -> int:
        return len(self.state)

    @property
    def done(self) -> Numbers:
        """Whether the conversation ended, ``[n]``."""
        return self.after < 0

    @property
    def begins(self) -> Numbers:
        """Whether the conversation begins with it, ``[n]``."""
        import numpy as np

        led_to = np.zeros(len(self), bool)
        led_to[self.after[~self.done]] = True
        return ~led_to

    def returns(self) -> Numbers:
        """The discounted rewards from each decision on, ``[n]``."""
        import numpy as np

        found = np.zeros(len(self))
        for number in range(len(self) - 1, -1, -1):  # what follows has a higher number
            rest = self.gamma * found[self.after[number]] if self.after[number] >= 0 else 0.0
            found[number] = self.reward[number] + rest
        return found

    def totals(self) -> Numbers:
        """The return of each decision's whole conversation, ``[n]``."""
        import numpy as np

        found = np.zeros(int(self.trace.max()) + 1 if len(self) else 0)
        begins = self.begins
        found[self.trace[begins]] = self.returns()[begins]
        whole: Numbers = found[self.trace]
        return whole

    def next_values(self, values: Numbers) -> Numbers:
        """γ times the values of the states that follow, ``[n]``, given those of all ``[S]``."""
        import numpy as np

        following = values[self.state[np.maximum(self.after, 0)]]
        return np.where(self.done, 0.0, self.gamma * following)


@dataclass(frozen=True, slots=True)
class Basis:
    """What a critic reads of features: their likeness to some that were logged, and a one.

    ``mean`` and ``size`` standardise, ``landmarks`` are some of them, and ``mix`` makes likenesses
    to these columns whose products are the kernel's.
    """

    mean: Numbers
    size: Numbers
    landmarks: Numbers
    width: float
    mix: Numbers

    @classmethod
    def of(cls, values: Numbers, width: float) -> Basis:
        """Of some features, ``[m, d]``."""
        import numpy as np

        mean = values.mean(0)
        size = np.sqrt(np.square(values - mean).mean(0))
        size = np.where(size > 1e-6, size, np.inf)
        few = values[np.linspace(0, len(values) - 1, min(len(values), _SAMPLED)).astype(int)]
        rows = np.unique(np.round((few.astype(np.float64) - mean) / size, 5), axis=0)
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _COLUMNS)).astype(int)]
        squares = squared_distances(rows, rows)
        apart = squares[squares > 1e-9]
        wide = width * float(np.median(apart)) if len(apart) else 1.0
        found, sides = np.linalg.eigh(np.exp(-squares / wide))
        kept = found > 1e-6 * found[-1]
        return cls(mean, size, rows, wide, sides[:, kept] / np.sqrt(found[kept]))

    def __call__(self, values: Numbers) -> Numbers:
        """The columns of other features of the same kind, ``[m, ·]``, in float64."""
        import numpy as np

        rows = (values.astype(np.float64) - self.mean) / self.size
        alike = np.exp(-squared_distances(rows, self.landmarks) / self.width)
        return np.concatenate([alike @ self.mix, np.ones((len(values), 1))], 1)


@dataclass(frozen=True, slots=True)
class Critic:
    """The columns of states ``[S, ·]`` and answers ``[C, ·]``, and fits on them.

    ``answers`` and ``states`` are the bases, which read other conversations as well. ``ridge`` is
    the penalty of each fit, and ``explained`` the share of the variance of returns, in threads that
    were left out, that answers tell of with it: 0 or less is what their mean tells.
    """

    data: Decisions
    states: Basis
    answers: Basis
    ridge: float
    explained: float
    psi: Numbers = field(repr=False)
    phi: Numbers = field(repr=False)

    @classmethod
    def on(cls, data: Decisions) -> Critic:
        """A critic that reads some decisions, with the width and penalty that fit them."""
        tried = []
        for width in WIDTHS:
            answers = Basis.of(data.answer, width)
            phi = answers(data.answer)
            unexplained, ridge = _best_ridge(data, phi)
            tried.append((unexplained, -width, ridge, answers, phi))
        unexplained, width, ridge, answers, phi = min(tried, key=lambda one: one[:2])
        states = Basis.of(data.turn, -width)
        return cls(data, states, answers, ridge, 1 - unexplained, states(data.turn), phi)

    def fit(self, columns: Numbers, target: Numbers, weight: Numbers) -> Numbers:
        """Ridge regression of a target, ``[m]`` or ``[m, k]``, on columns: the coefficients."""
        import numpy as np

        weighed = columns * weight[:, None]
        penalty = _penalty(columns, weight, self.ridge)
        solved: Numbers = np.linalg.solve(weighed.T @ columns + penalty, weighed.T @ target)
        return solved

    def regression(self, weight: Numbers) -> Callable[[Numbers], Numbers]:
        """What makes of any target, ``[n]``, the coefficients of Q; its matrix is factored once."""
        from agentpref.prove.bootstrap import scipy

        rows = self.phi[self.data.taken]
        weighed = rows * weight[:, None]
        penalty = _penalty(rows, weight, self.ridge)
        linalg = scipy("linalg")
        factor = linalg.cho_factor(weighed.T @ rows + penalty)
        return lambda target: linalg.cho_solve(factor, target @ weighed)

    def q(self, target: Callable[[Numbers], Numbers], value: Callable[[Numbers], Numbers]) -> Fit:
        """Sweep Q(s, a) ← ``target`` of V, and V ← ``value`` of Q, until neither changes.

        Args:
            target: what each decision comes to, ``[n]``, given the values of all states, ``[S]``.
            value: the values of the states, given those of all answers, ``[C]``.
        """
        import numpy as np

        regress, close = self.regression(self.data.weight), _CLOSE * np.ptp(self.data.returns())
        values, theta = np.zeros(len(self.data.turn)), np.zeros(self.phi.shape[1])
        for _ in range(_SWEEPS):
            theta = regress(target(values))
            before, values = values, value(self.phi @ theta)
            if np.abs(values - before).max() <= close:
                break
        return Fit(theta, self.phi @ theta)


def _best_ridge(data: Decisions, phi: Numbers) -> tuple[float, float]:
    """The penalty with which the returns of threads that were left out are told best.

    It comes second, and the share of their variance that is not told with it first.
    """
    import numpy as np

    rows, returns, parts = phi[data.taken], data.returns(), data.thread % FOLDS
    errors, variance = np.zeros(len(RIDGES)), 0.0
    for part in range(FOLDS):
        fitted, left = parts != part, parts == part
        if not fitted.any() or not left.any():
            continue
        weight = data.weight[fitted]
        weighed = rows[fitted] * weight[:, None]
        square, target = weighed.T @ rows[fitted], weighed.T @ returns[fitted]
        mean = np.average(returns[fitted], weights=weight)
        variance += data.weight[left] @ (returns[left] - mean) ** 2
        for number, ridge in enumerate(RIDGES):
            theta = np.linalg.solve(square + _penalty(rows, weight, ridge), target)
            errors[number] += data.weight[left] @ (rows[left] @ theta - returns[left]) ** 2
    return float(errors.min() / variance) if variance > 0 else 0.0, RIDGES[int(errors.argmin())]


def _penalty(columns: Numbers, weight: Numbers, ridge: float) -> Numbers:
    """That of a regression: on all columns but the ones, so that a constant is nobody's fault."""
    import numpy as np

    found: Numbers = ridge * weight.sum() * np.identity(columns.shape[1])
    found[-1, -1] = 1e-9 * weight.sum()
    return found


class Fit(NamedTuple):
    """Coefficients of Q, and the values of the answers, ``[C]``."""

    theta: Numbers
    answers: Numbers


def expectile(critic: Critic, target: Numbers, weight: Numbers, tau: float) -> Numbers:
    """The τ-expectile of a target, ``[n]``, at each state: coefficients on the states' columns.

    Asymmetric least squares (Newey & Powell 1987), by reweighing until the signs stay.
    """
    import numpy as np

    rows = critic.psi[critic.data.state]
    above = np.ones(len(target), bool)
    theta = critic.fit(rows, target, weight)
    for _ in range(_REWEIGHINGS):
        before, above = above, target > rows @ theta
        if (above == before).all():
            break
        theta = critic.fit(rows, target, weight * np.where(above, tau, 1 - tau))
    return theta


def largest_by_state(data: Decisions, values: Numbers, allowed: Numbers | None = None) -> Numbers:
    """The number of the best answer at each state, ``[S]``, by values ``[C]``.

    Where no answer is ``allowed``, all are.
    """
    import numpy as np

    ranked = np.where(allowed, values, -np.inf) if allowed is not None else values
    order = np.lexsort((ranked, data.of))  # the last of a state is its best
    last = np.flatnonzero(np.diff(np.append(data.of[order], -1)))
    best = np.zeros(len(data.turn), int)
    best[data.of[order[last]]] = order[last]
    return best


def planned(
    critic: Critic, policies: Sequence[Numbers], weight: Numbers | None = None
) -> list[float]:
    """What policies would earn from where conversations began, by fitted Q-evaluation (1903.08738).

    Args:
        critic: reads the decisions that are logged.
        policies: the mean columns of what each says at each state, ``[S, ·]``.
        weight: of each decision, ``[n]``; by default its own.
    """
    import numpy as np

    data, weight = critic.data, critic.data.weight if weight is None else weight
    begins, returns = data.begins, data.returns()
    # No conversation is worth more than twice what any was: few of them are no ground for more.
    low, high = returns.min(), returns.max()
    low, high = low - (high - low), high + (high - low)
    regress, found = critic.regression(weight), []
    for answers in policies:
        values = np.zeros(len(data.turn))
        for _ in range(_SWEEPS):  # what is put together may be longer than all that was logged
            theta = regress(data.reward + data.next_values(values))
            before, values = values, (answers @ theta).clip(low, high)
            if np.abs(values - before).max() <= _CLOSE * (high - low):
                break
        first = values[data.state[begins]]
        found.append(float(np.average(first, weights=weight[begins])))
    return found


def answers_of(critic: Critic, weights: Numbers) -> Numbers:
    """The mean columns of answers at each state, ``[S, ·]``, of a policy that weighs decisions.

    It does at a state what was done at states like it, as often as the weights ``[n]`` say; where
    they say next to nothing, it does what was done.
    """
    data = critic.data
    floor = _UNTAUGHT * float(weights.mean()) or 1.0
    some = data.weight * (weights + floor)
    theta = critic.fit(critic.psi[data.state], critic.phi[data.taken], some)
    found: Numbers = critic.psi @ theta
    return found
