"""`demo`: what the command asks for first and hands to the story, which has tests of its own."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture
def told(monkeypatch):
    """What the story was told, in place of three minutes of it."""
    calls: list[dict] = []
    monkeypatch.setattr("agentpref_cli.demo.run", lambda **given: calls.append(given))
    return calls


def test_the_story_gets_folder_seed_and_format(run, told, tmp_path) -> None:
    run("demo")
    run("demo", "--home", tmp_path, "--seed", "7", "--json")
    assert told == [
        {"home": None, "json": False, "seed": 0},
        {"home": tmp_path, "json": True, "seed": 7},
    ]


def test_what_is_not_installed_comes_with_its_cure(run, told, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "langchain" else find(name)
    )
    err = run("demo", exits=1).err
    assert err == "error: the demo needs langchain; install with: pip install 'agentpref[demo]'\n"
    assert told == []
