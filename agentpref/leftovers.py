"""What is made beside its place and then renamed, and what killed processes leave of it.

Whoever makes such a file or folder holds a lock on it. The system releases the lock when the
process dies. So no clock is needed to tell what is being made from what was left: nobody has that.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PUBLISHING = ".publishing-"
"""How the names of the folders begin in which revisions are made."""

PRUNING = ".pruning-"
"""How the names of the folders begin that a pruning removes."""

_REVISION_ID = re.compile(r"rev-\d{6,}-[0-9a-f]{12}")


def is_revision_id(name: str) -> bool:
    """Whether a name has the form of a revision's, and so is safe as a folder's name."""
    return _REVISION_ID.fullmatch(name) is not None


@contextmanager
def claimed(path: Path, make: Callable[[], object]) -> Iterator[None]:
    """Call ``make`` to make a file or a folder, and hold a lock on it for a block.

    If it is removed before it is locked, it is made again.
    """
    while True:
        make()
        descriptor = _opened(path)
        if descriptor is None:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(path, descriptor):
                continue
            yield
            return
        finally:
            _close(descriptor)


@contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Say whether nobody makes a file or a folder any more; nobody can claim it in the block."""
    try:
        descriptor = _opened(path)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES):
            raise
        yield error.errno == errno.ELOOP  # a link, which none of ours is; or not this user's
        return
    if descriptor is None:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_left = True
    except BlockingIOError:
        is_left = False
    try:
        yield is_left
    finally:
        _close(descriptor)


def draft_name(name: str) -> str:
    """A name for the draft of a file."""
    return f".{name}.{os.urandom(8).hex()}"


def clear_drafts(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of the drafts of a file, or of all files, of a folder."""
    of = "*" if name is None else glob.escape(name)
    for draft in folder.glob(f".{of}.{'[0-9a-f]' * 16}"):
        with abandoned(draft) as is_left:
            if is_left:
                draft.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder without a revision's name as far as possible; of a link, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def clear_adapters(adapters: Path, known: Container[str]) -> None:
    """Remove from the folder of revisions what crashes left: what is half made, or not ``known``.

    Call it with the write lock of the database: no process is then between a folder's name and its
    row.
    """
    for folder in adapters.iterdir():
        if is_revision_id(folder.name) and folder.name not in known:
            discard(folder)
    for name in unfinished(adapters):
        with abandoned(adapters / name) as is_left:
            if is_left:
                discard(adapters / name)


def unfinished(adapters: Path) -> list[str]:
    """Name the folders that a crash during publishing or pruning left."""
    found: list[str] = []
    for folder in adapters.iterdir():
        if folder.name.startswith((PRUNING, PUBLISHING)):
            with suppress(FileNotFoundError), abandoned(folder) as is_left:
                if is_left:
                    found.append(folder.name)
    return sorted(found)


def _opened(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _close(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have a copy of the descriptor
    os.close(descriptor)
