"""Whether a revision may serve: it is not tainted, not in quarantine, and not pruned.

Reads and writes the flags of ``revision``, over a connection that it is given. Taint is set by
``record.lineage``; it and a pruning are for good, a quarantine ends. Knows nothing of files, and of
what serves.
"""

from __future__ import annotations

import sqlite3
import time

from agentpref.errors import RevisionError
from agentpref.record.lineage import last_clean

_FIT = "tainted_at IS NULL AND quarantined_at IS NULL AND pruned_at IS NULL"


def names(connection: sqlite3.Connection) -> set[str]:
    """Name all revisions that have a row, of all namespaces."""
    return {name for (name,) in connection.execute("SELECT revision_id FROM revision")}


def unfit(connection: sqlite3.Connection) -> set[str]:
    """Name the revisions that must not come to serve, of all namespaces."""
    query = f"SELECT revision_id FROM revision WHERE NOT ({_FIT})"
    return {name for (name,) in connection.execute(query)}


def require_clean(connection: sqlite3.Connection, revision_id: str) -> None:
    """Refuse a tainted revision; the cure names the last one of its line that may serve."""
    query = "SELECT 1 FROM revision WHERE revision_id = ? AND tainted_at IS NOT NULL"
    if connection.execute(query, (revision_id,)).fetchone():
        clean = last_clean(connection, revision_id)
        raise RevisionError(
            f"{revision_id} is tainted: its training saw what a user has had forgotten; go back "
            f"to {clean}, the last clean one of its line, with `agentpref adapters promote {clean}`"
            ", then learn again with `agentpref update`"
        )


def require_present(connection: sqlite3.Connection, revision_id: str) -> None:
    """Refuse a revision that was pruned."""
    query = "SELECT 1 FROM revision WHERE revision_id = ? AND pruned_at IS NOT NULL"
    if connection.execute(query, (revision_id,)).fetchone():
        raise RevisionError(
            f"{revision_id} was pruned: its files are gone; choose another of `agentpref adapters "
            f"list`, or publish it again from a backup"
        )


def require_available(connection: sqlite3.Connection, revision_id: str) -> None:
    """Refuse a revision that was pruned, or is in quarantine."""
    require_present(connection, revision_id)
    query = (
        "SELECT quarantine_reason FROM revision"
        " WHERE revision_id = ? AND quarantined_at IS NOT NULL"
    )
    for (reason,) in connection.execute(query, (revision_id,)):
        raise RevisionError(
            f"{revision_id} is in quarantine: {reason}; when that is mended, `agentpref adapters "
            f"release {revision_id}` checks its files and lets it serve again; if it is live, "
            f"`agentpref adapters rollback` makes the one before it live"
        )


def require_fit(connection: sqlite3.Connection, revision_id: str) -> None:
    """Refuse a revision that must not come to serve, for whichever reason."""
    require_clean(connection, revision_id)
    require_available(connection, revision_id)


def quarantine(connection: sqlite3.Connection, revision_id: str, reason: str) -> None:
    """Put a revision into quarantine; one that is there keeps its time and its reason.

    A reason may name a file whose name is no UTF-8, which no database takes as it is.
    """
    reason = reason.encode(errors="backslashreplace").decode()
    connection.execute(
        "UPDATE revision SET quarantined_at = ?, quarantine_reason = ?"
        " WHERE revision_id = ? AND quarantined_at IS NULL",
        (time.time(), reason, revision_id),
    )


def release(connection: sqlite3.Connection, revision_id: str) -> None:
    """End a quarantine."""
    connection.execute(
        "UPDATE revision SET quarantined_at = NULL, quarantine_reason = NULL WHERE revision_id = ?",
        (revision_id,),
    )


def pruned(connection: sqlite3.Connection) -> dict[str, float]:
    """Say which revisions were pruned, and since when, of all namespaces."""
    query = "SELECT revision_id, pruned_at FROM revision WHERE pruned_at IS NOT NULL"
    return dict(connection.execute(query).fetchall())


def mark_pruned(connection: sqlite3.Connection, revision_id: str, at: float) -> None:
    """Mark a revision as pruned since a time."""
    query = "UPDATE revision SET pruned_at = ? WHERE revision_id = ?"
    connection.execute(query, (at, revision_id))


def is_marked(connection: sqlite3.Connection, revision_id: str, at: float) -> bool:
    """Say whether a revision is marked as pruned, and since just that time."""
    query = "SELECT 1 FROM revision WHERE revision_id = ? AND pruned_at = ?"
    return connection.execute(query, (revision_id, at)).fetchone() is not None


def unmark_pruned(connection: sqlite3.Connection, revision_id: str, at: float) -> None:
    """Take a mark back, and none that another has set."""
    query = "UPDATE revision SET pruned_at = NULL WHERE revision_id = ? AND pruned_at = ?"
    connection.execute(query, (revision_id, at))
