"""Opens the home that a command was told of, for reading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


@contextmanager
def reading(folder: Path | None) -> Iterator[sqlite3.Connection]:
    """Yield a read-only connection to an existing home, and close it.

    Raises:
        HomeError: there is no home at the folder, or it cannot be read.
    """
    from agentpref.home import Home
    from agentpref.record.database import connect, translated

    home = Home.open(folder)
    with translated(home), closing(connect(home, readonly=True)) as connection:
        yield connection
