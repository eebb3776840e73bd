"""Forgetting somebody: their text off the disk, and word of the weights that saw it.

What goes is what the user asked and was answered, all that was said of it, and what the user said
of other answers. What stays is a tombstone, the keyed hash of who was forgotten and when, so that
what still waits in a queue, in a spill or in another home is not let in again; and the lineage,
ids without text. Training that was interrupted goes altogether. Forgetting may be interrupted at
any moment: the same call again completes it.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from agentpref.errors import CorruptHome
from agentpref.home import Home, StrPath, sync
from agentpref.record.database import transaction
from agentpref.record.deletion.refused import purge
from agentpref.record.deletion.removal import (
    Removed,
    choose,
    chosen_judgements,
    delete,
    removal,
)
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.updates import Rebuild, Updates, rebuilds, taint
from agentpref.types import Progress


@dataclass(frozen=True, slots=True)
class Forgotten(Removed):
    """What came of forgetting somebody.

    ``revisions`` are those whose training saw something of what was removed now, oldest first; they
    are marked as tainted. ``rebuild`` is what to do in each namespace that a tainted revision
    serves, whether this call found it tainted or one before.
    """

    revisions: tuple[str, ...] = ()
    rebuild: tuple[Rebuild, ...] = ()

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that bring every namespace back to weights that never saw it."""
        return tuple(command for rebuild in self.rebuild for command in rebuild.commands)

    def to_mapping(self) -> dict[str, Any]:
        """All of it as plain values: what ``--json`` prints."""
        rebuild = [{**asdict(each), "commands": each.commands} for each in self.rebuild]
        return {**asdict(self), "rebuild": rebuild}


def forget(
    home: Home | StrPath | None, user_id: str, *, progress: Progress | None = None
) -> Forgotten:
    """Remove everything that a user said from a home, and mark the revisions that saw it.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        user_id: the user's id, as the host gave it to the log.
        progress: called with ``(stage, done, total)`` as work goes on.

    Returns:
        What was removed, and how to rebuild. All counts are 0 for a user that the home does not
        know; the disk is scrubbed all the same.

    Raises:
        NotAHome: there is no home in the folder.
        CorruptHome: the keys of its users' names are missing or spoilt.
        UpdateRunning: an update holds the home; it would publish what it has read already.
        NotKept: the database or the spill cannot be written, and then nothing is removed; or a
            reader or a full disk keeps the text of what is removed from being overwritten. The
            same call again completes it.
    """
    place = Home.open(home)
    tell: Progress = progress or (lambda stage, done, total: None)
    with removal(place, tell) as connection:
        _require_keys(place, connection)
        names = Pseudonyms.of(place).names(str(user_id))
        _drop_training(place)
        _purge_refused(place, connection, names)
        with transaction(connection):
            removed, revisions = _remove(connection, names)
        return Forgotten(
            **asdict(removed), revisions=revisions, rebuild=rebuilds(connection, place)
        )


def _require_keys(home: Home, connection: sqlite3.Connection) -> None:
    """A new key would find nobody, which must not look like somebody who was never here."""
    query = "SELECT 1 FROM run WHERE user_id IS NOT NULL LIMIT 1"
    if not home.user_keys.exists() and connection.execute(query).fetchone():
        raise CorruptHome(
            f"{home.user_keys} is missing: without it, no user of this home can be found; restore "
            "it from a backup"
        )


_THEIRS = "user_id IN (SELECT value FROM json_each(:names))"


def _remove(
    connection: sqlite3.Connection, names: Sequence[str]
) -> tuple[Removed, tuple[str, ...]]:
    """Do all that is in the database, as one transaction of the caller's."""
    now = time.time()
    choose(connection, _THEIRS, _THEIRS, {"names": _json(names)})
    updates, sources = Updates(connection), chosen_judgements(connection)
    revisions = tuple(updates.revisions_trained_on(sources))
    updates.forget_words(sources)
    taint(connection, revisions, now)
    connection.executemany(
        "INSERT INTO forgotten (user_id, at) VALUES (?, ?)"
        " ON CONFLICT (user_id) DO UPDATE SET at = max(at, excluded.at)",
        [(name, now) for name in names],
    )
    return delete(connection), revisions


def _drop_training(home: Home) -> None:
    """Remove what interrupted updates left, all of it and first: half-trained weights saw it too.

    What that costs is training again; nothing is kept that would have to be looked through.
    """
    if home.training.is_symlink():
        home.training.unlink()
    elif home.training.exists():
        shutil.rmtree(home.training)
        sync(home.path)


def _purge_refused(home: Home, connection: sqlite3.Connection, names: Sequence[str]) -> None:
    query = f"SELECT run_id FROM run WHERE {_THEIRS}"
    runs = {run for (run,) in connection.execute(query, {"names": _json(names)})}

    def is_gone(fields: Mapping[str, Any]) -> bool:
        about = {fields.get(name) for name in ("run_id", "run_a", "run_b")}
        return fields.get("user_id") in names or not runs.isdisjoint(about)

    purge(home, is_gone)


def _json(names: Sequence[str]) -> str:
    return orjson.dumps(names).decode()
