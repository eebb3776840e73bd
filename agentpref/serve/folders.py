"""Folders of adapters on disk: copied whole, named, removed, and cleaned up after a crash.

A folder has a revision's name only while it is whole: what is copied is synced before it gets one,
and what is to go loses it first. Modes are set, not left to the umask, since an engine may run as
another user. Knows nothing of the database: which folders have a row, it is told.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agentpref.errors import AgentprefError, NotKept
from agentpref.home import sync
from agentpref.serve import manifest as manifests
from agentpref.serve.validate import check_files

_TEMPORARY = ".publishing-"
_LEAVING = ".pruning-"
_FOLDER_MODE = 0o755
_FILE_MODE = 0o644
_ABANDONED_AFTER = 3600.0


def copy(folder: Path, adapters: Path) -> Path:
    """Copy an adapter's files into a folder that has no name yet, and return that.

    Raises:
        InvalidAdapter: a file is missing, or is none that an adapter has.
    """
    check_files(folder)
    temporary = adapters / f"{_TEMPORARY}{uuid.uuid4().hex}"
    with ExitStack() as on_failure:
        on_failure.callback(discard, temporary)
        copy_files(folder, temporary, manifests.ADAPTER_FILES)
        sync(adapters.parent)  # which may have got the folder of adapters just now
        on_failure.pop_all()
    return temporary


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files into a new folder, synced; the folder itself is not, until it gets a name."""
    target.mkdir(parents=True)
    target.chmod(_FOLDER_MODE)
    for name in names:
        _copy_file(source / name, target / name)


def write(target: Path, data: bytes) -> None:
    """Write a new file, synced."""
    with target.open("xb") as writer:
        writer.write(data)
        writer.flush()
        _seal(writer.fileno())


def give_name(temporary: Path, folder: Path) -> None:
    """Move a folder whose files are synced to its place, durably."""
    sync(temporary)
    temporary.rename(folder)
    sync(folder.parent)


def take_name(folder: Path) -> Path:
    """Take the name of a folder that is to go, durably, and return where it is now.

    So no half of a folder ever has a revision's name: what a crash leaves, the next one cleans.
    """
    leaving = folder.with_name(f"{_LEAVING}{uuid.uuid4().hex}")
    folder.rename(leaving)
    sync(folder.parent)
    return leaving


def clean(adapters: Path, known: Container[str]) -> None:
    """Remove what crashed publishers left. Call it while no other can name a folder."""
    for folder in adapters.iterdir():
        nameless = manifests.is_revision_id(folder.name) and folder.name not in known
        if nameless or _is_left(folder):
            discard(folder)


def leavings(adapters: Path) -> list[str]:
    """Name the folders that a publisher or a pruning did not come to the end of."""
    return sorted(folder.name for folder in adapters.iterdir() if _is_left(folder))


def discard(folder: Path) -> None:
    """Remove a folder that has no name, as far as that goes; of a link, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def written(place: Path) -> Iterator[None]:
    """Raise as ``NotKept`` what the system says where a place cannot be written."""
    try:
        yield
    except AgentprefError:
        raise  # some of ours are OSErrors too
    except OSError as error:
        raise NotKept(
            f"{error.filename or place} cannot be written ({error.strerror or error}); free space "
            f"on its disk, and let this user read and write it"
        ) from error


def _is_left(folder: Path) -> bool:
    publishing = folder.name.startswith(_TEMPORARY) and _abandoned(folder)
    return publishing or folder.name.startswith(_LEAVING)


def _abandoned(temporary: Path) -> bool:
    """Another publisher may be copying right now: only a folder left alone for an hour is dead."""
    try:
        return time.time() - temporary.stat().st_mtime > _ABANDONED_AFTER
    except FileNotFoundError:
        return False


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        _seal(writer.fileno())


def _seal(descriptor: int) -> None:
    os.fchmod(descriptor, _FILE_MODE)
    os.fsync(descriptor)
