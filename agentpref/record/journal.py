"""The journal of updates: what came of every night, also of those that trained nothing.

The ledger (:mod:`agentpref.record.updates`) has the updates that trained a candidate, or tried to,
with what each pair was used for. The journal has the others: nothing new or usable, busy, failed,
interrupted or still running. A row is written when an update begins. It goes when the ledger has
the update, in the same transaction, and is completed when the update ends in another way. So the
row of a process that was killed is still open, and the next update closes it.

A command that runs every minute must not fill the home: an update that ends just as another one did
since the last one in the ledger takes over its row and its id, and counts.
"""

from __future__ import annotations

import sqlite3
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from agentpref.errors import AgentprefError, HomeError, NotKept, UpdateError, UpdateRunning
from agentpref.home import Home
from agentpref.printable import in_namespace
from agentpref.record.database import connect, transaction, translated, warn
from agentpref.record.messages import as_json
from agentpref.record.updates import read_report
from agentpref.types import UpdateReport, Verdict

RUNNING = "running"
"""The verdict of an update that has not ended, or whose process was killed just now."""

_KILLED = (
    "it did not end by itself: its process was killed (kill -9, or no memory was left), or the "
    "machine stopped"
)


class Entry(NamedTuple):
    """One update as it is listed.

    ``times`` counts the updates that ended in this way, of which the first began at ``first_at``.
    ``in_ledger`` says whether it looked at anything new.
    """

    update_id: str
    namespace: str
    created_at: float
    verdict: str
    revision: str | None
    report: Mapping[str, Any]
    times: int
    first_at: float
    in_ledger: bool


