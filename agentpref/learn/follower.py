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
from agentpref.learn.learner import Learner
from agentpref.learn.objective import Leash, TrainingRow
from agentpref.learn.process import Interrupts
from agentpref.learn.team import Team
from agentpref.learn.trainer import Limits
from agentpref.models.adapter_files import AdapterFiles
from agentpref.models.base import load_base
from agentpref.models.threads import sharing


def follow(team: Team) -> dict[str, Any]:
    """Carry out the main process's orders until it is done; return its outcome.

    Ctrl-C and SIGTERM reach all processes of a launcher. The main one answers them at its next
    step; a follower that stopped at once would break that step off.

    Raises:
        UpdateError: the main process ended, or the processes have different weights.
        AgentprefError: what the main process ended with.
        KeyboardInterrupt: a second signal came.
    """
    interrupts, learner = Interrupts(), None
    order: dict[str, Any] = {}
    try:
        with interrupts.listening(), interrupts.deferred(), sharing():
            while "outcome" not in (order := team.receive()):
                if order["do"] == "attach":
                    learner = _attach(order, team)
                elif learner is None:
                    raise UpdateError("the main process ordered work before it named a model")
                else:
                    _work(order, learner)
    except KeyboardInterrupt:
        if "outcome" not in order:
            raise
    outcome: dict[str, Any] = order["outcome"]
    return outcome


def _attach(order: Mapping[str, Any], team: Team) -> Learner | None:
    """Load the model that the main process has, and report whether that worked.

    The live adapter comes from there, too: a follower on another machine has no home.
    """
    learner, live, failure = None, None, ""
    if order["live"] is not None:
        config_file, weights = team.broadcast(b""), team.broadcast(b"")
        live = AdapterFiles(Path(order["live"]), config_file, weights)
    try:
        config = UpdateConfig.from_mapping(order["config"])
        base = load_base(
            order["model"],
            precision=order["precision"],
            chat_template_kwargs=config.chat_template_kwargs,
        )
        if base.numbers != order["numbers"]:
            raise UpdateError(
                f"{order['model']!r} is a different model here than in the first process; give all "
                "machines the same files"
            )
        learner = Learner(base, live, config, caches={}, progress=lambda *_: None, team=team)
    except AgentprefError as error:
        failure = str(error)
    team.gather(failure.encode())
    return learner


def _work(order: Mapping[str, Any], learner: Learner) -> None:
    """Score or train this process's share of the rows in an order, or start over."""
    if order["do"] == "restart":
        learner.restart(order["start"])
        return
    learner.use_route(order["route"])
    if order["do"] == "score":
        learner.score_share(order["policy"], [EncodedExample.thaw(row) for row in order["rows"]])
        return
    rows, limits = [TrainingRow.thaw(row) for row in order["rows"]], Limits()
    try:
        learner.train(
            rows,
            epochs=order["epochs"],
            imitation=order["imitation"],
            leash=Leash(*order["leash"]),
            limits=limits,
        )
    except KeyboardInterrupt:
        if not limits.interrupts.asked:
            raise  # this process was signalled twice
        # Else the main process was signalled, and reports it.
