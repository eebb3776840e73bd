"""Folders of adapters on disk: copied, named, exported, removed, and cleaned up after a crash.

A folder has a revision's name only while it is complete: a copy is synced before it gets the name,
and a folder that is to be removed loses the name first. Modes are set, not left to the umask, since
an engine may run as another user.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Container, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from agentpref.errors import ConfigError, InvalidAdapter
from agentpref.home import Home, StrPath, copy_file, sync, writing
from agentpref.serve.backend import Revision
from agentpref.serve.manifest import ADAPTER_FILES, MANIFEST_FILE, digest_adapter, is_revision_id
from agentpref.serve.validate import check_files, check_published

_TEMPORARY = ".publishing-"
_LEAVING = ".pruning-"
_FOLDER_MODE = 0o755
_FILE_MODE = 0o644
_ABANDONED_AFTER = 3600.0


def copy_adapter(folder: Path, adapters: Path) -> Path:
    """Copy an adapter's files into a new folder without a revision's name, and return that.

    Raises:
        InvalidAdapter: a file is missing or a symbolic link.
    """
    check_files(folder)
    temporary = adapters / f"{_TEMPORARY}{uuid.uuid4().hex}"
    with ExitStack() as on_failure:
        on_failure.callback(discard, temporary)
        _copy_files(folder, temporary, ADAPTER_FILES)
        sync(adapters.parent)  # the folder of adapters may be new
        on_failure.pop_all()
    return temporary


def write(target: Path, data: bytes) -> None:
    """Write a new file, durably."""
    with target.open("xb") as writer:
        writer.write(data)
        writer.flush()
        os.fchmod(writer.fileno(), _FILE_MODE)
        os.fsync(writer.fileno())


def give_name(temporary: Path, folder: Path) -> None:
    """Move a folder whose files are synced to its place, durably."""
    sync(temporary)
    temporary.rename(folder)
    sync(folder.parent)


def take_name(folder: Path) -> Path:
    """Take the name from a folder that is to be removed, durably, and return its new path."""
    leaving = folder.with_name(f"{_LEAVING}{uuid.uuid4().hex}")
    folder.rename(leaving)
    sync(folder.parent)
    return leaving


def discard(folder: Path) -> None:
    """Remove a folder without a revision's name as far as possible; of a link, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def clean(adapters: Path, known: Container[str]) -> None:
    """Remove what crashes left. Call it while no other process can name a folder."""
    leftover = leftovers(adapters)
    for folder in adapters.iterdir():
        is_unknown = is_revision_id(folder.name) and folder.name not in known
        if is_unknown or folder.name in leftover:
            discard(folder)


def leftovers(adapters: Path) -> list[str]:
    """Name the folders that a crash during publishing or pruning left."""
    found: list[str] = []
    for folder in adapters.iterdir():
        with suppress(FileNotFoundError):
            # A younger one may be in use: another process is publishing right now.
            is_abandoned = time.time() - folder.stat().st_mtime > _ABANDONED_AFTER
            if folder.name.startswith(_LEAVING) or (
                folder.name.startswith(_TEMPORARY) and is_abandoned
            ):
                found.append(folder.name)
    return sorted(found)


def export(revision: Revision, target: StrPath, home: Home) -> Path:
    """Copy a revision to a new folder, which gets its name once all of it is on disk.

    Raises:
        ConfigError: the target is in the home, a file, or a folder that is not empty.
        InvalidAdapter: the revision's files are not those that were published.
        NotKept: the target cannot be written.
    """
    place = Home.resolve(target)
    with writing(place), ExitStack() as at_end:
        _require_free(place, home)
        check_published(revision)
        draft = place.with_name(f"{place.name}.unfinished-{uuid.uuid4().hex}")
        at_end.callback(discard, draft)
        _copy_files(revision.path, draft, (*ADAPTER_FILES, MANIFEST_FILE))
        copied = digest_adapter(draft)  # what was checked may have changed while it was copied
        for name, digest in revision.manifest["files"].items():
            if copied.get(name) != digest:
                raise InvalidAdapter(
                    f"{revision.path / name} changed while it was copied; export the revision again"
                )
        give_name(draft, place)
    return place


def _copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    target.mkdir(parents=True)
    target.chmod(_FOLDER_MODE)
    for name in names:
        copy_file(source / name, target / name, _FILE_MODE)


def _require_free(place: Path, home: Home) -> None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise ConfigError(f"{place} is not a folder; choose one that is missing or empty")
    if Path(os.path.realpath(place)).is_relative_to(os.path.realpath(home.path)):
        raise ConfigError(f"{place} is inside the home itself; choose a folder elsewhere")
    found = next(place.iterdir(), None) if place.is_dir() else None
    if found is not None:
        raise ConfigError(
            f"{place} contains {found.name!r}; choose a folder that is missing or empty"
        )
