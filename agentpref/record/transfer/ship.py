"""Ships what is new in a home to a place of segments, for homes that this one does not see.

1. Plan: note the ids of what no shipment has had, before anything leaves.
2. Write each batch of the plan as a segment. After a kill, the same plan makes the same segments,
   under the same names, so the place has nothing twice.
3. Write the tombstones of who was forgotten here, so that the others forget them too.
4. Replace the segments, whoever wrote them, that hold what was forgotten here.

One shipment of a home runs at a time. What is forgotten in between is not there to be written.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from agentpref.errors import ExchangeError, UpdateRunning
from agentpref.home import Home, StrPath
from agentpref.record.chains import Chains, read_feedback
from agentpref.record.database import connect, locked, translated
from agentpref.record.keys import registered
from agentpref.record.messages import (
    COMPARISON_COLUMNS,
    FEEDBACK_COLUMNS,
    RUN_COLUMNS,
    Node,
    RunRow,
    as_json,
)
from agentpref.record.rows import row_of
from agentpref.record.spill import drain
from agentpref.record.store import Store, run_hash
from agentpref.record.transfer.places import Place
from agentpref.record.transfer.segments import FORGOTTEN, ROWS, is_of, packed, unpacked
from agentpref.record.transfer.shipped import Shipped
from agentpref.types import Comparison, Progress

BATCH = 5_000
"""How many rows one segment has at most."""

_CHUNK = 10_000
_TABLES = {"r": "run", "f": "feedback", "c": "comparison"}
"""How the ids of each table are told apart: by a letter and a colon before them."""


@dataclass(slots=True)
class Shipment:
    """What came of a shipment: how many rows and segments were written.

    ``replaced`` are the segments that held what was forgotten, and ``unreadable`` those that could
    not be searched for it, with the reason.
    """

    url: str
    runs: int = 0
    feedback: int = 0
    comparisons: int = 0
    segments: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """Return all of it as plain values, as ``--json`` prints it."""
        return asdict(self)


def ship(home: Home | StrPath | None, url: str, *, progress: Progress | None = None) -> Shipment:
    """Write what is new in a home since the last shipment to a place of segments.

    >>> ship("./.agentpref", "s3://bucket/preferences")  # doctest: +SKIP

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        url: a folder, or an address of object storage that fsspec knows.
        progress: called with ``(stage, done, total)`` during the work.

    Raises:
        NotAHome, ConfigError, MissingDependency: the home or the place cannot be opened.
        UpdateRunning: another shipment of this home is running.
        NotKept: the place, or the home's memory of it, cannot be written. The same call again
            goes on where this one stopped.
    """
    source, place = Home.open(home), Place(str(url))
    tell: Progress = progress or (lambda stage, done, total: None)
    what = f"another shipment of {source.path} is running; wait for it to end, then try again"
    with locked(source.path / "ship.lock", UpdateRunning(what)):
        drain(source)
        shipment = Shipment(place.url)
        with (
            closing(Shipped(source, place.url)) as shipped,
            translated(source),
            closing(connect(source)) as connection,
        ):
            keys = registered(connection).fingerprints()[:1]
            _follow(shipped, connection, place, shipment, keys, tell)  # what a kill has left
            shipped.plan(_new(connection, shipped), BATCH)
            _follow(shipped, connection, place, shipment, keys, tell)
            _bury(connection, place, shipped, shipment, keys)
            clean(connection, place, shipped, shipment, tell)
    return shipment


def _follow(
    shipped: Shipped,
    connection: sqlite3.Connection,
    place: Place,
    shipment: Shipment,
    keys: Sequence[str],
    tell: Progress,
) -> None:
    """Write the segments of the plan."""
    plan = shipped.planned()
    for number, ids in enumerate(plan):
        tell("ship", number, len(plan))
        with Store(connection).one_state():  # else a run may lose its messages while it is read
            rows = [*_rows(connection, ids, shipment)]
        for name, data in packed(ROWS, keys, rows):
            place.write(name, data)
            shipment.segments.append(name)
        shipped.done(ids)
    tell("ship", len(plan), len(plan))


def _new(connection: sqlite3.Connection, shipped: Shipped) -> Iterator[str]:
    for letter, table in _TABLES.items():
        cursor = connection.execute(f"SELECT {table}_id FROM {table} ORDER BY rowid")
        while chunk := [f"{letter}:{name}" for (name,) in cursor.fetchmany(_CHUNK)]:
            known = shipped.known(chunk)
            yield from (name for name in chunk if name not in known)


def marks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ids of rows as a shipment notes them."""
    return [f"{row['type'][0]}:{row['id']}" for row in rows]


