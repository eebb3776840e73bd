"""A namespace that is not in the home is said, by every command that reads one."""

from __future__ import annotations

from pathlib import Path

import pytest

import agentpref
from agentpref.errors import UnknownNamespace
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

READING = [
    ["stats"],
    ["pairs"],
    ["report"],
    ["report", "--since", "1d"],
    ["eval"],
    ["export"],
    ["update", "--model", "tiny"],
    ["adapters", "list"],
    ["adapters", "rollback"],
    ["adapters", "prune", "--yes"],
]


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_a_namespace_that_is_not_in_the_home_is_an_error_that_lists_those_that_are(
    run, filled, rows, command
) -> None:
    run("import", rows, "--namespace", "support")
    err = run(*command, "--namespace", "suport", exits=1).err
    assert err == (
        "error: no namespace 'suport' is in this home; it has 'default', 'support'; name one of "
        "these, or log a run under the new name first\n"
    )


@pytest.mark.parametrize("command", [["stats"], ["pairs"], ["export"], ["adapters", "list"]])
def test_no_name_is_wrong_while_the_home_is_empty(run, command) -> None:
    run("init")
    run(*command, "--namespace", "support")


def test_an_update_of_an_empty_home_finds_nothing_new(run) -> None:
    """Cron may be set up before the app's first run."""
    run("init")
    run("update", "--model", "tiny", "--namespace", "support", exits=3)


def test_a_namespace_without_runs_is_known_by_its_revisions(run, filled, tmp_path: Path) -> None:
    registry = Registry(filled, namespace="by-hand")
    registry.publish(write_adapter(tmp_path / "adapter"), parent=None, model={}, training={})
    assert run("adapters", "list", "--namespace", "by-hand", "--json").json["revisions"]
    run("update", "--model", "tiny", "--namespace", "by-hand", exits=3)


def test_a_first_run_makes_a_namespace(home: Path) -> None:
    with agentpref.Log(home, namespace="first") as log:
        log.record([{"role": "user", "content": "Hello!"}], "Hi!")
    with pytest.raises(UnknownNamespace, match="it has 'first'"):
        agentpref.update(home, model="tiny", namespace="second")


def test_a_model_that_is_nowhere_is_an_error_also_when_nothing_is_new(run, tmp_path: Path) -> None:
    run("init")
    err = run("update", "--model", tmp_path / "nowhere", exits=1).err
    assert "nowhere" in err
    assert err.startswith("error: no model is named")
