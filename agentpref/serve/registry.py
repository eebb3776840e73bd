"""The registry: which revisions exist, and which of them serves.

A revision is a folder that is never changed and a row that names it; the row is the truth. Publish
makes the folder whole and durable first and the row last, so that a crash leaves a folder that
nothing names, which the next publish removes. What is live is one row per namespace, changed only
by compare-and-swap on its generation, and each change is appended to a history. Knows nothing of
engines and requests. Every call opens its own connection: threads and processes may share a home.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from agentpref.errors import GenerationConflict, InvalidAdapter, RevisionError, UnknownRevision
from agentpref.record.database import connect, transaction, translated
from agentpref.record.home import Home, sync
from agentpref.record.lineage import last_clean
from agentpref.serve import folders
from agentpref.serve import manifest as manifests
from agentpref.serve.backend import Revision
from agentpref.serve.validate import check_adapter, check_published
from agentpref.types import BASE

_NOTHING: Mapping[str, Any] = {}

# Inside the class, `list` is a method.
Revisions: TypeAlias = list[Revision]


class ServingState(NamedTuple):
    """What a namespace serves. ``live`` is ``None`` for the bare base model."""

    namespace: str
    live: str | None
    canary: str | None
    weight: float
    generation: int


class HistoryEntry(NamedTuple):
    """One change of what is served: ``action`` is ``promote``, ``canary`` or ``rollback``."""

    at: float
    generation: int
    action: str
    live: str | None
    canary: str | None
    weight: float


History: TypeAlias = list[HistoryEntry]


class Registry:
    """The revisions of one namespace of a home, and which of them is live.

    Args:
        home: a home, its folder, or ``None`` for ``AGENTPREF_HOME`` or ``./.agentpref``.
        namespace: whose revisions; each namespace has its own live revision.

    Raises:
        NotAHome: there is no home in the folder.
    """

    def __init__(
        self, home: Home | str | Path | None = None, *, namespace: str = "default"
    ) -> None:
        """Take an existing home; nothing is created."""
        self.home = home if isinstance(home, Home) else Home.open(home)
        self.namespace = namespace

    def __repr__(self) -> str:
        """The call that makes an equal registry."""
        return f"Registry({str(self.home.path)!r}, namespace={self.namespace!r})"

    def live(self) -> Revision | None:
        """The revision that serves, or ``None`` while the bare base model does."""
        name = self.state().live
        return None if name is None else self.get(name)

    def list(self) -> Revisions:
        """All published revisions of the namespace, oldest first."""
        query = "SELECT * FROM revision WHERE namespace = ? ORDER BY seq"
        with self._reading() as connection:
            return [self._revision(row) for row in connection.execute(query, (self.namespace,))]

    def get(self, revision_id: str) -> Revision:
        """Look a revision up by its id.

        Raises:
            UnknownRevision: this namespace has none of that id.
        """
        with self._reading() as connection:
            return self._find(connection, revision_id)

    def state(self) -> ServingState:
        """What is live and canary now, and the generation to compare with."""
        with self._reading() as connection:
            return _state(connection, self.namespace)

    def history(self) -> History:
        """Every change of what is served, oldest first."""
        with self._reading() as connection:
            return _history(connection, self.namespace)

    def previous(self) -> str | None:
        """What a rollback would make live: a revision's id, or ``None`` for the bare base model.

        Raises:
            RevisionError: nothing was ever promoted, or everything was rolled back.
        """
        with self._reading() as connection:
            return _previous(connection, self.namespace)

    def require_untainted(self, revision: Revision) -> None:
        """Refuse a revision that saw what was forgotten since: it neither serves nor learns on.

        Raises:
            RevisionError: it is tainted; the cure names the last clean one of its line.
        """
        with self._reading() as connection:
            _require_clean(connection, revision.revision_id)

    def publish(
        self,
        folder: str | Path,
        *,
        parent: str | None,
        base: Mapping[str, Any],
        training: Mapping[str, Any],
        watermark: Mapping[str, Any] = _NOTHING,
    ) -> Revision:
        """Copy a trained adapter into the home as a new revision. It does not serve yet.

        Args:
            folder: where peft saved the adapter; it is left as it is.
            parent: the revision that training started from, ``None`` for the bare base model.
            base: ``name``, ``digest`` and ``template_digest`` of the base model.
            training: settings and figures of the update, as plain values.
            watermark: how far into the log the training data reached.

        Raises:
            InvalidAdapter: for an adapter that no engine should see; nothing is published.
            UnknownRevision: the parent does not exist.
        """
        if parent is not None:
            self.get(parent)
        temporary = folders.copy(Path(folder), self.home.adapters)
        try:
            check_adapter(temporary)
            manifest = manifests.describe(
                files=manifests.digest_adapter(temporary),
                namespace=self.namespace,
                parent=parent,
                base=base,
                training=training,
                watermark=watermark,
            )
            folders.write(temporary / manifests.MANIFEST_FILE, manifests.encode(manifest))
            sync(temporary)
            return self._name(temporary, manifest)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def promote(self, revision_id: str, *, expected_generation: int | None = None) -> ServingState:
        """Make a revision live. It ends a canary, whichever revision that was.

        Args:
            revision_id: the revision to serve from now on; ``"base"`` for the bare base model.
            expected_generation: refuse if the state has changed since it had this generation.

        Raises:
            UnknownRevision: this namespace has none of that id.
            InvalidAdapter: its files are not those that were published.
            RevisionError: it is tainted: it saw what a user has had forgotten.
            GenerationConflict: somebody changed what is served in between.
        """
        if revision_id != BASE:
            check_published(self.get(revision_id))
        live = None if revision_id == BASE else revision_id
        with self._changing(expected_generation) as (connection, state):
            _require_clean(connection, revision_id)
            new = state._replace(live=live, canary=None, weight=0.0)
            return _change(connection, new, "promote")

    def canary(
        self,
        revision_id: str | None,
        weight: float,
        *,
        expected_generation: int | None = None,
    ) -> ServingState:
        """Let a revision serve a share of the threads, or end that with ``canary(None, 0)``.

        Args:
            revision_id: the revision to try, or ``None``.
            weight: share of the threads, above 0 and at most 1.
            expected_generation: as for :meth:`promote`.

        Raises:
            RevisionError: the weight is out of range, or the revision is tainted.
            UnknownRevision: this namespace has none of that id.
            InvalidAdapter: its files are not those that were published.
            GenerationConflict: somebody changed what is served in between.
        """
        if not (0 < weight <= 1 if revision_id is not None else weight == 0):
            raise RevisionError(
                f"canary weight {weight!r} of {revision_id} is out of range; give a share above 0 "
                f"and at most 1, or end the canary with canary(None, 0)"
            )
        if revision_id is not None:
            check_published(self.get(revision_id))
        with self._changing(expected_generation) as (connection, state):
            if revision_id is not None:
                _require_clean(connection, revision_id)
            new = state._replace(canary=revision_id, weight=float(weight))
            return _change(connection, new, "canary")

    def rollback(self, *, expected_generation: int | None = None) -> ServingState:
        """Undo the last promotion that still stands: the revision before it serves again.

        Rolling back twice goes back two promotions; from the first it goes to the bare base model.
        Tainted revisions are passed over: what must not serve is no way out of trouble. A canary
        ends.

        Raises:
            RevisionError: no promotion is left to undo.
            GenerationConflict: somebody changed what is served in between.
        """
        with self._changing(expected_generation) as (connection, state):
            live = _previous(connection, self.namespace)
            return _change(
                connection, state._replace(live=live, canary=None, weight=0.0), "rollback"
            )

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with translated(self.home), closing(connect(self.home)) as connection:
            connection.row_factory = sqlite3.Row
            yield connection

    @contextmanager
    def _changing(self, expected: int | None) -> Iterator[tuple[sqlite3.Connection, ServingState]]:
        with self._reading() as connection, transaction(connection):
            state = _state(connection, self.namespace)
            if expected is not None and state.generation != expected:
                raise GenerationConflict(
                    f"{self.namespace!r} is at generation {state.generation}, not {expected}: "
                    f"{state.live or 'the base model'} was made live by somebody else; look at "
                    f"history() and try again"
                )
            yield connection, state

    def _find(self, connection: sqlite3.Connection, revision_id: str) -> Revision:
        query = "SELECT * FROM revision WHERE revision_id = ? AND namespace = ?"
        row = connection.execute(query, (revision_id, self.namespace)).fetchone()
        if row is None:
            raise UnknownRevision(
                f"namespace {self.namespace!r} has no revision {revision_id!r}; "
                f"list() names those it has"
            )
        return self._revision(row)

    def _revision(self, row: sqlite3.Row) -> Revision:
        name = row["revision_id"]
        if not manifests.is_revision_id(name):
            raise InvalidAdapter(f"{name!r} in {self.home.database} is no revision's name")
        return Revision(
            revision_id=name,
            namespace=row["namespace"],
            parent=row["parent"],
            created_at=row["created_at"],
            path=self.home.adapters / name,
            manifest=manifests.decode(row["manifest"]),
            tainted_at=row["tainted_at"],
        )

    def _name(self, temporary: Path, manifest: dict[str, Any]) -> Revision:
        """Number the folder, move it to its place and write its row, as one transaction.

        The write lock is what makes the cleaning safe: whoever holds it knows that no other
        publisher stands between its rename and its row.
        """
        with self._reading() as connection, transaction(connection):
            known = {name for (name,) in connection.execute("SELECT revision_id FROM revision")}
            folders.clean(self.home.adapters, known)
            (seq,) = connection.execute("SELECT COALESCE(MAX(seq), 0) + 1 FROM revision").fetchone()
            name = manifests.revision_id(seq, manifest["files"])
            temporary.rename(self.home.adapters / name)
            sync(self.home.adapters)
            connection.execute(
                "INSERT INTO revision (revision_id, namespace, seq, parent, created_at, manifest,"
                " tainted_at) VALUES (?, ?, ?, ?, ?, ?,"
                " (SELECT tainted_at FROM revision WHERE revision_id = ?))",
                (
                    name,
                    self.namespace,
                    seq,
                    manifest["parent"],
                    time.time(),
                    manifests.encode(manifest).decode(),
                    manifest["parent"],
                ),
            )
            return self._find(connection, name)


def namespaces_with_revisions(home: Home) -> list[str]:
    """Name the namespaces that have a revision, in alphabetical order, whether or not they log."""
    query = "SELECT DISTINCT namespace FROM revision ORDER BY namespace"
    with translated(home), closing(connect(home, readonly=True)) as connection:
        return [name for (name,) in connection.execute(query)]


def _state(connection: sqlite3.Connection, namespace: str) -> ServingState:
    query = "SELECT namespace, live, canary, weight, generation FROM serving WHERE namespace = ?"
    row = connection.execute(query, (namespace,)).fetchone()
    return ServingState(namespace, None, None, 0.0, 0) if row is None else ServingState(*row)


def _history(connection: sqlite3.Connection, namespace: str) -> list[HistoryEntry]:
    query = (
        "SELECT at, generation, action, live, canary, weight FROM serving_history"
        " WHERE namespace = ? ORDER BY id"
    )
    return [HistoryEntry(*row) for row in connection.execute(query, (namespace,))]


def _previous(connection: sqlite3.Connection, namespace: str) -> str | None:
    """Find the last promotion to a clean revision that stands below the one that serves."""
    served = _served(_history(connection, namespace))
    if len(served) == 1:
        raise RevisionError(
            f"nothing to roll back in {namespace!r}: the base model is live; "
            f"promote(revision) makes one live, canary(None, 0) ends a canary"
        )
    tainted = {
        name
        for (name,) in connection.execute(
            "SELECT revision_id FROM revision WHERE tainted_at IS NOT NULL"
        )
    }
    return next(name for name in reversed(served[:-1]) if name not in tainted)


def _served(history: list[HistoryEntry]) -> list[str | None]:
    """Replay the history as a stack: promotions push, a rollback pops down to where it went."""
    served: list[str | None] = [None]
    for entry in history:
        if entry.action == "rollback":
            served.pop()
            while served[-1] != entry.live:
                served.pop()
        elif entry.action == "promote" and entry.live != served[-1]:
            served.append(entry.live)
    return served


def _require_clean(connection: sqlite3.Connection, revision_id: str) -> None:
    query = "SELECT 1 FROM revision WHERE revision_id = ? AND tainted_at IS NOT NULL"
    if connection.execute(query, (revision_id,)).fetchone():
        clean = last_clean(connection, revision_id)
        raise RevisionError(
            f"{revision_id} is tainted: its training saw what a user has had forgotten; go back "
            f"to {clean}, the last clean one of its line, with `agentpref adapters promote {clean}`"
            ", then learn again with `agentpref update`"
        )


def _change(connection: sqlite3.Connection, new: ServingState, action: str) -> ServingState:
    new = new._replace(generation=new.generation + 1)
    connection.execute(
        "INSERT OR REPLACE INTO serving (namespace, live, canary, weight, generation)"
        " VALUES (?, ?, ?, ?, ?)",
        new,
    )
    connection.execute(
        "INSERT INTO serving_history (namespace, at, generation, action, live, canary, weight)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (new.namespace, time.time(), new.generation, action, new.live, new.canary, new.weight),
    )
    return new
