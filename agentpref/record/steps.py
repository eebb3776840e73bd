"""How a step of the schema is declared: its number, and whether older programs must stop at it."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

Change: TypeAlias = Callable[[sqlite3.Connection], None]


class Step(NamedTuple):
    """One change of the schema; ``version`` is what the database has after it.

    ``breaking`` says that a program which does not know the step must stop using the database, even
    if it has it open.
    """

    version: int
    name: str
    change: Change
    breaking: bool = False


STEPS: list[Step] = []


def step(change: Change, *, breaking: bool = False) -> Change:
    """Add a change, under the next number, after which older programs still work.

    Such a change only adds: tables, indices, views, columns that may be null or have a default.
    What older programs read keeps its meaning.
    """
    STEPS.append(Step(len(STEPS) + 1, change.__name__, change, breaking))
    return change


breaking_step = functools.partial(step, breaking=True)
"""Add a change, under the next number, that older programs must not use."""

MIGRATION = (
    "CREATE TABLE IF NOT EXISTS migration "
    "(version INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at REAL NOT NULL)"
)
"""The table of the steps that were applied."""
