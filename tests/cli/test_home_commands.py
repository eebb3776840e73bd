"""`init`, `stats` and `verify` on real homes."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from agentpref.record.home import Home
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}


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


def test_verify_of_an_honest_home(run, filled) -> None:
    assert run("verify").out == "all that is recorded is as it was written\n"


def test_verify_convicts_a_changed_message(run, filled) -> None:
    with closing(sqlite3.connect(filled / "agentpref.db")) as connection, connection:
        connection.execute("UPDATE message SET body = replace(body, 'No idea', 'An idea')")
    result = run("verify", exits=1)
    assert result.out.startswith("table\tkey\twhat\nmessage\t")
    problems = run("verify", "--json", exits=1).json["problems"]
    assert {problem["table"] for problem in problems} == {"message"}
    assert f"problems: {len(problems)};" in result.out


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("namespace", ["default", "nothing-logged-here"])
def test_verify_convicts_a_changed_adapter(run, filled, tmp_path, file, namespace) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    registry = Registry(filled, namespace=namespace)
    revision = registry.publish(adapter, parent=None, base=IDENTITY, training={})
    assert run("verify", "--json").json == {"problems": []}
    (revision.path / file).chmod(0o644)
    with (revision.path / file).open("ab") as stream:
        stream.write(b" ")
    (problem,) = run("verify", "--json", exits=1).json["problems"]
    assert (problem["table"], problem["key"]) == ("revision", revision.revision_id)
    assert file in problem["what"]
