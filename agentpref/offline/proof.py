"""What held-out conversations would earn: of a trained candidate, and of plans before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from agentpref.offline import answers as asking
from agentpref.offline.answers import own_only
from agentpref.offline.critics import Basis, Critic, answers_of, planned
from agentpref.prove.evidence import ValueEvidence
from agentpref.prove.probes import token_limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.config import UpdateConfig
    from agentpref.learn.adapter import Policy
    from agentpref.learn.features import FeatureReader
    from agentpref.learn.learner import Learner
    from agentpref.offline.decisions import Layout
    from agentpref.offline.methods import Lesson

RESAMPLES, PLAN_RESAMPLES = 100, 40
"""How often conversations are resampled for a standard error."""

DRAWS = 2
"""How many answers of each policy at a held-out state say what it would do there."""

_RARE = 0.01
_POLICIES: tuple[Policy, Policy] = ("live", "candidate")


@dataclass(frozen=True, slots=True)
class Plan:
    """What imitating as a method says would earn, and imitating the best conversations.

    ``logged`` is what conversations earned. ``over_filtered`` is an interval of 95 % of the
    method's less filtered behaviour cloning's. All are of conversations that trained.
    """

    logged: float
    filtered: float
    method: float
    over_filtered: tuple[float, float]

    def note(self, name: str) -> str:
        """What the report says of it."""
        low, high = self.over_filtered
        found = (
            f"planned: conversations earned {self.logged:.3g}; imitating the best of them would "
            f"earn {self.filtered:.3g}, and {name} {self.method:.3g} ({low:+.2g} to {high:+.2g})"
        )
        if low <= 0:
            found += ": no better than filtered behaviour cloning, which is simpler"
        return found

    def to_mapping(self) -> dict[str, Any]:
        """The numbers for reports."""
        return asdict(self)


def plan(critic: Critic, lesson: Lesson, filtered: Lesson, *, seed: int) -> Plan:
    """What a method's policy would earn, and filtered behaviour cloning's, before any training."""
    import numpy as np

    data = critic.data

    def worth(of: Lesson, counts: NDArray[Any] | None) -> float:
        weight = data.weight if counts is None else data.weight * counts[data.trace]
        if of.choice is not None:
            return planned(critic, critic.phi[of.choice], weight)
        own = of.weights if counts is None else of.weights * counts[data.trace]
        return planned(critic, answers_of(critic, own), weight)

    begins = data.begins
    logged = float(np.average(data.returns()[begins], weights=data.weight[begins]))
    values = [worth(one, None) for one in (filtered, lesson)]
    source, size = np.random.default_rng(seed), int(data.trace.max()) + 1
    apart = []
    for _ in range(PLAN_RESAMPLES):
        counts = np.bincount(source.integers(size, size=size), minlength=size)
        apart.append(worth(lesson, counts) - worth(filtered, counts))
    half = 1.96 * float(np.std(apart))
    middle = values[1] - values[0]
    return Plan(logged, values[0], values[1], (middle - half, middle + half))


def prove(
    learner: Learner,
    reader: FeatureReader,
    layout: Layout,
    config: UpdateConfig,
) -> ValueEvidence:
    """What held-out conversations earn with live's answers and the candidate's.

    Args:
        learner: holds both.
        reader: reads features under the base.
        layout: the held-out conversations.
        config: the seed, and the temperature of the gate, at which both are asked.
    """
    import numpy as np

    conversations = len({*layout.data.trace.tolist()})
    if not conversations:
        return ValueEvidence(0.0, 0.0, 0.0, 0)
    limit = token_limit([own_only(row) for row in layout.rows])
    basis, columns, said_features = Basis.of(layout.data.answer), {}, {}
    for policy in _POLICIES:
        said = asking.draw(
            learner,
            policy,
            layout.rows,
            each=DRAWS,
            limit=limit,
            temperature=config.gate.temperature,
            seed=config.seed,
            progress=learner.progress,
        )
        features = asking.features_of(learner, reader, layout.rows, said)
        said_features[policy] = features
        columns[policy] = np.stack([basis(own).mean(0) for own in features])
    critic = Critic.on(layout.data)
    live, candidate = (planned(critic, columns[policy]) for policy in _POLICIES)
    source, apart = np.random.default_rng(config.seed), list[float]()
    data, size = layout.data, int(layout.data.trace.max()) + 1
    for _ in range(RESAMPLES):
        counts = np.bincount(source.integers(size, size=size), minlength=size)
        weight = data.weight * counts[data.trace]
        if weight[data.begins].any():
            before, after = (planned(critic, columns[policy], weight) for policy in _POLICIES)
            apart.append(after - before)
    strange = [_unlike(critic.phi, basis, said_features[policy]) for policy in _POLICIES]
    error = float(np.std(apart))
    return ValueEvidence(live, candidate, error, conversations, strange[1], strange[0])


def _unlike(logged: NDArray[Any], basis: Basis, features: Sequence[NDArray[Any]]) -> float:
    """The share of some answers that are like no logged one.

    One is unlike them that is twice as far from the nearest as all but 1 % of them are from theirs.
    """
    import numpy as np

    among = _nearest(logged, logged, own=True)
    far = 2 * float(np.quantile(among, 1 - _RARE))
    return float((_nearest(basis(np.concatenate(features)), logged) > far).mean())


def _nearest(of: NDArray[Any], to: NDArray[Any], *, own: bool = False) -> NDArray[Any]:
    """How far each row is from the nearest other one, ``[m]``."""
    import numpy as np

    squares = (of**2).sum(1)[:, None] + (to**2).sum(1)[None] - 2 * of @ to.T
    if own:
        np.fill_diagonal(squares, np.inf)
    found: NDArray[Any] = np.sqrt(np.maximum(squares.min(1), 0.0))
    return found
