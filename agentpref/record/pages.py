"""Reads what a namespace holds page by page, oldest first, for readers that take their time.

A cursor that stays open keeps SQLite from shortening its log of changes, and a notebook may look
at a row for hours. So a page is read whole, from one state of the home, and nothing is held between
two pages. A reading gives the rows that were there when it began, without those that are removed
meanwhile.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from typing import Any, NamedTuple, TypeAlias, TypeVar

from agentpref.errors import ConfigError
from agentpref.record.chains import Chains, read_feedback, read_run
from agentpref.record.messages import COMPARISON_COLUMNS, FEEDBACK_COLUMNS, RUN_COLUMNS
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run

PAGE = 256
"""How many rows, with all their messages, are in memory at a time."""

T = TypeVar("T")


Since: TypeAlias = "float | str | date | timedelta | None"
"""A time: POSIX seconds, ISO 8601 text, a date, or an age; a time without a zone is local."""


class Selection(NamedTuple):
    """Which rows to read; ``None`` selects all.

    ``since`` is a time (POSIX seconds), ``thread`` the id of a conversation, ``tag`` one of a run's
    tags (or ``"untagged"``), and ``limit`` how many of the newest rows.
    """

    namespace: str
    since: float | None = None
    thread: str | None = None
    tag: str | None = None
    limit: int | None = None


def selection(
    namespace: str,
    since: Since = None,
    limit: int | None = None,
    *,
    thread: str | None = None,
    tag: str | None = None,
) -> Selection:
    """Check what a notebook asks for.

    Raises:
        ConfigError: a time cannot be read, or a limit is not a number of rows.
    """
    if limit is not None and (type(limit) is not int or limit < 0):
        raise ConfigError(f"limit is {limit!r}; give a number of rows, or None for all")
    return Selection(namespace, None if since is None else _seconds(since), thread, tag, limit)


def _seconds(since: float | str | date | timedelta) -> float:
    """A time as POSIX seconds."""
    try:
        if isinstance(since, str):
            since = datetime.fromisoformat(since.strip().replace("Z", "+00:00"))
        if isinstance(since, timedelta):
            return datetime.now().timestamp() - since.total_seconds()
        if isinstance(since, date):
            since = since if isinstance(since, datetime) else datetime.combine(since, time())
            return since.timestamp()
        if not isinstance(since, bool) and math.isfinite(since):
            return float(since)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(
        f"since is {since!r}; give seconds since 1970, a date, a datetime, text such as "
        "'2026-11-19', or a timedelta for an age"
    )


def runs(connection: sqlite3.Connection, which: Selection) -> Iterator[Run]:
    """Read the runs of a namespace."""
    return _pages(connection, "run", "run", RUN_COLUMNS, which, read_run)


def feedback(connection: sqlite3.Connection, which: Selection) -> Iterator[Feedback]:
    """Read what was said of the runs of a namespace, one by one."""
    joined = "feedback CROSS JOIN run USING (run_id)"
    return _pages(connection, "feedback", joined, FEEDBACK_COLUMNS, which, read_feedback)


def comparisons(connection: sqlite3.Connection, which: Selection) -> Iterator[Comparison]:
    """Read the comparisons between runs of a namespace; a thread or a tag is that of ``run_a``."""
    joined = "comparison CROSS JOIN run ON run_id = run_a"
    columns = COMPARISON_COLUMNS
    return _pages(connection, "comparison", joined, columns, which, lambda row, _: Comparison(*row))


def updates(connection: sqlite3.Connection, which: Selection) -> Iterator[tuple[Any, ...]]:
    """Read of each update of a namespace its id, time, parent, candidate and verdict."""
    columns = ("update_id", "created_at", "parent", "candidate", "verdict")
    return _pages(connection, "updates", "updates", columns, which, lambda row, _: row)


def _pages(
    connection: sqlite3.Connection,
    table: str,
    joined: str,
    columns: tuple[str, ...],
    which: Selection,
    read: Callable[[tuple[Any, ...], Chains], T],
) -> Iterator[T]:
    """Read the rows of a table that belong to a namespace, by the joined table of runs."""
    owner = "updates" if table == "updates" else "run"
    found = f"FROM {joined} WHERE {owner}.namespace = :namespace AND {table}.rowid <= :last"
    if which.thread is not None:
        found += " AND run.thread_id = :thread"
    if which.tag is not None:
        found += (
            " AND (EXISTS (SELECT 1 FROM json_each(run.tags) WHERE value = :tag)"
            " OR :tag = 'untagged' AND run.tags = '[]')"
        )
    key = "update_id" if table == "updates" else f"{table}_id"
    # Not the rowid: forgetting somebody compacts the file, which numbers the rows anew.
    place = f"{table}.created_at, {table}.{key}"
    (last,) = connection.execute(f"SELECT coalesce(max(rowid), 0) FROM {table}").fetchone()
    values: dict[str, Any] = {**which._asdict(), "last": last, "page": PAGE}
    values["at"], values["id"] = -math.inf if which.since is None else which.since, ""
    # The first condition says nothing more, and lets SQLite begin at the time.
    rest = f"{found} AND {table}.created_at >= :at AND ({place}) {{}} (:at, :id)"
    if which.limit == 0:
        return
    if which.limit is not None:
        newest = f"ORDER BY {table}.created_at DESC, {table}.{key} DESC LIMIT :limit - 1, 1"
        first = connection.execute(
            f"SELECT {place} {rest.format('>=')} {newest}", values
        ).fetchone()
        if first is not None:  # else there are fewer, and all of them are read
            values["at"], values["id"] = first
    selected = ", ".join(f"{table}.{name}" for name in columns)
    query, after = f"SELECT {place}, {selected} {rest} ORDER BY {place} LIMIT :page", ">="
    while True:
        with Store(connection).one_state():
            rows = connection.execute(query.format(after), values).fetchall()
            messages = Chains(connection)
            page = [read(row[2:], messages) for row in rows]
        yield from page
        if len(rows) < PAGE:
            return
        (values["at"], values["id"]), after = rows[-1][:2], ">"
