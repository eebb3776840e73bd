"""A home that belongs to another user: each command says so in one line, with the cure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")

COMMANDS = [
    ["init"],
    ["stats"],
    ["pairs"],
    ["export"],
    ["report"],
    ["eval"],
    ["verify"],
    ["retract", "run-1"],
    ["update", "--model", "tiny"],
    ["forget", "--user-id", "ana", "--yes"],
    ["forget", "--user-id", "ana", "--dry-run"],
    ["forget", "--older-than", "90d", "--yes"],
    ["backup", "{elsewhere}/copy"],
    ["import", "{elsewhere}/rows.jsonl"],
    ["adapters", "list"],
    ["adapters", "prune", "--yes"],
]

# The interpreter may be out of the other user's reach, so all is imported before.
SCRIPT = """
import encodings.ascii, importlib, json, os, pkgutil, sys, tomllib
import agentpref, agentpref_cli, filelock, ijson, grp, pwd
from agentpref_cli.main import app
for package in (agentpref, agentpref_cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not set(module.name.split(".")) & {"__main__", "demo", "kernels", "learn", "prove"}:
            importlib.import_module(module.name)
import agentpref.learn.process, agentpref.learn.team, agentpref.learn.checkpoint
import agentpref.learn.resume
from typer.testing import CliRunner

os.setgroups([]); os.setgid(65534); os.setuid(65534)
answers = []
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, [*command, "--home", sys.argv[2]], prog_name="agentpref")
    answers.append([result.exit_code, result.stdout, result.stderr, repr(result.exception)])
print(json.dumps(answers))
"""


def as_nobody(home: Path, commands: list[list[str]]) -> list[tuple[int, str, str, str]]:
    elsewhere = home.parent / "elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    (elsewhere / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (elsewhere / "rows.jsonl").chmod(0o644)
    asked = [[word.format(elsewhere=elsewhere) for word in words] for words in commands]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked), str(home)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(done.stdout)]


@pytest.mark.parametrize("mode", [0o711, 0o700], ids=oct)
def test_every_command_says_whose_the_home_is_and_what_to_do(
    filled: Path, reachable: Path, mode: int
) -> None:
    home = shutil.copytree(filled, reachable / "home")
    home.chmod(mode)
    answers = as_nobody(home, COMMANDS)
    for command, (code, out, err, exception) in zip(COMMANDS, answers, strict=True):
        assert (code, out) == (1, ""), (command, err, exception)
        assert err.startswith("error: "), command
        assert err.count("\n") == 1, command
        assert str(home) in err, command
        assert "belongs to root, and this is nobody: run this as root, or let" in err, command


def test_a_folder_that_cannot_be_written_is_named_with_its_owner(reachable: Path) -> None:
    [(code, _, err, _)] = as_nobody(reachable / "new", [["init"]])
    assert code == 1
    assert err.startswith(f"error: cannot make a home in {reachable / 'new'} (Permission")
    assert f"{reachable} belongs to root, and this is nobody" in err
