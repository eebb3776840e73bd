"""The home folder: the paths of the log, the adapters and the reports; and writing files safely.

A folder is a home if it has a file ``agentpref.db``. ``Home.create`` makes that file first, so that
two processes can create the same home at once.

Who may read a home does not depend on the umask. Every file that may hold what people wrote is made
by :func:`open_private`: its owner alone reads and writes it (0600). Where the folder is shared with
a group on purpose, the group does too (0660): its group may write it, or it gives its group to what
is made in it (setgid). Revisions are for everybody to read, because an engine may run as another
user. So others may pass through the folder of a home (0711), but they cannot list it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from agentpref.errors import AgentprefError, NotAHome, NotKept
from agentpref.reads import Reads

if TYPE_CHECKING:
    import sqlite3

DATABASE = "agentpref.db"
VARIABLE = "AGENTPREF_HOME"
DEFAULT = ".agentpref"

StrPath: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True, slots=True)
class Home(Reads):
    """A home folder, by its absolute path. Its methods that read are those of :class:`Reads`."""

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
                home.path.chmod(_folder_mode(home.path) | _PASS)
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
            if not home.adapters.exists():
                home.adapters.mkdir(exist_ok=True)
                home.adapters.chmod(READABLE_FOLDER)
            make_private_folder(home.reports)
        except NotAHome:
            raise  # it is an OSError, too
        except OSError as error:
            raise NotAHome(
                f"cannot make a home in {home.path} ({error.strerror}); "
                "choose a folder that this user may write to"
            ) from error
        return home

    @classmethod
    def open(cls, path: Home | StrPath | None = None) -> Home:
        """Take a home, by its path or opened before; raise ``NotAHome`` if there is none."""
        if isinstance(path, Home):
            return path
        home = cls(cls.resolve(path))
        if not home.database.is_file():
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


READABLE_FOLDER, READABLE_FILE = 0o755, 0o644
"""The modes of the folders and files of revisions, which an engine of another user reads too."""

_PASS = 0o011
_OTHERS = 0o007


def open_private(path: StrPath, flags: int = os.O_RDWR) -> int:
    """Open a file that only its home's people may read, and make it if it is missing.

    Other users lose their access to an older file, too. As the ``opener`` of ``open``, it keeps
    what is written from the first byte on.

    >>> with open(home.spill, "ab", opener=open_private) as file:
    ...     file.write(line)
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        descriptor = os.open(path, flags | os.O_CREAT, 0o600)
        tighten(Path(path))
    else:
        os.fchmod(descriptor, _file_mode(os.fstat(descriptor), Path(path).parent))
    return descriptor


def make_private_folder(path: Path) -> None:
    """Make a folder inside a home for its people only; an existing one stays as it is."""
    if not path.is_dir():
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(_folder_mode(path.parent))


def tighten(path: Path) -> None:
    """Take a file from all other users, if an older agentpref or another program let them at it.

    What this process may not change stays as it is; ``agentpref doctor`` names it.
    """
    with suppress(OSError):
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) and found.st_mode & _OTHERS:
            path.chmod(_file_mode(found, path.parent))


def open_to_others(home: Home) -> list[Path]:
    """The files of a home that every user of the machine can use, without those of revisions."""
    found: list[Path] = []
    for folder, folders, files in os.walk(home.path):
        if Path(folder) == home.path and home.adapters.name in folders:
            folders.remove(home.adapters.name)
        for path in (Path(folder, name) for name in files):
            with suppress(FileNotFoundError):
                mode = os.lstat(path).st_mode
                if stat.S_ISREG(mode) and mode & _OTHERS:
                    found.append(path)
    return sorted(found)


def _is_shared(folder: os.stat_result) -> bool:
    """Whether a folder is shared with its group on purpose, and not with everybody as /tmp is."""
    mode = folder.st_mode
    return bool(mode & (stat.S_ISGID | stat.S_IWGRP)) and not mode & stat.S_IWOTH


def _file_mode(file: os.stat_result, folder: Path) -> int:
    around = folder.stat()
    return 0o660 if _is_shared(around) and file.st_gid == around.st_gid else 0o600


def _folder_mode(around: Path) -> int:
    found = around.stat()
    return 0o770 | found.st_mode & stat.S_ISGID if _is_shared(found) else 0o700


def enclosing_home(path: StrPath) -> Path | None:
    """The home that a path is, or is inside of, links resolved; ``None`` if it is in none.

    What a command writes for its user must not go there: it could replace the database.
    """
    real = Path(os.path.realpath(path))
    return next((up for up in (real, *real.parents) if (up / DATABASE).is_file()), None)


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
        raise NotKept(
            f"{place} cannot be written ({error.strerror or error}); free space on its disk, and "
            "let this user write the folder"
        ) from error


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
        tighten(draft)  # a library may have made it anew
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)
