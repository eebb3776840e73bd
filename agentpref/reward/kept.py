"""The files of a home's reward models, and the features that they are fitted on.

A model is a file of safetensors that is named by its content and never changes; the newest one of a
namespace counts. A removal deletes all files of the folder: what is fitted afterwards has not seen
what is gone.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.errors import RewardError
from agentpref.home import Home, open_private, writing
from agentpref.learn.kept_arrays import keep_arrays, make_folder, read_arrays
from agentpref.record.database import insert_or_ignore, transaction
from agentpref.record.messages import as_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEPT = 5
"""So many models of a namespace are kept, the newest."""

_NAME = re.compile(r"reward-(\d{6})-([0-9a-f]{12})")
_AT_ONCE = 500


class Kept(NamedTuple):
    """A reward model as it is kept: its name, its file, its arrays, and what is said of it."""

    name: str
    path: Path
    arrays: Mapping[str, NDArray[Any]]
    about: Mapping[str, Any]


class Shelf:
    """The reward models of a namespace."""

    def __init__(self, home: Home, namespace: str) -> None:
        self.home, self.namespace = home, namespace
        self.folder = home.rewards_of(namespace)

    def names(self) -> list[str]:
        """The names of the models, the oldest first."""
        files = self.folder.glob("reward-*.safetensors") if self.folder.is_dir() else []
        return sorted(file.stem for file in files if _NAME.fullmatch(file.stem))

    def read(self, name: str | None = None) -> Kept:
        """Read a model, or the newest.

        Raises:
            RewardError: there is none, or its file is not the one that was written.
        """
        names = self.names()
        if not names:
            raise RewardError(
                f"namespace {self.namespace!r} has no reward model: none was fitted, or a removal "
                "deleted it; run `agentpref reward fit`"
            )
        if name is not None and name not in names:
            raise RewardError(f"no reward model {name!r}; there are: {', '.join(names)}")
        chosen = name or names[-1]
        path = self.folder / f"{chosen}.safetensors"
        return Kept(chosen, *read_arrays(path))

    def write(self, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> Kept:
        """Keep a model as the newest; of the older ones, :data:`KEPT` stay."""
        names = self.names()
        number = 1 + int(names[-1].split("-")[1]) if names else 1
        path = keep_arrays(self.home, self.namespace, f"reward-{number:06d}", arrays, about)
        for old in [*names, path.stem][:-KEPT]:
            (self.folder / f"{old}.safetensors").unlink(missing_ok=True)
        return Kept(path.stem, path, arrays, about)

    @contextmanager
    def features(self, numbers: str) -> Iterator[FeatureFile]:
        """The features that were computed for this namespace under a base, for a block."""
        path = make_folder(self.home, self.namespace) / "features.db"
        with writing(path):
            if not path.exists():
                os.close(open_private(path))
            with closing(sqlite3.connect(path, isolation_level=None)) as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS feature"
                    " (base TEXT, key TEXT, vector BLOB, PRIMARY KEY (base, key)) WITHOUT ROWID"
                )
                yield FeatureFile(connection, numbers)


class FeatureFile:
    """Features of answers under one base; see :class:`agentpref.learn.features.FeatureMemory`."""

    def __init__(self, connection: sqlite3.Connection, base: str) -> None:
        self._connection, self._base = connection, base
        self._used: set[str] = set()

    def find(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """Those that are known."""
        self._used.update(keys)
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = as_json([*keys[start : start + _AT_ONCE]])
            query = """SELECT key, vector FROM feature
                WHERE base = ? AND key IN (SELECT value FROM json_each(?))"""
            found |= dict(self._connection.execute(query, (self._base, some)).fetchall())
        return found

    def keep(self, found: Mapping[str, bytes]) -> None:
        """Keep some more."""
        with transaction(self._connection):
            rows = [(self._base, key, vector) for key, vector in found.items()]
            insert_or_ignore(self._connection, "feature", ("base", "key", "vector"), rows)

    def drop_unused(self) -> None:
        """Delete what was not asked for: of other bases, and of answers that count no more."""
        query = """DELETE FROM feature
            WHERE base <> ? OR key NOT IN (SELECT value FROM json_each(?))"""
        self._connection.execute(query, (self._base, as_json(sorted(self._used))))
