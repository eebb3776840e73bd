"""Merges a place of segments into a home: what other homes shipped, each row once.

1. Tombstones first: forget here who was forgotten there.
2. Each segment that this home has not seen is checked as a whole: its name, its keys, every row. A
   segment that is damaged, or holds what no log writes, is refused by name, and gives nothing.
3. Its rows are written as those of a spill are. What the home has stays; rows of a user who was
   forgotten here stay out. A segment is seen when all its rows are settled.
4. Segments that hold what was forgotten here are replaced in the place.

A segment that judges runs of another one that is not there yet waits for it, and is read again by
the next merge. A merge may be killed anywhere and done again.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from agentpref.errors import (
    AgentprefError,
    ExchangeError,
    ForgottenUser,
    InvalidMessage,
    RecordError,
    UnknownRun,
    described,
)
from agentpref.home import Home
from agentpref.record.database import connect, require_known_schema, transaction, translated
from agentpref.record.deletion.forget import adopt
from agentpref.record.deletion.removal import merging
from agentpref.record.ingest import Ingest, RawRun
from agentpref.record.ingest.pseudonyms import AsGiven
from agentpref.record.keys import registered
from agentpref.record.messages import RunRow, StoredRecord, as_json
from agentpref.record.rows import entry_of
from agentpref.record.spill import drain
from agentpref.record.store import Store
from agentpref.record.transfer.merge import NAMED, Counts, Merged
from agentpref.record.transfer.places import Place
from agentpref.record.transfer.segments import FORGOTTEN, ROWS, Segment, is_of, unpacked
from agentpref.record.transfer.ship import Shipment, clean, marks
from agentpref.record.transfer.shipped import Shipped
from agentpref.types import Feedback, Progress

_BATCH = 1_000
"""Rows that one transaction writes at most."""


def gather(home: Home, url: str, tell: Progress) -> Merged:
    """Merge a place of segments; see :func:`agentpref.record.transfer.merge.merge`."""
    place = Place(url)
    merged = Merged(place.url)
    with merging(home), closing(Shipped(home, place.url)) as shipped:
        drain(home)
        names = [name for name in place.names() if name not in shipped.seen()]
        _forget(home, place, [n for n in names if is_of(n, FORGOTTEN)], shipped, merged, tell)
        waiting = [name for name in names if is_of(name, ROWS)]
        suspects: list[str] = []
        with translated(home), closing(connect(home)) as connection:
            keys = registered(connection).fingerprints()
            left = len(waiting) + 1
            while len(waiting) < left:  # a segment may have what an older one judges
                left, waiting = len(waiting), _merge(
                    connection, home, place, waiting, keys, shipped, merged, suspects, tell
                )  # fmt: skip
            merged.waiting = waiting
            shipment = Shipment(place.url)
            clean(connection, place, shipped, shipment, tell, suspects)
            merged.replaced = shipment.replaced
            for name, why in shipment.unreadable.items():
                what = f"it was not searched for what was forgotten here: {why}"
                merged.refused.setdefault(name, what)
    return merged


def _forget(
    home: Home,
    place: Place,
    names: Sequence[str],
    shipped: Shipped,
    merged: Merged,
    tell: Progress,
) -> None:
    """Forget here who was forgotten elsewhere; a clock that is ahead forgets nothing to come."""
    now, theirs = time.time(), dict[str, float]()
    read: list[str] = []
    for name in names:
        segment = _segment(place, name, merged)
        if segment is None:
            continue
        for row in segment.rows:
            user, at = (
                (row.get(key) for key in ("user_id", "at")) if isinstance(row, dict) else (0, 0)
            )
            if isinstance(user, str) and isinstance(at, float):
                theirs[user] = max(theirs.get(user, float("-inf")), min(at, now))
        read.append(name)
    with translated(home), closing(connect(home)) as connection:
        ours = dict(connection.execute("SELECT user_id, at FROM forgotten"))
    new = {user: at for user, at in theirs.items() if ours.get(user, float("-inf")) < at}
    merged.tombstones, merged.forgot = len(new), adopt(home, new, tell) if new else None
    for name in read:
        shipped.see(name)


def _merge(
    connection: sqlite3.Connection,
    home: Home,
    place: Place,
    names: Sequence[str],
    keys: Sequence[str],
    shipped: Shipped,
    merged: Merged,
    suspects: list[str],
    tell: Progress,
) -> list[str]:
    """Merge segments; return those that wait for a run that is not here."""
    waiting = []
    for done, name in enumerate(names):
        tell("merge segments", done, len(names))
        segment = _segment(place, name, merged)
        if segment is None:
            continue
        try:
            records = _records(segment, keys)
        except AgentprefError as error:
            merged.refused[name] = str(error)
            continue
        outcomes: list[tuple[str, str, str]] = []
        for at in range(0, len(records), _BATCH):
            with transaction(connection):
                require_known_schema(connection, home)
                outcomes += _store(connection, records[at : at + _BATCH])
        fates = {fate for _, _, fate in outcomes}
        if "waits" in fates:
            waiting.append(name)
        if "forgotten" in fates:
            suspects.append(name)
        _count(merged, outcomes)
        if "waits" not in fates:
            shipped.done(marks(segment.rows))  # the place has them: they need not be shipped there
            shipped.see(name)
    return waiting


def _segment(place: Place, name: str, merged: Merged) -> Segment | None:
    try:
        data = place.read(name)
        return None if data is None else unpacked(name, data)  # None: somebody replaced it just now
    except ExchangeError as error:
        merged.refused[name] = str(error)
        return None


def _records(segment: Segment, keys: Sequence[str]) -> list[StoredRecord]:
    """Check all rows of a segment; raise for the first that no home would have shipped."""
    records: list[StoredRecord] = []
    ingests: dict[str, Ingest] = {}  # each remembers the messages that it has linked
    has_users = False
    for number, row in enumerate(segment.rows, 2):
        try:
            records.append(_record(row, ingests))
        except RecordError as error:
            raise ExchangeError(f"line {number}: {error}") from error
        has_users |= row.get("user_id") is not None
    if has_users and not {*segment.keys} <= {*keys}:
        raise ExchangeError(
            "its users are named under another key than this home's, so that they could not be "
            "forgotten here; merge that home's folder once (`agentpref merge FOLDER`), which "
            "brings its key, then merge the segments again"
        )
    return records


def _record(row: Any, ingests: dict[str, Ingest]) -> StoredRecord:
    entry, namespace = entry_of(row, ""), ""
    if isinstance(entry, RawRun):
        namespace = row.get("namespace")
        if not isinstance(namespace, str) or not namespace or not namespace.isprintable():
            raise InvalidMessage(f"namespace is {described(namespace)}, and not printable text")
    ingest = ingests.setdefault(namespace, Ingest(namespace, AsGiven()))
    return ingest.prepare(entry)


def _store(
    connection: sqlite3.Connection, records: Sequence[StoredRecord]
) -> list[tuple[str, str, str]]:
    """Write rows; return for each its table, its id and what became of it."""
    store, known = Store(connection), _known(connection, records)
    runs = [record for record in records if isinstance(record, RunRow)]
    refused = iter(store.add_runs(runs) if runs else ())
    outcomes = []
    for record in records:
        table, name = _key(record)
        error: RecordError | None = None
        if isinstance(record, RunRow):
            error = next(refused)
        else:
            try:
                if isinstance(record, Feedback):
                    store.add_feedback(record)
                else:
                    store.add_comparison(record)
            except RecordError as refusal:
                error = refusal
        if error is None:
            fate = "known" if (table, name) in known else "added"
        elif isinstance(error, ForgottenUser):
            fate = "forgotten"
        else:
            fate = "waits" if isinstance(error, UnknownRun) else "conflicts"
        outcomes.append((table, name, fate))
    return outcomes


def _known(connection: sqlite3.Connection, records: Sequence[StoredRecord]) -> set[tuple[str, str]]:
    ids: dict[str, list[str]] = {}
    for record in records:
        table, name = _key(record)
        ids.setdefault(table, []).append(name)
    some = "IN (SELECT value FROM json_each(?))"
    return {
        (table, name)
        for table, names in ids.items()
        for (name,) in connection.execute(
            f"SELECT {table}_id FROM {table} WHERE {table}_id {some}", (as_json(names),)
        )
    }


def _key(record: StoredRecord) -> tuple[str, str]:
    if isinstance(record, RunRow):
        return "run", record.run_id
    if isinstance(record, Feedback):
        return "feedback", record.feedback_id
    return "comparison", record.comparison_id


def _count(merged: Merged, outcomes: Sequence[tuple[str, str, str]]) -> None:
    tables: Mapping[str, Counts] = {
        "run": merged.runs, "feedback": merged.feedback, "comparison": merged.comparisons
    }  # fmt: skip
    for table, name, fate in outcomes:
        if fate != "waits":
            setattr(tables[table], fate, getattr(tables[table], fate) + 1)
        if fate == "conflicts" and len(merged.conflicts) < NAMED:
            merged.conflicts.append({"table": table, "key": name})
