"""`demo`: the packages it needs, and the options it passes on; the story has tests of its own."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture
def told(monkeypatch):
    """The calls of the stories, which are replaced: they take minutes."""
    calls: list[dict] = []
    for name in ("run", "run_real"):
        monkeypatch.setattr(
            f"agentpref_cli.demo.{name}",
            lambda name=name, **given: calls.append({"story": name, **given}),
        )
    return calls


def test_folder_seed_and_format_are_passed_on(run, told, tmp_path) -> None:
    run("demo")
    run("demo", "--home", tmp_path, "--seed", "7", "--json", "-q")
    shared = {"story": "run", "model": "tiny"}
    assert told == [
        {**shared, "home": None, "json": False, "seed": 0, "quiet": False},
        {**shared, "home": tmp_path, "json": True, "seed": 7, "quiet": True},
    ]


def test_another_model_than_the_bundled_one_gets_the_story_of_a_real_one(run, told) -> None:
    run("demo", "--model", "smollm2")
    run("demo", "--model", "a/folder")
    assert [(call["story"], call["model"]) for call in told] == [
        ("run_real", "smollm2"),
        ("run_real", "a/folder"),
    ]


def test_the_real_story_needs_no_agent_framework(run, told, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "langchain" else find(name)
    )
    run("demo", "--model", "smollm2")
    assert len(told) == 1


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    run, told, monkeypatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "langchain" else find(name)
    )
    err = run("demo", exits=1).err
    assert err == "error: the demo needs langchain; install with: pip install 'agentpref[demo]'\n"
    assert told == []
