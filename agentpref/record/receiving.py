"""Takes in rows that other logs recorded, on behalf of the log of one namespace.

Rows come from elsewhere, so nothing in them is believed but the ids: their times are moved to the
clock of this machine, and are never later than the present, so that what was said before its user
was forgotten stays forgotten. A judgement may name any run; that of another namespace is nobody's
to judge here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from agentpref.errors import AgentprefError, LogClosed, NotKept, UnknownRun
from agentpref.home import Home
from agentpref.record.database import connect, translated
from agentpref.record.finding import find, unknown_run
from agentpref.record.ingest import CLOCK_STEP_SECONDS, FromApp, RawRun
from agentpref.record.rows import entry_of
from agentpref.record.writer import Writer
from agentpref.types import RETRACTION, Comparison, Feedback


def receive(
    home: Home, namespace: str, writer: Writer, rows: Sequence[Any], ahead: float
) -> list[AgentprefError | None]:
    """Write rows; see :meth:`agentpref.record.log.Log.receive`."""
    outcomes: list[AgentprefError | None] = [None] * len(rows)
    entries: dict[int, FromApp] = {}
    now, step = time.time(), ahead if abs(ahead) > CLOCK_STEP_SECONDS else 0.0
    for place, row in enumerate(rows):
        read = _read(row, namespace)
        if isinstance(read, AgentprefError):
            outcomes[place] = read
        else:
            entries[place] = _at(read, now, step)
    for place, refusal in _foreign(home, namespace, entries).items():
        outcomes[place] = refusal
        del entries[place]
    for place, error in zip(entries, writer.commit_all([*entries.values()]), strict=True):
        if isinstance(error, NotKept | LogClosed):
            raise error.with_traceback(None)
        outcomes[place] = error
    return outcomes


def _read(row: Any, namespace: str) -> FromApp | AgentprefError:
    try:
        return entry_of(row, namespace)
    except AgentprefError as error:
        return error


def _at(entry: FromApp, now: float, step: float) -> FromApp:
    at = min(entry.created_at - step, now)
    if at == entry.created_at:
        return entry
    return (
        entry._replace(created_at=at)
        if isinstance(entry, RawRun)
        else replace(entry, created_at=at)
    )


def _foreign(
    home: Home, namespace: str, entries: Mapping[int, FromApp]
) -> dict[int, AgentprefError]:
    """Refuse judgements of runs that another namespace has. Runs that are not there yet pass."""
    named = {
        place: names
        for place, entry in entries.items()
        if not isinstance(entry, RawRun) and (names := _judged(entry))
    }
    refused: dict[int, AgentprefError] = {}
    if not named:
        return refused
    query = "SELECT namespace FROM run WHERE run_id = ?"
    with translated(home), closing(connect(home, readonly=True)) as connection:
        for place, names in named.items():
            for name in names:
                try:
                    found = find(connection, name, entries[place].created_at)
                except UnknownRun:
                    continue
                if connection.execute(query, (found,)).fetchone() != (namespace,):
                    refused[place] = unknown_run(name)
    return refused


def _judged(entry: Feedback | Comparison) -> list[str]:
    if isinstance(entry, Comparison):
        return [entry.run_a, entry.run_b]
    other = entry.value.get("against") if isinstance(entry.value, Mapping) else None
    if entry.key == RETRACTION and isinstance(other, str):
        return [entry.run_id, other]
    return [entry.run_id]
