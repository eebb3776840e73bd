"""A process that follows: it computes its share of what the main process orders.

It loads the base, the live adapter and a candidate, equal to the main process's to the last bit. It
never opens a home, publishes nothing and prints nothing. It ends when the main process sends the
outcome or ends itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentpref.config import UpdateConfig
from agentpref.errors import AgentprefError, UpdateError
from agentpref.learn import orders
from agentpref.learn.interrupts import Interrupts
from agentpref.learn.learner import Learner
from agentpref.learn.team import Team
from agentpref.learn.trainer import Limits
from agentpref.models.base import load_base


def follow(team: Team) -> dict[str, Any]:
    """Carry out the main process's orders until it is done; returns the outcome it sends.

    A launcher passes Ctrl-C and SIGTERM to all processes. The main process reacts at its next step;
    a follower ignores the first signal, because ending at once would break off that step.

    Raises:
        UpdateError: the main process ended, or the processes ended with different weights.
        AgentprefError: the error with which the main process ended.
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
    """A follower and the learner it keeps from one order to the next."""

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
        learner.take_route(order["route"])
        if order["do"] == "score":
            rows = [orders.thaw_row(row) for row in order["rows"]]
            learner.score_share(order["policy"], rows)
        else:
            self._fit(learner, order)

    def _attach(self, order: Mapping[str, Any]) -> None:
        """Load the same models as the main process, and report an error to it if there is one."""
        trouble = ""
        try:
            self._held = _learner(order, self._team)
        except AgentprefError as error:
            trouble = str(error)
        self._team.gather(trouble.encode())

    def _fit(self, learner: Learner, order: Mapping[str, Any]) -> None:
        rows, limits = orders.thaw_training(order["rows"]), Limits()
        try:
            learner.train(rows, epochs=order["epochs"], limits=limits)
        except KeyboardInterrupt:
            if not limits.interrupts.asked:
                raise  # this process got a second signal
            # Otherwise the main process got the signal, and its next order says how to go on.

    @property
    def _learner(self) -> Learner:
        if self._held is None:
            raise UpdateError("the main process ordered work before it named a model")
        return self._held


def _learner(order: Mapping[str, Any], team: Team) -> Learner:
    base = load_base(order["model"], held_in=order["precision"])
    if base.numbers != order["numbers"]:
        raise UpdateError(
            f"{order['model']!r} is another model here than in the main process; copy the same "
            "files to all machines"
        )
    live = None if order["live"] is None else Path(order["live"])
    config = UpdateConfig.from_mapping(order["config"])
    return Learner(base, live, config, caches={}, progress=lambda *_: None, team=team)