class Journal:
    """The updates of a home that are not in the ledger, over one open connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def begin(self, report: UpdateReport) -> tuple[int, list[str]]:
        """Write that an update begins; returns its number, and notes on those that were killed.

        Call it with the home locked: no other update of it is running then, so what is open was
        killed.
        """
        now = time.time()
        with transaction(self._connection):
            query = "SELECT update_id, namespace FROM journal WHERE ended_at IS NULL"
            killed = self._connection.execute(query).fetchall()
            self._connection.execute(
                "UPDATE journal SET ended_at = ?, verdict = 'interrupted' WHERE ended_at IS NULL",
                (now,),
            )
            killed_now = replace(report, verdict="interrupted", notes=[_KILLED]).to_mapping()
            text = as_json(killed_now | {"seconds": None})  # nobody measures how long it takes
            added = self._connection.execute(
                "INSERT INTO journal (update_id, namespace, started_at, report, first_at)"
                " VALUES (?, ?, ?, ?, ?)",
                (report.update_id, report.namespace, report.created_at, text, report.created_at),
            )
            number = int(added.lastrowid or 0)
        found = [name for name, namespace in killed if namespace == report.namespace]
        return number, [f"of update {name}: {_KILLED}" for name in found]

    def resume(self, number: int, update_id: str) -> None:
        """Write that a running update goes on with an older one, under its id."""
        query = "UPDATE journal SET update_id = ?1, report = json_set(report, '$.update_id', ?1)"
        self._connection.execute(f"{query} WHERE number = ?2", (update_id, number))

    def end(self, report: UpdateReport, number: int | None = None) -> UpdateReport:
        """Write how an update ended that the ledger does not have; returns it with its id.

        ``number`` is that of :meth:`begin`, or ``None`` if the update did not get that far.
        """
        with transaction(self._connection):
            self._connection.execute("DELETE FROM journal WHERE number = ?", (number,))
            twin = self._connection.execute(
                "SELECT number, update_id, times, first_at FROM journal"
                " WHERE namespace = ?1 AND verdict = ?2 AND ended_at >"
                " coalesce((SELECT max(finished_at) FROM updates WHERE namespace = ?1), 0)"
                " AND json_extract(report, '$.notes') = json(?3)",
                (report.namespace, report.verdict, as_json(report.notes)),
            ).fetchone()
            same, name, times, first_at = twin or (None, report.update_id, 0, report.created_at)
            self._connection.execute("DELETE FROM journal WHERE number = ?", (same,))
            report = replace(report, update_id=name)
            self._connection.execute(
                "INSERT INTO journal (update_id, namespace, started_at, ended_at, verdict, report,"
                " times, first_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    name, report.namespace, report.created_at, time.time(), report.verdict,
                    as_json(report.to_mapping()), times + 1, first_at,
                ),
            )  # fmt: skip
        return report


class Trace:
    """Sees to it that an update leaves a trace, however it ends: a context manager around it.

    Args:
        home: the home that the update works on.
        report: what is known before it begins.
    """

    def __init__(self, home: Home, report: UpdateReport) -> None:
        self.home, self.report = home, report
        self._number: int | None = None

    def __enter__(self) -> Trace:
        return self

    def begin(self, connection: sqlite3.Connection) -> list[str]:
        """Write that the home is locked and the update begins; see :meth:`Journal.begin`."""
        self._number, notes = Journal(connection).begin(self.report)
        return notes

    def resume(self, connection: sqlite3.Connection, update_id: str) -> None:
        """The update goes on with an older one."""
        self.report = replace(self.report, update_id=update_id)
        if self._number is not None:
            Journal(connection).resume(self._number, update_id)

    def end(self, connection: sqlite3.Connection, report: UpdateReport) -> UpdateReport:
        """Write that the update ended without a row of the ledger."""
        return Journal(connection).end(report, self._number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        place: TracebackType | None,
    ) -> None:
        if error is None:
            return
        verdict: Verdict = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if isinstance(error, UpdateRunning):
            verdict = "busy"
        seconds = max(0.0, time.time() - self.report.created_at)
        notes = [_told(error)]
        report = replace(self.report, verdict=verdict, seconds=seconds, notes=notes)
        try:
            with translated(self.home), closing(connect(self.home)) as connection:
                Journal(connection).end(report, self._number)
        except AgentprefError as trouble:
            if not isinstance(error, HomeError | NotKept):  # which say what is wrong with the home
                warn("that an update %s is not in the journal: %s", verdict, trouble)


def _told(error: BaseException) -> str:
    """An error in words that may be kept: only our own messages quote nothing that was logged."""
    if isinstance(error, AgentprefError):
        return str(error)
    places = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(places[-1].filename).name}, line {places[-1].lineno}" if places else ""
    kind = type(error).__name__
    return f"{kind}{where}; its message is not kept, because it may quote what was logged"


# What is listed


_LISTED = f"""
WITH listed AS (
    SELECT update_id, namespace, created_at, coalesce(finished_at, created_at) AS ended_at,
        verdict, candidate AS revision, report, 1 AS times, created_at AS first_at,
        1 AS in_ledger, 0 AS number
    FROM updates
    UNION ALL
    SELECT update_id, namespace, started_at, ended_at, coalesce(verdict, '{RUNNING}'),
        NULL, report, times, first_at, 0, number
    FROM journal
)
SELECT update_id, namespace, created_at, verdict, revision, report, times, first_at, in_ledger
FROM listed
"""
_NEWEST_FIRST = "ORDER BY ended_at IS NOT NULL, ended_at DESC, number DESC, update_id DESC LIMIT ?"


def listed(
    connection: sqlite3.Connection, namespace: str | None = None, limit: int | None = None
) -> list[Entry]:
    """List the updates of the ledger and of the journal, those that ended last first.

    ``namespace`` and ``limit`` are without effect if they are ``None``.
    """
    query = f"{_LISTED} WHERE namespace = coalesce(?, namespace) {_NEWEST_FIRST}"
    rows = connection.execute(query, (namespace, -1 if limit is None else limit))
    return [_entry(row) for row in rows]


def last_trained(connection: sqlite3.Connection, namespace: str) -> Entry | None:
    """The last update of a namespace that trained a candidate."""
    trained = "in_ledger AND coalesce(json_extract(report, '$.training'), '{}') <> '{}'"
    query = f"{_LISTED} WHERE namespace = ? AND {trained} {_NEWEST_FIRST}"
    row = connection.execute(query, (namespace, 1)).fetchone()
    return None if row is None else _entry(row)


def last_counted(connection: sqlite3.Connection, namespace: str) -> Entry | None:
    """The last update of a namespace that got as far as to count what there was to learn."""
    counted = "coalesce(json_extract(report, '$.counts'), '{}') <> '{}'"
    query = f"{_LISTED} WHERE namespace = ? AND {counted} {_NEWEST_FIRST}"
    row = connection.execute(query, (namespace, 1)).fetchone()
    return None if row is None else _entry(row)


def find(connection: sqlite3.Connection, name: str, namespace: str | None = None) -> Entry:
    """Find an update by its id or that of its revision, or by how one of these begins.

    Of an update that was interrupted and resumed, this is its end.

    Raises:
        UpdateError: there is none, or several begin so.
    """
    where = "namespace = coalesce(?1, namespace) AND ?2 IN (substr(update_id, 1, length(?2)),"
    query = f"{_LISTED} WHERE {where} substr(revision, 1, length(?2))) ORDER BY in_ledger, number"
    found = {row[0]: row for row in connection.execute(query, (namespace, name))}
    exact = [row for row in found.values() if name in (row[0], row[4])]
    if len(exact or found) != 1:
        raise UpdateError(_why_not(name, namespace, [*found]))
    return _entry(exact[0] if exact else next(iter(found.values())))


def _why_not(name: str, namespace: str | None, found: Sequence[str]) -> str:
    where = "the home" if namespace is None else f"namespace {namespace!r}"
    if len(found) > 1:
        some = ", ".join(found[:3])
        return f"{len(found)} updates of {where} begin with {name!r}: {some}; give more of the id"
    cure = f"`{in_namespace('agentpref updates', namespace or 'default')}` lists them"
    if name.startswith("rev-"):
        cure = f"`agentpref adapters show {name}` shows one that was published by hand"
    return f"{where} has no update {name!r}; {cure}"


def _entry(row: Sequence[Any]) -> Entry:
    update_id, namespace, created_at, verdict, revision, text, times, first_at, in_ledger = row
    report = {} if text is None else read_report(text)
    if verdict == RUNNING:
        report |= {"verdict": verdict, "notes": []}
    return Entry(
        update_id, namespace, created_at, verdict or report.get("verdict", ""), revision, report,
        times, first_at, bool(in_ledger),
    )  # fmt: skip
