"""What held-out conversations would earn with a trained candidate, and a guess before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from agentpref.learn.features import squared_distances
from agentpref.models.threads import single_blas_thread
from agentpref.offline import answers as asking
from agentpref.offline.answers import own_only
from agentpref.offline.critics import Critic, answers_of, planned
from agentpref.prove.evidence import ValueEvidence
from agentpref.prove.probes import token_limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.config import UpdateConfig
    from agentpref.learn.adapter import Policy
    from agentpref.learn.features import FeatureReader
    from agentpref.learn.learner import Learner
    from agentpref.offline.critics import Decisions
    from agentpref.offline.decisions import Layout
    from agentpref.offline.methods import Lesson

RESAMPLES = 100
"""How often conversations are resampled for a standard error."""

DRAWS = 2
"""How many answers of each policy at a held-out state say what it would do there."""

_RARE, _LEAST_SPREAD = 0.1, 0.05  # of a few logged answers some are odd themselves
_POLICIES: tuple[Policy, Policy] = ("live", "candidate")


def expected(critic: Critic, lesson: Lesson) -> float:
    """What a critic expects of answering as a method says, before any training: no proof."""
    if lesson.choice is not None:
        return planned(critic, [critic.phi[lesson.choice]])[0]
    return planned(critic, [answers_of(critic, lesson.weights)])[0]


def _resamples(data: Decisions, number: int, seed: int) -> Iterator[NDArray[Any]]:
    """How often each decision's thread is drawn, ``[n]``, where any conversation begins."""
    import numpy as np

    source, size = np.random.default_rng(seed), int(data.thread.max()) + 1
    for _ in range(number):
        counts = np.bincount(source.integers(size, size=size), minlength=size)[data.thread]
        if (data.weight * counts)[data.begins].any():
            yield counts.astype(float)


@single_blas_thread()
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

    conversations = len({*layout.data.thread.tolist()})
    if not conversations:
        return ValueEvidence(0.0, 0.0, 0.0, 0)
    limit = token_limit([own_only(row) for row in layout.rows])
    critic = Critic.on(layout.data)
    columns, strange = list[Any](), list[float]()
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
        columns.append(np.stack([critic.answers(own).mean(0) for own in features]))
        strange.append(unlike(layout.data.answer, np.concatenate(features)))
    live, candidate = planned(critic, columns)
    apart = []
    for counts in _resamples(layout.data, RESAMPLES, config.seed):
        before, after = planned(critic, columns, layout.data.weight * counts)
        apart.append(after - before)
    error = float(np.std(apart))
    return ValueEvidence(
        live, candidate, error, conversations, strange[1], strange[0], critic.explained
    )


def unlike(logged: NDArray[Any], said: NDArray[Any]) -> float:
    """The share of answers that are like no logged one, by their features, ``[m, D]`` each.

    One is unlike them that is twice as far from the nearest as nine in ten of them are from theirs.
    What hardly varies in the log counts much where it does in the answers.
    """
    import numpy as np

    if len(logged) < 2:
        return 0.0
    spread = logged.std(0)
    size = np.maximum(spread, max(_LEAST_SPREAD * float(np.median(spread)), 1e-6))
    known, new = ((rows.astype(np.float64) - logged.mean(0)) / size for rows in (logged, said))
    far = 2 * float(np.quantile(_nearest(known, known, own=True), 1 - _RARE))
    return float((_nearest(new, known) > far).mean())


def _nearest(of: NDArray[Any], to: NDArray[Any], *, own: bool = False) -> NDArray[Any]:
    """How far each row is from the nearest other one, ``[m]``."""
    import numpy as np

    squares = squared_distances(of, to)
    if own:
        np.fill_diagonal(squares, np.inf)
    found: NDArray[Any] = np.sqrt(squares.min(1))
    return found
