"""Methods of offline reinforcement learning: from logged decisions to answers to imitate.

Each method is one file and registers by name (entry point group ``agentpref.methods``), so a new
one is one new file, here or in another package. It values decisions with a critic
(:mod:`agentpref.offline.critics`), and says how much of each logged answer to imitate, or which
answer at each state. Training is the same for all: the log-likelihood of these answers, beside
replay, within the KL penalty. Or it pairs whole conversations, which then train as preferences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from agentpref import plugins

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.config import OfflineSettings
    from agentpref.offline.critics import Critic, Decisions

    Numbers = NDArray[Any]

MOST_WEIGHT = 20.0
"""No decision weighs more than this (AWR: 1910.00177, section 4)."""


class Lesson(NamedTuple):
    """What a method makes of logged decisions.

    Attributes:
        weights: how much of each logged answer to imitate, ``[n]``.
        choice: the answer to imitate at each state instead, ``[S]``; ``None`` for the logged ones.
        advantage: how much better than usual each answer of other decisions was, ``[n]``.
        pairs: conversations by number, of which the first of each two is to be preferred whole;
            then nothing is imitated.
        q: the coefficients of Q on the columns of the critic's answers, where there is one.
    """

    weights: Numbers
    choice: Numbers | None
    advantage: Callable[[Decisions], Numbers]
    pairs: tuple[tuple[int, int], ...] | None = None
    q: Numbers | None = None


class Method:
    """The base of every method.

    Args:
        settings: the group ``offline`` of the settings of an update.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """The settings of the group ``offline`` that the method reads beside those of the rewards."""

    draws: ClassVar[bool] = False
    """Whether it compares answers that live would give with the logged ones."""

    follows: ClassVar[bool] = False
    """Whether it learns only from conversations that came to more than nothing."""

    compares: ClassVar[bool] = True
    """Whether it learns nothing where all conversations were worth the same."""

    def __init__(self, settings: OfflineSettings) -> None:
        self.settings = settings

    def __call__(self, critic: Critic) -> Lesson:
        """Value the decisions that the critic reads."""
        raise NotImplementedError


def exponential(advantage: Numbers, returns: Numbers, temperature: float) -> Numbers:
    """exp(A/T), at most :data:`MOST_WEIGHT`, where T is in standard deviations of the returns.

    So the temperature means the same whatever the scale of the rewards is.
    """
    import numpy as np

    scale = temperature * float(returns.std())
    if scale <= 1e-9 * max(1.0, float(np.abs(returns).max())):
        return np.ones(len(advantage))  # all conversations were worth the same
    return np.exp(np.minimum(advantage / scale, np.log(MOST_WEIGHT)))


def by_value(data: Decisions, values: Numbers, states: Numbers) -> Numbers:
    """Q(s, a) − V(s) of each decision, ``[n]``, given the values of answers and of states."""
    found: Numbers = values[data.taken] - states[data.state]
    return found


def load_method(name: str) -> type[Method]:
    """The method that is registered under a name; ``ConfigError`` if there is none."""
    return plugins.load_subclass(plugins.METHODS, name, Method)
