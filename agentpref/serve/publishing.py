"""The transaction in which a revision is published, and the row that it then is.

The folder is complete and durable before; its name and its row come last.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from agentpref.errors import InvalidAdapter
from agentpref.home import Home, sync, writing
from agentpref.leftovers import clear_adapters
from agentpref.record.database import connect, transaction, translated
from agentpref.record.seals import sealed
from agentpref.record.sums import counted
from agentpref.record.weights import name_weights, tensor_digest
from agentpref.serve import decisions, folders, status
from agentpref.serve.backend import Revision
from agentpref.serve.status import ServingState
from agentpref.serve.validate import check_adapter


class Publication(NamedTuple):
    """A revision that is being published, and the connection whose transaction does it."""

    revision: Revision
    connection: sqlite3.Connection

    def promote(self, state: ServingState) -> bool:
        """Make the revision live if what serves is still ``state``; say whether it is."""
        name = self.revision.revision_id
        return self._change(state, state._replace(live=name, canary=None, weight=0.0), "promote")

    def canary(self, state: ServingState, weight: float, reason: str = "") -> bool:
        """Make it the canary if what serves is still ``state``; say whether it is."""
        name = self.revision.revision_id
        return self._change(state, state._replace(canary=name, weight=weight), "canary", reason)

    def _change(
        self, state: ServingState, new: ServingState, action: str, reason: str = ""
    ) -> bool:
        namespace = self.revision.namespace
        if status.read_state(self.connection, namespace) != state:
            return False
        decisions.require_not_held(self.connection, namespace)
        status.require_fit(self.connection, self.revision.revision_id)
        status.change(self.connection, new, action, reason)
        return True


@contextmanager
def published(home: Home, folder: Path, own: Mapping[str, Any]) -> Iterator[Publication]:
    """Publish a folder; ``own`` is what its manifest says beside the digests of its files."""
    with writing(home.adapters):
        files = check_adapter(folder)
        manifest = {
            "format": folders.FORMAT,
            "files": files.digests,
            "tensors": tensor_digest(files.weights),
            **own,
        }
        draft = folders.new_draft(home.adapters)
        with folders.written(files, manifest, draft):
            sync(home.path)  # the folder of adapters may be new
            with translated(home), closing(connect(home)) as connection, transaction(connection):
                name = insert(connection, home, draft, manifest)
                connection.row_factory = sqlite3.Row
                query = "SELECT * FROM revision WHERE revision_id = ?"
                row = connection.execute(query, (name,)).fetchone()
                yield Publication(revision_of(row, home), connection)


def insert(
    connection: sqlite3.Connection, home: Home, draft: Path, manifest: Mapping[str, Any]
) -> str:
    """Number the folder, move it to its place and write its row, in the open transaction.

    The write lock makes the cleaning safe: while a process has it, no other publisher is between
    its rename and its row. A child of a tainted revision is tainted, and so is a revision with the
    weights of one.
    """
    names = connection.execute("SELECT revision_id FROM revision")
    clear_adapters(home.adapters, {name for (name,) in names})
    (seq,) = connection.execute("SELECT COALESCE(MAX(seq), 0) + 1 FROM revision").fetchone()
    name = folders.revision_id(seq, folders.contents(manifest))
    folders.give_name(draft, home.adapters / name)
    parent, content = manifest["parent"], folders.encode(manifest).decode()
    values = (name, manifest["namespace"], seq, parent, time.time(), content)
    (row,) = sealed(connection, "revision", [values])
    name_weights(connection, home, of="tainted_at IS NOT NULL")
    with counted(connection, "standing", where="revision_id = ?", values=(name,)):
        connection.execute(
            "INSERT INTO revision (revision_id, namespace, seq, parent, created_at, manifest, seal,"
            " tainted_at) VALUES (?, ?, ?, ?, ?, ?, ?, (SELECT min(tainted_at) FROM revision"
            " WHERE revision_id = ? OR weights(revision_id) IN (?, ?)))",
            (*row, parent, manifest["tensors"], manifest["files"][folders.WEIGHTS_FILE]),
        )
    return name


def revision_of(row: sqlite3.Row, home: Home) -> Revision:
    """Read a row of the table of revisions.

    Raises:
        InvalidAdapter: its id has not the form of one, and so names no folder.
    """
    name = row["revision_id"]
    if not folders.is_revision_id(name):
        raise InvalidAdapter(f"{name!r} in {home.database} is not a revision's name")
    return Revision(
        revision_id=name,
        namespace=row["namespace"],
        parent=row["parent"],
        created_at=row["created_at"],
        path=home.adapters / name,
        manifest=orjson.loads(row["manifest"]),
        tainted_at=row["tainted_at"],
        quarantined_at=row["quarantined_at"],
        quarantine_reason=row["quarantine_reason"],
        pruned_at=row["pruned_at"],
    )
