"""A process of a team that computes its share of what the main process orders.

It has the base, the live adapter and a candidate of its own, equal to the main one's to the last
bit. It never opens a home, publishes or prints, and it ends when the main process ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentpref.config import UpdateConfig
from agentpref.errors import AgentprefError, UpdateError
from agentpref.learn.encode import EncodedExample
from agentpref.learn.interrupts import Interrupts
from agentpref.learn.learner import Learner
from agentpref.learn.objective import TrainingRow
from agentpref.learn.team import Team
from agentpref.learn.trainer import Limits
from agentpref.models.base import load_base


def follow(team: Team) -> dict[str, Any]:
    """Carry out the main process's orders until it is done; return its result.

    Ctrl-C and SIGTERM reach all processes of a launcher. The main one answers them at its next
    step; a follower that stopped at once would break that step off.

    Raises:
        UpdateError: the main process ended, or the processes have different weights.
        AgentprefError: what the main process ended with.
        KeyboardInterrupt: a second signal came.
    """
    interrupts, outcome = Interrupts(), None
    try:
        with interrupts.listening(), interrupts.held():
            outcome = _Follower(team).obey()
    except KeyboardInterrupt:
        if outcome is None:
            raise
    return outcome


class _Follower:
    """A follower's state from one order to the next."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._held: Learner | None = None

    def obey(self) -> dict[str, Any]:
        while True:
            order = self._team.hear()
            if "outcome" in order:
                self._team.released()
                found: dict[str, Any] = order["outcome"]
                return found
            self._carry_out(order)

    def _carry_out(self, order: Mapping[str, Any]) -> None:
        if order["do"] == "attach":
            self._attach(order)
            return
        learner = self._learner
        learner.use_route(order["route"])
        if order["do"] == "score":
            rows = [EncodedExample.thaw(row) for row in order["rows"]]
            learner.score_share(order["policy"], rows)
        else:
            self._fit(learner, order)

    def _attach(self, order: Mapping[str, Any]) -> None:
        """Load what the main process has, and report whether that worked."""
        failure = ""
        try:
            self._held = _learner(order, self._team)
        except AgentprefError as error:
            failure = str(error)
        self._team.gather(failure.encode())

    def _fit(self, learner: Learner, order: Mapping[str, Any]) -> None:
        rows, limits = [TrainingRow.thaw(row) for row in order["rows"]], Limits()
        try:
            learner.train(rows, epochs=order["epochs"], limits=limits)
        except KeyboardInterrupt:
            if not limits.interrupts.asked:
                raise  # this process was signalled twice
            # Else the main process was signalled, and reports it.

    @property
    def _learner(self) -> Learner:
        if self._held is None:
            raise UpdateError("the main process ordered work before it named a model")
        return self._held


def _learner(order: Mapping[str, Any], team: Team) -> Learner:
    base = load_base(order["model"], held_in=order["precision"])
    if base.numbers != order["numbers"]:
        raise UpdateError(
            f"{order['model']!r} is a different model here than in the first process; give all "
            "machines the same files"
        )
    live = None if order["live"] is None else Path(order["live"])
    config = UpdateConfig.from_mapping(order["config"])
    return Learner(base, live, config, caches={}, progress=lambda *_: None, team=team)
