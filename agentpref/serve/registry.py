"""The registry: which revisions exist, and which of them serves.

A revision is a folder that never changes and a row in the database; the row is the truth.
Publishing makes the folder complete and durable first and writes the row last, together with what
else belongs to it (an update's ledger, its promotion), so a crash leaves a folder without a row,
which the next publishing removes. What is live is one row per namespace, changed only by
compare-and-swap on its generation, and each change is added to a history. Every call opens its own
connection: threads and processes may share a home.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentpref.config import WatchSettings
from agentpref.errors import InvalidAdapter, RevisionError, UnknownRevision
from agentpref.home import Home, StrPath
from agentpref.record.database import connect, transaction, translated
from agentpref.serve import decisions, folders, pruning, publishing, regression, status
from agentpref.serve.backend import Revision
from agentpref.serve.decisions import Hold as Hold
from agentpref.serve.publishing import Publication, revision_of
from agentpref.serve.quarantine import intact_previous
from agentpref.serve.regression import Finding as Finding
from agentpref.serve.status import HistoryEntry as HistoryEntry
from agentpref.serve.status import ServingState as ServingState
from agentpref.serve.validate import check_published, check_revision
from agentpref.types import BASE


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
        self.home = Home.open(home)
        self.namespace = namespace

    def __repr__(self) -> str:
        return f"Registry({str(self.home.path)!r}, namespace={self.namespace!r})"

    def live(self) -> Revision | None:
        """The revision that serves, or ``None`` while the bare base model does."""
        name = self.state().live
        return None if name is None else self.get(name)

    def list(self) -> Sequence[Revision]:
        """All published revisions of the namespace, oldest first."""
        query = "SELECT * FROM revision WHERE namespace = ? ORDER BY seq"
        with self._connected(readonly=True) as connection:
            rows = connection.execute(query, (self.namespace,))
            return [revision_of(row, self.home) for row in rows]

    def get(self, revision_id: str) -> Revision:
        """Look up a revision by its id.

        Raises:
            UnknownRevision: this namespace has none of that id.
        """
        with self._connected(readonly=True) as connection:
            return self._find(connection, revision_id)

    def state(self) -> ServingState:
        """What is live and canary now, and the generation to compare with."""
        with self._connected(readonly=True) as connection:
            return status.read_state(connection, self.namespace)

    def history(self) -> Sequence[HistoryEntry]:
        """Every change of what is served, oldest first."""
        with self._connected(readonly=True) as connection:
            return status.read_history(connection, self.namespace)

    def service(self, revision_id: str | None) -> status.Service:
        """When a revision was live last, and whether it serves now."""
        return status.service_of(self.history(), revision_id)

    def previous(self) -> str | None:
        """What a rollback would make live: a revision's id, or ``None`` for the bare base model.

        Raises:
            RevisionError: nothing was promoted, or everything was rolled back.
        """
        with self._connected(readonly=True) as connection:
            return status.previous(connection, self.namespace)

    def require_fit(
        self, revision: Revision, *, untainted: bool = True, released: bool = True
    ) -> None:
        """Refuse a revision that was pruned, is tainted, or is in quarantine.

        A router asks after it has pinned the revision: from then on, nobody prunes it.

        Args:
            untainted: refuse it if it was trained on what was forgotten since.
            released: refuse it if it is in quarantine.

        Raises:
            RevisionError: the message says why, and names the cure.
        """
        with self._connected(readonly=True) as connection:
            status.require_fit(connection, revision.revision_id, untainted, released)

    def quarantine(self, revision_id: str, reason: str) -> Revision:
        """Keep a revision from being made live until it is released.

        A revision that serves goes on serving: roll back, or promote another. A revision that is in
        quarantine already keeps its time and reason.

        Raises:
            UnknownRevision: this namespace has none of that id.
            RevisionError: the reason is empty.
        """
        if not reason.strip():
            message = f"the quarantine of {revision_id} has no reason; say what is wrong with it"
            raise RevisionError(message)
        with self._connected() as connection, transaction(connection):
            self._find(connection, revision_id)
            status.quarantine(connection, revision_id, time.time(), reason)
            return self._find(connection, revision_id)

    def release(self, revision_id: str) -> Revision:
        """End a revision's quarantine, once its files have passed every check again.

        Raises:
            UnknownRevision: this namespace has none of that id.
            InvalidAdapter: its files are still broken; it stays in quarantine.
            RevisionError: it was pruned.
        """
        revision = self.get(revision_id)
        if revision.pruned_at is None:
            check_revision(revision)
        with self._connected() as connection, transaction(connection):
            status.require_fit(connection, revision_id, untainted=False, released=False)
            status.quarantine(connection, revision_id, None, None)
            return self._find(connection, revision_id)

    def held(self) -> Hold | None:
        """Since when and why nothing is promoted; ``None`` if nobody holds the namespace."""
        with self._connected(readonly=True) as connection:
            return decisions.read_hold(connection, self.namespace)

    def hold(self, reason: str = "", *, expected_generation: int | None = None) -> ServingState:
        """Promote nothing, and begin no canary, until :meth:`lift`.

        Updates go on training and publishing. A rollback works, and so does the end of a canary. A
        namespace that is held already keeps its time and reason.

        Raises:
            GenerationConflict: another process changed what is served in between.
        """
        with self._changing(BASE, expected_generation) as (connection, state):
            return decisions.hold(connection, state, reason)

    def lift(self, *, expected_generation: int | None = None) -> ServingState:
        """End a hold; does nothing if there is none.

        Raises:
            GenerationConflict: another process changed what is served in between.
        """
        with self._changing(BASE, expected_generation) as (connection, state):
            return decisions.lift(connection, state)

    def publish(
        self,
        folder: str | Path,
        *,
        parent: str | None,
        model: Mapping[str, Any],
        training: Mapping[str, Any],
        watermark: Mapping[str, Any] | None = None,
    ) -> Revision:
        """Copy a trained adapter into the home as a new revision. It does not serve yet.

        Args:
            folder: where peft saved the adapter; it stays as it is.
            parent: the revision that training started from, ``None`` for the bare base model.
            model: ``name``, ``digest`` and ``template_digest`` of the base model.
            training: settings and figures of the update, as plain values.
            watermark: how far into the log the training data reached.

        Raises:
            InvalidAdapter: the adapter is broken or unsupported; nothing is published.
            NotKept: the home cannot be written.
            UnknownRevision: the parent does not exist.
        """
        with self.publishing(
            folder, parent=parent, model=model, training=training, watermark=watermark
        ) as publication:
            return publication.revision

    @contextmanager
    def publishing(
        self,
        folder: str | Path,
        *,
        parent: str | None,
        model: Mapping[str, Any],
        training: Mapping[str, Any],
        watermark: Mapping[str, Any] | None = None,
        instructions: str = "",
    ) -> Iterator[Publication]:
        """Publish as :meth:`publish` does, in one transaction with what the block writes.

        ``instructions`` are what the model is told before each conversation.

        The folder is complete and durable before the block. If the block raises, or the process
        dies in it, nothing was published.
        """
        if parent is not None:
            self.get(parent)
        own = {"namespace": self.namespace, "parent": parent, "base": dict(model)}
        own |= {"training": dict(training), "watermark": dict(watermark or {})}
        own |= {"instructions": instructions} if instructions else {}
        with publishing.published(self.home, Path(folder), own) as publication:
            yield publication

    def promote(
        self, revision_id: str, *, expected_generation: int | None = None, reason: str = ""
    ) -> ServingState:
        """Make a revision live. This ends a canary, whichever revision that was.

        Args:
            revision_id: the revision to serve from now on; ``"base"`` for the bare base model.
            expected_generation: refuse if the state has changed since it had this generation.
            reason: why, for the history.

        Raises:
            UnknownRevision: this namespace has none of that id.
            InvalidAdapter: its files are not those that were published.
            RevisionError: it is tainted, in quarantine, or pruned, or the namespace is held.
            GenerationConflict: another process changed what is served in between.
        """
        live = None if revision_id == BASE else revision_id
        with self._changing(revision_id, expected_generation) as (connection, state):
            decisions.require_not_held(connection, self.namespace)
            new = state._replace(live=live, canary=None, weight=0.0)
            return status.change(connection, new, "promote", reason)

    def canary(
        self, revision_id: str | None, weight: float, *, expected_generation: int | None = None
    ) -> ServingState:
        """Let a revision serve a share of the threads, or end that with ``canary(None, 0)``.

        Args:
            revision_id: the revision to try, or ``None``.
            weight: share of the threads, above 0 and at most 1.
            expected_generation: as for :meth:`promote`.

        Raises:
            RevisionError: the weight is out of range, the revision must not serve, or the
                namespace is held.
            UnknownRevision: this namespace has none of that id.
            InvalidAdapter: its files are not those that were published.
            GenerationConflict: another process changed what is served in between.
        """
        if revision_id == BASE:
            raise RevisionError(
                "the bare base model is no revision, so it cannot be a canary; promote 'base' to "
                "let it serve"
            )
        status.require_share(revision_id, weight)
        with self._changing(revision_id or BASE, expected_generation) as (connection, state):
            if revision_id is not None:
                decisions.require_not_held(connection, self.namespace)
            new = state._replace(canary=revision_id, weight=float(weight))
            return status.change(connection, new, "canary")

    def rollback(self, *, expected_generation: int | None = None) -> ServingState:
        """Undo the last promotion that still stands: the revision before it serves again.

        Rolling back twice goes back two promotions; from the first it goes to the bare base model.
        Revisions that are tainted, in quarantine or pruned are passed over, and so is one whose
        files are damaged: it is put into quarantine, and a warning says so. A canary ends.

        Raises:
            RevisionError: no promotion is left to undo.
            GenerationConflict: another process changed what is served in between.
        """
        while True:
            done = self.roll_back_to(intact_previous(self), expected_generation=expected_generation)
            if done is not None:
                return done

    def roll_back_to(
        self, live: str | None, *, expected_generation: int | None = None
    ) -> ServingState | None:
        """Undo the last promotion if ``live``, checked before, is still what serves again then.

        Else return ``None``: meanwhile it was put into quarantine, say, and another would serve.
        """
        with self._connected() as connection, transaction(connection):
            state = status.read_state(connection, self.namespace, expected_generation)
            if status.previous(connection, self.namespace) != live:
                return None
            new = state._replace(live=live, canary=None, weight=0.0)
            return status.change(connection, new, "rollback")

    def check_thumbs(self, *, act: bool = True) -> Sequence[Finding]:
        """Compare people's thumbs on the live revision and the canary with those before and beside.

        What is proven worse is taken out of service and put into quarantine, and a canary that is
        proven better is promoted, as far as :meth:`watch` allows it and nobody holds the namespace.
        Call it as often as you like: looking costs no certainty.

        Args:
            act: ``False`` changes nothing, and only says what is proven.
        """
        return regression.check(self, act=act)

    def watch(self, **changes: Any) -> WatchSettings:
        """Keep what :meth:`check_thumbs` may do in this namespace, and return all of it.

        Args:
            changes: fields of :class:`~agentpref.config.WatchSettings`; the others stay.

        Raises:
            ConfigError: a setting does not exist, or its value is not allowed.
        """
        with self._changing(BASE, None) as (connection, state):
            settings = replace(decisions.read_watch(connection, self.namespace), **changes)
            decisions.set_watch(connection, state, settings)
            return settings

    def prune(
        self,
        keep: int = pruning.KEEP,
        *,
        ask: pruning.Ask = pruning.no_answer,
        dry_run: bool = False,
    ) -> pruning.Pruned:
        """Remove the folders of revisions that nothing needs; their rows stay.

        These stay: the live one and the canary, what a rollback would make live, the last clean one
        of the live line, the newest, and what a process uses or an engine may have loaded.

        Args:
            keep: how many of the newest stay, 1 or more.
            ask: is called with an engine's place (a URL) and a revision's id, and returns whether
                the engine has it loaded, or ``None`` if it does not say. The revision is removed
                only if it returns ``False``.
            dry_run: remove nothing, and say what would be removed.

        Raises:
            ConfigError: ``keep`` is below 1.
            NotKept: a folder cannot be removed.
        """
        with self._connected() as connection:
            return pruning.Pruning(self.home, connection, self.namespace, keep, ask).run(dry_run)

    def export(self, revision_id: str, folder: StrPath) -> Path:
        """Copy a revision to a folder of its own, which plain peft and plain vLLM load.

        Args:
            folder: a folder that is missing or empty, outside of the home.

        Raises:
            UnknownRevision: this namespace has none of that id.
            RevisionError: it is tainted, or was pruned.
            InvalidAdapter: its files are not those that were published.
            ConfigError: the folder is in the home, a file, or not empty.
            NotKept: the folder cannot be written.
        """
        revision = self.get(revision_id)
        self.require_fit(revision, released=False)
        return folders.export(check_published(revision), revision.manifest, folder)

    @contextmanager
    def _connected(self, *, readonly: bool = False) -> Iterator[sqlite3.Connection]:
        with translated(self.home), closing(connect(self.home, readonly=readonly)) as connection:
            connection.row_factory = sqlite3.Row
            yield connection

    @contextmanager
    def _changing(
        self, revision_id: str, expected_generation: int | None
    ) -> Iterator[tuple[sqlite3.Connection, ServingState]]:
        """Change what serves in one transaction, for a revision that may serve and is intact."""
        if revision_id != BASE:
            revision = self.get(revision_id)
            self.require_fit(revision)
            try:
                check_published(revision)
            except InvalidAdapter:
                self.require_fit(revision)  # it may have been pruned just now
                raise
        with self._connected() as connection, transaction(connection):
            state = status.read_state(connection, self.namespace, expected_generation)
            status.require_fit(connection, revision_id)
            yield connection, state

    def _find(self, connection: sqlite3.Connection, revision_id: str) -> Revision:
        query = "SELECT * FROM revision WHERE revision_id = ? AND namespace = ?"
        row = connection.execute(query, (revision_id, self.namespace)).fetchone()
        if row is None:
            raise UnknownRevision(
                f"namespace {self.namespace!r} has no revision {revision_id!r}; "
                "see `agentpref adapters list`"
            )
        return revision_of(row, self.home)
