"""Which keys a home names its users with, and what happens when the file of keys is lost.

The database has a fingerprint of each key: a keyed hash of a constant, which says nothing of the
key or of the users. So a home that has users notices that ``user.keys`` is missing, or is another
home's. A new key would give every user a second name, and forgetting would find nobody. The home
then makes no key. It goes on logging, with one name for all users.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing

from agentpref.errors import CorruptHome, NotKept
from agentpref.home import Home
from agentpref.record.database import connect, transaction, translated, warn
from agentpref.record.ingest.pseudonyms import UNNAMED, Pseudonyms
from agentpref.record.sums import counted

_CURE = "restore it from a backup of the home"


class KeysLost(CorruptHome):
    """The keys that a home names its users with are not in its file ``user.keys``."""


def names_of(home: Home) -> Pseudonyms:
    """Return the names to log under; where the keys are lost, one name for all, with a warning.

    Raises:
        HomeError, NotKept: the database or the file of keys cannot be read.
    """
    with translated(home), closing(connect(home)) as connection:
        try:
            return registered(connection)
        except KeysLost as lost:
            warn("%s. Until then, all users are logged as %r", lost, UNNAMED)
            return Pseudonyms(())


def registered(connection: sqlite3.Connection) -> Pseudonyms:
    """Read the keys of a home, and note their fingerprints; make a key only while it has no users.

    Raises:
        KeysLost: there are users, and the key that names them is missing.
        CorruptHome: the file does not hold keys.
        NotKept: it cannot be read or made.
    """
    home = Home.of(connection)
    known = _known(connection)
    if not home.user_keys.exists() and _has_users(connection):
        raise KeysLost(f"{home.user_keys} is missing, and the home has users; {_CURE}")
    names = Pseudonyms.of(home)
    first, *_ = held = names.fingerprints()
    if known and first not in known and _has_users(connection):
        raise KeysLost(f"{home.user_keys} holds another key than the home's users have; {_CURE}")
    if not known.issuperset(held):
        with transaction(connection), counted(connection, "user_key"):
            if first not in known:  # nobody was named with the keys from before
                connection.execute("DELETE FROM user_key")
            rows = [(fingerprint,) for fingerprint in held]
            connection.executemany("INSERT OR IGNORE INTO user_key VALUES (?)", rows)
    return names


def complete(connection: sqlite3.Connection) -> Pseudonyms:
    """Like :func:`registered`, and raise ``KeysLost`` also if a merged home's key is missing."""
    names = registered(connection)
    missing = _known(connection).difference(names.fingerprints())
    if missing:
        path = Home.of(connection).user_keys
        raise KeysLost(f"{path} lacks {len(missing)} of the keys that users have; {_CURE}")
    return names


def keys_problem(connection: sqlite3.Connection) -> str | None:
    """Say what is wrong with the file of keys of a home; nothing is written."""
    home = Home.of(connection)
    known = _known(connection)
    if not home.user_keys.exists():
        lost = _has_users(connection)
        return f"the file is missing, so no user can be forgotten; {_CURE}" if lost else None
    try:
        missing = known.difference(Pseudonyms.of(home).fingerprints())
    except (CorruptHome, NotKept) as error:
        return str(error)
    if missing and _has_users(connection):
        return f"it lacks {len(missing)} of the keys that users have; {_CURE}"
    return None


def _known(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT fingerprint FROM user_key")}


def _has_users(connection: sqlite3.Connection) -> bool:
    """Whether any row has the name of a user. Seldom asked: it may read whole tables."""
    tables = ("run", "feedback", "comparison", "forgotten")
    named = (
        f"EXISTS (SELECT 1 FROM {table} WHERE user_id IS NOT NULL AND user_id != ?1)"
        for table in tables
    )
    (found,) = connection.execute(f"SELECT {' OR '.join(named)}", (UNNAMED,)).fetchone()
    return bool(found)
