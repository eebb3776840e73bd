"""The file of what the store refused of a spill, without the lines of somebody who is forgotten.

The spill keeps there what names a run that this home does not have, for somebody to look at; it is
text of users, and goes when they do. Knows nothing of the database.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from agentpref.errors import NotKept
from agentpref.home import Home
from agentpref.record.messages import RUN_COLUMNS
from agentpref.record.spill import LOCK_SECONDS, is_whole

IsGone: TypeAlias = Callable[[Mapping[str, Any]], bool]
"""Given the fields of a run, of feedback or of a comparison."""


def purge(home: Home, is_gone: IsGone) -> None:
    """Drop the refused entries that are gone, and lines that a crash cut off.

    Raises:
        NotKept: the file cannot be written, or another process holds it.
    """
    from filelock import FileLock, Timeout

    if not home.refused.exists():
        return
    try:
        with FileLock(home.path / "spill.lock", timeout=LOCK_SECONDS):
            _rewrite(home.refused, is_gone)
    except (Timeout, OSError) as error:
        raise NotKept(
            f"{home.refused} cannot be written anew ({error}); let this user write the folder, "
            "free space on its disk, then try again"
        ) from error


def _rewrite(path: Path, is_gone: IsGone) -> None:
    """Write the file whole or not at all; one that would be empty goes."""
    draft = path.with_suffix(".draft")
    with path.open("rb") as old, draft.open("wb") as new:
        new.writelines(line for line in old if is_whole(line) and not is_gone(_fields(line)))
        new.flush()
        os.fsync(new.fileno())
        is_empty = new.tell() == 0
    os.replace(draft, path)
    if is_empty:
        path.unlink()


def _fields(line: bytes) -> Mapping[str, Any]:
    entry = orjson.loads(line.partition(b" ")[2])
    if "run" in entry:
        return dict(zip(RUN_COLUMNS, entry["run"], strict=False))
    (fields,) = entry.values()
    return dict(fields)
