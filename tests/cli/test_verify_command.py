"""`verify` on real homes, whole and tampered with."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing

import pytest

from agentpref.errors import InvalidAdapter
from agentpref.home import Home
from agentpref.models.adapter_files import read_adapter
from agentpref.record.database import connect
from agentpref.record.messages import prompt_of, run_row
from agentpref.record.seals import seal
from agentpref.record.spill import Spill
from agentpref.serve import folders
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref.types import Run

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}


def test_verify_passes_on_an_unchanged_home(run, filled) -> None:
    as_recorded, not_checked = run("verify").out.splitlines()
    assert as_recorded.startswith("as recorded: every page and index, all rows (")
    assert "86 run, 6 feedback, 40 comparison," in as_recorded
    assert as_recorded.endswith("the files of 0 adapters, the spill")
    assert not_checked.startswith("not checked: rows that somebody changed and sealed again")


def test_verify_finds_an_edited_score_and_deleted_feedback(run, filled) -> None:
    with closing(sqlite3.connect(filled / "agentpref.db")) as connection, connection:
        connection.execute("UPDATE feedback SET score = 0.5 WHERE rowid = 2")
        connection.execute("DELETE FROM feedback WHERE rowid = 4")
    result = run("verify", "--json", exits=1).json
    what = "it is not as it was written, or a row before it is gone"
    gone = "its rows are not those that were written: 5 are there, 6 were written"
    assert [(p["table"], p["what"]) for p in result["problems"]] == [
        ("feedback", what),
        ("feedback", what),
        ("feedback", gone),
    ]
    assert len(result["seals"]["feedback"]) == 32


def test_verify_finds_an_adapter_edited_together_with_manifest_and_row(
    run, filled, tmp_path
) -> None:
    registry = Registry(filled)
    folder = write_adapter(tmp_path / "adapter")
    revision = registry.publish(folder, parent=None, model=IDENTITY, training={})
    other = write_adapter(tmp_path / "other", seed=1)
    manifest = dict(revision.manifest, files=read_adapter(other).digests)
    for name in folders.ADAPTER_FILES:
        shutil.copy(other / name, revision.path / name)
    (revision.path / "manifest.json").write_bytes(folders.encode(manifest))
    with closing(connect(Home.open(filled))) as connection:
        connection.execute("UPDATE revision SET manifest = ?", (folders.encode(manifest).decode(),))
        seal(connection, "revision")
    (problem,) = run("verify", "--json", exits=1).json["problems"]
    assert "is not the name of the digests in its manifest" in problem["what"]
    with pytest.raises(InvalidAdapter, match="somebody edited it"):
        registry.promote(revision.revision_id)


def test_verify_finds_a_changed_message(run, filled) -> None:
    with closing(sqlite3.connect(filled / "agentpref.db")) as connection, connection:
        connection.execute("UPDATE message SET body = replace(body, 'No idea', 'An idea')")
    result = run("verify", exits=1)
    assert result.out.startswith("table\tkey\twhat\nmessage\t")
    problems = run("verify", "--json", exits=1).json["problems"]
    assert {problem["table"] for problem in problems} == {"message"}
    assert f"problems: {len(problems)};" in result.out


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("namespace", ["default", "nothing-logged-here"])
def test_verify_finds_a_changed_adapter(run, filled, tmp_path, file, namespace) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    registry = Registry(filled, namespace=namespace)
    revision = registry.publish(adapter, parent=None, model=IDENTITY, training={})
    assert run("verify", "--json").json["problems"] == []
    (revision.path / file).chmod(0o644)
    with (revision.path / file).open("ab") as stream:
        stream.write(b" ")
    (problem,) = run("verify", "--json", exits=1).json["problems"]
    assert (problem["table"], problem["key"]) == ("revision", revision.revision_id)
    assert file in problem["what"]


def test_a_sample_prints_how_many_rows_it_checked(run, filled) -> None:
    lines = run("verify", "--sample", "--rows", 20).out.splitlines()
    assert lines[0] == "table\tchecked\tof about"
    assert "run\t20\t86" in lines
    assert lines[-2] == "as recorded: the sampled part, the files of 0 adapters, the spill"
    assert lines[-1].endswith(
        "pages, indices and definitions; rows that are gone at the end of a table; "
        "tables without a line above; the other rows"
    )
    assert run("verify", "--sample", "--json").json["looked_at"]["run"] == {"rows": 86, "of": 86}


def test_a_sample_finds_problems(run, filled) -> None:
    with closing(sqlite3.connect(filled / "agentpref.db")) as connection, connection:
        connection.execute("UPDATE comparison SET winner = 'c'")
    problems = run("verify", "--sample", "--rows", 7, "--json", exits=1).json["problems"]
    assert {(p["table"], p["what"]) for p in problems} == {
        ("comparison", "its winner is 'c', not one of a, b, tie")
    }
    assert len(problems) == 7


def test_a_sample_checks_the_adapters_that_serve(run, filled, tmp_path) -> None:
    registry = Registry(filled)
    published = [
        registry.publish(
            write_adapter(tmp_path / f"adapter-{n}", seed=n),
            parent=None,
            model=IDENTITY,
            training={},
        )
        for n in range(3)
    ]
    registry.promote(published[0].revision_id)
    registry.canary(published[1].revision_id, 0.5)
    for revision in published:
        (revision.path / "adapter_config.json").chmod(0o644)
        (revision.path / "adapter_config.json").write_text("{}", encoding="utf-8")
    problems = run("verify", "--sample", "--json", exits=1).json["problems"]
    assert [p["key"] for p in problems] == [one.revision_id for one in published[:2]]
    assert len(run("verify", "--json", exits=1).json["problems"]) == 3


def test_a_pruned_adapter_is_no_problem(run, filled, tmp_path) -> None:
    registry = Registry(filled)
    adapter = write_adapter(tmp_path / "adapter")
    for _ in range(2):
        registry.publish(adapter, parent=None, model=IDENTITY, training={})
    assert len(registry.prune(keep=1).removed) == 1
    assert run("verify", "--json").json["problems"] == []


def test_entries_in_the_spill_are_reported_and_no_problem(run, filled) -> None:
    home = Home.open(filled)
    prompt = prompt_of([{"role": "user", "content": "hello"}])
    waiting = Run("r", "default", 1.0, prompt, {"role": "assistant", "content": "hi"})
    Spill(home).append([run_row(waiting)])
    with home.spill.open("ab") as file:
        file.write(b"0123 {")
    assert run("verify").out.startswith(
        "waiting in the spill until the next log writes to this home: 1\n"
        "cut off in the spill, by a crash before being acknowledged or by hand: 1\n"
        "as recorded: "
    )
    value = run("verify", "--sample", "--json").json
    assert (value["waiting"], value["torn"]) == (1, 1)


def test_a_full_check_reports_its_stages(run, filled) -> None:
    assert run("verify").err.splitlines()[0] == "pages"
    assert run("verify", "--json", "--quiet").err == ""
