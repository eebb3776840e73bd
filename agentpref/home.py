"""The home folder: the paths of the log, the adapters and the reports; and writing files safely.

A folder is a home if it has a file ``agentpref.db``. ``Home.create`` makes that file first, so that
two processes can create the same home at once.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from agentpref.errors import CorruptHome, HomeError, NotAHome, NotKept
from agentpref.leftovers import claimed, draft_name
from agentpref.owners import (
    DATABASE,
    OTHERS,
    access_cure,
    folder_mode,
    make_readable_folder,
    own_file,
)
from agentpref.owners import READABLE_FILE as READABLE_FILE
from agentpref.owners import READABLE_FOLDER as READABLE_FOLDER
from agentpref.owners import StrPath as StrPath
from agentpref.owners import enclosing_home as enclosing_home
from agentpref.owners import is_of_system as is_of_system
from agentpref.owners import make_private_folder as make_private_folder
from agentpref.owners import open_private as open_private
from agentpref.owners import own_folder as own_folder
from agentpref.owners import tighten as tighten
from agentpref.reads import Reads

if TYPE_CHECKING:
    import sqlite3

VARIABLE = "AGENTPREF_HOME"
DEFAULT = ".agentpref"

CANDIDATE = ".candidate-"
"""How the names of the folders begin in which updates keep their candidates."""

RESTORE = "restore a backup of the home, or move the folder away and start a new home"
"""What helps where the database is lost."""

_PASS = 0o011


@dataclass(frozen=True, slots=True)
class Home(Reads):
    """A home folder, by its absolute path. Its methods that read are those of :class:`Reads`."""

    path: Path

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.path / DATABASE

    @property
    def database_files(self) -> tuple[Path, Path, Path]:
        """The SQLite file, and the two that SQLite keeps beside it while it is open."""
        return self.database, Path(f"{self.database}-wal"), Path(f"{self.database}-shm")

    @property
    def adapters(self) -> Path:
        """The folder of published revisions."""
        return self.path / "adapters"

    @property
    def reports(self) -> Path:
        """The folder of update reports."""
        return self.path / "reports"

    @property
    def judges(self) -> Path:
        """The folder of judges' rubrics, ``NAME.md``; missing if there are none."""
        return self.path / "judges"

    @property
    def skipped(self) -> Path:
        """The file of questions that people did not want to answer; ids alone."""
        return self.path / "skipped.jsonl"

    @property
    def rewards(self) -> Path:
        """The folder of reward models and their features; missing if there are none."""
        return self.path / "rewards"

    def rewards_of(self, namespace: str) -> Path:
        """The folder of a namespace's reward models."""
        digest = hashlib.blake2b(namespace.encode(), digest_size=6).hexdigest()
        return self.rewards / digest

    @property
    def training(self) -> Path:
        """The folder of interrupted updates; missing if there are none."""
        return self.path / "training"

    @property
    def candidates(self) -> list[Path]:
        """The folders of candidates: of an update that ends now, or that was killed."""
        return sorted(self.path.glob(f"{CANDIDATE}*"))

    @property
    def pins(self) -> Path:
        """The folder of pins: which revisions are loaded where; missing before one is."""
        return self.path / "holds"

    @property
    def spill(self) -> Path:
        """The file of entries that wait for a locked or full database."""
        return self.path / "spill.jsonl"

    @property
    def refused(self) -> Path:
        """The file of entries of the spill that the database refused, for a person to look at."""
        return self.path / "refused.jsonl"

    @property
    def user_keys(self) -> Path:
        """The keys that user ids are hashed with."""
        return self.path / "user.keys"

    @staticmethod
    def resolve(path: StrPath | None = None) -> Path:
        """The absolute path of ``path``, else ``$AGENTPREF_HOME``, else ``./.agentpref``.

        Raises ``NotAHome`` for one that is not UTF-8: SQLite and JSON cannot hold it.
        """
        chosen = path if path is not None else os.environ.get(VARIABLE) or DEFAULT
        absolute = os.path.abspath(os.path.expanduser(chosen))
        if any("\ud800" <= character <= "\udfff" for character in absolute):
            raise NotAHome(f"the path {absolute!a} is not UTF-8; rename the folder")
        return Path(absolute)

    @classmethod
    def create(cls, path: StrPath | None = None) -> Home:
        """Make a home in a missing or empty folder; an existing home stays as it is.

        Raises:
            NotAHome: the path is a file, a folder of something else, or cannot be written.
            CorruptHome: it is a home that has lost its database.
        """
        home = cls(cls.resolve(path))
        try:
            if not home.path.exists():
                home.path.mkdir(parents=True, exist_ok=True)
                home.path.chmod(folder_mode(home.path) | _PASS)
            if not home.database.exists():
                # Asked of the folder's parent: another process may have made this very home by now.
                outer = enclosing_home(Path(os.path.realpath(home.path)).parent)
                if outer is not None:
                    raise NotAHome(f"{home.path} is inside the home {outer}; choose another folder")
                found = {item.name for item in home.path.iterdir()}
                if found and DATABASE not in found:  # else another process is making the home
                    home.require_database(new=True)
                    raise NotAHome(
                        f"{home.path} has {min(found)!r} and no {DATABASE}, so it is not an "
                        "agentpref home; choose an empty or a new folder"
                    )
                os.close(open_private(home.database))
            make_readable_folder(home.adapters)
            make_private_folder(home.reports)
        except OSError as error:
            if not is_of_system(error):
                raise
            is_denied = isinstance(error, PermissionError)
            whose = f" ({access_cure(home.path)})" if is_denied else ""
            raise NotAHome(
                f"cannot make a home in {home.path} ({error.strerror}); choose a folder that this "
                f"user may write to{whose}"
            ) from error
        return home

    @classmethod
    def open(cls, path: Home | StrPath | None = None) -> Home:
        """Take a home, by its path or opened before.

        Raises:
            NotAHome: there is none in the folder.
            HomeError: this user may not enter the folder.
            CorruptHome: its database is lost.
        """
        if isinstance(path, Home):
            return path
        home = cls(cls.resolve(path))
        home.require_database()
        return home

    def require_database(self, *, new: bool = False) -> None:
        """Raise unless there is a database, or an empty file that becomes one.

        A database that is gone or empty beside files that are only made after it is lost: a new one
        would take feedback for a home that has forgotten all else. With ``new``, nothing need be
        there yet.

        Raises:
            NotAHome: the folder is no home.
            HomeError: this user may not enter it.
            CorruptHome: it is one that has lost its database.
        """
        try:
            is_there = self.database.is_file()
            if is_there and self.database.stat().st_size:
                return
            beside = self.made_later()
            # Asked again: another process may have made the home in between.
            if beside is not None and not (is_there and self.database.stat().st_size):
                raise CorruptHome(
                    f"{self.database} is {'empty' if is_there else 'missing'}, but {beside} is "
                    f"there: the home has lost its database; {RESTORE}"
                )
        except PermissionError as error:
            raise HomeError(
                f"{self.path} cannot be entered ({error.strerror}); {access_cure(self.path)}"
            ) from error
        if not is_there and not new:
            raise NotAHome(
                f"{self.path} is not an agentpref home (it has no {DATABASE}); name another folder "
                "with --home or AGENTPREF_HOME, or make one with `agentpref init`"
            )

    def made_later(self) -> str | None:
        """Name something in the folder that is only made after its database, if there is any."""
        single = [self.spill, self.refused]
        if self.adapters.exists():  # else it may be a replica's key, copied before its first log
            single.insert(0, self.user_keys)
        inside = ((self.adapters, "rev-*"), (self.pins, "rev-*"), (self.training, "*"))
        found = [path for path in single if path.exists()]
        found += [path for folder, names in inside for path in folder.glob(names)]
        return str(found[0].relative_to(self.path)) if found else None

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Home:
        """The home whose database a connection has open.

        SQLite knows the database by its real path, and nothing else of the home lies there if that
        in the home is a link. So a connection of ``database.connect`` knows its home itself.
        """
        known: Home | None = getattr(connection, "home", None)
        if known is not None:
            return known
        query = "SELECT file FROM pragma_database_list WHERE name = 'main'"
        (file,) = connection.execute(query).fetchone()
        return cls(Path(file).parent)


