"""Folders of revisions: what they contain, and how they are named, copied, exported and removed.

A revision is named by its content, ``rev-<number>-<first 12 hex digits of the files' digest>``, so
that a name never means two adapters. A folder has a revision's name only while it is complete: a
copy is synced before it gets the name, and a folder that is to be removed loses the name first.
Modes and owners are set, not left to the umask and to who publishes: an engine may run as another
user, and another user may prune.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from agentpref.errors import ConfigError
from agentpref.home import (
    READABLE_FILE,
    READABLE_FOLDER,
    Home,
    StrPath,
    enclosing_home,
    open_private,
    ours,
    own_folder,
    sync,
    writing,
)
from agentpref.leftovers import PRUNING, PUBLISHING, claimed, discard, unfinished
from agentpref.leftovers import is_revision_id as is_revision_id
from agentpref.models.adapter_files import CONFIG_FILE as CONFIG_FILE
from agentpref.models.adapter_files import WEIGHTS_FILE as WEIGHTS_FILE
from agentpref.models.adapter_files import AdapterFiles

MANIFEST_FILE = "manifest.json"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
FORMAT = 1
"""The format of the manifest."""


def revision_id(seq: int, files: Mapping[str, str]) -> str:
    """Name a revision by its number and the digests of its files (name → sha256)."""
    content = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return f"rev-{seq:06d}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def contents(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The digests of all that a revision consists of: its files, and its instructions if any."""
    found = dict(manifest["files"])
    if instructions := manifest.get("instructions"):
        found["instructions"] = hashlib.sha256(instructions.encode()).hexdigest()
    return found


def is_named_by_content(name: str, manifest: Mapping[str, Any]) -> bool:
    """Whether a name is that of these digests: if not, somebody edited files, manifest and row."""
    seq = int(name.split("-")[1])
    is_whole = set(manifest["files"]) == set(ADAPTER_FILES)
    return is_whole and revision_id(seq, contents(manifest)) == name


def encode(manifest: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a manifest, which the folder and the database both contain."""
    options = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(dict(manifest), option=options)


@contextmanager
def written(files: AdapterFiles, manifest: Mapping[str, Any], draft: Path) -> Iterator[Path]:
    """Write an adapter, durably, into a new folder; remove it after the block if still there."""
    contents = {
        CONFIG_FILE: files.config,
        WEIGHTS_FILE: files.weights,
        MANIFEST_FILE: encode(manifest),
    }
    try:
        with claimed(draft, lambda: draft.mkdir(mode=0o700, parents=True)):
            own_folder(draft, READABLE_FOLDER)
            for name, content in contents.items():
                with open(draft / name, "xb", opener=open_private) as writer:
                    writer.write(content)
                    writer.flush()
                    os.fchmod(writer.fileno(), READABLE_FILE)
                    os.fsync(writer.fileno())
            yield draft
    finally:
        discard(draft)


def new_draft(adapters: Path) -> Path:
    """A path for a folder that is being published."""
    return adapters / f"{PUBLISHING}{uuid.uuid4().hex}"


def give_name(draft: Path, folder: Path) -> None:
    """Move a folder whose files are synced to its place, durably."""
    sync(draft)
    draft.rename(folder)
    sync(folder.parent)


def take_name(folder: Path) -> Path:
    """Take the name from a folder that is to be removed, durably, and return its new path."""
    leaving = folder.with_name(f"{PRUNING}{uuid.uuid4().hex}")
    folder.rename(leaving)
    sync(folder.parent)
    return leaving


def leftovers(adapters: Path) -> list[str]:
    """Name the folders that a crash left; ``NotKept`` if the folder is not this user's to read."""
    with ours(adapters):
        return unfinished(adapters)


def export(files: AdapterFiles, manifest: Mapping[str, Any], target: StrPath) -> Path:
    """Write a checked revision to a new folder, which gets its name once all of it is on disk.

    Raises:
        ConfigError: the target is in a home, a file, or a folder that is not empty.
        NotKept: the target cannot be written.
    """
    place = Home.resolve(target)
    draft = place.with_name(f"{place.name}.unfinished-{uuid.uuid4().hex}")
    with writing(place):
        _require_free(place)
        with written(files, manifest, draft):
            give_name(draft, place)
    return place


@contextmanager
def exporting(target: StrPath) -> Iterator[Path]:
    """Yield a draft of a folder, which gets its name, durably, once the block has filled it.

    Nothing is left of it if the block raises.

    Raises:
        ConfigError: the target is in a home, a file, or a folder that is not empty.
        NotKept: the target cannot be written.
    """
    place = Home.resolve(target)
    draft = place.with_name(f"{place.name}.unfinished-{uuid.uuid4().hex}")
    with writing(place):
        _require_free(place)
        try:
            draft.mkdir(parents=True)
            yield draft
            for path in (draft, *draft.rglob("*")):
                path.chmod(READABLE_FOLDER if path.is_dir() else READABLE_FILE)
                sync(path)
            give_name(draft, place)
        finally:
            discard(draft)


def _require_free(place: Path) -> None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise ConfigError(f"{place} is not a folder; choose one that is missing or empty")
    if (inside := enclosing_home(place)) is not None:
        raise ConfigError(f"{place} is inside the home {inside}; choose a folder elsewhere")
    if place.is_dir() and (found := next(place.iterdir(), None)) is not None:
        raise ConfigError(
            f"{place} contains {found.name!r}; choose a folder that is missing or empty"
        )
