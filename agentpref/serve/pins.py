"""Pins: which processes may have a revision loaded, and where.

A pin is a file ``<revision>@<12 hex digits of the place's sha256>`` that contains the place's name.
Each living process that uses the revision at that place holds a shared lock on the file. The system
releases the lock when the process dies, so no clock and no heartbeat is needed: the last user of a
revision can tell that it is the last, and a pin without a lock is what a dead process left.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from agentpref.errors import RevisionError
from agentpref.home import make_private_folder, open_private, ours, sync, writing
from agentpref.record import forks
from agentpref.serve.backend import IN_PROCESS
from agentpref.serve.folders import is_revision_id


@dataclass(frozen=True, slots=True)
class Pin:
    """A place where a revision may be loaded.

    ``alive`` says whether a living process uses it there. ``place`` is empty while a process takes
    the pin, and stays empty if the process dies in that moment, with nothing loaded.
    """

    revision_id: str
    place: str
    alive: bool
    path: Path = field(default=Path(), compare=False, repr=False)

    @property
    def is_stale(self) -> bool:
        """Whether nothing can be loaded there any more: the engine ended with its process."""
        return not self.alive and (not self.place or self.place.startswith(IN_PROCESS))

    def remove(self) -> bool:
        """Delete the file, unless a living process uses the revision there; say if it is gone."""
        with suppress(FileNotFoundError), _opened(self.path) as descriptor:
            removable = _lock_alone(descriptor, self.path) and _place(descriptor) == self.place
            if removable:
                self.path.unlink()
            return removable
        return True


class Pins:
    """The revisions that this process may have loaded in one engine.

    All methods may be called from any thread. A forked child starts with no pins; its parent keeps
    its own.

    Args:
        folder: where the files are; it is made when the first pin is taken.
        places: where the engine loads revisions, as in the backend's capabilities.
    """

    def __init__(self, folder: Path, *places: str) -> None:
        self._folder = folder
        self._places = {hashlib.sha256(p.encode()).hexdigest()[:12]: p for p in places}
        self._held: dict[Path, int] = {}  # descriptors, each with a shared lock
        self._descriptors: set[int] = set()  # all open ones: those held and those being taken
        self._opening = threading.RLock()  # no fork happens between opening and noting one
        forks.guard(self)

    @property
    def names(self) -> set[str]:
        """The revisions that this process has pinned."""
        return {path.name.partition("@")[0] for path in tuple(self._held)}

    def take(self, name: str) -> None:
        """Pin a revision at every place, before it is loaded; pinning it again does nothing.

        Waits while another process unloads the revision there.

        Raises:
            RevisionError: the name is not a revision's.
            NotKept: a file cannot be made or locked.
        """
        for path, place in self._paths(name).items():
            if path not in self._held:
                self._keep(path, self._locked(path, place))

    @contextmanager
    def drop(self, name: str) -> Iterator[list[str]]:
        """Unpin a revision; the block gets the places where nobody else uses it, and unloads it.

        At those places, a process that wants to take the revision waits until the block ends. If
        the block raises, the revision is pinned there as before. A revision that is not pinned is
        pinned first, so that what a dead process left loaded can be unloaded.

        Raises:
            RevisionError: the name is not a revision's.
            NotKept: a file cannot be made, locked or removed.
        """
        # All are taken before any is dropped: the block holds some locks alone, and must not wait.
        self.take(name)
        with ExitStack() as dropped:
            paths = self._paths(name).items()
            alone = {place: dropped.enter_context(self._drop(path, place)) for path, place in paths}
            yield [place for place, is_alone in alone.items() if is_alone]

    def close(self) -> None:
        """Unpin everything. The files stay where the engine outlives this process.

        Raises:
            NotKept: a file cannot be removed; everything is unpinned nevertheless.
        """
        with ExitStack() as at_end:
            for path in tuple(self._held):
                descriptor = self._held.pop(path, None)
                if descriptor is not None:
                    at_end.callback(self._shut, descriptor)
                    place = self._places[path.name.partition("@")[2]]
                    if place.startswith(IN_PROCESS) and _lock_alone(descriptor, path):
                        at_end.callback(_unlink, path)

    def before_fork(self) -> None:
        """Wait until every open descriptor is noted."""
        self._opening.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        forks.let_go(self._opening)

    def after_fork_in_child(self) -> None:
        """Close what was inherited: a lock shared with the parent would outlive the parent."""
        self._opening = threading.RLock()
        self._held = {}
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _paths(self, name: str) -> dict[Path, str]:
        if not is_revision_id(name):
            raise RevisionError(f"{name!r} is not a revision's name; see `agentpref adapters list`")
        return {self._folder / f"{name}@{key}": place for key, place in self._places.items()}

    @contextmanager
    def _drop(self, path: Path, place: str) -> Iterator[bool]:
        descriptor = self._held.pop(path, None)
        if descriptor is None:
            descriptor = self._locked(path, place)
        with ExitStack() as at_end:
            at_end.callback(self._shut, descriptor)
            alone = _lock_alone(descriptor, path)
            try:
                yield alone
            except BaseException:
                if alone:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    at_end.pop_all()
                    self._keep(path, descriptor)
                raise
            if alone:
                _unlink(path)

    def _locked(self, path: Path, place: str) -> int:
        """Open and lock the file; again if its last user removed it in between."""
        with writing(path):
            while True:
                with ExitStack() as on_failure:
                    make_private_folder(self._folder)
                    with self._opening:
                        flags = os.O_RDWR | os.O_NOFOLLOW
                        descriptor = open_private(path, flags)
                        self._descriptors.add(descriptor)
                    on_failure.callback(self._shut, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    if _is_at(path, descriptor):
                        if _place(descriptor) != place:  # it is new, or somebody edited it
                            os.pwrite(descriptor, place.encode(), 0)
                            os.ftruncate(descriptor, len(place.encode()))
                            os.fsync(descriptor)
                            sync(self._folder)
                        on_failure.pop_all()
                        return descriptor

    def _keep(self, path: Path, descriptor: int) -> None:
        """Note a lock, unless another thread took one in between."""
        if self._held.setdefault(path, descriptor) != descriptor:
            self._shut(descriptor)

    def _shut(self, descriptor: int) -> None:
        """Unlock, then close: a child that is being forked keeps the descriptor a moment longer."""
        with self._opening:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            self._descriptors.discard(descriptor)
            os.close(descriptor)


def find_pins(folder: Path, name: str | None = None) -> list[Pin]:
    """List the pins in a folder, which may be missing: all of them, or those of one revision.

    Raises:
        NotKept: a pin, or the folder, is not this user's to read.
    """
    found: list[Pin] = []
    with ours(folder):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        revision_id = path.name.partition("@")[0]
        if not is_revision_id(revision_id) or name not in (None, revision_id):
            continue
        with suppress(FileNotFoundError), _opened(path) as descriptor:
            alive = not _lock_alone(descriptor, path)
            place = _place(descriptor)  # read last: whoever holds a lock has written it
            if _is_at(path, descriptor):
                found.append(Pin(revision_id, place, alive, path))
    return found


def _place(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 16, 0).decode(errors="replace")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file that the block may lock."""
    with ours(path):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have a copy of the descriptor
        os.close(descriptor)


def _lock_alone(descriptor: int, path: Path) -> bool:
    """Try to turn a lock into an exclusive one; say whether that worked and the file is there."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is_at(path, descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _unlink(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)
