"""Reads chains of messages from the database, and the runs and feedback that name them."""

from __future__ import annotations

import math
import sqlite3
from typing import Any

import orjson

from agentpref.errors import CorruptHome
from agentpref.record.messages import EMPTY_JSON, FEEDBACK_COLUMNS, RUN_COLUMNS, TOOLS
from agentpref.record.scales import read_scale
from agentpref.types import Feedback, Message, Prompt, Run

_PARSED_MESSAGES = 50_000
"""How many messages one reading keeps parsed."""


class Chains:
    """Reads chains and parses each message once; made anew for each reading."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._nodes: dict[str, tuple[str | None, dict[str, Any]]] = {}

    def prompt(self, prompt_id: str) -> Prompt:
        """The prompt whose last message has this id."""
        bodies: list[dict[str, Any]] = []
        parent: str | None = prompt_id
        while parent is not None:
            parent, body = self._node(parent)
            bodies.append(body)
        bodies.reverse()
        tools = bodies.pop(0)[TOOLS] if TOOLS in bodies[0] else ()
        return Prompt(prompt_id, tuple(bodies), tuple(tools))

    def message(self, message_id: str) -> Message:
        """One message, without those before it."""
        return self._node(message_id)[1]

    def _node(self, message_id: str) -> tuple[str | None, dict[str, Any]]:
        node = self._nodes.get(message_id)
        if node is not None:
            return node
        query = "SELECT parent, body FROM message WHERE id = ?"
        row = self._connection.execute(query, (message_id,)).fetchone()
        if row is None:
            raise CorruptHome(
                f"message {message_id} is referred to but missing; see `agentpref verify`, "
                "then restore a backup"
            )
        if len(self._nodes) >= _PARSED_MESSAGES:
            self._nodes.clear()
        self._nodes[message_id] = row[0], orjson.loads(row[1])
        return self._nodes[message_id]


def read_run(row: tuple[Any, ...], messages: Chains) -> Run:
    """Make a run of the columns ``RUN_COLUMNS`` and of the messages that they name."""
    run = dict(zip(RUN_COLUMNS, row, strict=True))
    run["prompt"] = messages.prompt(run["prompt"])
    run["output"] = messages.message(run["output"])
    for name in EMPTY_JSON:
        if run[name] is not None:
            run[name] = orjson.loads(run[name])
    for name in ("tags", "token_ids"):
        run[name] = None if run[name] is None else tuple(run[name])
    if run["logprobs"] is not None:  # JSON has no infinity and no NaN, and stores both as null
        run["logprobs"] = tuple(math.nan if n is None else n for n in run["logprobs"])
    return Run(**run)


def read_feedback(row: tuple[Any, ...], messages: Chains) -> Feedback:
    """Make feedback of the columns ``FEEDBACK_COLUMNS`` and of the message that they name."""
    feedback = dict(zip(FEEDBACK_COLUMNS, row, strict=True))
    if feedback["value"] is not None:
        feedback["value"] = orjson.loads(feedback["value"])
    if feedback["correction"] is not None:
        feedback["correction"] = messages.message(feedback["correction"])
    if feedback["scale"] is not None:
        feedback["scale"] = read_scale(feedback["scale"])
    return Feedback(**feedback)
