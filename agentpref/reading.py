"""What a home holds, for notebooks: records one by one, or whole tables for pandas and Arrow.

:class:`agentpref.Home` has a method for each kind of record; they return :class:`Records`, which
read nothing before they are asked. Iterating gives the library's own immutable records and holds a
few hundred of them in memory. As a table, each kind has flat columns, whose names and types stay as
they are: a new version may add columns at the end. pandas and pyarrow are imported when a table is
asked for.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import fields
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import orjson

from agentpref.columns import COLUMNS, Column, Kind
from agentpref.errors import ConfigError, MissingDependency, UpdateError
from agentpref.home import Home
from agentpref.prefer.walk import walk_pairs
from agentpref.record import pages
from agentpref.record.database import connect, translated
from agentpref.record.pages import Selection
from agentpref.record.pages import selection as selection
from agentpref.record.store import Store
from agentpref.record.updates import Updates
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.types import (
    HELD_OUT,
    Answered,
    Comparison,
    Example,
    Feedback,
    Run,
    UpdateReport,
)

if TYPE_CHECKING:
    import pandas
    import pyarrow

T = TypeVar("T")
Beside: TypeAlias = "Mapping[str, Any]"
"""Columns that a record does not hold itself, by name."""

BATCH_ROWS = 1000
"""How many rows of a table are made at a time."""

_REPORT = frozenset(field.name for field in fields(UpdateReport))


class Records(Generic[T]):
    """Records of one kind, read anew each time that they are asked for.

    >>> for run in home.runs(tag="hours"):
    ...     print(run.output["content"])
    >>> frame = home.runs(since="2026-11-01").to_pandas()

    ``columns`` are the names of a table's columns. What reads Arrow's C stream interface takes the
    records as they are, and holds as much of them as it wants: ``polars.DataFrame(home.runs())``.
    """

    def __init__(
        self, kind: Kind, where: str, read: Callable[[], Iterator[tuple[T, Beside]]]
    ) -> None:
        self._kind, self._where, self._read = kind, where, read
        self._columns: tuple[Column, ...] = COLUMNS[kind]
        self.columns = tuple(column.name for column in self._columns)

    def __repr__(self) -> str:
        return f"<{self._kind} of {self._where}: iterate, or ask for .to_pandas() or .to_arrow()>"

    def __iter__(self) -> Iterator[T]:
        return (record for record, _ in self._read())

    def to_arrow(self) -> pyarrow.Table:
        """Read the records into an Arrow table.

        Raises:
            MissingDependency: pyarrow is not installed.
            HomeError: the home cannot be read.
        """
        return self._reader().read_all()

    def to_pandas(self) -> pandas.DataFrame:
        """Read the records into a data frame. Its types do not depend on what the records hold.

        Raises:
            MissingDependency: pandas or pyarrow is not installed.
            HomeError: the home cannot be read.
        """
        try:
            import pandas
        except ImportError as error:
            raise _missing("a data frame", "pandas", error) from error
        table = self.to_arrow()
        integers = {"int64": pandas.Int64Dtype()}  # a missing one would make floats of them all
        return table.to_pandas(
            types_mapper=lambda kind: integers.get(str(kind)), split_blocks=True, self_destruct=True
        )

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """Give the records as a stream of Arrow's C data interface, a batch at a time."""
        return self._reader().__arrow_c_stream__(requested_schema)

    def _reader(self) -> Any:
        try:
            import pyarrow as pa
        except ImportError as error:
            raise _missing("a table", "pyarrow", error) from error
        types = {
            "text": pa.string(),
            "texts": pa.list_(pa.string()),
            "json": pa.string(),
            "flag": pa.bool_(),
            "count": pa.int64(),
            "number": pa.float64(),
            "time": pa.timestamp("us", "UTC"),
        }
        schema = pa.schema([(column.name, types[column.type]) for column in self._columns])

        def batches() -> Iterator[Any]:
            found = self._read()
            while rows := [*islice(found, BATCH_ROWS)]:
                cells = ([column.cell(*row) for row in rows] for column in self._columns)
                arrays = [pa.array(v, kind) for v, kind in zip(cells, schema.types, strict=True)]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)

        return pa.RecordBatchReader.from_batches(schema, batches())


def _missing(what: str, package: str, error: ImportError) -> MissingDependency:
    return MissingDependency(
        f"{what} needs {package} ({error}); install it with: pip install 'agentpref[notebook]'"
    )


