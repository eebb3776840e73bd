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


def require_available(connection: sqlite3.Connection, revision_id: str) -> None:
    """Refuse a revision that was pruned, or is in quarantine."""
    query = (
        "SELECT quarantined_at, quarantine_reason, pruned_at FROM revision WHERE revision_id = ?"
    )
    row = connection.execute(query, (revision_id,)).fetchone()
    quarantined_at, reason, pruned_at = (None, None, None) if row is None else row
    if pruned_at is not None:
        raise RevisionError(
            f"{revision_id} was pruned: its files are gone; choose one that `agentpref adapters "
            f"list` shows as kept, or publish it again from a backup"
        )
    if quarantined_at is not None:
        raise RevisionError(
            f"{revision_id} is in quarantine: {reason}; when that is mended, `agentpref adapters "
            f"release {revision_id}` checks its files and lets it serve again"
        )


def require_fit(connection: sqlite3.Connection, revision_id: str) -> None:
    """Refuse a revision that must not come to serve, for whichever reason."""
    require_clean(connection, revision_id)
    require_available(connection, revision_id)


def quarantine(connection: sqlite3.Connection, revision_id: str, reason: str) -> None:
    """Put a revision into quarantine; one that is there keeps its time and its reason."""
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


def set_pruned(connection: sqlite3.Connection, revision_id: str, at: float | None) -> None:
    """Mark a revision as pruned since a time, or take that back."""
    connection.execute("UPDATE revision SET pruned_at = ? WHERE revision_id = ?", (at, revision_id))