def _rows(
    connection: sqlite3.Connection, ids: Sequence[str], shipment: Shipment
) -> Iterator[dict[str, Any]]:
    """The rows of a batch that are still there, in the order of the plan."""
    chains = Chains(connection)
    some = "IN (SELECT value FROM json_each(?))"
    for letter, table in _TABLES.items():
        columns = {"r": RUN_COLUMNS, "f": FEEDBACK_COLUMNS, "c": COMPARISON_COLUMNS}[letter]
        wanted = [name[2:] for name in ids if name[0] == letter]
        query = f"SELECT {table}_id, {', '.join(columns)} FROM {table} WHERE {table}_id {some}"
        found = {row[0]: row[1:] for row in connection.execute(query, (as_json(wanted),))}
        for name in wanted:
            if name not in found:
                continue  # forgotten since it was planned
            if letter == "r":
                shipment.runs += 1
                yield row_of(RunRow._make((*found[name], _nodes(connection, found[name]))))
            elif letter == "f":
                shipment.feedback += 1
                yield row_of(read_feedback(found[name], chains))
            else:
                shipment.comparisons += 1
                yield row_of(Comparison(*found[name]))


def _nodes(connection: sqlite3.Connection, run: Sequence[Any]) -> tuple[Node, ...]:
    """The messages of a run, as they are kept, from the first one to its answer."""
    at: str | None = run[RUN_COLUMNS.index("output")]
    nodes: list[Node] = []
    while at is not None:
        query = "SELECT id, parent, CAST(body AS BLOB) FROM message WHERE id = ?"
        nodes.append(Node(*connection.execute(query, (at,)).fetchone()))
        at = nodes[-1].parent
    return tuple(reversed(nodes))


def _bury(
    connection: sqlite3.Connection,
    place: Place,
    shipped: Shipped,
    shipment: Shipment,
    keys: Sequence[str],
) -> None:
    """Write the tombstones, if there are others than at the last shipment."""
    query = "SELECT user_id, at FROM forgotten ORDER BY user_id"
    rows = [{"type": "forgotten", "user_id": user, "at": at}
            for user, at in connection.execute(query)]  # fmt: skip
    for name, data in packed(FORGOTTEN, keys, rows):
        if shipped.state("tombstones") != name:
            place.write(name, data)
            shipment.segments.append(name)
            shipped.keep("tombstones", name)


def clean(
    connection: sqlite3.Connection,
    place: Place,
    shipped: Shipped,
    shipment: Shipment,
    tell: Progress,
    suspects: Sequence[str] = (),
) -> None:
    """Replace the segments that hold what was forgotten here by ones without it.

    All segments are searched if somebody was forgotten since they were searched last, else only
    the ``suspects``, and those that could not be read then. The new segment is there before the
    old one goes.
    """
    users = dict(connection.execute("SELECT user_id, at FROM forgotten"))
    runs = {number for (number,) in connection.execute("SELECT hash FROM forgotten_run")}
    stamp = f"{len(users)} {max(users.values(), default=0.0)!r} {len(runs)}"
    everything = shipped.state("cleaned") != stamp and (users or runs)
    names = [name for name in place.names() if is_of(name, ROWS)]
    again = {*suspects, *(shipped.state("unsearched") or "").split()}
    searched = names if everything else [name for name in names if name in again]
    for done, name in enumerate(searched):
        tell("search for the forgotten", done, len(searched))
        try:
            data = place.read(name)
            if data is None:
                continue
            segment = unpacked(name, data)
            left = [row for row in segment.rows if not _is_forgotten(row, users, runs)]
        except ExchangeError as error:
            shipment.unreadable[name] = str(error)
            continue
        except (AttributeError, KeyError, TypeError) as error:
            what = f"it has a row that no home ships ({type(error).__name__}: {error})"
            shipment.unreadable[name] = what
            continue
        if len(left) < len(segment.rows):
            for new, content in packed(ROWS, segment.keys, left):
                place.write(new, content)
            place.remove(name)
            shipment.replaced.append(name)
    shipped.keep("unsearched", " ".join(shipment.unreadable))
    if everything:
        shipped.keep("cleaned", stamp)


def _is_forgotten(row: Mapping[str, Any], users: Mapping[str, float], runs: set[int]) -> bool:
    """Whether a row is of somebody who was forgotten later, or about a run that was removed."""
    about = [row.get("id")] if row.get("type") == "run" else []
    about += [row.get(name) for name in ("run_id", "run_a", "run_b")]
    is_of_user = users.get(row.get("user_id") or "", float("-inf")) >= row["created_at"]
    return is_of_user or any(run_hash(name) in runs for name in about if isinstance(name, str))
