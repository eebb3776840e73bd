"""Folders of adapters on disk: copied whole, sealed, and cleaned up after a crash.

What is copied is synced and read-only before it gets a name. Knows nothing of the database: which
folders have a row, it is told.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Container
from pathlib import Path

from agentpref.serve import manifest as manifests
from agentpref.serve.validate import check_files

_TEMPORARY = ".publishing-"
_ABANDONED_AFTER = 3600.0


def copy(folder: Path, adapters: Path) -> Path:
    """Copy an adapter's files into a folder that has no name yet, and return that.

    Raises:
        InvalidAdapter: a file is missing, or is none that an adapter has.
    """
    check_files(folder)
    temporary = adapters / f"{_TEMPORARY}{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    for name in manifests.ADAPTER_FILES:
        _copy_file(folder / name, temporary / name)
    return temporary


def write(target: Path, data: bytes) -> None:
    """Write a new file, synced and read-only."""
    with target.open("xb") as writer:
        writer.write(data)
        writer.flush()
        _seal(writer.fileno())


def clean(adapters: Path, known: Container[str]) -> None:
    """Remove what crashed publishers left. Call it while no other can name a folder."""
    for folder in adapters.iterdir():
        nameless = manifests.is_revision_id(folder.name) and folder.name not in known
        if nameless or (folder.name.startswith(_TEMPORARY) and _abandoned(folder)):
            shutil.rmtree(folder, ignore_errors=True)


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
    os.fchmod(descriptor, 0o444)
    os.fsync(descriptor)
