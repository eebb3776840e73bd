"""The status of revisions: what a namespace serves, and which revisions may serve.

What serves is one row per namespace, changed under the next generation, and a history of its
changes. A revision may serve unless it is tainted, in quarantine or pruned. The functions use a
connection of the caller's; those that change something are called in a transaction.
"""

from __future__ import annotations

import hashlib
import shlex
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from agentpref.errors import GenerationConflict, RevisionError
from agentpref.home import Home
from agentpref.record.database import connect, translated
from agentpref.record.seals import sealed
from agentpref.record.sums import counted
from agentpref.record.updates import last_clean
from agentpref.types import BASE


class ServingState(NamedTuple):
    """What a namespace serves. ``live`` is ``None`` for the bare base model."""

    namespace: str
    live: str | None
    canary: str | None
    weight: float
    generation: int

    def revision_for(self, thread_id: str | None) -> str:
        """Name the revision that serves a thread, ``"base"`` for the bare base model.

        A thread belongs to the canary by a hash of its id, so it stays with one revision, and a
        growing weight keeps the threads that the canary had. Requests without a thread are live's.
        """
        if self.canary is not None and thread_id is not None:
            # A thread's id may be any string, even one that is not valid Unicode.
            key = f"{self.canary}\n{thread_id}".encode(errors="surrogatepass")
            digest = hashlib.blake2b(key, digest_size=8).digest()
            if int.from_bytes(digest, "big") < self.weight * 2**64:
                return self.canary
        return self.live or BASE


class HistoryEntry(NamedTuple):
    """One change, by ``promote``, ``canary``, ``rollback``, ``hold``, ``lift`` or ``watch``.

    ``reason`` is why: of a hold, what somebody said; of a change that people's thumbs decided, the
    thumbs; of a trial (``trials.py``), its evidence; of ``watch``, the settings from then on, as
    JSON. Else it is empty.
    """

    at: float
    generation: int
    action: str
    live: str | None
    canary: str | None
    weight: float
    reason: str = ""


class Service(NamedTuple):
    """When a revision was live last, in seconds since 1970, and whether it is live or canary now.

    ``now`` is ``"live"``, ``"canary"`` or ``None``. ``since`` is ``None`` for one that was never
    live, and ``until`` for one that is live still, or never was. ``canary_until`` is when it last
    stopped being the canary without being made live, ``None`` if it never did.
    """

    now: str | None
    since: float | None
    until: float | None
    canary_until: float | None


def service_of(history: Sequence[HistoryEntry], revision_id: str | None) -> Service:
    """Find out of a namespace's history when a revision served, and whether it does now."""
    now, since, until, canary_until = None, None, None, None
    for entry in history:
        if revision_id is not None and entry.live == revision_id:
            since, until = (entry.at if now != "live" else since), None
            now = "live"
        else:
            until = entry.at if now == "live" else until
            is_canary = revision_id is not None and entry.canary == revision_id
            canary_until = entry.at if now == "canary" and not is_canary else canary_until
            now = "canary" if is_canary else None
    return Service(now, since, until, canary_until)


def namespaces_with_revisions(home: Home) -> list[str]:
    """List the namespaces that have a revision, in alphabetical order, whether or not they log."""
    query = "SELECT DISTINCT namespace FROM revision ORDER BY namespace"
    with translated(home), closing(connect(home, readonly=True)) as connection:
        return [name for (name,) in connection.execute(query)]


def read_state(
    connection: sqlite3.Connection, namespace: str, expected_generation: int | None = None
) -> ServingState:
    """Read what is live and canary now.

    Raises:
        GenerationConflict: the generation is not the expected one.
    """
    query = "SELECT namespace, live, canary, weight, generation FROM serving WHERE namespace = ?"
    row = connection.execute(query, (namespace,)).fetchone()
    found = ServingState(namespace, None, None, 0.0, 0) if row is None else ServingState(*row)
    if expected_generation not in (None, found.generation):
        raise GenerationConflict(
            f"{namespace!r} is at generation {found.generation}, not {expected_generation}: "
            f"another process made {found.live or 'the base model'} live; look at `agentpref "
            f"adapters list`, then try again with this generation"
        )
    return found


def read_history(connection: sqlite3.Connection, namespace: str) -> list[HistoryEntry]:
    """Read every change of what is served, oldest first."""
    query = (
        "SELECT at, generation, action, live, canary, weight, coalesce(reason, '')"
        " FROM serving_history LEFT JOIN hold_reason USING (namespace, generation)"
        " WHERE namespace = ? ORDER BY id"
    )
    return [HistoryEntry(*row) for row in connection.execute(query, (namespace,))]


