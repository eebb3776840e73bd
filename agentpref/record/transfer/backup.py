"""Copies a home that is in use: its database, adapters and user keys.

SQLite's own backup copies the database as it is at one moment, while writers go on. The copy is
built beside its place, as ``….unfinished-<id>``, and gets its name when all of it is on disk. A
crash leaves that folder, which may be deleted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import orjson

from agentpref.errors import ConfigError
from agentpref.home import (
    READABLE_FILE,
    READABLE_FOLDER,
    Home,
    StrPath,
    copy_file,
    enclosing_home,
    make_private_folder,
    open_private,
    reading,
    sync,
    writing,
)
from agentpref.record.database import connect, translated
from agentpref.record.keys import keys_problem
from agentpref.record.messages import new_id
from agentpref.record.spill import drain
from agentpref.types import Progress

_PAGES = 1_000
"""Pages copied between two reports of progress: 8 MB."""


@dataclass(frozen=True, slots=True)
class Backup:
    """The copy: its path, the bytes of its database, and how many revisions it has.

    ``missing`` are the revisions in the database whose folder the home does not have, ``damaged``
    those with a file that is not what was published. ``keys`` says what is wrong with the file of
    user keys: without it, no user can be forgotten in the copy either.
    """

    path: str
    bytes: int
    revisions: int
    missing: tuple[str, ...]
    damaged: tuple[str, ...] = ()
    keys: str | None = None


def backup(
    home: Home | StrPath | None, target: StrPath, *, progress: Progress | None = None
) -> Backup:
    """Copy a home, with all that was acknowledged before the call, to a new folder.

    >>> backup("./.agentpref", "./outbox/lyon")  # doctest: +SKIP
    Backup(path='/srv/outbox/lyon', bytes=311296, revisions=2, missing=())

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        target: a missing or empty folder; it becomes a home.
        progress: called with ``(stage, done, total)`` during the work.

    Raises:
        NotAHome: the folder is no home.
        ConfigError: the target is in use, no folder, or inside the home; nothing was written.
        CorruptHome: the home's database cannot be read.
        NotKept: the copy or the home's database cannot be written; no copy is left.
    """
    source = Home.open(home)
    place = Home.resolve(target)
    _require_free(place, source)
    tell: Progress = progress or (lambda stage, done, total: None)
    drain(source)
    draft = Home(place.with_name(f"{place.name}.unfinished-{new_id()}"))
    with writing(place), ExitStack() as at_end:
        at_end.callback(shutil.rmtree, draft.path, ignore_errors=True)  # nothing once it is renamed
        draft.path.mkdir(mode=0o700, parents=True)
        draft.path.chmod(source.path.stat().st_mode & 0o777)
        draft.adapters.mkdir()
        draft.adapters.chmod(READABLE_FOLDER)
        make_private_folder(draft.reports)
        with translated(source), closing(connect(source, readonly=True)) as connection:
            connection.execute("BEGIN")  # so the database below is copied as it is now
            query = (
                "SELECT revision_id, manifest FROM revision WHERE pruned_at IS NULL ORDER BY seq"
            )
            revisions = dict(connection.execute(query).fetchall())
            keys = keys_problem(connection)
            copy_database(connection, draft, tell)
        sync(draft.database)
        missing = _copy_adapters(source, draft, [*revisions], tell)
        copied = [name for name in revisions if name not in missing]
        damaged = tuple(n for n in copied if _is_damaged(draft.adapters / n, revisions[n]))
        for path in (source.user_keys, source.refused):
            if path.exists():
                copy_file(path, draft.path / path.name)
        _copy_judges(source, draft)
        size = draft.database.stat().st_size
        sync(draft.path)
        draft.path.rename(place)  # fails if something came there meanwhile
        sync(place.parent)
    return Backup(str(place), size, len(copied), missing, damaged, keys)


def copy_database(connection: sqlite3.Connection, copy: Home, tell: Progress) -> None:
    """Copy the state that the open transaction of a connection reads to the database of a home.

    Writers go on meanwhile. The file gets its name when it is complete.
    """
    part = copy.database.with_suffix(".part")
    os.close(open_private(part))
    with translated(copy), closing(sqlite3.connect(part)) as target:
        target.execute("PRAGMA synchronous = OFF")  # the caller syncs the file once
        connection.backup(
            target,
            pages=_PAGES,
            progress=lambda status, left, total: tell("pages", total - left, total),
        )
    part.rename(copy.database)


def _require_free(place: Path, source: Home) -> None:
    inside = enclosing_home(place)
    if inside is not None and inside == Path(os.path.realpath(place)):
        raise ConfigError(
            f"{place} holds a home already, such as an earlier backup; name a new folder"
        )
    if inside is not None:
        raise ConfigError(f"{place} is inside the home {inside}; choose a folder elsewhere")
    if place.is_dir():
        found = next(place.iterdir(), None)
        if found is not None:
            raise ConfigError(
                f"{place} holds {found.name!r}; choose a folder that is missing or empty"
            )
    elif place.exists() or place.is_symlink():
        raise ConfigError(f"{place} is no folder; choose one that is missing or empty")


def _copy_judges(source: Home, draft: Home) -> None:
    """Copy the rubrics of judges, which are people's files."""
    rubrics = sorted(source.judges.glob("*.md")) if source.judges.is_dir() else []
    if rubrics:
        make_private_folder(draft.judges)
    for file in rubrics:
        if file.is_file() and not file.is_symlink():
            copy_file(file, draft.judges / file.name)


def _is_damaged(folder: Path, manifest: str) -> bool:
    """Whether the copy of a revision has other files than its manifest names."""
    try:
        published = {**orjson.loads(manifest)["files"]}
    except (KeyError, TypeError, ValueError):
        return True
    found = {}
    for file in folder.iterdir():
        with reading(file) as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        found[file.name] = digest.hexdigest()
    return not published.items() <= found.items()


def _copy_adapters(
    source: Home, draft: Home, revisions: list[str], tell: Progress
) -> tuple[str, ...]:
    """Copy the folders of revisions, which never change; return the revisions without a folder.

    Only real folders directly in ``adapters`` count: a name from a database may be a path.
    """
    folders = os.scandir(source.adapters) if source.adapters.is_dir() else ()
    there = {entry.name for entry in folders if entry.is_dir(follow_symlinks=False)}
    present = [name for name in revisions if name in there]
    for done, name in enumerate(present):
        tell("adapters", done, len(present))
        (draft.adapters / name).mkdir()
        (draft.adapters / name).chmod(READABLE_FOLDER)
        for file in (source.adapters / name).iterdir():
            if file.is_file() and not file.is_symlink():
                copy_file(file, draft.adapters / name / file.name, READABLE_FILE)
        sync(draft.adapters / name)
    tell("adapters", len(present), len(present))
    sync(draft.adapters)
    return tuple(name for name in revisions if name not in there)
