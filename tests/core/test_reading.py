"""Notebooks read a home: its own records in bounded memory, and tables with fixed columns."""

from __future__ import annotations

import sqlite3
import sys
import time
import tracemalloc
from contextlib import closing
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import agentpref
from agentpref import reading
from agentpref.columns import COLUMNS, text_of
from agentpref.errors import ConfigError, MissingDependency, NotAHome, UnknownNamespace
from agentpref.prefer import walk
from agentpref.prefer.examples import read_examples
from agentpref.record import pages
from agentpref.record.database import connect, transaction
from agentpref.record.messages import prompt_of
from agentpref.record.store import Store
from agentpref.record.updates import UpdateRow, Updates
from agentpref.testing import write_adapter
from agentpref.types import Comparison, Feedback, Run

NAMES = {
    "runs": "run_id namespace created_at thread_id trace_id user_id model revision tag tags "
    "question answer tool_calls messages tools output params metadata tokens logprob",
    "feedback": "feedback_id namespace created_at run_id key score scale_low scale_high value "
    "comment correction source user_id",
    "comparisons": "comparison_id namespace created_at run_a run_b winner comment source user_id",
    "pairs": "pair_id namespace created_at tag origin held_out question chosen rejected "
    "chosen_revision rejected_revision weight noise trace_id provenance messages tools "
    "chosen_message rejected_message",
    "updates": "update_id namespace created_at verdict seconds model parent revision "
    "trained replayed evaluated waiting set_aside left_out accuracy_before accuracy_after failed "
    "config report",
    "revisions": "revision_id namespace created_at parent serves base update_id tainted_at "
    "quarantined_at quarantine_reason pruned_at path manifest",
}


def run(number: int, **fields: Any) -> Run:
    values = {
        "created_at": 1000.0 + number,
        "prompt": prompt_of(({"role": "user", "content": f"Question {number // 2}?"},)),
        "output": {"role": "assistant", "content": f"Answer {number}."},
    }
    return Run(f"r{number}", "default", **values | fields)


@pytest.fixture
def home(tmp_path: Path) -> agentpref.Home:
    return agentpref.Home.create(tmp_path / "home")


@pytest.fixture
def filled(home: agentpref.Home, monkeypatch: pytest.MonkeyPatch) -> agentpref.Home:
    """Twenty runs, ten prompts; half of them of the same moment; a comparison of each prompt."""
    monkeypatch.setattr(pages, "PAGE", 3)
    monkeypatch.setattr(walk, "PROMPTS_AT_ONCE", 2)
    with closing(connect(home)) as connection:
        store = Store(connection)
        for n in range(20):
            tags = ("hours", "vip") if n % 4 == 0 else ("place",) if n % 4 == 1 else ()
            at = 1000.0 if n < 10 else 1000.0 + n
            store.add_run(run(n, created_at=at, thread_id=f"t{n % 3}", tags=tags))
        for n in (8, 6, 4, 2, 0, 10, 12, 14, 16, 18):
            at = 2000.0 + (n if n > 8 else -n)
            store.add_comparison(Comparison(f"c{n}", at, f"r{n}", f"r{n + 1}", "a"))
    return home


def ids(records: Any) -> list[str]:
    return [getattr(record, "run_id", None) or record.example_id for record in records]


def test_iterating_gives_the_runs_of_the_log_in_the_order_of_their_time(filled) -> None:
    with closing(connect(filled)) as connection:
        written = {one.run_id: one for one in Store(connection).runs("default")}
    found = list(filled.runs())
    assert found == [written[f"r{n}"] for n in range(20)]
    assert list(filled.runs()) == found, "records are read anew each time"


def test_runs_are_chosen_by_time_thread_tag_and_number(filled) -> None:
    assert ids(filled.runs(limit=4)) == ["r16", "r17", "r18", "r19"]
    assert ids(filled.runs(limit=0)) == []
    assert len(ids(filled.runs(limit=99))) == 20
    assert ids(filled.runs(since=1018)) == ["r18", "r19"]
    assert ids(filled.runs(since=1012, thread="t1")) == ["r13", "r16", "r19"]
    assert ids(filled.runs(thread="t1", limit=2)) == ["r16", "r19"]
    assert ids(filled.runs(tag="vip", since=1010)) == ["r12", "r16"]
    assert ids(filled.runs(tag="untagged", limit=2)) == ["r18", "r19"]
    assert ids(filled.runs(thread="nobody's")) == []
    assert [c.comparison_id for c in filled.comparisons(thread="t0", since=2000)] == [
        "c0",
        "c12",
        "c18",
    ]


