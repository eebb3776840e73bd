"""The home folder: the paths of the log, the adapters and the reports; and writing files safely.

A folder is a home if it has a file ``agentpref.db``. ``Home.create`` makes that file first, so that
two processes can create the same home at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from agentpref.errors import AgentprefError, NotAHome, NotKept

if TYPE_CHECKING:
    import sqlite3

DATABASE = "agentpref.db"
VARIABLE = "AGENTPREF_HOME"
DEFAULT = ".agentpref"

StrPath: TypeAlias = "str | os.PathLike[str]"


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
        """The keys that user ids are hashed with; readable by the owner only."""
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
            home.path.mkdir(parents=True, exist_ok=True)
            if not home.database.exists():
                found = {item.name for item in home.path.iterdir()}
                if found and DATABASE not in found:  # else another process is making the home
                    raise NotAHome(
                        f"{home.path} has {min(found)!r} and no {DATABASE}, so it is not an "
                        "agentpref home; choose an empty or a new folder"
                    )
                home.database.touch()
            home.adapters.mkdir(exist_ok=True)
            home.reports.mkdir(exist_ok=True)
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


def sync(path: Path) -> None:
    """Flush a file, or the list of files in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path, mode: int | None = None) -> None:
    """Copy a file to a new one, durably; ``mode`` is by default that of the source."""
    import shutil

    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fchmod(writer.fileno(), source.stat().st_mode & 0o777 if mode is None else mode)
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

    If the block raises, the draft is removed and ``path`` stays as it was.

    >>> with replacing(home.reports / "last.json") as draft:
    ...     draft.write_bytes(report)
    """
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)
