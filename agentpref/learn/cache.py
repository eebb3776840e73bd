"""Log-probs that were computed once and hold for ever.

A sequence log-prob is a function of the weights and the token ids, and is stored under both, so it
is never stale: a new night scores only the rows that no night has scored. Knows nothing of losses,
nor of what the scores are for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import TypeVar

import orjson

from agentpref.learn.encode import Encoded, sequence_key
from agentpref.learn.logps import PairLogps
from agentpref.record.database import transaction

E = TypeVar("E", bound=Encoded)


class LogpCache:
    """Scores of one frozen policy, known by ``BaseModel.numbers`` and revision.

    A candidate has no revision yet: its scores stand under the update's id until :meth:`rename`
    gives them the revision's name, so that what the gate scored tonight is known tomorrow.
    """

    def __init__(self, connection: sqlite3.Connection, numbers: str, revision: str) -> None:
        self._connection = connection
        self._base = numbers
        self._policy = f"{self._base}:{revision}"

    def score(
        self, rows: Sequence[E], scorer: Callable[[Sequence[E]], Sequence[PairLogps]]
    ) -> list[PairLogps]:
        """Scores of ``rows``, in order, asking ``scorer`` only for those not known yet."""
        known = self._read({key for row in rows for key, _ in _keys(row)})
        missing = [row for row in rows if any(key not in known for key, _ in _keys(row))]
        fresh = scorer(missing) if missing else []
        self.remember(missing, fresh)
        for row, scores in zip(missing, fresh, strict=True):
            known.update((key, logp) for (key, _), logp in zip(_keys(row), scores, strict=True))
        return [PairLogps(*(known[key] for key, _ in _keys(row))) for row in rows]

    def remember(self, rows: Sequence[Encoded], scores: Sequence[PairLogps]) -> None:
        """Keep scores that were computed elsewhere."""
        columns = [
            (self._policy, key, logp, tokens)
            for row, pair in zip(rows, scores, strict=True)
            for (key, tokens), logp in zip(_keys(row), pair, strict=True)
        ]
        if not columns:
            return
        with transaction(self._connection):
            self._connection.executemany(
                "INSERT OR IGNORE INTO logp (policy, row, logp, tokens) VALUES (?, ?, ?, ?)",
                columns,
            )

    def rename(self, revision: str) -> None:
        """Let all scores stand under the name of a revision, which has the same weights."""
        with transaction(self._connection):
            self._connection.execute(
                "UPDATE OR IGNORE logp SET policy = ? WHERE policy = ?",
                (f"{self._base}:{revision}", self._policy),
            )
            self.forget()

    def forget(self) -> None:
        """Drop all scores of this policy, which will never serve."""
        self._connection.execute("DELETE FROM logp WHERE policy = ?", (self._policy,))

    def _read(self, keys: set[str]) -> dict[str, float]:
        found = self._connection.execute(
            "SELECT row, logp FROM logp"
            " WHERE policy = ? AND row IN (SELECT value FROM json_each(?))",
            (self._policy, orjson.dumps(sorted(keys)).decode()),
        )
        return dict(found.fetchall())


def _keys(row: Encoded) -> tuple[tuple[str, int], tuple[str, int]]:
    """Key and number of tokens of each of the two completions."""
    first, second = row.completions
    return (
        (sequence_key(row.prompt, first), len(first)),
        (sequence_key(row.prompt, second), len(second)),
    )
