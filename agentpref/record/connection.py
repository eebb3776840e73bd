"""A connection to the database of a home, which knows that home.

SQLite knows a database by its real path. If the database in a home is a link, nothing else of the
home lies where it leads: no keys, no spill, no adapters.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from agentpref.home import Home


class HomeConnection(sqlite3.Connection):
    """A connection whose home :meth:`agentpref.home.Home.of` finds."""

    home: Home


def connection_to(
    home: Home, place: Path | str, timeout: float, *, uri: bool = False
) -> sqlite3.Connection:
    """Connect to a home's database, by its path or a URI, in autocommit.

    It may move from thread to thread, and waits ``timeout`` seconds for the locks of others.
    """
    connection = sqlite3.connect(
        place,
        uri=uri,
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,
        factory=HomeConnection,
    )
    connection.home = home
    return connection
