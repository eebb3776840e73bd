"""Puts entries on disk, whatever the state of the database.

The database is tried first; while it is locked, full or otherwise unable, the spill takes what
comes, and its entries go to the database before any later one. A keeper has one user at a time and
owns one connection. Knows nothing of queues, threads and the host.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing

from agentpref.errors import AgentprefError, HomeError, NotKept, RecordError
from agentpref.home import Home
from agentpref.record.database import (
    BUSY_SECONDS,
    connect,
    require_known_schema,
    transaction,
    translated,
)
from agentpref.record.ingest.intake import Entry
from agentpref.record.rows import RunRow
from agentpref.record.spill import Drained, Spill
from agentpref.record.store import Store
from agentpref.record.tallies import LAG, catch_up
from agentpref.types import Comparison, Feedback

PATIENCE_SECONDS = 2.0
"""How long an entry waits for a lock before it goes to the spill."""

REST_SECONDS = 1.0
"""How long a database that was in trouble is left alone; then it is tried without patience."""


class Keeper:
    """Keeps entries in one home."""

    def __init__(self, home: Home) -> None:
        """Open the home's database.

        Raises:
            HomeError: the database is not ours to write.
            NotKept: it cannot be opened.
        """
        self._home = home
        self._spill = Spill(home)
        self._connection: sqlite3.Connection | None = connect(home)
        self._trouble: AgentprefError | None = None
        self._rest_until = 0.0
        self._patience = BUSY_SECONDS

    @property
    def trouble(self) -> AgentprefError | None:
        """What keeps the database from taking entries, while something does."""
        return self._trouble

    def keep(self, entries: Sequence[Entry]) -> list[RecordError | None]:
        """Put entries on disk, and say for each whether it was refused.

        In the spill, nothing is refused: whether a run exists that feedback names is looked at when
        the database takes it.

        Raises:
            NotKept: neither the database nor the spill can take them; none of them is on disk.
        """
        if self._trouble is None or time.monotonic() >= self._rest_until:
            try:
                return self._store(entries)
            except (NotKept, HomeError) as trouble:
                self._rest(trouble)
        self._spill.append(entries)
        return [None] * len(entries)

    def waits(self) -> bool:
        """Say whether something was spilled that the database has not taken yet."""
        return self._trouble is not None and self._spill.waits()

    def recover(self) -> None:
        """Try to bring the database what waits; without success, that goes on waiting."""
        try:
            self._store([])
        except (NotKept, HomeError) as trouble:
            self._rest(trouble)

    def drain(self) -> Drained:
        """Write what waits in the spill to the database.

        Raises:
            NotKept: the database or the spill is still in trouble; nothing is lost.
            HomeError: the database is not ours to write.
        """
        return self._spill.drain(self._write)

    def disconnect(self) -> None:
        """Let go of the database; the next entry opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    close = disconnect

    def _rest(self, trouble: AgentprefError) -> None:
        if self._trouble is None:
            _warn_of(trouble, self._home)
        self._trouble = trouble
        self._rest_until = time.monotonic() + REST_SECONDS

    def _store(self, entries: Sequence[Entry]) -> list[RecordError | None]:
        if self._spill.waits():
            _report(self._home, self.drain())
        outcomes = self._write(entries)
        self._trouble = None
        return outcomes

    def _write(self, entries: Sequence[Entry]) -> list[RecordError | None]:
        """Write entries together; where one breaks the schema's rules, it alone is refused."""
        try:
            with translated(self._home):
                return self._write_together(entries)
        except sqlite3.IntegrityError as error:
            if len(entries) > 1:
                return [outcome for entry in entries for outcome in self._write([entry])]
            refusal = NotKept(f"{self._home.database} refused an entry: {error}; please report it")
            refusal.__cause__ = error
            return [refusal]

    def _write_together(self, entries: Sequence[Entry]) -> list[RecordError | None]:
        """Write all runs first: what is said of them may come before them in a spill."""
        runs = [entry for entry in entries if isinstance(entry, RunRow)]
        connection = self._open()
        store = Store(connection)
        with transaction(connection):
            require_known_schema(connection, self._home)
            refused = iter(store.add_runs(runs) if runs else ())
            outcomes = [
                next(refused) if isinstance(entry, RunRow) else _judge(store, entry)
                for entry in entries
            ]
            if runs:
                catch_up(connection, lag=LAG)
        return outcomes

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = connect(self._home)
            self._patience = BUSY_SECONDS
        patience = PATIENCE_SECONDS if self._trouble is None else 0.0
        if patience != self._patience:
            self._connection.execute(f"PRAGMA busy_timeout = {1000 * patience:.0f}")
            self._patience = patience
        return self._connection


def drain(home: Home) -> Drained:
    """Write what waits in a home's spill to its database; see :meth:`Keeper.drain`."""
    if not Spill(home).waits():
        return Drained(0, 0, 0)
    with closing(Keeper(home)) as keeper:
        return keeper.drain()


def _judge(store: Store, said: Feedback | Comparison) -> RecordError | None:
    """Write a judgement; its refusal keeps nothing else of the batch from the disk."""
    try:
        if isinstance(said, Feedback):
            store.add_feedback(said)
        else:
            store.add_comparison(said)
    except RecordError as refusal:
        return refusal
    return None


def _warn_of(trouble: AgentprefError, home: Home) -> None:
    import logging  # 10 ms, which a log without trouble never spends

    logging.getLogger("agentpref").warning(
        "%s. Until then, what is logged goes to %s", trouble, home.spill
    )


def _report(home: Home, drained: Drained) -> None:
    import logging

    logger = logging.getLogger("agentpref")
    logger.info("%s: %d entries went to the database", home.spill, drained.stored)
    if drained.refused:
        logger.warning(
            "%d entries of %s name what this home does not have; they are kept in %s",
            drained.refused,
            home.spill,
            home.refused,
        )
    if drained.torn:
        logger.warning(
            "%d lines of %s were cut off by a crash before they were acknowledged",
            drained.torn,
            home.spill,
        )