def open_to_others(home: Home) -> list[Path]:
    """The files of a home that every user of the machine can use, without those of revisions."""
    found: list[Path] = []
    for folder, folders, files in os.walk(home.path):
        if Path(folder) == home.path and home.adapters.name in folders:
            folders.remove(home.adapters.name)
        for path in (Path(folder, name) for name in files):
            with suppress(FileNotFoundError):
                mode = os.lstat(path).st_mode
                if stat.S_ISREG(mode) and mode & OTHERS:
                    found.append(path)
    return sorted(found)


def sync(path: Path) -> None:
    """Flush a file, or the list of files in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path, mode: int | None = None) -> None:
    """Copy a file to a new one, durably; by default only its home's people may read the copy."""
    import shutil

    with reading(source) as reader, open(target, "xb", opener=open_private) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        if mode is not None:
            os.fchmod(writer.fileno(), mode)
        os.fsync(writer.fileno())


@contextmanager
def ours(path: Path, use: str = "used") -> Iterator[None]:
    """Raise ``NotKept`` where a file or folder that the block uses is not this user's to use."""
    try:
        yield
    except PermissionError as error:
        if not is_of_system(error):
            raise
        place = Path(error.filename or path)
        place = place if place.is_absolute() else path  # a name within a folder, from a descriptor
        raise NotKept(
            f"{place} cannot be {use} ({error.strerror}); {access_cure(place)}"
        ) from error


def reading(path: Path) -> BinaryIO:
    """Open a file to read it; ``NotKept`` if it is not this user's to read, or no plain file.

    A pipe or a device in its place, which somebody put into another home, would wait for ever.
    """
    with ours(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise NotKept(f"{path} is not a plain file; remove it, or restore the file from a backup")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise the system's errors as ``NotKept``: the block writes to ``place`` and cannot."""
    try:
        with ours(place, "written"):
            yield
    except OSError as error:
        if not is_of_system(error):
            raise
        raise NotKept(
            f"{place} cannot be written ({error.strerror}); free space on its disk, and let this "
            "user write the folder"
        ) from error


@contextmanager
def replacing(path: Path, drafts: Path | None = None) -> Iterator[Path]:
    """Write a file whole or not at all: yield a draft, then sync it and rename it to ``path``.

    If the block raises, the draft is removed and ``path`` stays as it was. The draft is an empty
    file that :func:`open_private` made. It lies beside the file, or in the folder ``drafts`` of the
    same disk. If the process is killed, it stays until somebody calls ``leftovers.clear_drafts``.

    >>> with replacing(home.reports / "last.json") as draft:
    ...     draft.write_bytes(report)
    """
    draft = (drafts or path.parent) / draft_name(path.name)
    try:
        with claimed(draft, lambda: os.close(open_private(draft))):
            yield draft
            own_file(draft)  # a library may have made it anew
            sync(draft)
            os.replace(draft, path)
            sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)
