"""What an arm changes in the product beyond its settings: each a block, and all of them here.

The product proves before it serves, measures against the base, and replays as much as is new. It
has no setting that turns these off, since nobody should; an arm that shows what they are worth
replaces them for the time of one update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from agentpref import attempt
from agentpref.attempt import Bench
from agentpref.learn import data, logps
from agentpref.learn.encode import EncodedExample
from agentpref.learn.learner import Learner
from agentpref.prove import gate
from agentpref.prove.known import Known
from agentpref.prove.metrics import accuracy, correctness
from agentpref.prove.results import GateResult
from agentpref.types import Example

Rows = Sequence[EncodedExample]

_EVERY = 6


@contextmanager
def no_gate() -> Iterator[None]:
    """Every night trains, and every candidate passes with all that it was trained on.

    The report keeps what the gate found.
    """
    judge = gate.judge

    def pass_all(*given: Any, **named: Any) -> GateResult:
        return replace(judge(*given, **named), verdict="passed")

    knows_nothing: Any = lambda bench, rows, plan: Known()  # noqa: E731
    with (
        patch.object(gate, "judge", pass_all),
        patch.object(Bench, "_knows", knows_nothing),
        patch.object(attempt, "idle", lambda *given, **named: None),
    ):
        yield


@contextmanager
def replay_share(share: float) -> Iterator[None]:
    """Replay this share of the number of new examples."""
    with patch.object(data, "replay_size", lambda new, settings: round(share * new)):
        yield


@contextmanager
def previous_as_reference() -> Iterator[None]:
    """Train against the live adapter instead of the base, as a loop around DPOTrainer does."""
    fit = Learner.fit

    def against_live(learner: Learner, rows: Rows, **named: Any) -> Any:
        score = learner.score
        replaced: Any = lambda policy, rows: score("live" if policy == "base" else policy, rows)  # noqa: E731
        with patch.object(learner, "score", replaced):
            return fit(learner, rows, **named)

    with patch.object(Learner, "fit", against_live):
        yield


@contextmanager
def other_rows(change: Callable[[Learner, Rows], Rows]) -> Iterator[None]:
    """Train on what ``change`` makes of an update's rows: a fault that the gate must find."""
    fit = Learner.fit

    def on_changed(learner: Learner, rows: Rows, **named: Any) -> Any:
        return fit(learner, change(learner, rows), **named)

    with patch.object(Learner, "fit", on_changed):
        yield


@dataclass
class Watch:
    """The mean accuracy on old strata at each look inside an update, and what the looks cost."""

    means: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Count what a look costs."""
        began = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - began[0]
        self.cpu += time.process_time() - began[1]


@contextmanager
def watched(old: Sequence[Sequence[Example]]) -> Iterator[Watch]:
    """Measure the candidate on pairs of earlier nights now and then while it trains."""
    fit, watch = Learner.fit, Watch()

    def observed(learner: Learner, rows: Rows, **named: Any) -> Any:
        with watch.looking():
            strata = [learner.measure(examples) for examples in old]
            references = [learner.score("base", stratum) for stratum in strata]
        steps = 0

        def look(step: object) -> None:
            nonlocal steps
            steps += 1
            if steps % _EVERY == 0:
                with watch.looking():
                    found = [*map(_accuracy, [learner] * len(strata), strata, references)]
                    watch.means.append(sum(found) / len(found))

        return fit(learner, rows, observe=look, **named)

    if not old:
        yield watch
        return
    with patch.object(Learner, "fit", observed):
        yield watch


def _accuracy(learner: Learner, rows: Rows, reference: Sequence[Sequence[float]]) -> float:
    """The candidate's accuracy as it is now; its scores must not reach the home's cache."""
    with learner.policy("candidate") as model:
        scores = logps.score(model, rows, route=learner.route(rows), pad=learner.pad)
    margins = ((s[0] - r[0]) - (s[1] - r[1]) for s, r in zip(scores, reference, strict=True))
    return accuracy(correctness(margins))
