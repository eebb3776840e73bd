"""A whole copy of a home that is in use: database, adapters, keys.

The database is copied as it was at one moment, through SQLite's own backup; writers go on
meanwhile. The copy is built beside its place, as ``….unfinished-<id>``, and gets its name when all
of it is on disk. What a crash leaves is that folder, which may be deleted. Knows nothing of what is
in the tables but which adapters they name.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentpref.errors import AgentprefError, ConfigError, NotKept
from agentpref.home import Home, StrPath, sync
from agentpref.record.database import connect, translated
from agentpref.record.messages import new_id
from agentpref.record.spill import drain
from agentpref.types import Progress

_UNFINISHED = ".unfinished-"
_PAGES = 1_000
"""Pages copied between two reports of progress: 8 MB."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What was copied, and where to. ``missing`` are revisions whose folder the home has not."""

    path: str
    bytes: int
    revisions: int
    missing: tuple[str, ...]


def backup(
    home: Home | StrPath | None, target: StrPath, *, progress: Progress | None = None
) -> Backup:
    """Copy a home, with all that was acknowledged before the call, to a new folder.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        target: a folder that is missing or empty; it becomes a home.
        progress: called with ``(stage, done, total)`` as work goes on.

    Raises:
        NotAHome: there is no home in the folder.
        ConfigError: the target is no place for a copy; nothing was written.
        CorruptHome: the home's database cannot be read.
        NotKept: the copy cannot be written, or what waits in the home's spill cannot be read into
            its database; there is no copy then.
    """
    source = Home.open(home)
    place = Home.resolve(target)
    _require_free(place, source)
    drain(source)
    with _written(place), _draft(place) as draft:
        revisions = _copy_database(source, draft, progress or _tell_nobody)
        missing = _copy_adapters(source, draft, revisions, progress or _tell_nobody)
        for path in (source.user_keys, source.refused):
            if path.exists():
                _copy_file(path, draft.path / path.name)
        size = draft.database.stat().st_size
        draft.path.chmod(_mode(source.path))
        _give_name(draft, place)
    return Backup(str(place), size, len(revisions) - len(missing), missing)


def _require_free(place: Path, source: Home) -> None:
    if place.is_relative_to(source.path):
        raise ConfigError(f"{place} is inside the home itself; choose a folder elsewhere")
    if place.is_dir():
        found = next(place.iterdir(), None)
        if found is not None:
            raise ConfigError(
                f"{place} holds {found.name!r}; choose a folder that is missing or empty"
            )
    elif place.exists() or place.is_symlink():
        raise ConfigError(f"{place} is no folder; choose one that is missing or empty")


@contextmanager
def _written(place: Path) -> Iterator[None]:
    try:
        yield
    except AgentprefError:
        raise  # some of ours are OSErrors too
    except OSError as error:
        raise NotKept(
            f"{place} cannot be written ({error.strerror or error}); free space on its disk, and "
            "let this user write the folder"
        ) from error


@contextmanager
def _draft(place: Path) -> Iterator[Home]:
    """Make a folder of this user's alone beside ``place``, and remove it unless it was renamed."""
    draft = Home(place.with_name(f"{place.name}{_UNFINISHED}{new_id()}"))
    draft.path.mkdir(mode=0o700, parents=True)
    draft.adapters.mkdir()
    draft.reports.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)


def _copy_database(source: Home, draft: Home, tell: Progress) -> list[str]:
    """Copy the database; return the revisions that it names.

    An open transaction keeps the state that is copied, so that writers neither wait for the backup
    nor make it begin again. The file has its name only when it is whole.
    """
    part = draft.database.with_suffix(".part")
    with translated(source), closing(connect(source, readonly=True)) as connection:
        connection.execute("BEGIN")
        query = "SELECT revision_id FROM revision WHERE pruned_at IS NULL ORDER BY seq"
        revisions = [name for (name,) in connection.execute(query)]
        with translated(draft), closing(sqlite3.connect(part)) as copy:
            copy.execute("PRAGMA synchronous = OFF")  # it is synced below, once
            connection.backup(
                copy,
                pages=_PAGES,
                progress=lambda status, left, total: tell("pages", total - left, total),
            )
    part.chmod(_mode(source.database))
    part.rename(draft.database)
    sync(draft.database)
    return revisions


def _copy_adapters(
    source: Home, draft: Home, revisions: list[str], tell: Progress
) -> tuple[str, ...]:
    """Copy the folders of revisions, which never change; return those that are not there."""
    there = _folders(source.adapters)
    present = [name for name in revisions if name in there]
    for done, name in enumerate(present):
        tell("adapters", done, len(present))
        _copy_folder(source.adapters / name, draft.adapters / name)
    tell("adapters", len(present), len(present))
    sync(draft.adapters)
    return tuple(name for name in revisions if name not in there)


def _folders(place: Path) -> set[str]:
    """Name what is really a folder there: a name from a database may lead anywhere."""
    if not place.is_dir():
        return set()
    with os.scandir(place) as entries:
        return {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}


def _copy_folder(folder: Path, copy: Path) -> None:
    copy.mkdir()
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink():
            _copy_file(file, copy / file.name)
    sync(copy)


def _copy_file(file: Path, copy: Path) -> None:
    with file.open("rb") as reader, copy.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fchmod(writer.fileno(), _mode(file))
        os.fsync(writer.fileno())


def _mode(path: Path) -> int:
    """Who may read and write it."""
    return path.stat().st_mode & 0o777


def _give_name(draft: Home, place: Path) -> None:
    """Put the copy in its place; where something came there meanwhile, that stays."""
    sync(draft.path)
    draft.path.rename(place)
    sync(place.parent)


def _tell_nobody(stage: str, done: int, total: int) -> None:
    pass
