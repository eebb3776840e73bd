"""The transaction in which a revision is published, and what else may be written in it.

The folder is complete and durable before; its name and its row come last.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agentpref.home import Home
from agentpref.record.seals import sealed
from agentpref.record.sums import counted
from agentpref.record.updates import WEIGHTS
from agentpref.serve import folders, status
from agentpref.serve.backend import Revision
from agentpref.serve.status import ServingState


class Publication(NamedTuple):
    """A revision that is being published, and the connection whose transaction does it."""

    revision: Revision
    connection: sqlite3.Connection

    def promote(self, state: ServingState) -> bool:
        """Make the revision live if what serves is still ``state``; say whether it is."""
        if status.read_state(self.connection, self.revision.namespace) != state:
            return False
        status.require_fit(self.connection, self.revision.revision_id)
        new = state._replace(live=self.revision.revision_id, canary=None, weight=0.0)
        status.change(self.connection, new, "promote")
        return True


def insert(
    connection: sqlite3.Connection, home: Home, draft: Path, manifest: Mapping[str, Any]
) -> str:
    """Number the folder, move it to its place and write its row, in the open transaction.

    The write lock makes the cleaning safe: while a process has it, no other publisher is between
    its rename and its row. A child of a tainted revision is tainted, and so is a revision with the
    weights of one.
    """
    names = connection.execute("SELECT revision_id FROM revision")
    folders.clean(home.adapters, {name for (name,) in names})
    (seq,) = connection.execute("SELECT COALESCE(MAX(seq), 0) + 1 FROM revision").fetchone()
    name = folders.revision_id(seq, manifest["files"])
    folders.give_name(draft, home.adapters / name)
    parent, content = manifest["parent"], folders.encode(manifest).decode()
    values = (name, manifest["namespace"], seq, parent, time.time(), content)
    (row,) = sealed(connection, "revision", [values])
    with counted(connection, "standing", where="revision_id = ?", values=(name,)):
        connection.execute(
            "INSERT INTO revision (revision_id, namespace, seq, parent, created_at, manifest, seal,"
            " tainted_at) VALUES (?, ?, ?, ?, ?, ?, ?, (SELECT min(tainted_at) FROM revision"
            f" WHERE revision_id = ? OR ({WEIGHTS.format('manifest')}) = ?))",
            (*row, parent, manifest["files"][folders.WEIGHTS_FILE]),
        )
    return name
