"""`init`, `stats` and `pairs` on real homes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from agentpref.home import Home
from agentpref.prefer.catalog import Catalog
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.updates import UpdateRow, Updates
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter


def test_init_makes_a_home_once(run, home) -> None:
    assert run("init").out == f"made a home: {home}\n"
    assert Home.open(home).database.stat().st_size > 0, "the schema is made too"
    assert run("init", "--json").json == {"home": str(home), "existed": True}


def test_the_home_option_wins_over_the_environment(run, home, tmp_path) -> None:
    run("init", "--home", tmp_path / "other")
    assert not home.exists()
    assert (tmp_path / "other" / "agentpref.db").is_file()


def test_init_refuses_a_folder_of_something_else(run, home) -> None:
    home.mkdir()
    (home / "thesis.txt").write_text("mine", encoding="utf-8")
    err = run("init", exits=1).err
    assert "thesis.txt" in err
    assert [file.name for file in home.iterdir()] == ["thesis.txt"]


def test_stats_of_an_empty_home_says_that_nothing_is_logged(run) -> None:
    run("init")
    assert run("stats").out == "nothing is logged yet\n"
    assert run("stats", "--json").json == {}


def test_stats_counts_by_namespace(run, filled, rows) -> None:
    run("import", rows, "--namespace", "support")
    lines = run("stats").out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["namespace", "default", "support"]
    assert lines[1].split("\t")[1:7] == ["86", "0", "0", "6", "0", "40"]
    assert set(run("stats", "--namespace", "support", "--json").json) == {"support"}


def test_stats_and_updates_count_what_was_set_aside_and_is_still_there(run, filled) -> None:
    with closing(connect(Home.open(filled))) as connection:
        Catalog(connection, "default", held_out=0.2).refresh()
        query = "SELECT example_id FROM example WHERE namespace = 'default'"
        listed = [name for (name,) in connection.execute(query)]
    told = {
        "update_id": "u",
        "examples": 2,
        "tags": {"bread": 2},
        "why": "failed",
        "back": "--again",
    }
    row = UpdateRow(
        "u", "default", 1.0, 2.0, None, None, "refused", {"set_aside": [told], "counts": {}},
        {**dict.fromkeys(listed[:2], "set_aside"), listed[2]: "replay", "judged anew": "set_aside"},
    )  # fmt: skip
    with closing(connect(Home.open(filled))) as connection:
        Updates(connection).add(row)
    assert run("stats", "--json").json["default"]["set_aside"] == 2
    shown = "examples in default that updates set aside: 2; `agentpref update --again`"
    assert shown in run("stats").out
    assert run("updates", "--json").json["updates"][0]["set_aside"] == 2


def test_pairs_since_a_time_come_from_prompts_judged_since_then(run, filled) -> None:
    with closing(connect(Home.open(filled))) as connection:
        connection.execute("UPDATE comparison SET created_at = created_at - 1000000")
    with Log(filled) as log:
        asked = [{"role": "user", "content": "How is it tonight?"}]
        log.correct(log.record(asked, "Dark."), "Dark and warm.")
    assert _counts(run("pairs", "--json").json) == {"comparison": 40, "correction": 1}
    assert _counts(run("pairs", "--since", "1d", "--json").json) == {"correction": 1}
    assert _counts(run("pairs", "--since", "2001-01-01", "--json").json).keys() == {
        "comparison",
        "correction",
    }
    assert run("pairs", "--since", "2999-01-01").out.startswith("no pairs since 2999-01-01")


def _counts(value) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in value["strata"]:
        counts[row["origin"]] = counts.get(row["origin"], 0) + row["train"] + row["held_out"]
    return counts


def test_pairs_since_a_text_that_is_no_time_exits_2(run, filled) -> None:
    err = run("pairs", "--since", "yesterday", exits=2).err
    assert "'yesterday' is no time" in err
    assert "2026-11-19" in err


@pytest.fixture
def last_update(filled: Path):
    """Keep a report in the home, as an update with another share of held-out prompts does."""

    def keep(report: dict) -> None:
        with closing(connect(Home.open(filled))) as connection:
            row = UpdateRow("u1", "default", 1.0, 2.0, None, None, report["verdict"], report)
            Updates(connection).add(row)

    return keep


def _held_out(run) -> tuple[float, int]:
    value = run("pairs", "--json").json
    return value["held_out"], sum(row["held_out"] for row in value["strata"])


def test_pairs_are_split_by_the_default_share_before_the_first_update(run, filled) -> None:
    share, count = _held_out(run)
    assert share == 0.2
    assert 0 < count < 20
    assert "share of the prompts that is held out" not in run("pairs").out


def test_pairs_are_split_as_by_the_last_update(run, last_update) -> None:
    before = _held_out(run)[1]
    last_update({"verdict": "refused", "config": {"held_out": 0.9}})
    share, count = _held_out(run)
    assert share == 0.9
    assert count > 2 * before
    assert "share of the prompts that is held out: 0.9\n" in run("pairs").out
    assert run("pairs", "--held-out", "0.2", "--json").json["held_out"] == 0.2


def test_the_share_of_an_update_by_an_older_version_is_read_from_its_revision(
    run, filled, last_update, tmp_path
) -> None:
    training = {"config": {"held_out": 0.8}}
    Registry(filled).publish(
        write_adapter(tmp_path / "adapter"), parent=None, model={"name": "tiny"}, training=training
    )
    last_update({"verdict": "insufficient"})
    assert _held_out(run)[0] == 0.8


def test_an_update_by_an_older_version_without_a_revision_leaves_the_default_share(
    run, last_update
) -> None:
    last_update({"verdict": "refused"})
    assert _held_out(run)[0] == 0.2


def test_an_export_is_split_as_by_the_last_update(run, last_update, tmp_path) -> None:
    last_update({"verdict": "refused", "config": {"held_out": 0.9}})
    value = run("export", "--split", "held-out", "-o", tmp_path / "held.jsonl", "--json").json
    assert value["held_out"] == 0.9
    assert value["rows"] == _held_out(run)[1]
