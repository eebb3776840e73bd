"""The list of examples is that of everything that was logged, however it came in and went."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentpref
from agentpref.home import Home
from agentpref.prefer import catalog as catalogs
from agentpref.prefer.catalog import Catalog
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget
from agentpref.record.integrity import examine
from agentpref.record.store import Store
from agentpref.record.sums import LISTED, counted, resum
from agentpref.types import Comparison, Feedback
from tests.core.prefer.test_read_examples import COMPARISONS, FEEDBACK, RUNS, declare_keys

THINKING = {"chat_template_kwargs": {"enable_thinking": True}}
Judgement: TypeAlias = "Feedback | Comparison"
JUDGEMENTS = st.lists(
    FEEDBACK | COMPARISONS,
    max_size=20,
    unique_by=lambda row: row.feedback_id if isinstance(row, Feedback) else row.comparison_id,
)
GONE = {
    "feedback": "DELETE FROM feedback WHERE rowid % 3 = ?",
    "comparison": "DELETE FROM comparison WHERE rowid % 3 = ?",
    "the last": "DELETE FROM feedback WHERE rowid = (SELECT max(rowid) FROM feedback) + 0 * ?",
    "a prompt": "DELETE FROM feedback WHERE run_id LIKE 'r' || ? || '%'",
    "a scale": "DELETE FROM feedback_scale WHERE key = 'smile' AND ? < 3",
}


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    """A home with three answers to each of three prompts, twice: in two namespaces."""
    home = Home.create(tmp_path_factory.mktemp("home"))
    with closing(connect(home)) as connection:
        for name, run in RUNS.items():
            own = replace(run, params=THINKING) if name.endswith("2") else run
            Store(connection).add_run(own)
            Store(connection).add_run(replace(own, run_id=f"x{name}", namespace="other"))
        declare_keys(connection)
        yield connection


def require_all(connection: sqlite3.Connection, namespace: str = "default") -> None:
    """The refreshed list has all examples, in order, and reads them whole."""
    catalog = Catalog(connection, namespace, held_out=0.5)
    catalog.refresh()
    expected = read_examples(Store(connection), namespace, held_out=0.5)
    entries = catalog.entries()
    assert tuple(catalog.read(entries)) == expected.examples
    assert catalog.left_out() == expected.left_out
    for entry, one in zip(entries, expected.examples, strict=True):
        assert entry[:7] == (
            one.example_id,
            one.namespace,
            one.created_at,
            one.origin,
            one.tag,
            one.lone,
            one.held_out,
        )
    ids = [entry.example_id for entry in entries[::-2]]
    assert [one.example_id for one in catalog.find([*ids, "gone"])] == ids


@given(st.lists(st.tuples(JUDGEMENTS, st.sampled_from([*GONE, ""]), st.integers(0, 2)), max_size=3))
@settings(deadline=None, max_examples=60)
def test_the_list_kept_over_days_is_that_of_one_reading_of_everything(
    connection: sqlite3.Connection, days: Sequence[tuple[Sequence[Judgement], str, int]]
) -> None:
    connection.execute("BEGIN")
    try:
        known: set[str] = set()
        for said, gone, number in days:
            for row in said:
                store(connection, row, known)
            require_all(connection)
            if gone:
                with counted(connection, *LISTED):  # as a removal does: else all is made anew
                    connection.execute(GONE[gone], (number,))
            require_all(connection)
        require_all(connection, "other")
    finally:
        connection.execute("ROLLBACK")


def store(connection: sqlite3.Connection, row: Judgement, known: set[str]) -> None:
    """Store a judgement in both namespaces; in the other one it comes first."""
    if isinstance(row, Feedback):
        for prefix in ("x", ""):
            own = replace(row, feedback_id=prefix + row.feedback_id, run_id=prefix + row.run_id)
            Store(connection).add_feedback(own)
    else:
        for prefix in ("x", ""):
            names = (prefix + name for name in (row.comparison_id, row.run_a, row.run_b))
            keys = ("comparison_id", "run_a", "run_b")
            Store(connection).add_comparison(replace(row, **dict(zip(keys, names, strict=True))))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


def teach(home: Home, numbers: range, user: str | None = None) -> list[str]:
    with agentpref.Log(home.path) as log:
        runs = []
        for number in numbers:
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            runs += [log.record(asked, text, user_id=user, tags=["t"]) for text in ("yes", "no")]
            log.compare(runs[-2], runs[-1], winner="a", user_id=user)
        return runs


def test_only_what_was_judged_since_is_built_again(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(home, range(20))
    with closing(connect(home)) as connection:
        require_all(connection)
        built: list[str] = []
        real = catalogs.sort_out

        def counted(runs: list[agentpref.Run], *rest: object, **more: object) -> object:
            built.extend(run.run_id for run in runs)
            return real(runs, *rest, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(catalogs, "sort_out", counted)
        catalog = Catalog(connection, "default", held_out=0.3)
        catalog.refresh()
        assert built == []
        new = teach(home, range(50, 52))
        catalog.refresh()
        assert sorted(built) == sorted(new)
    with closing(connect(home)) as connection:
        require_all(connection)


def test_an_ended_refresh_goes_on_where_it_was(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    teach(home, range(20))
    monkeypatch.setattr(catalogs, "_PROMPTS_AT_ONCE", 6)
    monkeypatch.setattr(catalogs, "_JUDGEMENTS_AT_ONCE", 7)
    real, calls = catalogs.sort_out, []

    def ended(*rows: object, **more: object) -> object:
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*rows, **more)  # type: ignore[arg-type]

    with closing(connect(home)) as connection:
        catalog = Catalog(connection, "default", held_out=0.5)
        with monkeypatch.context() as patch:
            patch.setattr(catalogs, "sort_out", ended)
            with pytest.raises(KeyboardInterrupt):
                catalog.refresh()
        assert len(catalog.entries()) == 12
        require_all(connection)


def test_after_a_removal_and_a_vacuum_new_judgements_are_found(home: Home) -> None:
    teach(home, range(10), user="ann")
    teach(home, range(10, 20))
    with closing(connect(home)) as connection:
        require_all(connection)
    forget(home.path, "ann")
    with closing(connect(home)) as connection:
        (left,) = connection.execute("SELECT count(*) FROM example").fetchone()
        assert left == 10, "what was forgotten is gone from the list at once"
        require_all(connection)
    forget(home.path, "nobody")
    teach(home, range(30, 33))
    with closing(connect(home)) as connection:
        require_all(connection)
        assert len(Catalog(connection, "default", held_out=0.5).entries()) == 13


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM example WHERE number > 2",
        "UPDATE example SET created_at = 1.0 WHERE number = 1",
        "DELETE FROM judged_run",
        "UPDATE listing SET feedback = 7",
        "DELETE FROM left_out",
        "DELETE FROM table_sum WHERE name = 'example'",
    ],
)
def test_a_list_that_another_program_changed_is_made_anew(home: Home, change: str) -> None:
    runs = teach(home, range(6))
    with agentpref.Log(home.path) as log:
        log.feedback(runs[0], key="note", value="well")
    with closing(connect(home)) as connection:
        require_all(connection)
        assert examine(connection).problems == []
        assert connection.execute(change).rowcount > 0
        assert examine(connection).problems != []
        require_all(connection)
        assert examine(connection).problems == []


def test_other_rules_make_the_list_anew(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    teach(home, range(4))
    with closing(connect(home)) as connection:
        require_all(connection)
        connection.execute("UPDATE example SET origin = 'judge'")
        resum(connection)
        monkeypatch.setattr(catalogs, "_RULES", catalogs._RULES + 1)
        require_all(connection)


def test_a_key_that_is_declared_lists_only_the_prompts_that_it_touches(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = teach(home, range(30))
    with closing(connect(home)) as connection:
        Catalog(connection, "default", held_out=0.5).refresh()
        with agentpref.Log(home.path) as log:
            log.feedback(runs[0], key="helpful", score=1)
            log.feedback(runs[2], key="helpful", score=0)
            Catalog(connection, "default", held_out=0.5).refresh()
            log.declare("helpful")
        built: list[str] = []
        build = Catalog._build

        def counted(self: Catalog, prompts: Sequence[str], scales: Any) -> Any:
            built.extend(prompts)
            return build(self, prompts, scales)

        monkeypatch.setattr(Catalog, "_build", counted)
        Catalog(connection, "default", held_out=0.5).refresh()
        assert len(built) == 2
        built.clear()
        Catalog(connection, "default", held_out=0.5).refresh()
        assert built == [], "the scale is known by now"
        require_all(connection)


def test_a_list_that_counts_more_judgements_than_there_are_is_made_anew(home: Home) -> None:
    teach(home, range(5))
    with closing(connect(home)) as connection:
        require_all(connection)
        connection.execute("UPDATE listing SET comparisons = comparisons + 3")
        connection.execute("DELETE FROM example")
        require_all(connection)
