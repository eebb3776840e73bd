"""`init` and `stats` on real homes."""

from __future__ import annotations

from agentpref.home import Home


def test_init_makes_a_home_once(run, home) -> None:
    assert run("init").out == f"made a home: {home}\n"
    assert Home.open(home).database.stat().st_size > 0, "the schema is made too"
    assert run("init", "--json").json == {"home": str(home), "existed": True}


def test_init_takes_the_option_before_the_environment(run, home, tmp_path) -> None:
    run("init", "--home", tmp_path / "other")
    assert not home.exists()
    assert (tmp_path / "other" / "agentpref.db").is_file()


def test_init_leaves_a_foreign_folder_alone(run, home) -> None:
    home.mkdir()
    (home / "thesis.txt").write_text("mine", encoding="utf-8")
    err = run("init", exits=1).err
    assert "thesis.txt" in err
    assert [file.name for file in home.iterdir()] == ["thesis.txt"]


def test_stats_of_an_empty_home(run) -> None:
    run("init")
    assert run("stats").out == "nothing is logged yet\n"
    assert run("stats", "--json").json == {}


def test_stats_counts_by_namespace(run, filled, rows) -> None:
    run("import", rows, "--namespace", "support")
    lines = run("stats").out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["namespace", "default", "support"]
    assert lines[1].split("\t")[1:7] == ["86", "0", "0", "6", "0", "40"]
    assert set(run("stats", "--namespace", "support", "--json").json) == {"support"}
