"""Trials: canaries that updates begin by themselves, where a gain is likely and not proven.

A trial lasts while later updates find the gain likely. People's thumbs may end it, or promote it
(``regression.py``), and so may people. If thumbs or people ended a canary since live was made live,
no update begins another one: it takes a proof, or somebody's word.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from agentpref.serve import status
from agentpref.serve.status import ServingState

BEGUN, FADED = "a likely gain", "the gain is no longer likely"
"""How the reasons of the history begin."""


class Trial(NamedTuple):
    """What there is to know of trials beside what is live: the one that runs, and a veto."""

    canary: str | None = None
    vetoed: bool = False


def read(connection: sqlite3.Connection, state: ServingState) -> Trial:
    """Read the trial that runs, and whether a canary was ended since live was made live."""
    found, live = Trial(), None
    for entry in status.read_history(connection, state.namespace):
        if entry.live != live or entry.action == "promote":
            found, live = Trial(), entry.live
        elif entry.action == "canary" and entry.canary is None:
            found = Trial(None, found.vetoed or not entry.reason.startswith(FADED))
        elif entry.action == "canary":
            is_trial = entry.reason.startswith(BEGUN)
            found = Trial(entry.canary if is_trial else None, found.vetoed)
    return found if found.canary == state.canary else Trial(None, found.vetoed)


def end(connection: sqlite3.Connection, state: ServingState, why: str) -> bool:
    """End the trial that runs, if what serves is still ``state``; say whether one was ended."""
    if status.read_state(connection, state.namespace) != state:
        return False
    if read(connection, state).canary is None:
        return False
    new = state._replace(canary=None, weight=0.0)
    status.change(connection, new, "canary", f"{FADED}: {why}")
    return True
