"""The home folder: the paths of the log, the adapters and the reports; and writing files safely.

A folder is a home if it has a file ``agentpref.db``. ``Home.create`` makes that file first, so that
two processes can create the same home at once.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.errors import AgentprefError, HomeError, NotAHome, NotKept
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
from agentpref.owners import make_private_folder as make_private_folder
from agentpref.owners import open_private as open_private
from agentpref.owners import own_folder as own_folder
from agentpref.owners import tighten as tighten

if TYPE_CHECKING:
    import sqlite3

VARIABLE = "AGENTPREF_HOME"
DEFAULT = ".agentpref"

_PASS = 0o011


@dataclass(frozen=True, slots=True)
class Home:
    """A home folder, by its absolute path."""

    path: Path

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.path / DATABASE

    @property
    def adapters(self) -> Path:
        """The folder of published revisions."""
        return self.path / "adapters"

    @property
    def reports(self) -> Path:
        """The folder of update reports."""
        return self.path / "reports"

    @property
    def training(self) -> Path:
        """The folder of interrupted updates; missing if there are none."""
        return self.path / "training"

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
        """The absolute path of ``path``, else ``$AGENTPREF_HOME``, else ``./.agentpref``."""
        chosen = path if path is not None else os.environ.get(VARIABLE) or DEFAULT
        return Path(os.path.abspath(os.path.expanduser(chosen)))

    @classmethod
    def create(cls, path: StrPath | None = None) -> Home:
        """Make a home in a missing or empty folder; an existing home stays as it is.

        Raises:
            NotAHome: the path is a file, a folder of something else, or cannot be written.
        """
        home = cls(cls.resolve(path))
        try:
            if not home.path.exists():
                home.path.mkdir(parents=True, exist_ok=True)
                home.path.chmod(folder_mode(home.path) | _PASS)
            if not home.database.exists():
                if (outer := enclosing_home(home.path)) is not None:
                    raise NotAHome(f"{home.path} is inside the home {outer}; choose another folder")
                found = {item.name for item in home.path.iterdir()}
                if found and DATABASE not in found:  # else another process is making the home
                    raise NotAHome(
                        f"{home.path} has {min(found)!r} and no {DATABASE}, so it is not an "
                        "agentpref home; choose an empty or a new folder"
                    )
                os.close(open_private(home.database))
            make_readable_folder(home.adapters)
            make_private_folder(home.reports)
        except NotAHome:
            raise  # it is an OSError, too
        except OSError as error:
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
        """
        if isinstance(path, Home):
            return path
        home = cls(cls.resolve(path))
        try:
            is_home = home.database.is_file()
        except PermissionError as error:
            raise HomeError(
                f"{home.path} cannot be entered ({error.strerror}); {access_cure(home.path)}"
            ) from error
        if not is_home:
            raise NotAHome(
                f"{home.path} is not an agentpref home (it has no {DATABASE}); name another folder "
                "with --home or AGENTPREF_HOME, or make one with `agentpref init`"
            )
        return home

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Home:
        """The home whose database a connection has open."""
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

    with source.open("rb") as reader, open(target, "xb", opener=open_private) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        if mode is not None:
            os.fchmod(writer.fileno(), mode)
        os.fsync(writer.fileno())


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise the system's errors as ``NotKept``: the block writes to ``place`` and cannot."""
    try:
        yield
    except AgentprefError:
        raise  # some of ours are OSErrors too
    except OSError as error:
        cure = "free space on its disk, and let this user write the folder"
        if error.errno in (errno.EACCES, errno.EPERM):
            cure = access_cure(place)
        raise NotKept(f"{place} cannot be written ({error.strerror or error}); {cure}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: yield a draft, then sync it and rename it to ``path``.

    If the block raises, the draft is removed and ``path`` stays as it was. The draft is an empty
    file that :func:`open_private` made.

    >>> with replacing(home.reports / "last.json") as draft:
    ...     draft.write_bytes(report)
    """
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        os.close(open_private(draft))
        yield draft
        own_file(draft)  # a library may have made it anew
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)
