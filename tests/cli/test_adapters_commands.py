"""`adapters`: real revisions in a real registry, changed by hand."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from agentpref.record.database import connect
from agentpref.record.home import Home
from agentpref.record.lineage import taint
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

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
            folder, parent=parent, base=IDENTITY, training={"learning_rate": 0.1}
        )
        published.append(revision.revision_id)
    return published


def serving(run) -> str:
    return run("adapters", "list", "--json").json["serving"]["live"]


def test_the_base_model_serves_a_new_home(run, home) -> None:
    run("init")
    header, base = run("adapters", "list").out.splitlines()
    assert header == "revision\tserves\tparent\tcreated\ttainted"
    assert base == "base\tlive\t-\t-\t-"
    assert run("adapters", "list", "--json").json["revisions"] == []


def test_list_names_revisions_parents_and_roles(run, home, names) -> None:
    Registry(home).canary(names[1], 0.1)
    run("adapters", "promote", names[0])
    Registry(home).canary(names[1], 0.1)
    rows = [line.split("\t")[:3] for line in run("adapters", "list").out.splitlines()[1:]]
    assert rows == [["base", "-", "-"], [names[0], "live", "base"], [names[1], "canary", names[0]]]
    value = run("adapters", "list", "--json").json
    assert [row["serves"] for row in value["revisions"]] == ["live", "canary"]
    assert value["serving"]["weight"] == 0.1


def test_promote_and_roll_back(run, names) -> None:
    for name in names:
        assert run("adapters", "promote", name).out.startswith(f"live: {name} ")
        assert serving(run) == name
    assert run("adapters", "rollback", "--json").json["live"] == names[0]
    assert run("adapters", "rollback").out.startswith("live: base ")
    err = run("adapters", "rollback", exits=1).err
    assert err.startswith("error: nothing to roll back")


def test_show_tells_where_a_revision_comes_from(run, names) -> None:
    facts = dict(line.split("\t") for line in run("adapters", "show", names[1]).out.splitlines())
    assert facts["revision"] == names[1]
    assert facts["parent"] == names[0]
    assert facts["base model"] == "tiny"
    assert facts["learning_rate"] == "0.1"
    value = run("adapters", "show", names[1], "--json").json
    assert value["manifest"]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("command", ["show", "promote"])
def test_an_unknown_revision_is_named(run, names, command) -> None:
    err = run("adapters", command, "rev-000009-000000000000", exits=1).err
    assert "'rev-000009-000000000000'" in err
    assert err.count("\n") == 1


def test_an_edited_adapter_is_not_promoted(run, home, names) -> None:
    file = home / "adapters" / names[0] / "adapter_model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes() + b" ")
    assert "adapter_model.safetensors" in run("adapters", "promote", names[0], exits=1).err
    assert serving(run) == "base"


def test_namespaces_do_not_see_each_other(run, names) -> None:
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
    assert [row[-1] for row in rows] == ["-", "-", "yes"]
    found = run("adapters", "list", "--json").json["revisions"]
    assert [row["tainted_at"] for row in found] == [None, 5.0]
    assert "tainted\t" in run("adapters", "show", names[1]).out
    assert "tainted\t" not in run("adapters", "show", names[0]).out
    err = run("adapters", "promote", names[1], exits=1).err
    assert f"agentpref adapters promote {names[0]}" in err
