"""Letting runs go when they are old enough, with all that was said of them.

Nothing is tainted: to have learned from what has since expired is no wrong. Age is told by clocks,
and clocks go wrong, so a removal that only a wrong clock would explain is refused.
"""

from __future__ import annotations

import sqlite3
import time

from agentpref.errors import ConfigError, ImplausibleClock
from agentpref.home import Home, StrPath
from agentpref.record.database import transaction
from agentpref.record.deletion.removal import Removed, choose, delete, removal
from agentpref.types import Progress

TOLERANCE_SECONDS = 3600.0
"""How far the newest run may lie in the future: hosts' clocks differ."""


def expire(
    home: Home | StrPath | None,
    *,
    older_than: float,
    force: bool = False,
    progress: Progress | None = None,
) -> Removed:
    """Remove the runs that are older than ``older_than`` seconds, and what was said of them.

    A comparison goes with the older of its runs. Messages that younger runs hold too stay.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        older_than: the age in seconds, above 0.
        force: remove even where the clock looks wrong, or nothing would be left.
        progress: called with ``(stage, done, total)`` as work goes on.

    Raises:
        NotAHome: there is no home in the folder.
        ConfigError: ``older_than`` is no age.
        ImplausibleClock: the newest run lies in the future, or every run would go.
        UpdateRunning: an update holds the home.
        NotKept: as for :func:`~agentpref.record.deletion.forget.forget`.
    """
    if not 0 < older_than < float("inf"):
        raise ConfigError(f"older_than is {older_than!r}, but must be above 0, in seconds")
    place = Home.open(home)
    tell: Progress = progress or (lambda stage, done, total: None)
    with removal(place, tell) as connection, transaction(connection):
        return _remove(connection, older_than, force)


def _remove(connection: sqlite3.Connection, older_than: float, force: bool) -> Removed:
    now = time.time()
    if not force:
        _require_plausible(connection, now, now - older_than)
    choose(connection, "created_at < :before", "0", {"before": now - older_than})
    return delete(connection)


def _require_plausible(connection: sqlite3.Connection, now: float, before: float) -> None:
    (newest,) = connection.execute("SELECT max(created_at) FROM run").fetchone()
    if newest is None:
        return
    if newest > now + TOLERANCE_SECONDS:
        raise ImplausibleClock(
            f"the newest run was recorded {newest - now:,.0f} s after this clock's now; nothing "
            "was removed; set the clock, or force the removal"
        )
    if newest < before:
        raise ImplausibleClock(
            f"the newest run is {now - newest:,.0f} s old by this clock, so that none would be "
            "left; nothing was removed; set the clock, or force the removal"
        )