def read_runs(home: Home, which: Selection) -> Records[Run]:
    """Make the records of :meth:`agentpref.Home.runs`."""
    return _records(home, which, "runs", lambda database: _alone(pages.runs(database, which)))


def read_feedback(home: Home, which: Selection) -> Records[Feedback]:
    """Make the records of :meth:`agentpref.Home.feedback`."""
    beside = {"namespace": which.namespace}
    return _records(
        home, which, "feedback", lambda database: _alone(pages.feedback(database, which), beside)
    )


def read_comparisons(home: Home, which: Selection) -> Records[Comparison]:
    """Make the records of :meth:`agentpref.Home.comparisons`."""
    beside = {"namespace": which.namespace}
    return _records(
        home,
        which,
        "comparisons",
        lambda database: _alone(pages.comparisons(database, which), beside),
    )


def read_pairs(home: Home, which: Selection, held_out: float | None) -> Records[Example]:
    """Make the records of :meth:`agentpref.Home.pairs`."""
    if held_out is not None and not 0 <= held_out <= 1:
        raise ConfigError(f"held_out is {held_out!r}; give a share from 0 to 1")

    def read(database: sqlite3.Connection) -> Iterator[tuple[Example, Beside]]:
        share = last_held_out(database, which.namespace) if held_out is None else held_out
        return _alone(walk_pairs(database, which, share))

    return _records(home, which, "pairs", read)


def read_updates(home: Home, which: Selection) -> Records[UpdateReport]:
    """Make the records of :meth:`agentpref.Home.updates`."""

    def read(database: sqlite3.Connection) -> Iterator[tuple[UpdateReport, Beside]]:
        for update_id, created_at, parent, candidate, verdict in pages.updates(database, which):
            report = Updates(database).report(which.namespace, update_id)
            told = {"update_id": update_id, "created_at": created_at, "parent": parent}
            told |= {"namespace": which.namespace, "revision": candidate, "verdict": verdict}
            known = (
                {"model": ""} | told | {name: report[name] for name in report if name in _REPORT}
            )
            yield UpdateReport(**known), {"report": orjson.dumps(report).decode()}

    return _records(home, which, "updates", read)


def read_answers(home: Home, update_id: str) -> list[Answered]:
    """Make the list of :meth:`agentpref.Home.answers`."""
    with translated(home), closing(connect(home, readonly=True)) as database:
        return Updates(database).answers(update_id)


def read_revisions(home: Home, which: Selection) -> Records[Revision]:
    """Make the records of :meth:`agentpref.Home.revisions`."""

    def read(database: sqlite3.Connection) -> Iterator[tuple[Revision, Beside]]:
        registry = Registry(home, namespace=which.namespace)
        state, found = registry.state(), registry.list()
        since = -math.inf if which.since is None else which.since
        kept = [revision for revision in found if revision.created_at >= since]
        for revision in kept if which.limit is None else kept[max(0, len(kept) - which.limit) :]:
            serves = {state.canary: "canary", state.live: "live"}.get(revision.revision_id)
            yield revision, {"serves": serves}

    return _records(home, which, "revisions", read)


def namespaces(home: Home) -> list[str]:
    """Name the namespaces in which something was logged, trained or published."""
    with translated(home), closing(connect(home, readonly=True)) as database:
        return Store(database).namespaces()


def last_held_out(database: sqlite3.Connection, namespace: str) -> float:
    """The share of prompts that the last update of a namespace held out, or the default."""
    try:
        config = Updates(database).report(namespace).get("config")
    except UpdateError:
        return HELD_OUT  # no update yet
    if config is None:  # reports of 0.1.0 have no config, the manifests of revisions have
        revisions = Registry(Home.of(database), namespace=namespace).list()
        config = revisions[-1].manifest["training"].get("config", {}) if revisions else {}
    return float(config.get("held_out", HELD_OUT))


def _records(
    home: Home,
    which: Selection,
    kind: Kind,
    read: Callable[[sqlite3.Connection], Iterator[tuple[T, Beside]]],
) -> Records[T]:
    def opened() -> Iterator[tuple[T, Beside]]:
        with translated(home), closing(connect(home, readonly=True)) as database:
            Store(database).require_namespace(which.namespace)
            yield from read(database)

    return Records(kind, f"{which.namespace!r} in {home.path}", opened)


def _alone(records: Iterator[T], beside: Beside | None = None) -> Iterator[tuple[T, Beside]]:
    nothing: Beside = beside or {}
    return ((record, nothing) for record in records)
