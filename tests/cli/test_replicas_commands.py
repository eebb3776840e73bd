"""`backup` and `merge` on real homes."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.record.deletion.forget import forget
from agentpref.record.log import Log
from agentpref_cli.commands import home as command

ASK = [{"role": "user", "content": "When are you open?"}]


@pytest.fixture
def other(tmp_path: Path, filled: Path) -> Path:
    """Another host's home, with three runs and a thumb; the hosts share their keys."""
    folder = tmp_path / "other"
    with Log(filled) as log:
        log.record(ASK, "Always.", user_id="eve")
    folder.mkdir()
    shutil.copy(filled / "user.keys", tmp_path / "keys")
    folder.rmdir()
    with Log(folder):
        shutil.copy(tmp_path / "keys", folder / "user.keys")
    with Log(folder) as log:
        runs = [log.record(ASK, f"From {n}.", user_id="ada") for n in (8, 9, 10)]
        log.feedback(runs[0], key="thumbs", score=1)
    return folder


def test_a_backup_is_a_home(run, filled, tmp_path) -> None:
    said = run("backup", tmp_path / "copy")
    assert said.out.startswith("copied ")
    assert said.out.endswith(f" MB and 0 revisions to {tmp_path / 'copy'}\n")
    assert said.err.splitlines()[0] == "pages"
    assert run("stats", "--json", "--home", tmp_path / "copy") == run("stats", "--json")
    assert run("verify", "--home", tmp_path / "copy")


def test_backup_prints_json(run, filled, tmp_path) -> None:
    value = run("backup", tmp_path / "copy", "--json").json
    assert value["path"] == str(tmp_path / "copy")
    assert value["bytes"] > 0
    assert (value["revisions"], value["missing"]) == (0, [])


def test_a_backup_into_a_folder_in_use_is_bad_usage(run, filled, tmp_path) -> None:
    assert "missing or empty" in run("backup", filled.parent, exits=2).err
    assert "inside the home" in run("backup", filled / "copy", exits=2).err


def test_merge_prints_what_became_of_the_rows(run, filled, other) -> None:
    lines = run("merge", other).out.splitlines()
    assert lines == [
        "home\trows\tadded\tknown\tconflicts\tforgotten",
        "other\truns\t3\t0\t0\t0",
        "other\tfeedback\t1\t0\t0\t0",
        "other\tcomparisons\t0\t0\t0\t0",
    ]
    (again,) = run("merge", other, "--json").json["merged"]
    assert again["runs"] == {"added": 0, "known": 3, "conflicts": 0, "forgotten": 0}
    assert (again["messages"], again["conflicts"], again["forgot"]) == (0, [], None)
    assert run("stats", "--json").json["default"]["runs"] == 90


def test_merge_refuses_a_home_that_fails_verification(run, filled, other) -> None:
    with closing(sqlite3.connect(other / "agentpref.db")) as connection, connection:
        connection.execute("UPDATE message SET body = replace(body, 'From 9', 'From 7')")
    err = run("merge", other, exits=1).err
    assert "fails verification, so nothing of it was merged: message" in err
    assert "its text is not what was recorded; look at it with `agentpref verify --home" in err
    assert run("stats", "--json").json["default"]["runs"] == 87


def test_merge_names_the_rows_in_conflict(run, filled, other) -> None:
    with Log(filled) as log:
        log.record(ASK, "Mine.", run_id="same")
    with Log(other) as log:
        log.record(ASK, "Theirs.", run_id="same")
    lines = run("merge", other).out.splitlines()
    assert lines[-3:] == [
        "home\ttable\tkey",
        "other\trun\tsame",
        "rows in conflict: 1; the row that was here first stays",
    ]


def test_merge_prints_what_a_tombstone_removed(run, filled, other) -> None:
    run("merge", other)
    forget(other, "ada")
    out = run("merge", other).out
    assert "forgotten in other, so removed here: runs 3, feedback 1, comparisons 0\n" in out
    assert run("stats", "--json").json["default"]["runs"] == 87


def test_merge_prints_the_commands_to_rebuild(capsys: pytest.CaptureFixture[str]) -> None:
    rebuild = {
        "namespace": "default",
        "tainted": ["rev-1"],
        "commands": ["agentpref adapters promote base"],
    }
    forgot = {"runs": 1, "feedback": 0, "comparisons": 0, "rebuild": [rebuild]}
    command._show_forgotten("h", {"keys": 0, "forgot": forgot})
    assert capsys.readouterr().out.endswith(
        "default is served by rev-1; to rebuild:\n  agentpref adapters promote base\n"
    )


def test_merge_warns_if_the_homes_share_no_key(run, filled, tmp_path) -> None:
    with Log(tmp_path / "stranger") as log:
        log.record(ASK, "Always.", user_id="ada")
    assert "stranger hashes its users under another key" in run("merge", log.home.path).out
    assert "another key" not in run("merge", log.home.path).out


def test_merging_a_home_with_itself_is_bad_usage(run, filled) -> None:
    assert "the home itself" in run("merge", filled, exits=2).err


def test_merging_a_folder_that_is_no_home_fails(run, filled, tmp_path) -> None:
    assert "is not an agentpref home" in run("merge", tmp_path / "nowhere", exits=1).err
    run("merge", exits=2)


def test_ship_prints_what_was_written_and_merge_what_became_of_it(
    run, filled, other, tmp_path
) -> None:
    bus = tmp_path / "bus"
    said = run("ship", bus, "--home", other)
    assert said.out == f"shipped to {bus}: runs 3, feedback 1, comparisons 0, in segments 1\n"
    assert run("ship", bus, "--home", other, "--json").json["segments"] == []
    lines = run("merge", bus).out.splitlines()
    assert lines == [
        "home\trows\tadded\tknown\tconflicts\tforgotten",
        "bus\truns\t3\t0\t0\t0",
        "bus\tfeedback\t1\t0\t0\t0",
        "bus\tcomparisons\t0\t0\t0\t0",
    ]


def test_merge_names_a_damaged_segment_and_fails(run, filled, other, tmp_path) -> None:
    bus = tmp_path / "bus"
    (segment,) = run("ship", bus, "--home", other, "--json").json["segments"]
    (bus / segment).write_bytes(b"no gzip")
    said = run("merge", bus, exits=1)
    assert f"refused, and nothing of it was merged: {segment}: it is no whole gzip file" in said.out


def test_ship_says_which_segments_were_replaced(run, filled, other, tmp_path) -> None:
    bus = tmp_path / "bus"
    run("ship", bus, "--home", other)
    forget(other, "ada")
    said = run("ship", bus, "--home", other).out
    assert "replaced, because they held what was forgotten: 1 segments" in said


def test_ship_to_no_address_is_bad_usage(run, filled) -> None:
    assert "fsspec knows" in run("ship", "nowhere://x", exits=2).err
