"""One revision as a folder of its own, that plain peft and plain vLLM load.

The folder appears under its name when all of it is on disk, and holds the files that were
published, byte for byte. Knows nothing of the database.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from agentpref.errors import ConfigError, InvalidAdapter
from agentpref.home import Home, StrPath
from agentpref.record.messages import new_id
from agentpref.serve import folders
from agentpref.serve import manifest as manifests
from agentpref.serve.backend import Revision
from agentpref.serve.validate import check_published

_UNFINISHED = ".unfinished-"


def export(revision: Revision, target: StrPath, home: Home) -> Path:
    """Copy a revision to a new folder, and return that.

    Raises:
        ConfigError: the target is no place for a copy.
        InvalidAdapter: the revision's files are not those that were published.
        NotKept: the target cannot be written.
    """
    place = Home.resolve(target)
    with folders.written(place), ExitStack() as at_end:
        _require_free(place, home)
        check_published(revision)
        draft = place.with_name(f"{place.name}{_UNFINISHED}{new_id()}")
        at_end.callback(folders.discard, draft)
        files = (*manifests.ADAPTER_FILES, manifests.MANIFEST_FILE)
        folders.copy_files(revision.path, draft, files)
        _check_copy(draft, revision)
        folders.give_name(draft, place)
    return place


def _require_free(place: Path, home: Home) -> None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise ConfigError(f"{place} is no folder; choose one that is missing or empty")
    if Path(os.path.realpath(place)).is_relative_to(os.path.realpath(home.path)):
        raise ConfigError(f"{place} is inside the home itself; choose a folder elsewhere")
    found = next(place.iterdir(), None) if place.is_dir() else None
    if found is not None:
        raise ConfigError(f"{place} holds {found.name!r}; choose a folder that is missing or empty")


def _check_copy(draft: Path, revision: Revision) -> None:
    """Hold the copy to the digests: what was checked may have changed while it was copied."""
    copied = manifests.digest_adapter(draft)
    for name, digest in revision.manifest["files"].items():
        if copied.get(name) != digest:
            raise InvalidAdapter(
                f"{revision.path / name} changed while it was copied; export the revision again"
            )
