"""Who may have a revision loaded, and where: files that the system unlocks when a process dies.

A file ``<revision>@<12 hex digits of the place's sha256>`` says that the revision may be loaded at
that place, and holds the place's name. Every living process that uses it there has the file locked,
shared. So the last one of them to go can tell that it is, and what a dead one held is known without
clocks and heartbeats. Knows nothing of engines, of the registry, and of what is in a revision.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentpref.errors import NotKept, RevisionError
from agentpref.home import sync
from agentpref.record import forks
from agentpref.serve.backend import IN_PROCESS
from agentpref.serve.manifest import is_revision_id


@dataclass(frozen=True, slots=True)
class Holder:
    """A place where a revision may be loaded; ``alive`` where a living process uses it there.

    ``place`` is empty for a moment while a process takes hold, and for good if it died in that
    moment, with nothing loaded.
    """

    revision_id: str
    place: str
    alive: bool

    @property
    def is_over(self) -> bool:
        """Whether nothing can be loaded there any more: the engine ended with its process."""
        return not self.alive and (not self.place or self.place.startswith(IN_PROCESS))


class Holds:
    """What this process may have loaded at one place.

    May be used from any thread. A child that was forked off holds nothing, and takes anew what it
    uses; the parent keeps what it holds.

    Args:
        folder: where the files are; it is made if it is missing.
        place: where the revisions are loaded, one of those that the backend's capabilities name.
    """

    def __init__(self, folder: Path, place: str) -> None:
        """Hold nothing yet."""
        self.place = place
        self._folder = folder
        self._held: dict[str, int] = {}
        self._descriptors: set[int] = set()  # of what is held, and of what is being taken
        self._opening = threading.Lock()  # no fork between a descriptor and the note of it
        forks.guard(self)

    def take(self, name: str) -> None:
        """Hold a revision, before it is loaded; does nothing where it is held.

        Waits where another process is about to unload it there, until it has.

        Raises:
            RevisionError: the name is no revision's.
            NotKept: the file cannot be made or locked.
        """
        if name not in self._held:
            self._keep(name, self._locked(self._path(name)))

    @contextmanager
    def drop(self, name: str) -> Iterator[bool]:
        """Give a revision up for a block, which is told whether nobody else uses it there.

        If so, the block unloads it: who wants to take it meanwhile waits. If the block raises then,
        the revision is held as before. One that is not held is taken first, so that what a dead
        process left loaded can be unloaded.

        Raises:
            RevisionError: the name is no revision's.
            NotKept: the file cannot be made or locked, or not be removed in the end.
        """
        path = self._path(name)
        with ExitStack() as at_end:
            descriptor = self._held.pop(name, None)
            if descriptor is None:
                descriptor = self._locked(path)
            at_end.callback(self._shut, descriptor)
            alone = _claimed(descriptor, path)
            try:
                yield alone
            except BaseException:
                if alone:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    at_end.pop_all()
                    self._keep(name, descriptor)
                raise
            if alone:
                _unlink(path)

    def close(self) -> None:
        """Give everything up; the files stay if the engine is one that outlives this process.

        Raises:
            NotKept: a file cannot be removed; all is given up nevertheless.
        """
        with ExitStack() as at_end:
            for name in tuple(self._held):
                descriptor = self._held.pop(name, None)
                if descriptor is not None:
                    at_end.callback(self._end, self._path(name), descriptor)

    def before_fork(self) -> None:
        """Have every descriptor noted."""
        self._opening.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._opening.release()

    def after_fork_in_child(self) -> None:
        """Hold nothing: a lock that two processes share would outlive the one that uses it."""
        self._opening = threading.Lock()
        self._held = {}
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _path(self, name: str) -> Path:
        if not is_revision_id(name):
            raise RevisionError(f"{name!r} is no revision's name; list() names those there are")
        return self._folder / f"{name}@{hashlib.sha256(self.place.encode()).hexdigest()[:12]}"

    def _locked(self, path: Path) -> int:
        """Open and lock the file, which whoever was alone with it may have removed meanwhile."""
        with _kept(path):
            while True:
                with ExitStack() as on_failure:
                    descriptor = self._opened(path)
                    on_failure.callback(self._shut, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    if _is_at(path, descriptor):
                        self._sign(descriptor)
                        on_failure.pop_all()
                        return descriptor

    def _opened(self, path: Path) -> int:
        self._folder.mkdir(exist_ok=True)
        with self._opening:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self._descriptors.add(descriptor)
        return descriptor

    def _sign(self, descriptor: int) -> None:
        """Write the place into a new file, durably: an engine elsewhere outlives this machine."""
        if os.fstat(descriptor).st_size == 0:
            os.pwrite(descriptor, self.place.encode(), 0)
            os.fsync(descriptor)
            sync(self._folder)

    def _keep(self, name: str, descriptor: int) -> None:
        """Hold what was locked, unless another thread did meanwhile."""
        if self._held.setdefault(name, descriptor) != descriptor:
            self._shut(descriptor)

    def _end(self, path: Path, descriptor: int) -> None:
        try:
            if self.place.startswith(IN_PROCESS) and _claimed(descriptor, path):
                _unlink(path)
        finally:
            self._shut(descriptor)

    def _shut(self, descriptor: int) -> None:
        """Close and unlock: a child that is being forked off has the descriptor a moment longer."""
        with self._opening:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            self._descriptors.discard(descriptor)
            os.close(descriptor)


class EngineHolds:
    """What this process may have loaded in one engine, at each of its places.

    Args:
        folder: where the files are.
        places: as the backend's capabilities have them.
    """

    def __init__(self, folder: Path, places: Sequence[str]) -> None:
        """Hold nothing yet."""
        self._holds = [Holds(folder, place) for place in places]

    def take(self, name: str) -> None:
        """Hold a revision at every place, as :meth:`Holds.take` does at one."""
        for holds in self._holds:
            holds.take(name)

    @contextmanager
    def drop(self, name: str) -> Iterator[list[str]]:
        """Give a revision up everywhere for a block, which is told where nobody else uses it.

        As :meth:`Holds.drop` does at one place. All are taken first: who is alone at one place
        makes others wait, and so must not wait at another.
        """
        self.take(name)
        with ExitStack() as dropped:
            alone = {holds.place: dropped.enter_context(holds.drop(name)) for holds in self._holds}
            yield [place for place, is_alone in alone.items() if is_alone]

    def close(self) -> None:
        """Give everything up, as :meth:`Holds.close` does at one place."""
        with ExitStack() as at_end:
            for holds in self._holds:
                at_end.callback(holds.close)


def holders(folder: Path, name: str | None = None) -> list[Holder]:
    """Say where a revision may be loaded, or each of them where no name is given.

    Args:
        folder: the one that :class:`Holds` were made with; it may be missing.
        name: a revision's id.
    """
    found = (_holder(path) for path in _files(folder) if name in (None, _revision(path)))
    return [holder for holder in found if holder is not None]


def forget(folder: Path, holder: Holder) -> bool:
    """Remove the file of a place where nothing is loaded any more; say whether it is gone.

    It stays where a living process uses the revision there, perhaps since after ``holder`` was
    looked at.
    """
    for path in _files(folder):
        if _revision(path) == holder.revision_id and _place(path) == holder.place:
            return _removed(path)
    return True


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_revision_id(_revision(path)))


def _revision(path: Path) -> str:
    return path.name.partition("@")[0]


def _place(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _holder(path: Path) -> Holder | None:
    with _existing(path) as descriptor:
        if descriptor is None:
            return None
        alive = not _claimed(descriptor, path)
        # Read last: one who was about to sign has, where the file is locked no more.
        place = _place(path)
    return None if place is None else Holder(_revision(path), place, alive)


def _removed(path: Path) -> bool:
    with _existing(path) as descriptor:
        if descriptor is None:
            return True
        alone = _claimed(descriptor, path)
        if alone:
            path.unlink()
        return alone


@contextmanager
def _existing(path: Path) -> Iterator[int | None]:
    """Open a file that may be gone; at the end it is not locked by us."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child may have been forked off meanwhile
        os.close(descriptor)


def _claimed(descriptor: int, path: Path) -> bool:
    """Lock the file for us alone, giving up a shared lock; say whether that could be had."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is_at(path, descriptor)


def _unlink(path: Path) -> None:
    with _kept(path, "removed"):
        path.unlink(missing_ok=True)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def _kept(path: Path, done: str = "made and locked") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotKept(
            f"{path} cannot be {done} ({error.strerror or error}); let this user write "
            f"the folder, on a file system that has locks"
        ) from error
