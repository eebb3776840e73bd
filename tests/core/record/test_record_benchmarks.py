"""The benchmarks of the log run on small data, and the homes they generate are sound."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.store import Store
from benchmarks import large_home, record, record_scale, record_soak, update_scale

ROWS = 2_000


def test_a_generated_home_is_sound_and_has_the_right_size(tmp_path: Path) -> None:
    home = large_home.make(tmp_path / "home", ROWS, lambda line: None)
    with closing(connect(home)) as connection:
        assert examine(connection).problems == []
        found = Store(connection).stats()
        (messages,) = connection.execute("SELECT count(*) FROM message").fetchone()
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        pairs = read_examples(Store(connection), "default", held_out=0.2)
    said = found["feedback"] + found["comparisons"]
    assert abs(messages + found["runs"] + said - ROWS) < ROWS / 10
    assert {pair.origin for pair in pairs.pairs} >= {"comparison", "correction"}
    assert pairs.thumbs


def test_conversations_come_in_the_order_of_time() -> None:
    told = list(large_home.conversations(50, random.Random(0), until=1e9))
    times = [run.created_at for one in told for run in one.runs]
    assert times == sorted(times)
    assert times[0] < 1e9 - 500, "2,000 judgements a day"


def test_each_task_of_the_scale_benchmark_runs(tmp_path: Path) -> None:
    home = large_home.make(tmp_path / "home", ROWS, lambda line: None)
    assert set(record_scale.TASKS) > {"stats", "pairs_of_a_day", "verify_sample"}
    for name, task in record_scale.TASKS.items():
        assert task(home) > 0, name


def test_the_writes_of_a_home_are_measured(tmp_path: Path) -> None:
    figures = record_scale.writes(tmp_path / "home", runs=2_000)
    assert min(figures.values()) > 0
    assert {"run_last_us", "single_us"} <= figures.keys()
    names = {target.name for target in record_scale.targets({"run_last_kb": 33.0})}
    assert names == {"run_last_kb"}, "writes alone have targets of their own"


def test_the_soak_benchmark_finds_lost_runs(tmp_path: Path) -> None:
    report = record_soak.work(tmp_path / "home", threads=2, seconds=0.2)
    home = Home.open(tmp_path / "home")
    figures = record_soak.losses(home, [report])
    assert (figures["lost_runs"], figures["lost_judgements"]) == (0, 0)
    assert (figures["dropped"], figures["problems"]) == (0, 0)
    assert figures["runs"] == len(report["ids"]["run"]) > 0
    report["ids"]["run"].append("never-written")
    assert record_soak.losses(home, [report])["lost_runs"] == 1


def test_the_log_is_measured_beside_raw_sqlite() -> None:
    figures = record.throughput(1, runs=50) | record.feedback(1, calls=5)
    assert min(figures.values()) > 0
    assert record.disk(300, conversations=1, turns=3) > 1
    assert set(record.time_calls("bare", 20, idle=False)) == {"p50", "p99"}


def test_a_judged_home_has_two_judgements_for_five_runs_and_is_sound(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home")
    with closing(connect(home)) as connection:
        store = Store(connection)
        update_scale._write(store, list(update_scale._prompts(20)))
        found = store.stats()
        assert (found["runs"], found["feedback"], found["comparisons"]) == (100, 20, 20)
        assert examine(connection).problems == []
        pairs = read_examples(store, "default", held_out=0.2)
    assert (len(pairs.pairs), len(pairs.thumbs), pairs.left_out) == (20, 20, {})
