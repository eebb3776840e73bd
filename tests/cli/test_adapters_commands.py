"""`adapters`: real revisions in a real registry, changed by hand."""

from __future__ import annotations

import io
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.updates import taint
from agentpref.serve.pins import Pins
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref_cli.commands.adapters import prune

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}


@pytest.fixture
def names(home: Path, tmp_path: Path) -> list[str]:
    """Two revisions, the second trained from the first; neither serves."""
    registry = Registry(Home.create(home))
    published: list[str] = []
    for seed in (1, 2):
        folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed)
        parent = published[-1] if published else None
        revision = registry.publish(
            folder, parent=parent, model=IDENTITY, training={"learning_rate": 0.1}
        )
        published.append(revision.revision_id)
    return published


def serving(run) -> str:
    return run("adapters", "list", "--json").json["serving"]["live"]


def test_the_base_model_serves_a_new_home(run, home) -> None:
    run("init")
    header, base = run("adapters", "list").out.splitlines()
    assert header == "revision\tkind\tserves\tparent\tcreated\tstatus"
    assert base == "base\t-\tlive\t-\t-\t-"
    assert run("adapters", "list", "--json").json["revisions"] == []


def test_list_names_revisions_parents_and_roles(run, home, names) -> None:
    Registry(home).canary(names[1], 0.1)
    run("adapters", "promote", names[0])
    Registry(home).canary(names[1], 0.1)
    rows = [line.split("\t")[:4] for line in run("adapters", "list").out.splitlines()[1:]]
    assert rows == [
        ["base", "-", "-", "-"],
        [names[0], "adapter", "live", "base"],
        [names[1], "adapter", "canary", names[0]],
    ]
    value = run("adapters", "list", "--json").json
    assert [row["serves"] for row in value["revisions"]] == ["live", "canary"]
    assert value["serving"]["weight"] == 0.1


