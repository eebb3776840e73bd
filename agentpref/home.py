"""The home folder: where a log, its adapters and its reports live; and writing files safely.

A folder is a home if it holds ``agentpref.db``. That file is made first, so that another process
that looks meanwhile already sees a home.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from agentpref.errors import NotAHome

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
        """The folder of interrupted training; there is none unless something was interrupted."""
        return self.path / "training"

    @property
    def holds(self) -> Path:
        """The folder of pins, which say what process has loaded which revisions."""
        return self.path / "holds"

    @property
    def spill(self) -> Path:
        """The file of records that wait until the database can take them."""
        return self.path / "spill.jsonl"

    @property
    def refused(self) -> Path:
        """The file of records of the spill that the database refused, for the operator."""
        return self.path / "refused.jsonl"

    @property
    def user_keys(self) -> Path:
        """The keys of the hashes that stand for user ids; only their owner can read them."""
        return self.path / "user.keys"

    @staticmethod
    def resolve(path: StrPath | None = None) -> Path:
        """Return the folder: ``path``, else ``$AGENTPREF_HOME``, else ``./.agentpref``."""
        chosen = path if path is not None else os.environ.get(VARIABLE) or DEFAULT
        return Path(os.path.abspath(os.path.expanduser(chosen)))

    @classmethod
    def create(cls, path: StrPath | None = None) -> Home:
        """Make a home of a missing or empty folder, or open the home that is there.

        Raises:
            NotAHome: the path is a file, a folder of something else, or cannot be written.
        """
        home = cls(cls.resolve(path))
        try:
            home.path.mkdir(parents=True, exist_ok=True)
            if not home.database.exists():
                _require_empty(home.path)
                home.database.touch()
            home.adapters.mkdir(exist_ok=True)
            home.reports.mkdir(exist_ok=True)
        except OSError as error:
            if isinstance(error, NotAHome):
                raise
            raise NotAHome(
                f"{home.path} cannot be made a home ({error.strerror}); "
                "choose a folder that this user may write"
            ) from error
        return home

    @classmethod
    def open(cls, path: StrPath | None = None) -> Home:
        """Open an existing home.

        Raises:
            NotAHome: there is no home at the path.
        """
        home = cls(cls.resolve(path))
        if not home.database.is_file():
            raise NotAHome(
                f"{home.path} is not an agentpref home (it has no {DATABASE}); name another folder "
                "with --home or AGENTPREF_HOME, or make one with `agentpref init`"
            )
        return home

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Home:
        """Return the home whose database a connection has open."""
        query = "SELECT file FROM pragma_database_list WHERE name = 'main'"
        (file,) = connection.execute(query).fetchone()
        return cls(Path(file).parent)


def sync(path: Path) -> None:
    """Make the content of a file, or the list of a folder's files, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: yield a draft beside it, which then takes its place.

    After the block the draft is synced and renamed to ``path``; if the block raises, it is removed
    and ``path`` stays as it was.

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


def _require_empty(folder: Path) -> None:
    found = {item.name for item in folder.iterdir()}
    if found and DATABASE not in found:  # else another process was making it a home just now
        raise NotAHome(
            f"{folder} holds {min(found)!r} and no {DATABASE}, so it is not an agentpref home; "
            "choose an empty or a new folder"
        )
