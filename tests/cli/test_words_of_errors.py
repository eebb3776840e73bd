"""What the command line prints speaks of commands: those it names exist, no call stands alone."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import typer.main

from agentpref.serve.registry import Registry
from agentpref_cli.main import app

SOURCES = [Path(__file__).parents[2] / name for name in ("agentpref", "adapters", "cli")]
COMMAND = re.compile(r"`agentpref ([a-z]+)(?: ([a-z]+))?")
CALLS = "|".join(
    name for name, _ in inspect.getmembers(Registry, inspect.isfunction) if name[0] != "_"
)
OUR_CALL = re.compile(rf"\b({CALLS})\(")


def texts() -> Iterator[tuple[str, str]]:
    """Each text of the source that is no docstring, whole, and where it stands."""
    for file in (file for source in SOURCES for file in source.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(part) for part in node.values}
                yield (
                    f"{file}:{node.lineno}",
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    ),
                )
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in skipped:
                yield f"{file}:{node.lineno}", str(node.value)


TEXTS = list(texts())


def test_every_command_that_a_message_names_exists() -> None:
    root = typer.main.get_command(app).commands
    named = [(where, found) for where, text in TEXTS for found in COMMAND.findall(text)]
    assert len(named) > 20
    for where, (command, below) in named:
        assert command in root, where
        if below and hasattr(root[command], "commands"):
            assert below in root[command].commands, where


def test_a_message_that_names_a_call_of_the_registry_names_the_command_too() -> None:
    assert OUR_CALL.search("look at history() and try again")
    alone = [where for where, text in TEXTS if OUR_CALL.search(text) and not COMMAND.search(text)]
    assert alone == []


def test_a_conflict_and_an_empty_history_name_commands(run, home) -> None:
    run("init")
    failed = run("adapters", "rollback", exits=1)
    assert "`agentpref adapters promote REVISION` makes one live" in failed.err
    failed = run("adapters", "promote", "base", "--expected-generation", 7, exits=1)
    assert "look at `agentpref adapters list`, then try again" in failed.err
    failed = run("retract", "run-7", exits=1)
    assert "`agentpref runs` lists them" in failed.err
