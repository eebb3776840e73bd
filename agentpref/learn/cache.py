"""A cache of sequence log-probs, which never go stale.

A sequence log-prob is a function of the weights and the token ids, and the cache keys it by both.
So each update scores only rows that no update scored before. Scores are stored pass by pass: an
update that is ended while it scores leaves them to the next one. They decide what the gate compares
with, so each has a checksum: one that was changed since is computed again.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain

import orjson

from agentpref.learn.batch import Sequences
from agentpref.learn.logps import Logps, Scored, deciding_place
from agentpref.models.tokenizer import Ids, Mask
from agentpref.record.database import transaction
from agentpref.record.sums import checksum


def sequence_key(prompt: Ids, completion: Ids, mask: Mask | None = None) -> str:
    """Content address of a completion after a prompt, and of which of its tokens count.

    >>> sequence_key((1,), (2, 3)) == sequence_key((1,), (2, 3), (True, True))
    True
    >>> sequence_key((1,), (2, 3)) == sequence_key((1,), (2, 3), (False, True))
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt, completion):
        digest.update(len(ids).to_bytes(4, "little") + array("I", ids).tobytes())
    if mask is not None and not all(mask):
        digest.update(bytes(mask))
    return digest.hexdigest()


class LogpCache:
    """Scores of one frozen policy.

    Args:
        connection: the home's database.
        numbers: ``BaseModel.numbers``: the base model, its chat template and its precision.
        revision: the policy's revision. A candidate has none yet: it takes the update's id, and
            :meth:`rename` replaces that by the revision once it is published.
        keeps: whether new scores are stored. What only looks, or scores texts that are not of the
            home, reads what is known and stores nothing.
    """

    def __init__(
        self, connection: sqlite3.Connection, numbers: str, revision: str, *, keeps: bool = True
    ) -> None:
        self._connection, self._keeps = connection, keeps
        self._base = numbers
        self._policy = f"{self._base}:{revision}"

    def known(self, rows: Sequence[Sequences]) -> list[Logps | None]:
        """Return the sums of each row, in order; ``None`` for a row that is to be scored yet."""
        keys = [[key for key, _ in _keys(row)] for row in rows]
        found = self._read({key for own in keys for key in own})
        return [
            tuple(found[key] for key in own) if all(key in found for key in own) else None
            for own in keys
        ]

    def known_whole(self, rows: Sequence[Sequences]) -> list[Scored | None]:
        """As :meth:`known`, with the log-probs of deciding tokens: older versions kept sums."""
        sums = self.known(rows)
        keys = [[*_deciding_keys(row)] for row in rows]
        found = self._read({key for own in keys for key in own})
        whole: list[Scored | None] = []
        for row, scores, own in zip(rows, sums, keys, strict=True):
            if scores is None or not all(key in found for key in own):
                whole.append(None)
            else:
                deciding = tuple(found[key] for key in own)
                whole.append(Scored(scores, deciding or (math.nan,) * len(row.completions)))
        return whole

    def remember(self, rows: Sequence[Sequences], scores: Sequence[Scored]) -> None:
        """Store scores, if this cache keeps any; they are on disk when this returns.

        The log-prob of a deciding token is that of a completion in which it alone counts.
        """
        columns = []
        for row, scored in zip(rows, scores, strict=True):
            keys = [*_keys(row), *((key, 1) for key in _deciding_keys(row))]
            columns += [
                (self._policy, key, logp, tokens)
                for (key, tokens), logp in zip(keys, chain(*scored), strict=False)
            ]
        if columns and self._keeps:
            with transaction(self._connection):
                self._write(columns)

    def rename(self, revision: str) -> None:
        """Move all scores to a revision that has the same weights."""
        query = "SELECT policy, row, logp, tokens, checksum FROM logp WHERE policy = ?"
        with transaction(self._connection):
            found = self._connection.execute(query, (self._policy,)).fetchall()
            whole = (row[1:4] for row in found if row[4] == checksum(row[:4]))
            self._write([(f"{self._base}:{revision}", *row) for row in whole])
            self.forget()

    def forget(self) -> None:
        """Delete all scores of this policy."""
        self._connection.execute("DELETE FROM logp WHERE policy = ?", (self._policy,))

    def _read(self, keys: set[str]) -> dict[str, float]:
        found = self._connection.execute(
            "SELECT row, logp, tokens, checksum FROM logp"
            " WHERE policy = ? AND row IN (SELECT value FROM json_each(?))",
            (self._policy, orjson.dumps(sorted(keys)).decode()),
        )
        return {
            key: logp
            for key, logp, tokens, seal in found
            if seal == checksum((self._policy, key, logp, tokens))
        }

    def _write(self, rows: Sequence[tuple[str, str, float, int]]) -> None:
        """Write scores; they replace those that are there, which are the same or were changed."""
        self._connection.executemany(
            "INSERT OR REPLACE INTO logp (policy, row, logp, tokens, checksum)"
            " VALUES (?, ?, ?, ?, ?)",
            [(*row, checksum(row)) for row in rows],
        )


def _keys(row: Sequences) -> Iterator[tuple[str, int]]:
    """Key and number of counting tokens of each completion."""
    for completion, mask in zip(row.completions, row.masks, strict=True):
        yield sequence_key(row.prompt, completion, mask), sum(mask or (True,) * len(completion))


def _deciding_keys(row: Sequences) -> Iterator[str]:
    """The key of each completion up to the deciding token, which alone counts; none without one."""
    place = deciding_place(row)
    if place is not None:
        for completion in row.completions:
            yield sequence_key(row.prompt, completion[: place + 1], (False,) * place + (True,))
