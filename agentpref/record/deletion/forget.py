"""Forgets a user, or one run: deletes the text from the disk, and marks revisions trained on it.

The user's questions, the answers and all judgements of them, and the user's judgements of other
answers are deleted. So are further answers to the user's questions that the home drew or revised
itself, and what was revised by the user's comments. Interrupted training is deleted completely,
with the candidate of an update that was killed and with revisions that are not in the database,
since such weights may have seen the text. The home keeps a tombstone, the keyed hash of the user
and the time, which refuses what still waits in a queue, in a spill or in another home, and a hash
of the id of each run, which refuses what others still say of it. The lineage stays as ids without
text. If forgetting is interrupted at any point, the same call again completes it.

A run can be forgotten alone, with all that was said of it. What is said of it later is refused, but
a merge with a home that still has the run brings it back.
"""

from __future__ import annotations

import math
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from agentpref.errors import UnknownRun, UnknownUser, shown_id
from agentpref.home import Home, StrPath, sync, writing
from agentpref.leftovers import clear_adapters
from agentpref.record.database import connect, transaction, translated
from agentpref.record.deletion.removal import (
    Removed,
    choose,
    chosen_judgements,
    chosen_runs,
    delete,
    purge_refused,
    rehearsal,
    removal,
    remove_derived,
)
from agentpref.record.ingest.checks import as_id, known_id
from agentpref.record.ingest.pseudonyms import UNNAMED
from agentpref.record.keys import complete
from agentpref.record.store import Store, bury_runs
from agentpref.record.sums import counted
from agentpref.record.updates import Rebuild, Updates, rebuilds, taint
from agentpref.types import REVISED_FROM, SAMPLED_FOR, Progress