def test_commands_that_only_read_work_where_sqlite_can_make_no_file(
    run, home, names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: what serves must be seen there, too."""
    real = sqlite3.connect

    def refuse(place: object, **options: Any) -> sqlite3.Connection:
        if not options.get("uri") and place != ":memory:":
            raise sqlite3.OperationalError("unable to open database file")
        return real(place, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(sqlite3, "connect", refuse)
    assert all(name in run("adapters", "list").out for name in names)
    assert names[0] in run("adapters", "show", names[0]).out
    for command in ("stats", "pairs", "export", "verify"):
        run(command)
    assert "let this user read and write" in run("adapters", "promote", names[0], exits=1).err


def test_a_rollback_undoes_one_promotion_at_a_time(run, names) -> None:
    for name in names:
        assert run("adapters", "promote", name).out.startswith(f"live: {name} ")
        assert serving(run) == name
    assert run("adapters", "rollback", "--json").json["live"] == names[0]
    assert run("adapters", "rollback").out.startswith("live: base ")
    err = run("adapters", "rollback", exits=1).err
    assert err.startswith("error: nothing to roll back")


def test_a_revision_that_was_rolled_back_is_shown_as_one_until_it_is_promoted(run, names) -> None:
    run("adapters", "promote", names[0])
    run("adapters", "rollback")
    rows = [line.split("\t") for line in run("adapters", "list").out.splitlines()[1:]]
    assert [row[-1] for row in rows] == ["-", "taken back", "-"]
    found = run("adapters", "list", "--json").json["revisions"]
    assert [row["taken_back"] for row in found] == [True, False]
    run("adapters", "promote", names[0])
    assert "taken back" not in run("adapters", "list").out


def test_show_prints_where_a_revision_comes_from(run, names) -> None:
    facts = dict(line.split("\t") for line in run("adapters", "show", names[1]).out.splitlines())
    assert facts["revision"] == names[1]
    assert facts["parent"] == names[0]
    assert facts["base model"] == "tiny"
    assert facts["learning_rate"] == "0.1"
    value = run("adapters", "show", names[1], "--json").json
    assert value["manifest"]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("command", ["show", "promote"])
def test_an_error_names_an_unknown_revision(run, names, command) -> None:
    err = run("adapters", command, "rev-000009-000000000000", exits=1).err
    assert "'rev-000009-000000000000'" in err
    assert err.count("\n") == 1


def test_an_edited_adapter_is_not_promoted(run, home, names) -> None:
    file = home / "adapters" / names[0] / "adapter_model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes() + b" ")
    assert "adapter_model.safetensors" in run("adapters", "promote", names[0], exits=1).err
    assert serving(run) == "base"


def test_namespaces_do_not_see_each_other(run, home, names) -> None:
    with Log(home, namespace="other") as log:
        log.record([{"role": "user", "content": "Hello!"}], "Hi!")
    run("adapters", "promote", names[0], "--namespace", "other", exits=1)
    assert run("adapters", "list", "--json", "--namespace", "other").json["revisions"] == []


def test_the_bare_base_can_be_promoted(run, names) -> None:
    run("adapters", "promote", names[0])
    assert run("adapters", "promote", "base").out.startswith("live: base ")
    assert serving(run) == "base"
    assert run("adapters", "rollback", "--json").json["live"] == names[0]


def test_a_tainted_revision_is_shown_as_one_and_not_promoted(run, home, names) -> None:
    with closing(connect(Home.open(home))) as connection:
        taint(connection, names[1:], 5.0)
    rows = [line.split("\t") for line in run("adapters", "list").out.splitlines()[1:]]
    assert [row[-1] for row in rows] == ["-", "-", "tainted"]
    found = run("adapters", "list", "--json").json["revisions"]
    assert [row["tainted_at"] for row in found] == [None, 5.0]
    assert "tainted\t" in run("adapters", "show", names[1]).out
    assert "tainted\t" not in run("adapters", "show", names[0]).out
    err = run("adapters", "promote", names[1], exits=1).err
    assert f"agentpref adapters promote {names[0]}" in err


def generation(run) -> int:
    return run("adapters", "list", "--json").json["serving"]["generation"]


def test_a_canary_starts_and_ends(run, names) -> None:
    run("adapters", "promote", names[0])
    out = run("adapters", "canary", names[1], "--weight", ".1").out
    assert out.splitlines()[1] == f"canary: {names[1]}, for 10% of the threads"
    value = run("adapters", "canary", "--end", "--json").json
    assert (value["live"], value["canary"], value["weight"]) == (names[0], None, 0.0)
    assert "share above 0" in run("adapters", "canary", names[1], "--weight", "0", exits=1).err


@pytest.mark.parametrize(
    "arguments",
    [[], ["REV"], ["--weight", "0.1"], ["REV", "--end"], ["--end", "--weight", "0.1"]],
)
def test_a_canary_needs_a_revision_and_its_share_or_an_end(run, names, arguments) -> None:
    words = [names[1] if word == "REV" else word for word in arguments]
    assert "name a revision and its share" in run("adapters", "canary", *words, exits=2).err


def test_a_change_that_expects_an_older_generation_is_refused(run, names) -> None:
    run("adapters", "promote", names[0], "--expected-generation", 0)
    for command in (
        ["promote", names[1]],
        ["canary", names[1], "--weight", 0.1],
        ["canary", "--end"],
        ["rollback"],
    ):
        err = run("adapters", *command, "--expected-generation", 0, exits=1).err
        assert "is at generation 1, not 0" in err
    assert generation(run) == 1
    run("adapters", "rollback", "--expected-generation", 1)
    assert generation(run) == 2


def test_a_quarantine_is_shown_refused_and_ended(run, names) -> None:
    out = run("adapters", "quarantine", names[0], "--reason", "it answers in Latin").out
    assert out == f"{names[0]} is in quarantine: it answers in Latin\n"
    rows = [line.split("\t") for line in run("adapters", "list").out.splitlines()[1:]]
    assert [row[-1] for row in rows] == ["-", "quarantined", "-"]
    shown = dict(line.split("\t") for line in run("adapters", "show", names[0]).out.splitlines())
    assert shown["reason"] == "it answers in Latin"
    assert shown["quarantined"] != "-"
    assert "it answers in Latin" in run("adapters", "promote", names[0], exits=1).err
    assert "may serve again" in run("adapters", "release", names[0]).out
    run("adapters", "promote", names[0])


@pytest.mark.parametrize(("role", "end"), [("live", "rollback"), ("canary", "canary --end")])
def test_a_quarantine_of_what_serves_says_how_to_end_that(run, home, names, role, end) -> None:
    if role == "live":
        Registry(home).promote(names[0])
    else:
        Registry(home).canary(names[0], 0.5)
    out = run("adapters", "quarantine", names[0], "--reason", "bad").out
    assert f"it is still {role}; end that with `agentpref adapters {end}`" in out
    run("adapters", *end.split())
    assert run("adapters", "list", "--json").json["revisions"][0]["serves"] is None


def test_quarantine_and_release_as_json(run, names) -> None:
    value = run("adapters", "quarantine", names[0], "--reason", "bad", "--json").json
    assert (value["revision"], value["quarantine_reason"]) == (names[0], "bad")
    assert value["quarantined_at"] is not None
    value = run("adapters", "release", names[0], "--json").json
    assert (value["quarantined_at"], value["quarantine_reason"]) == (None, None)


def test_prune_removes_revisions_and_says_why_the_others_stay(run, home, names) -> None:
    dry = run("adapters", "prune", "--keep", 1, "--dry-run").out.splitlines()
    assert dry[:3] == [
        "revision\tpruning\twhy",
        f"{names[0]}\twould be removed\t-",
        f"{names[1]}\tkept\tone of the newest 1",
    ]
    assert dry[3].startswith("would free 0.0 MB")
    assert (home / "adapters" / names[0]).exists()
    value = run("adapters", "prune", "--keep", 1, "--yes", "--json").json
    assert value["removed"] == [names[0]]
    assert value["kept"] == {names[1]: "one of the newest 1"}
    assert value["bytes"] > 0
    assert not (home / "adapters" / names[0]).exists()
    rows = [line.split("\t") for line in run("adapters", "list").out.splitlines()[1:]]
    assert [row[-1] for row in rows] == ["-", "pruned", "-"]
    assert "pruned\t" in run("adapters", "show", names[0]).out
    assert "was pruned" in run("adapters", "promote", names[0], exits=1).err
    run("adapters", "prune", "--keep", 0, exits=2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("said", "removed"), [("y\n", True), ("n\n", False), ("", False)])
def test_prune_asks_before_it_removes_on_a_terminal(
    home, names, monkeypatch, capsys, said: str, removed: bool
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(said))
    try:
        prune(keep=1, dry_run=False, yes=False, home=home, namespace="default", as_json=False)
    except typer.Exit:
        assert "nothing was removed" in capsys.readouterr().out
    assert (home / "adapters" / names[0]).exists() != removed


def test_prune_refuses_to_remove_where_nobody_can_be_asked(run, home, names) -> None:
    refused = run("adapters", "prune", "--keep", 1, exits=2)
    assert refused.err.startswith("error: nothing was removed")
    assert refused.err.endswith("add --yes\n")
    assert (home / "adapters" / names[0]).exists()


@pytest.mark.parametrize(
    ("answer", "why"),
    [(True, "loaded at"), (None, "which does not say"), (False, None)],
)
def test_prune_asks_the_engine_at_a_url(run, home, names, monkeypatch, answer, why) -> None:
    left_loaded(home, names[0], "http://127.0.0.1:8000")
    asked = []

    def has_loaded(url: str, revision_id: str) -> bool | None:
        asked.append((url, revision_id))
        return answer

    engine = ModuleType("agentpref_adapters.vllm")
    engine.has_loaded = has_loaded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "agentpref_adapters.vllm", engine)
    value = run("adapters", "prune", "--keep", 1, "--yes", "--json").json
    assert set(asked) == {("http://127.0.0.1:8000", names[0])}
    assert (value["removed"] == [names[0]]) == (why is None)
    assert why is None or why in value["kept"][names[0]]


def test_a_revision_stays_when_the_client_that_asks_is_not_installed(
    run, home, names, monkeypatch
) -> None:
    left_loaded(home, names[0], "http://127.0.0.1:8000")
    monkeypatch.setitem(sys.modules, "agentpref_adapters.vllm", None)
    value = run("adapters", "prune", "--keep", 1, "--yes", "--json").json
    assert "does not say" in value["kept"][names[0]]


def test_a_place_that_is_not_a_url_is_not_asked(run, home, names, monkeypatch) -> None:
    left_loaded(home, names[0], "somewhere")
    monkeypatch.setitem(sys.modules, "agentpref_adapters.vllm", ModuleType("empty"))
    value = run("adapters", "prune", "--keep", 1, "--yes", "--json").json
    assert "does not say" in value["kept"][names[0]]


def left_loaded(home: Path, name: str, place: str) -> None:
    """Hold a revision there and go, as a router does whose engine outlives it."""
    pins = Pins(Home.open(home).pins, place)
    pins.take(name)
    pins.close()


def test_export_copies_one_revision(run, home, names, tmp_path) -> None:
    out = run("adapters", "export", names[0], tmp_path / "exported").out
    assert out == f"{names[0]} is in {tmp_path / 'exported'}\n"
    files = {file.name for file in (tmp_path / "exported").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    value = run("adapters", "export", names[0], tmp_path / "again", "--json").json
    assert value == {"revision": names[0], "path": str(tmp_path / "again")}
    run("adapters", "export", names[0], tmp_path / "again", exits=2)


def test_a_rollback_passes_over_a_broken_revision_and_says_so(run, home, names) -> None:
    for name in names:
        run("adapters", "promote", name)
    (home / "adapters" / names[0] / "adapter_model.safetensors").unlink()
    out = run("adapters", "rollback").out
    assert out.startswith("passed over, and in quarantine now: ")
    assert f"{names[0]}/adapter_model.safetensors is not the file that was published" in out
    assert serving(run) == "base"
    assert "adapter_model.safetensors" in run("adapters", "release", names[0], exits=1).err


def test_a_merged_export_is_a_whole_model(run, home, tmp_path, random_base) -> None:
    from agentpref.models.base import base_digests, identity

    run("init")
    layers = {"model.layers.0.self_attn.q_proj": (64, 64)}
    folder = write_adapter(tmp_path / "adapter", layers=layers)
    about = identity(str(random_base), *base_digests(random_base), {})
    revision = Registry(home).publish(folder, parent=None, model=about, training={}).revision_id
    shown = run("adapters", "export", revision, tmp_path / "whole", "--merged")
    size = sum(file.stat().st_size for file in (tmp_path / "whole").iterdir())
    assert shown.out == (
        f"{revision}, merged into its base (float32, {size / 1e6:,.1f} MB), is in "
        f"{tmp_path / 'whole'}\n"
    )
    assert "merging (layers)" in shown.err
    again = ("--merged", "--model", random_base, "--json")
    value = run("adapters", "export", revision, tmp_path / "again", *again).json
    assert value == {
        "revision": revision, "path": str(tmp_path / "again"), "merged": True,
        "dtype": "float32", "bytes": size,
    }  # fmt: skip
    refused = run("adapters", "export", revision, tmp_path / "x", "--model", "tiny", exits=2)
    assert "--merged" in refused.err


def test_a_revision_with_instructions_is_of_another_kind_and_its_export_says_them(
    run, home, names, tmp_path
) -> None:
    registry, first = Registry(home), Registry(home).get(names[0])
    with registry.publishing(
        first.path, parent=names[0], model=first.manifest["base"], training={},
        instructions="Answer in one sentence.",
    ) as made:  # fmt: skip
        name = made.revision.revision_id
    rows = [line.split("\t")[:2] for line in run("adapters", "list").out.splitlines()]
    assert [name, "prompt"] in rows
    assert "Answer in one sentence." in run("adapters", "show", name).out
    said = run("adapters", "export", name, tmp_path / "out").out
    assert "it was proven with these instructions, to be put into the system prompt" in said
    assert "Answer in one sentence." in said
