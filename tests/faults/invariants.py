"""What must hold of a home whatever was killed, and whatever came after."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
from killed_world import Told, publish

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget
from agentpref.record.integrity import examine
from agentpref.record.spill import drain
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_revision

RANDOM = re.compile(r"[0-9a-f]{16,}|[a-z0-9_]{8}(?=$|/)")


def check(home: Path, told: Told) -> None:
    """The record, the revisions, what serves, and the ledger are sound and agree."""
    registry = Registry(home)
    with closing(connect(registry.home, readonly=True)) as connection:
        assert examine(connection).problems == []
    for revision in registry.list():
        if revision.pruned_at is None or revision.path.exists():
            check_revision(revision)
    check_serving(registry)
    check_ledger(registry)
    check_taint(registry, told)


def check_serving(registry: Registry) -> None:
    """What serves is what the newest change made live, and its folder is there."""
    state, newest = registry.state(), registry.history()[-1]
    assert state[1:] == (newest.live, newest.canary, newest.weight, newest.generation)
    for name in (state.live, state.canary):
        if name is not None:
            assert registry.get(name).pruned_at is None


def check_ledger(registry: Registry) -> None:
    """A revision of an update and its ledger row are one fact, and the report is true."""
    with closing(connect(registry.home, readonly=True)) as connection:
        query = "SELECT candidate, parent, verdict, report FROM updates ORDER BY rowid"
        told = {name: rest for name, *rest in connection.execute(query)}
    made = {one.revision_id: one for one in registry.list() if one.manifest["watermark"]}
    assert [*made] == [*told]
    served = {entry.live for entry in registry.history()}
    for name, (parent, verdict, text) in told.items():
        report = orjson.loads(text)
        assert (report["revision"], report["parent"], report["verdict"]) == (name, parent, verdict)
        assert (verdict == "promoted") == (name in served)
        assert made[name].parent == parent


def check_taint(registry: Registry, told: Told) -> None:
    """A revision is tainted if it learned from who is gone, or descends from, or equals, one."""
    there = acknowledged(registry.home)
    gone = {user for user, ids in told.home.items() if there.isdisjoint(ids)}
    revisions = registry.list()
    tainted = {name for name, users in told.taught.items() if not gone.isdisjoint(users)}
    weights = {one.revision_id: one.manifest["files"] for one in revisions}
    before: set[str] = set()
    while before != tainted:
        before = set(tainted)
        seen = [weights[name] for name in before]
        tainted |= {
            one.revision_id
            for one in revisions
            if one.parent in before or weights[one.revision_id] in seen
        }
    assert {one.revision_id for one in revisions if one.tainted_at is not None} == tainted


def acknowledged(home: Home) -> set[str]:
    """The ids of all runs, feedback and comparisons in the database and in the spill."""
    found: set[str] = set()
    with closing(connect(home, readonly=True)) as connection:
        for table in ("run", "feedback", "comparison"):
            found.update(key for (key,) in connection.execute(f"SELECT {table}_id FROM {table}"))
    if home.spill.exists():
        for line in home.spill.read_bytes().splitlines():
            ((kind, entry),) = orjson.loads(line.partition(b" ")[2]).items()
            found.add(entry[f"{kind}_id"])
    return found


def check_kept(there: set[str], ids: dict[str, list[str]], *, forgetting: str = "") -> None:
    """All that was acknowledged is there; of who is forgotten meanwhile, all or nothing."""
    for user, said in ids.items():
        if user != forgetting or not there.isdisjoint(said):
            assert there >= set(said), user


def check_cleaned(home: Path, adapter: Path, told: Told) -> None:
    """A publisher and a pruning leave no trace of what was killed."""
    registry = Registry(home)
    publish(home, adapter, registry.state().live)
    registry.prune(keep=1, ask=lambda place, name: False)
    check(home, told)
    there = {path.name for path in registry.home.adapters.iterdir()}
    assert there == {one.revision_id for one in registry.list() if one.pruned_at is None}
    assert registry.rollback().live in {*there, None}


def check_forgotten(home: Path, told: Told, *users: str) -> None:
    """Whoever is forgotten leaves no byte in any file, and taints what learned from them."""
    for user in users:
        forget(home, user)
        assert holding(home, f"{user}-said") == []
        check_taint(Registry(home), told)
    check(home, told)


def holding(home: Path, mark: str) -> list[str]:
    """Name the files of a home that hold a text."""
    return [name for name, path in files(home) if mark.encode() in path.read_bytes()]


def contents(home: Path) -> dict[str, Any]:
    """What a home holds, but for times, seals and names drawn at random."""
    drain(Home.open(home))
    return rows(home) | {"files": sorted(RANDOM.sub("*", name) for name, _ in files(home))}


def fingerprint(folder: Path) -> Any:
    """All that differs between two kills: rows, sizes and texts of files, and who is found in them.

    The database and its log of changes are compared by their rows, and by whose words are found.
    """
    found = []
    for name, path in files(folder):
        size = 0 if ".db" in name else path.stat().st_size
        text = path.read_bytes()
        marks = [user for user in ("ada", "bob", "carol", "dan") if f"{user}-said".encode() in text]
        said = text if path.suffix in (".jsonl", ".keys") else b""
        found.append((RANDOM.sub("*", name), size, marks, said))
    homes = [path.parent for path in sorted(folder.rglob("agentpref.db"))]
    return sorted(found), [rows(home) for home in homes]


def files(folder: Path) -> list[tuple[str, Path]]:
    return [(str(path.relative_to(folder)), path) for path in folder.rglob("*") if path.is_file()]


def rows(home: Path) -> dict[str, Any]:
    with closing(connect(Home.open(home))) as connection:
        return {
            name: sorted(map(repr, connection.execute(query))) for name, query in QUERIES.items()
        }


QUERIES = {
    "message": "SELECT id, parent, body FROM message",
    "run": "SELECT run_id, created_at, prompt, output, user_id, metadata FROM run",
    "feedback": "SELECT feedback_id, run_id, created_at, score, comment, user_id FROM feedback",
    "comparison": "SELECT comparison_id, run_a, run_b, winner, comment, user_id FROM comparison",
    "scale": "SELECT * FROM feedback_scale",
    "forgotten": "SELECT user_id FROM forgotten",
    "key": "SELECT fingerprint FROM user_key",
    "updates": "SELECT namespace, parent, candidate, verdict FROM updates",
    "pair": "SELECT candidate, pair_id, role FROM updates JOIN update_pair USING (update_id)",
    "source": "SELECT source, pair_id FROM pair_source",
    "logp": "SELECT policy, row FROM logp",
    "revision": "SELECT revision_id, parent, tainted_at IS NULL, quarantined_at IS NULL,"
    " pruned_at IS NULL FROM revision",
    "serving": "SELECT * FROM serving",
    "history": "SELECT generation, action, live, canary, weight FROM serving_history",
}
