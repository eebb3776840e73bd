"""Which revisions saw what was forgotten, and how to come back to one that did not.

A revision is tainted for good: its weights cannot unlearn. Its line leads back to one that is
clean, at worst to the bare base model, and from there an update learns all that is still on record,
since pairs that the clean line has not learned are new to it. What is in quarantine or pruned is no
way back either. Reads and writes ``revision`` and ``serving``; knows nothing of adapters' files.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from agentpref.home import Home
from agentpref.types import BASE


@dataclass(frozen=True, slots=True)
class Rebuild:
    """What serves a namespace and should not, and what to go back to.

    ``tainted`` names the live revision, the canary or both; ``clean`` is the last revision of the
    live one's line that is clean and may serve (that one itself where it is), or ``"base"``;
    ``model`` is the base model as the update was told it.
    """

    home: str
    namespace: str
    tainted: tuple[str, ...]
    clean: str
    model: str

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that rebuild: serve the clean one now, then learn again from it."""
        where = f"--home {shlex.quote(self.home)} --namespace {shlex.quote(self.namespace)}"
        return (
            f"agentpref adapters promote {self.clean} {where}",
            f"agentpref update --model {shlex.quote(self.model)} {where}",
        )


class _Known(NamedTuple):
    parent: str | None
    is_tainted: bool
    is_fit: bool
    model: str


def taint(connection: sqlite3.Connection, revisions: Iterable[str], at: float) -> None:
    """Mark revisions as tainted since a time; one that is already keeps the time it has."""
    connection.executemany(
        "UPDATE revision SET tainted_at = coalesce(tainted_at, ?) WHERE revision_id = ?",
        [(at, revision) for revision in revisions],
    )


def last_clean(connection: sqlite3.Connection, revision: str) -> str:
    """Name the nearest ancestor of a revision, or itself, that is clean and may serve.

    That is ``"base"`` where there is no other.
    """
    return _last_clean(_known(connection), revision)


def rebuilds(connection: sqlite3.Connection, home: Home) -> tuple[Rebuild, ...]:
    """Say how to rebuild each namespace in which a tainted revision serves."""
    known = _known(connection)
    found = []
    query = "SELECT namespace, live, canary FROM serving ORDER BY namespace"
    for namespace, *serving in connection.execute(query):
        tainted = tuple(name for name in serving if name in known and known[name].is_tainted)
        if tainted:
            clean = _last_clean(known, serving[0])
            found.append(
                Rebuild(str(home.path), namespace, tainted, clean, known[tainted[0]].model)
            )
    return tuple(found)


def _last_clean(known: Mapping[str, _Known], revision: str | None) -> str:
    while revision is not None and not known[revision].is_fit:
        revision = known[revision].parent
    return revision or BASE


def _known(connection: sqlite3.Connection) -> dict[str, _Known]:
    query = (
        "SELECT revision_id, parent, tainted_at IS NOT NULL,"
        " coalesce(tainted_at, quarantined_at, pruned_at) IS NULL,"
        " coalesce(json_extract(manifest, '$.base.name'), 'MODEL') FROM revision"
    )
    return {
        name: _Known(parent, bool(is_tainted), bool(is_fit), model)
        for name, parent, is_tainted, is_fit, model in connection.execute(query)
    }
