"""Carries messages from one home to another, each with all that it follows.

Looks a batch's messages up, in the home that takes them and then in the other, level by level
towards their roots; a message that the home has is known with all its ancestors, since a message is
never without its parent. What comes from the other home is hashed again. Knows nothing of runs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import orjson

from agentpref.record.database import insert_or_ignore
from agentpref.record.ingest.checks import role_of
from agentpref.record.messages import TOOLS
from agentpref.record.transfer.foreign import Foreign


class Place(NamedTuple):
    """Where a message stands: ``text`` is that of one which this home has yet to take."""

    parent: str | None
    role: str
    text: str | None


class Carrier:
    """Takes messages out of ``source`` into ``target``, both open; asked about a batch at a time.

    ``refused`` says what is wrong with each message that no log would have written; ``added``
    counts those that were brought.
    """

    def __init__(self, source: Foreign, target: sqlite3.Connection) -> None:
        self.refused: dict[str, str] = {}
        self.added = 0
        self._source, self._target = source, target
        self._places: dict[str, Place] = {}
        self._sound: set[str] = set()

    def look_at(self, ids: Iterable[str]) -> None:
        """Look messages up with all that they follow, and forget those that were asked for before.

        Call it in the transaction that takes them: until it ends, what is known stays.
        """
        self._places, self._sound = {}, set()
        wanted = set(ids) - self.refused.keys()
        while wanted:
            self._places |= self._here(wanted)
            wanted -= self._places.keys()
            parents = self._look_there(wanted)
            wanted = parents - self._places.keys() - self.refused.keys()

    def fault(self, id: str) -> str | None:
        """Say why a message that was looked at cannot be taken, if so."""
        path: list[str] = []
        above: str | None = id
        while above is not None and above not in self._sound:
            if above in self.refused:
                return f"message {above}: {self.refused[above]}"
            place = self._places[above]
            if place.text is None:
                break
            path.append(above)
            above = place.parent
        self._sound.update(path)
        return None

    def place(self, id: str) -> Place:
        """Say where a message stands that was looked at and has no fault."""
        return self._places[id]

    def bring(self, ids: Iterable[str]) -> None:
        """Take messages that have no fault, and all that they follow."""
        rows: dict[str, tuple[str, str | None, str]] = {}
        for id in ids:
            path: list[tuple[str, str | None, str]] = []
            above: str | None = id
            while above is not None and above not in rows:
                parent, _, text = self._places[above]
                if text is None:
                    break
                path.append((above, parent, text))
                above = parent
            rows |= {row[0]: row for row in reversed(path)}  # a parent before its children
        insert_or_ignore(self._target, "message", ("id", "parent", "body"), [*rows.values()])
        self.added += len(rows)

    def _here(self, ids: Collection[str]) -> dict[str, Place]:
        query = (
            "SELECT id, parent, CASE WHEN json_valid(body) THEN json_extract(body, '$.role') END"
            " FROM message WHERE id IN (SELECT value FROM json_each(?))"
        )
        rows = self._target.execute(query, (_json(ids),))
        return {id: Place(parent, role or TOOLS, None) for id, parent, role in rows}

    def _look_there(self, ids: Collection[str]) -> set[str]:
        """Look for messages in the other home; return those that they follow."""
        query = (
            "SELECT id, parent, CAST(body AS BLOB) FROM message"
            " WHERE id IN (SELECT value FROM json_each(?))"
        )
        found = self._source.read(query, (_json(ids),))
        self.refused |= dict.fromkeys({*ids} - {row[0] for row in found}, "it is missing")
        return {parent for row in found if (parent := self._place(*row)) is not None}

    def _place(self, id: str, parent: Any, body: Any) -> str | None:
        """Place a message of the other home, or refuse it; return the one that it follows."""
        try:
            self._places[id] = Place(parent, role_of(id, parent, body), body.decode())
        except ValueError as error:
            self.refused[id] = str(error)
            return None
        return self._places[id].parent


def _json(ids: Collection[str]) -> str:
    return orjson.dumps([*ids]).decode()
