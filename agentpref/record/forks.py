"""Keeps what cannot cross a fork from crossing it, and lets it end with a forked child.

A child that inherits an open SQLite connection inherits SQLite's belief in locks that the child
does not hold, and with them lost writes. So whatever owns a connection and a thread is made to let
go of them before the fork, in the parent, and starts anew on either side. Knows nothing of what it
guards, and keeps nothing alive.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

EXIT_SECONDS = 10.0
"""How long the end of a process waits for what is still to be written."""


class Guarded(Protocol):
    """Something that must not be in the middle of its work when the process forks."""

    def before_fork(self) -> None:
        """Finish what is in hand, let go of it, and stay so."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Begin anew: no other thread exists, and all that was waiting is the parent's."""


_guarded: weakref.WeakValueDictionary[int, Guarded] = weakref.WeakValueDictionary()
_held = threading.local()


def guard(thing: Guarded) -> None:
    """Call ``thing`` around every fork of this process for as long as it lives."""
    _register_hooks()
    _guarded[id(thing)] = thing


@functools.cache
def _register_hooks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)


def _before() -> None:
    things = [thing for ref in _guarded.valuerefs() if (thing := ref()) is not None]
    for thing in things:
        thing.before_fork()
    _held.things = things


def _in_parent() -> None:
    for thing in _held.__dict__.pop("things", ()):
        thing.after_fork_in_parent()


def _in_child() -> None:
    for thing in _held.__dict__.pop("things", ()):
        thing.after_fork_in_child()


def at_child_exit(close: Callable[[float], None]) -> None:
    """Close with a child of multiprocessing, which ends by ``os._exit`` and so skips ``atexit``.

    Anywhere else this does nothing. ``close`` is a bound method, and its object is not kept alive.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, _close_if_alive, (weakref.WeakMethod(close),), exitpriority=0)


def _close_if_alive(method: weakref.WeakMethod[Callable[[float], None]]) -> None:
    close = method()
    if close is not None:
        close(EXIT_SECONDS)
