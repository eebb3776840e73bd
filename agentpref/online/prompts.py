"""The prompts of a log, from which each round of a loop draws some."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from agentpref.prefer.examples import is_held_out
from agentpref.prefer.strata import equal_shares
from agentpref.record.store import Store
from agentpref.types import Run

if TYPE_CHECKING:
    import sqlite3

_NEWEST = 20_000  # so many prompts of the log are drawn from


class Prompts:
    """The prompts of a namespace; of those that are drawn, others come first the next time."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        namespace: str,
        held_out: float,
        source: random.Random,
    ) -> None:
        self._connection, self._namespace = connection, namespace
        self._held_out, self._random = held_out, source
        self._drawn = Counter[str]()

    def find(self, trusted: Callable[[str], bool]) -> tuple[list[Run], list[Run]]:
        """A run of each prompt, the newest ones: of the training side, and held out.

        Args:
            trusted: whether the judge may say something in a tag.
        """
        query = """SELECT max(run_id), max(created_at) FROM run WHERE namespace = ?
            GROUP BY prompt ORDER BY 2 DESC LIMIT ?"""
        found = self._connection.execute(query, (self._namespace, _NEWEST))
        store, sides = Store(self._connection), (list[Run](), list[Run]())
        for run_id, _ in found.fetchall():
            run = store.run(run_id)
            if trusted(run.tag):
                sides[is_held_out(run.prompt.messages, self._held_out)].append(run)
        return sides

    def draw(self, runs: Sequence[Run], count: int) -> list[Run]:
        """Some runs at random, as equally of each tag as possible; those drawn least come first."""
        tags: dict[str, list[Run]] = {}
        for run in runs:
            tags.setdefault(run.tag, []).append(run)
        shares = equal_shares({tag: len(some) for tag, some in tags.items()}, count)
        drawn: list[Run] = []
        for tag in sorted(tags):
            shuffled = self._random.sample(tags[tag], len(tags[tag]))
            shuffled.sort(key=lambda run: self._drawn[run.run_id])
            drawn += shuffled[: shares[tag]]
        self._drawn.update(run.run_id for run in drawn)
        return drawn
