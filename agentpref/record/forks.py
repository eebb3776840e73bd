"""Closes connections around a fork, and logs at the end of a forked child.

A child that inherits an open SQLite connection also inherits SQLite's belief in locks that it does
not have, and loses writes. So an object that owns a connection and a thread is called before each
fork, to let go of them, and after it on both sides. Objects are referred to weakly.

A signal handler may raise in here, between any two bytecodes. Python then prints the exception and
forks nevertheless. So each call can be made again, and each hook is registered twice: the second
one completes what an exception cut off.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

EXIT_SECONDS = 10.0
"""How long the end of a process waits for pending writes."""


class Guarded(Protocol):
    """Something that must not be in the middle of its work when the process forks.

    An exception may end each of the calls, which is then made again. Both sides get theirs even if
    all calls before the fork were ended.
    """

    def before_fork(self) -> None:
        """Finish the current work, close what must not cross the fork, and wait."""

    def after_fork_in_parent(self) -> None:
        """Continue."""

    def after_fork_in_child(self) -> None:
        """Start again: no other thread exists, and pending work is the parent's."""


ATTEMPTS = 100
"""How often a call before a fork is made, if exceptions end it."""

_guarded: weakref.WeakValueDictionary[int, Guarded] = weakref.WeakValueDictionary()
_forking = threading.local()  # keeps alive what a fork of this thread has called before it


def guard(thing: Guarded) -> None:
    """Call ``thing`` around every fork of this process, as long as ``thing`` lives."""
    _register_hooks()
    _guarded[id(thing)] = thing


@functools.cache
def _register_hooks() -> None:
    if hasattr(os, "register_at_fork"):
        for _ in range(2):
            os.register_at_fork(
                before=_before,
                after_in_parent=lambda: _after("after_fork_in_parent"),
                after_in_child=lambda: _after("after_fork_in_child"),
            )


def _before() -> None:
    state = _forking.__dict__
    if "things" not in state:
        things = [thing for ref in _guarded.valuerefs() if (thing := ref()) is not None]
        state |= {"ready": set(), "things": things}
    ended = None
    for thing in state["things"]:
        for _ in range(ATTEMPTS):
            if id(thing) in state["ready"]:
                break
            try:
                thing.before_fork()
                state["ready"].add(id(thing))
            except BaseException as error:  # of a signal handler: what it ended is done again
                ended = error
    if ended is not None:
        raise ended


def _after(call: str) -> None:
    for thing in _forking.__dict__.get("things", ()):
        getattr(thing, call)()
    _forking.__dict__.pop("things", None)


def let_go(lock: threading.RLock) -> None:
    """Release a lock as often as this thread has taken it, if it has."""
    with suppress(RuntimeError):
        while True:
            lock.release()


def at_child_exit(close: Callable[[float], None]) -> None:
    """Close at the end of a child of multiprocessing, which skips ``atexit``.

    In any other process this does nothing. ``close`` is a bound method; its object may die first.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        method = weakref.WeakMethod(close)

        def close_if_alive() -> None:
            if (close := method()) is not None:
                close(EXIT_SECONDS)

        Finalize(None, close_if_alive, exitpriority=0)