@dataclass(frozen=True, slots=True)
class Forgotten(Removed):
    """What forgetting a user removed.

    ``revisions`` are those trained on something that this call removed, oldest first; they are now
    tainted. ``rebuild`` says what to do in each namespace that a tainted revision serves, including
    those that were tainted before.
    """

    revisions: tuple[str, ...] = ()
    rebuild: tuple[Rebuild, ...] = ()

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that bring every namespace back to weights that never saw the text."""
        return tuple(command for rebuild in self.rebuild for command in rebuild.commands)

    def to_mapping(self) -> dict[str, Any]:
        """Return all of it as plain values, as ``--json`` prints it."""
        rebuild = [{**asdict(each), "commands": each.commands} for each in self.rebuild]
        return {**asdict(self), "rebuild": rebuild}


def forget(
    home: Home | StrPath | None,
    user_id: str,
    *,
    missing_ok: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Forgotten:
    """Delete a user's texts from a home, and mark the revisions that were trained on them.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        user_id: the user's id, as the app gave it to the log.
        missing_ok: also forget a user who has said nothing here and was never forgotten: the
            tombstone refuses what still waits elsewhere. All counts are 0 then.
        dry_run: change nothing; say what would be removed. What waits in the spill is not counted.
        progress: called with ``(stage, done, total)`` during the work.

    Returns:
        What was removed, and how to rebuild.

    Raises:
        NotAHome: the folder is no home.
        ConfigError: the id is none that ``Log.record`` takes; the message says why.
        UnknownUser: nobody of this id is here, and ``missing_ok`` is false; nothing was removed.
        CorruptHome: the file of user keys is missing, damaged, or another home's.
        UpdateRunning: an update or a merge of this home is running; it would publish, or bring in,
            what it has read already.
        NotKept: the database or the spill cannot be written, and nothing was removed; or a reader
            or a full disk prevents overwriting the removed text. The same call again completes it.
    """
    place = Home.open(home)
    text = known_id(user_id)
    with _opened(place, dry_run, progress) as connection:
        names = complete(connection).names(text)  # without its keys, nobody is found
        if not missing_ok and not _has_user(connection, names):
            raise UnknownUser(
                f"nobody with the id {shown_id(user_id)} is in {place.path}, and nothing was "
                "removed; check that it is the id that your app logs"
            )
        said_until = dict.fromkeys(names, math.inf)
        tombstones = dict.fromkeys(names, time.time())
        return _forget(place, connection, said_until, tombstones, dry_run=dry_run)


def forget_run(
    home: Home | StrPath | None,
    run_id: str,
    *,
    missing_ok: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Forgotten:
    """Delete one run with all that was said of it, and mark the revisions that were trained on it.

    Raises and returns as :func:`forget` does. If the run is not in this home, nothing is removed.
    The disk is scrubbed all the same, which completes a call that was interrupted; then, without
    ``missing_ok``, it raises ``UnknownRun``.
    """
    place, removed, unknown = Home.open(home), Forgotten(), None
    with _opened(place, dry_run, progress) as connection:
        try:
            run_id = Store(connection).run(as_id(run_id) or str(run_id)).run_id
        except UnknownRun as error:
            unknown = error
        else:
            removed = _forget(place, connection, {}, {}, run_id=run_id, dry_run=dry_run)
    if unknown is not None and not missing_ok:
        raise unknown
    return removed


@contextmanager
def _opened(home: Home, dry_run: bool, progress: Progress | None) -> Iterator[sqlite3.Connection]:
    """A connection to remove with, or, for a dry run, one whose changes are taken back."""
    if not dry_run:
        with removal(home, progress) as connection:
            yield connection
        return
    with rehearsal(home) as connection:
        yield connection


def _has_user(connection: sqlite3.Connection, names: Sequence[str]) -> bool:
    """Whether a user has a row in this home, or was forgotten here."""
    tables = ("run", "feedback", "comparison", "forgotten")
    mine = f"user_id IN ({', '.join('?' * len(names))})"
    query = " UNION ALL ".join(f"SELECT 1 FROM {table} WHERE {mine}" for table in tables)
    found = connection.execute(f"SELECT EXISTS ({query})", [*names] * len(tables)).fetchone()
    return bool(found[0])


def forget_unnamed(
    home: Home | StrPath | None, *, dry_run: bool = False, progress: Progress | None = None
) -> Forgotten:
    """Forget everybody who was logged while the home's ``user.keys`` was lost.

    Their rows have one name for all, and cannot be told apart. Returns and raises as :func:`forget`
    does, and needs no keys.
    """
    place = Home.open(home)
    with _opened(place, dry_run, progress) as connection:
        said_until, tombstones = {UNNAMED: math.inf}, {UNNAMED: time.time()}
        return _forget(place, connection, said_until, tombstones, dry_run=dry_run)


def adopt(
    home: Home, tombstones: Mapping[str, float], progress: Progress | None = None
) -> Forgotten:
    """Forget users who were forgotten in another home: delete their texts up to that time.

    ``tombstones`` says for each user, by the hash under a key that the homes share, when they were
    forgotten (seconds since 1970). The caller has :func:`~removal.merging`. Raises like
    :func:`forget`.
    """
    with removal(home, progress, of_a_merge=True) as connection:
        done = _forget(home, connection, tombstones, {})
    # The tombstones come last: until they are there, the next merge does all of it again.
    with translated(home), closing(connect(home)) as connection, transaction(connection):
        _bury(connection, tombstones)
    return done


_SAID = "created_at <= (SELECT said_until FROM leaving WHERE name = user_id)"


def _forget(
    home: Home,
    connection: sqlite3.Connection,
    said_until: Mapping[str, float],
    tombstones: Mapping[str, float],
    *,
    run_id: str | None = None,
    dry_run: bool = False,
) -> Forgotten:
    """Delete the texts of each user up to a time, or a run; keep tombstones, in one transaction."""
    connection.execute("CREATE TEMP TABLE leaving (name TEXT PRIMARY KEY, said_until REAL)")
    connection.executemany("INSERT INTO leaving VALUES (?, ?)", said_until.items())
    if not dry_run:
        _remove_training(home)
    goes = f"({_SAID} OR run_id = :run_id)"
    choose(connection, goes, _SAID, {"run_id": run_id})  # again below, where nothing comes between
    runs = {*chosen_runs(connection), run_id}

    def is_gone(fields: Mapping[str, Any]) -> bool:
        if any(key in str(fields.get("metadata")) for key in (REVISED_FROM, SAMPLED_FOR)):
            return True  # whose words it is made of, nobody can tell
        about = {fields.get(name) for name in ("run_id", "run_a", "run_b")} - {None}
        until = said_until.get(fields.get("user_id") or "", -math.inf)
        return bool(fields["created_at"] <= until) or not runs.isdisjoint(about)

    if not dry_run:
        purge_refused(home, is_gone)
    with transaction(connection):
        if home.adapters.is_dir() and not dry_run:
            known = connection.execute("SELECT revision_id FROM revision")
            clear_adapters(home.adapters, {name for (name,) in known})
        choose(connection, goes, _SAID, {"run_id": run_id})
        gone = chosen_runs(connection)
        bury_runs(connection, gone)
        updates, sources = Updates(connection), [*chosen_judgements(connection), *gone]
        revisions = tuple(updates.revisions_trained_on(sources))
        updates.forget_words(sources)
        taint(connection, revisions, time.time())
        _bury(connection, tombstones)
        if not dry_run:
            remove_derived(connection, home)
        removed = delete(connection)
    return Forgotten(**asdict(removed), revisions=revisions, rebuild=rebuilds(connection, home))


def _remove_training(home: Home) -> None:
    """Remove interrupted training and its candidate: no search can tell whose text it has seen."""
    for place in (home.training, *home.candidates):
        with writing(place):
            if place.is_symlink():
                place.unlink()
            elif place.exists():
                shutil.rmtree(place)
    sync(home.path)


def _bury(connection: sqlite3.Connection, tombstones: Mapping[str, float]) -> None:
    """Keep tombstones; of two for the same user, keep the later one."""
    with counted(connection, "forgotten"):
        connection.executemany(
            "INSERT INTO forgotten (user_id, at) VALUES (?, ?)"
            " ON CONFLICT (user_id) DO UPDATE SET at = max(at, excluded.at)",
            tombstones.items(),
        )