@pytest.mark.parametrize(
    "since",
    [
        1018.0,
        datetime.fromtimestamp(1018),
        datetime.fromtimestamp(1018, timezone.utc),
        "1970-01-01T00:16:58Z",
    ],
)
def test_a_time_may_be_seconds_a_datetime_or_text(filled, since: Any) -> None:
    assert ids(filled.runs(since=since)) == ["r18", "r19"]


def test_an_age_and_a_day_are_times_too(home) -> None:
    with closing(connect(home)) as connection:
        Store(connection).add_run(run(1, created_at=time.time() - 3600))
    assert ids(home.runs(since=timedelta(hours=2))) == ["r1"]
    assert ids(home.runs(since=timedelta(minutes=2))) == []
    assert ids(home.runs(since=date(2020, 1, 1))) == ["r1"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"since": "yesterday"}, "since is 'yesterday'; give seconds since 1970, a date"),
        ({"since": float("nan")}, "since is nan"),
        ({"limit": -1}, "limit is -1; give a number of rows"),
        ({"limit": True}, "limit is True"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_cure(filled, asked: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        filled.runs(**asked)


def test_a_namespace_that_the_home_does_not_have_is_refused_with_those_it_has(filled) -> None:
    with pytest.raises(UnknownNamespace, match=r"no namespace 'support' is .* has 'default'; name"):
        list(filled.runs("support"))
    assert filled.namespaces() == ["default"]


def test_a_home_without_anything_has_empty_tables(home) -> None:
    assert home.namespaces() == []
    assert [len(getattr(home, kind)().to_pandas()) for kind in NAMES] == [0] * len(NAMES)
    with pytest.raises(NotAHome):
        agentpref.Home.open(home.path / "elsewhere")


def test_the_pairs_are_those_of_an_update(filled) -> None:
    with closing(connect(filled)) as connection:
        wanted = {
            p.example_id: p for p in read_examples(Store(connection), "default", held_out=0.2).pairs
        }
    found = list(filled.pairs())
    assert {pair.example_id: pair for pair in found} == wanted
    times = [pair.created_at for pair in found]
    assert times == sorted(times), "prompts come in the order of their last judgement"
    assert [p.created_at for p in filled.pairs(limit=3)] == times[-3:]
    assert [p.created_at for p in filled.pairs(since=2000)] == [t for t in times if t >= 2000]
    assert {p.tag for p in filled.pairs(tag="hours")} == {"hours"}
    assert list(filled.pairs(limit=0)) == []
    assert len(list(filled.pairs(limit=99))) == 10
    assert sum(p.held_out for p in filled.pairs(held_out=1)) == 10
    with pytest.raises(ConfigError, match="held_out is 2"):
        filled.pairs(held_out=2)


def test_of_several_pairs_of_one_prompt_the_newest_are_given(home, monkeypatch) -> None:
    monkeypatch.setattr(walk, "PROMPTS_AT_ONCE", 1)
    same = prompt_of(({"role": "user", "content": "The same?"},))
    with closing(connect(home)) as connection:
        store = Store(connection)
        for n in range(6):
            store.add_run(run(n, prompt=same) if n < 4 else run(n))
        for at, a, b in ((50.0, 0, 1), (90.0, 2, 3), (70.0, 4, 5)):
            store.add_comparison(Comparison(f"c{at}", at, f"r{a}", f"r{b}", "a"))
    assert [pair.created_at for pair in home.pairs(limit=2)] == [70.0, 90.0]


@pytest.mark.guarantee("logging")
def test_a_reader_that_pauses_holds_up_no_writer_and_sees_one_state(filled) -> None:
    reader = iter(filled.runs())
    first = next(reader)
    with closing(connect(filled)) as connection:
        store = Store(connection)
        store.add_run(run(99))
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert busy == 0, "an open cursor would keep the log of changes from being cut"
        with transaction(connection):
            connection.execute("DELETE FROM comparison WHERE run_a IN ('r0', 'r12')")
            connection.execute("DELETE FROM run WHERE run_id IN ('r1', 'r13')")
        connection.execute("VACUUM")
    rest = [f"r{n}" for n in range(1, 20) if n != 13]
    assert ids([first, *reader]) == ["r0", *rest], "r1 was in the first page, r13 is gone"


def test_pairs_are_right_when_the_home_is_compacted_while_they_are_read(filled) -> None:
    wanted = ids(filled.pairs())
    reader = iter(filled.pairs())
    first = next(reader)
    with closing(connect(filled)) as connection:
        connection.execute("DELETE FROM comparison WHERE comparison_id = 'c8'")
        connection.execute("VACUUM")
    assert ids([first, *reader]) == wanted, "c8 made the first pair"


def test_iterating_holds_a_page_of_the_runs_and_not_all_of_them(home, monkeypatch) -> None:
    monkeypatch.setattr(pages, "PAGE", 50)
    monkeypatch.setattr(walk, "PROMPTS_AT_ONCE", 20)
    words = "word " * 400
    with closing(connect(home)) as connection:
        store = Store(connection)
        with transaction(connection):
            for n in range(3000):
                text = f"{n} {words}"
                store.add_run(run(n, output={"role": "assistant", "content": text}))
            for n in range(0, 3000, 2):
                store.add_comparison(Comparison(f"c{n}", 1.0 * n, f"r{n}", f"r{n + 1}", "a"))
    list(home.runs(limit=1)), list(home.pairs(limit=1))  # imports
    for records in (home.runs(), home.pairs()):
        tracemalloc.start()
        count = sum(1 for _ in records)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count >= 1500
        assert peak < 2_000_000, "all of them are 7 MB"


def test_a_home_that_nothing_may_write_is_read(filled, monkeypatch) -> None:
    with closing(connect(filled)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    real = sqlite3.connect

    def refusing(place: Any, *args: Any, **options: Any) -> Any:
        if place == filled.database:
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return real(place, *args, **options)

    monkeypatch.setattr(sqlite3, "connect", refusing)
    assert len(filled.runs().to_pandas()) == 20
    assert len(filled.pairs().to_pandas()) == 10


def test_reading_writes_nothing(filled) -> None:
    with closing(connect(filled)) as connection:
        before = connection.execute("PRAGMA data_version").fetchone()
        for kind in NAMES:
            list(getattr(filled, kind)())
        assert connection.execute("PRAGMA data_version").fetchone() == before


def test_the_columns_are_these() -> None:
    assert {kind: [c.name for c in columns] for kind, columns in COLUMNS.items()} == {
        kind: names.split() for kind, names in NAMES.items()
    }


def test_types_are_the_same_with_and_without_rows(filled, home, tmp_path) -> None:
    empty = agentpref.Home.create(tmp_path / "empty")
    for kind in NAMES:
        full, bare = (getattr(one, kind)().to_pandas() for one in (filled, empty))
        assert list(full.dtypes.items()) == list(bare.dtypes.items())
        assert tuple(full.columns) == getattr(filled, kind)().columns
    frame = filled.runs().to_pandas()
    assert str(frame["created_at"].dtype) == "datetime64[us, UTC]"
    assert str(frame["tokens"].dtype) == "Int64"


def test_a_row_of_runs_has_the_texts_and_the_whole_of_it(home) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    parts = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {}}]
    asked = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": parts})
    with closing(connect(home)) as connection:
        Store(connection).add_run(
            run(
                1,
                prompt=prompt_of(asked, ({"type": "function", "function": {"name": "look"}},)),
                output={"role": "assistant", "content": None, "tool_calls": [call]},
                token_ids=(1, 2),
                logprobs=(-0.5, -0.25),
                tags=("a", "b"),
            )
        )
    [row] = home.runs().to_arrow().to_pylist()
    assert (row["question"], row["answer"]) == ("Look:\n[image_url]", None)
    assert (row["tokens"], row["logprob"], row["tags"]) == (2, -0.75, ["a", "b"])
    assert '"name":"look"' in row["tool_calls"]
    assert row["messages"].startswith('[{"role":"system"')
    assert row["created_at"] == datetime.fromtimestamp(1001, timezone.utc)


def test_feedback_has_its_namespace_scale_and_correction(filled) -> None:
    with closing(connect(filled)) as connection:
        store = Store(connection)
        store.add_feedback(Feedback("f1", "r3", 5.0, "thumbs", 1.0, scale=(0, 1)))
        right = {"role": "assistant", "content": "Right."}
        store.add_feedback(Feedback("f2", "r4", 6.0, "correction", correction=right))
    thumb, fixed = filled.feedback().to_arrow().to_pylist()
    assert (thumb["namespace"], thumb["scale_low"], thumb["scale_high"]) == ("default", 0, 1)
    assert (fixed["correction"], fixed["score"]) == ("Right.", None)
    assert [f.feedback_id for f in filled.feedback(tag="vip")] == ["f2"]


def test_updates_are_reports_with_their_figures_in_columns(home) -> None:
    report = {
        "update_id": "u2", "namespace": "default", "model": "tiny", "created_at": 20.0,
        "verdict": "refused", "parent": None, "seconds": 3.5, "from_a_newer_version": 1,
        "counts": {"trained": 5, "trained_thumbs": 2, "new_evaluated": 3, "old_evaluated": 1},
        "left_out": {"too_long": 2}, "config": {"held_out": 0.5},
        "accuracy": {
            "a": {"pairs": 3, "before": 0.5, "after": 1.0},
            "b": {"pairs": 1, "before": 0.5, "after": 0.0},
        },
        "checks": [{"name": "KL budget", "passed": False, "message": "too far"}],
    }  # fmt: skip
    with closing(connect(home)) as connection:
        for name, at, told in (("u1", 10.0, {}), ("u2", 20.0, report)):
            row = UpdateRow(name, "default", at, at + 1, None, None, "refused", told)
            Updates(connection).add(row)
    old, new = home.updates()
    assert (old.update_id, old.verdict, old.model) == ("u1", "refused", "")
    assert isinstance(new, agentpref.UpdateReport)
    assert new.counts == report["counts"]
    [row] = home.updates(limit=1).to_arrow().to_pylist()
    figures = ("trained", "evaluated", "left_out", "accuracy_before", "accuracy_after", "failed")
    assert [row[name] for name in figures] == [7, 4, 2, 0.5, 0.75, ["KL budget: too far"]]
    assert '"from_a_newer_version":1' in row["report"]
    assert sum(p.held_out for p in home.pairs()) == 0


def test_revisions_say_which_of_them_serves(home, tmp_path) -> None:
    registry = agentpref.Registry(home)
    model = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
    names = []
    for n in range(3):
        folder = write_adapter(tmp_path / f"adapter{n}", seed=n)
        names.append(registry.publish(folder, parent=None, model=model, training={}).revision_id)
    registry.promote(names[0])
    registry.canary(names[1], 0.5)
    assert list(home.revisions()) == list(registry.list())
    frame = home.revisions().to_pandas()
    assert list(frame["revision_id"]) == names
    assert frame["serves"].fillna("-").to_list() == ["live", "canary", "-"]
    assert [r.revision_id for r in home.revisions(limit=1)] == names[2:]


def test_what_reads_arrow_streams_takes_records_as_they_are(filled, monkeypatch) -> None:
    import pyarrow as pa

    monkeypatch.setattr(reading, "BATCH_ROWS", 8)
    batches = list(pa.RecordBatchReader.from_stream(filled.runs()))
    assert [batch.num_rows for batch in batches] == [8, 8, 4]
    assert pa.table(filled.runs()).equals(filled.runs().to_arrow())


@pytest.mark.parametrize("package", ["pandas", "pyarrow"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    filled, monkeypatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf"needs {package} .*agentpref\[notebook\]"):
        filled.runs().to_pandas()


def test_a_time_beyond_the_calendar_is_missing_and_spoils_no_table(home) -> None:
    with closing(connect(home)) as connection:
        Store(connection).add_run(run(1, created_at=1e300))
    assert home.runs().to_pandas()["created_at"].isna().all()


def test_parts_of_a_message_without_text_are_named_by_their_type() -> None:
    assert (
        text_of({"role": "user", "content": ["a", {"type": "text", "text": "b"}, {"type": "x"}]})
        == "a\nb\n[x]"
    )


def test_a_record_is_immutable(filled) -> None:
    first = next(iter(filled.runs()))
    with pytest.raises(AttributeError):
        first.run_id = "other"
    assert replace(first, run_id="other") != first
