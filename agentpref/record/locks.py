"""Holding a home for work that must not meet its like: an update, or a removal.

An update reads the record, trains for minutes and then publishes; what is removed meanwhile would
come back in its weights. The system lets go of the lock when the process dies. Knows nothing of
what is done under it; recording goes on beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agentpref.errors import UpdateRunning
from agentpref.home import Home


@contextmanager
def exclusive(home: Home) -> Iterator[None]:
    """Hold the home for one update or one removal.

    Raises:
        UpdateRunning: another one holds it; there is no waiting for its end.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(home.path / "update.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UpdateRunning(
            f"another update of {home.path}, or a removal from it, is running; wait for it to "
            "end, then try again"
        ) from error
    try:
        yield
    finally:
        lock.release()
