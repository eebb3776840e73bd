"""What the ledger says of examples that were set aside or aged out."""

from __future__ import annotations

from contextlib import closing

import pytest

from agentpref.home import Home
from agentpref.record import asides
from agentpref.record.database import connect
from agentpref.record.updates import UpdateRow, Updates


@pytest.fixture
def connection(tmp_path):
    with closing(connect(Home.create(tmp_path / "home"))) as found:
        yield found


def keep(connection, name, at, verdict="refused", parent=None, candidate=None, **roles):
    pairs = {pair: role for role, some in roles.items() for pair in some}
    row = UpdateRow(name, "n", at, at + 1, parent, candidate, verdict, {"config": at}, pairs)
    Updates(connection).add(row)


def publish(connection, name, parent=None):
    connection.execute(
        "INSERT INTO revision (revision_id, namespace, seq, created_at, parent, manifest)"
        " VALUES (?, 'n', ?, 1.0, ?, '{}')",
        (name, int(name[1:]), parent),
    )


def aside(connection, namespace="n"):
    return {one.update_id: set(one.examples) for one in asides.set_aside(connection, namespace)}


def test_the_last_update_that_used_an_example_says_whether_it_is_set_aside(connection):
    keep(connection, "u1", 1.0, set_aside=["a", "b", "c"], left_out=["d"])
    keep(connection, "u2", 2.0, set_aside=["e"], replay=["f"], waiting=["a"])
    assert aside(connection) == {"u1": {"a", "b", "c"}, "u2": {"e"}}
    keep(connection, "u3", 3.0, verdict="promoted", new=["a"], held_out=["b"])
    assert aside(connection) == {"u1": {"c"}, "u2": {"e"}}
    keep(connection, "u4", 4.0, set_aside=["a"])
    assert aside(connection) == {"u1": {"c"}, "u2": {"e"}, "u4": {"a"}}
    assert aside(connection, "other") == {}
    assert asides.set_aside(connection, "n")[0].report == {"config": 1.0}
    assert asides.tried(connection, "n") == {"a", "b", "c", "e"}


def test_examples_are_aged_out_for_the_revisions_that_learned_so(connection):
    publish(connection, "r1")
    publish(connection, "r2", "r1")
    publish(connection, "r3", "r2")
    keep(connection, "u1", 1.0, "promoted", None, "r1", new=["a", "b", "c"])
    keep(connection, "u2", 2.0, "promoted", "r1", "r2", aged_out=["a", "b", "c"])
    keep(connection, "u3", 3.0, "refused", "r2", None, aged_out=["d"])
    assert asides.aged_out(connection, "r1") == set()
    assert asides.aged_out(connection, "r2") == {"a", "b", "c"}
    keep(connection, "u4", 4.0, "promoted", "r2", "r3", restored=["a"], replay=["b"])
    assert asides.aged_out(connection, "r3") == {"c"}
    assert asides.aged_out(connection, "r2") == {"a", "b", "c"}
    assert asides.aged_out(connection, None) == set()
