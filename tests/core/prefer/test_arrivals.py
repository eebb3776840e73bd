"""The new examples that are counted are those that the list does not have yet."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.home import Home
from agentpref.prefer import arrivals
from agentpref.prefer import catalog as catalogs
from agentpref.prefer.arrivals import Arrivals
from agentpref.prefer.catalog import Catalog
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget
from agentpref.record.store import Store
from tests.core.prefer.test_catalog import JUDGEMENTS, Judgement, connection, home, store, teach

__all__ = ["connection", "home"]  # fixtures
ALL = 1 << 40


def unlisted(connection: sqlite3.Connection, namespace: str) -> int:
    """Count the examples that a reading of everything finds, and the list does not have."""
    query = "SELECT example_id FROM example WHERE namespace = ?"
    listed = {name for (name,) in connection.execute(query, (namespace,))}
    found = read_examples(Store(connection), namespace, held_out=0.5).examples
    return len({one.example_id for one in found} - listed)


@given(st.lists(st.tuples(JUDGEMENTS, JUDGEMENTS, st.booleans()), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_what_is_counted_is_what_the_next_update_would_list(
    connection: sqlite3.Connection,
    days: Sequence[tuple[Sequence[Judgement], Sequence[Judgement], bool]],
) -> None:
    connection.execute("BEGIN")
    try:
        known: set[str] = set()
        kept = {name: Arrivals(name, held_out=0.5) for name in ("default", "other")}
        for *looks, updates in days:
            for said in looks:
                for row in said:
                    store(connection, row, known)
                for name, one in kept.items():
                    assert one.count(connection, ALL) == unlisted(connection, name)
            if updates:
                Catalog(connection, "default", held_out=0.5).refresh()
                assert kept["default"].count(connection, ALL) == 0
    finally:
        connection.execute("ROLLBACK")


def test_a_look_reads_only_what_came_in_since_the_look_before(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(home, range(30))
    built: list[str] = []
    real = catalogs.sort_out

    def counted(runs, *rest, **more):
        built.extend(run.run_id for run in runs)
        return real(runs, *rest, **more)

    with closing(connect(home)) as writing:
        Catalog(writing, "default", held_out=0.3).refresh()
    monkeypatch.setattr(catalogs, "sort_out", counted)
    with closing(connect(home, readonly=True)) as reading:
        new = Arrivals("default", held_out=0.3)
        assert (new.count(reading, ALL), built) == (0, [])
        first = teach(home, range(50, 53))
        assert (new.count(reading, ALL), sorted(built)) == (3, sorted(first))
        built.clear()
        second = teach(home, range(60, 62))
        assert (new.count(reading, ALL), sorted(built)) == (5, sorted(second))
        built.clear()
        assert (new.count(reading, ALL), built) == (5, [])
        assert Arrivals("default", held_out=0.3).count(reading, ALL) == 5, "a restart knows, too"


def test_it_reads_no_further_than_what_is_wanted(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(home, range(12))
    monkeypatch.setattr(arrivals, "_AT_ONCE", 4)
    with closing(connect(home, readonly=True)) as reading:
        new = Arrivals("default", held_out=0.3)
        assert new.count(reading, 5) == 8, (
            "two times four; a home that no update has listed is not read"
        )
        assert new.count(reading, ALL) == 12


def test_what_was_forgotten_is_no_longer_counted(home: Home) -> None:
    teach(home, range(2))
    with closing(connect(home)) as writing:
        Catalog(writing, "default", held_out=0.3).refresh()
    with closing(connect(home, readonly=True)) as reading:
        new = Arrivals("default", held_out=0.3)
        teach(home, range(10, 14), user="ann")
        teach(home, range(20, 23))
        assert new.count(reading, ALL) == 7
        forget(home.path, "ann")
        assert new.count(reading, ALL) == 3