def change(
    connection: sqlite3.Connection, new: ServingState, action: str, reason: str = ""
) -> ServingState:
    """Write what is served from now on, under the next generation, and add it to the history.

    The table ``hold_reason`` keeps the reason. It was made for holds, and serves every change.
    """
    new = new._replace(generation=new.generation + 1)
    connection.execute(
        "INSERT OR REPLACE INTO serving (namespace, live, canary, weight, generation)"
        " VALUES (?, ?, ?, ?, ?)",
        new,
    )
    values = (
        new.namespace, time.time(), new.generation, action, new.live, new.canary, new.weight,
    )  # fmt: skip
    (row,) = sealed(connection, "serving_history", [values])
    connection.execute(
        "INSERT INTO serving_history (namespace, at, generation, action, live, canary, weight,"
        " seal) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        row,
    )
    if stored := _storable(reason):
        with counted(connection, "hold_reason"):
            connection.execute(
                "INSERT INTO hold_reason (namespace, generation, reason) VALUES (?, ?, ?)",
                (new.namespace, new.generation, stored),
            )
    return new


def _storable(reason: str) -> str:
    """A reason as SQLite stores it: it may name a file whose name is not UTF-8."""
    return reason.strip().encode(errors="backslashreplace").decode()


def require_share(revision_id: str | None, weight: float) -> None:
    """Refuse a canary's share of the threads that is out of range; without a canary it is 0.

    Raises:
        RevisionError: the message says what to give.
    """
    if not (0 < weight <= 1 if revision_id is not None else weight == 0):
        raise RevisionError(
            f"canary weight {weight!r} of {revision_id} is out of range; give a share above 0 and "
            "at most 1, or end it with `agentpref adapters canary --end`, in Python canary(None, 0)"
        )


def previous(connection: sqlite3.Connection, namespace: str) -> str | None:
    """Find what a rollback makes live: a revision that may serve, or ``None`` for the base model.

    The history is read as a stack: a promotion pushes, a rollback pops down to where it went.

    Raises:
        RevisionError: no promotion is left to undo.
    """
    served: list[str | None] = [None]
    for entry in read_history(connection, namespace):
        if entry.action == "rollback":
            served.pop()
            while served[-1] != entry.live:
                served.pop()
        elif entry.action == "promote" and entry.live != served[-1]:
            served.append(entry.live)
    if len(served) == 1:
        raise RevisionError(
            f"nothing to roll back in {namespace!r}: the base model is live; `agentpref adapters "
            f"promote REVISION` makes one live, `agentpref adapters canary --end` ends a canary"
        )
    query = (
        "SELECT revision_id FROM revision"
        " WHERE coalesce(tainted_at, quarantined_at, pruned_at) IS NOT NULL"
    )
    passed_over = {served[-1], *(name for (name,) in connection.execute(query))}
    return next((name for name in reversed(served) if name not in passed_over), None)


def quarantine(
    connection: sqlite3.Connection, revision_id: str, at: float | None, reason: str | None
) -> None:
    """Mark a revision as in quarantine since a time, unless it is already; ``None`` ends it."""
    with counted(connection, "standing"):
        connection.execute(
            "UPDATE revision SET quarantined_at = ?1, quarantine_reason = ?2"
            " WHERE revision_id = ?3 AND (quarantined_at IS NULL OR ?1 IS NULL)",
            (at, None if reason is None else _storable(reason), revision_id),
        )


def require_fit(
    connection: sqlite3.Connection, revision_id: str, untainted: bool = True, released: bool = True
) -> None:
    """Refuse a revision as :meth:`agentpref.Registry.require_fit` does."""
    query = (
        "SELECT pruned_at, tainted_at, quarantined_at, quarantine_reason FROM revision"
        " WHERE revision_id = ?"
    )
    for pruned_at, tainted_at, quarantined_at, reason in connection.execute(query, (revision_id,)):
        if untainted and tainted_at is not None:
            clean = last_clean(connection, revision_id)
            where = f"--home {shlex.quote(str(Home.of(connection).path))}"
            raise RevisionError(
                f"{revision_id} is tainted: it was trained on what was forgotten since; go back to "
                f"{clean}, the last clean one of its line, with `agentpref adapters promote "
                f"{clean} {where}`, then learn again with `agentpref update`"
            )
        if pruned_at is not None:
            raise RevisionError(
                f"{revision_id} was pruned: its files are gone; choose another of `agentpref "
                f"adapters list`, or publish it again from a backup"
            )
        if released and quarantined_at is not None:
            raise RevisionError(
                f"{revision_id} is in quarantine: {reason}; once that is repaired, `agentpref "
                f"adapters release {revision_id}` checks its files and lets it serve again; if it "
                f"is live, `agentpref adapters rollback` makes the one before it live"
            )
