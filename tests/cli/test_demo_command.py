"""`demo`: the packages it needs, and the options it passes on; the story has tests of its own."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture
def told(monkeypatch):
    """The calls of the story, which is replaced: it takes three minutes."""
    calls: list[dict] = []
    monkeypatch.setattr("agentpref_cli.demo.run", lambda **given: calls.append(given))
    return calls


def test_folder_seed_and_format_are_passed_on(run, told, tmp_path) -> None:
    run("demo")
    run("demo", "--home", tmp_path, "--seed", "7", "--json", "-q")
    assert told == [
        {"home": None, "json": False, "seed": 0, "quiet": False},
        {"home": tmp_path, "json": True, "seed": 7, "quiet": True},
    ]


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
