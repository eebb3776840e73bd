"""`--notify`: what the command gets, and that nothing it does changes the update."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import orjson
import pytest
import typer

from agentpref.errors import HomeError, UpdateInterrupted, UpdateRunning
from agentpref_cli.notify import Notifier

KEEPS = """\
import json, os, sys
facts = {name: value for name, value in os.environ.items() if name.startswith("AGENTPREF_")}
told = {"arguments": sys.argv[2:], "text": sys.stdin.read(), **facts}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(told) + "\\n")
"""


@pytest.fixture
def keeper(tmp_path: Path):
    """A command that keeps what it is told, and what it was told."""
    script, kept = tmp_path / "keeps it.py", tmp_path / "kept"
    script.write_text(KEEPS, encoding="utf-8")

    class Keeper:
        command = shlex.join([sys.executable, str(script), str(kept), "$HOME", "a b; echo *"])

        @property
        def told(self) -> list[dict[str, str]]:
            lines = kept.read_bytes().splitlines() if kept.exists() else []
            return [*map(orjson.loads, lines)]

    return Keeper()


def test_an_update_tells_its_report_without_a_shell(run, filled: Path, keeper) -> None:
    found = run("update", "--model", "tiny", "--set", "epochs=1", "--set", "gate.kl_budget=1e-9",
                "--notify", keeper.command, exits=4)  # fmt: skip
    (told,) = keeper.told
    assert told["arguments"] == ["$HOME", "a b; echo *"], "nothing is expanded"
    assert told["AGENTPREF_VERDICT"] == "refused"
    assert told["AGENTPREF_SUBJECT"] == "refused: a check failed; nothing was published"
    assert told["AGENTPREF_HOME"] == str(filled)
    assert told["AGENTPREF_UPDATE"] in found.out
    assert told["text"].startswith("## refused: a check failed")
    assert "- **KL budget**: " in told["text"]
    run("update", "--model", "tiny", "--set", "epochs=1", "--set", "gate.kl_budget=1e-9",
        "--notify", keeper.command, exits=3)  # fmt: skip
    assert keeper.told[1]["AGENTPREF_VERDICT"] == "nothing_new"


def test_an_update_that_fails_is_told_and_fails_as_it_did(run, home: Path, keeper) -> None:
    said = run("update", "--model", "tiny", "--notify", keeper.command, exits=1).err
    (told,) = keeper.told
    assert told["AGENTPREF_VERDICT"] == "failed"
    assert "is not an agentpref home" in said
    assert "is not an agentpref home" in told["text"]
    assert told["text"].startswith("failed: ")


@pytest.mark.parametrize(
    ("error", "verdict", "words"),
    [
        (UpdateRunning("another one runs"), "busy", "another one runs"),
        (UpdateInterrupted("interrupted; it resumes", 15), "interrupted", "it resumes"),
        (HomeError("no room"), "failed", "no room"),
        (ValueError("what somebody logged"), "failed", "ValueError"),
    ],
)
def test_how_it_ended_is_a_verdict_and_foreign_errors_quote_nothing(
    tmp_path: Path, keeper, error: BaseException, verdict: str, words: str
) -> None:
    with pytest.raises(type(error)), Notifier(keeper.command, tmp_path, "default"):
        raise error
    (told,) = keeper.told
    assert told["AGENTPREF_VERDICT"] == verdict
    assert words in told["AGENTPREF_SUBJECT"]
    assert "somebody" not in told["text"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/not/there", "cannot be run"),
        ("sh -c 'echo it is full >&2; exit 3'", "exited 3"),
        ("sh -c 'kill -9 $$'", "exited -9"),
        ("sh -c 'exec 0<&-; exit 1'", "exited 1"),
    ],
)
def test_what_goes_wrong_with_it_is_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    Notifier(command, tmp_path, "default").say("promoted", "s" * 100_000)
    err = capsys.readouterr().err
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert said in warning
    assert ("it is full" in err) == ("full" in command), "what it printed is passed on"


def test_a_command_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    alive = tmp_path / "alive"
    command = f"sh -c 'while sleep .05; do touch {alive}; done & wait'"
    Notifier(command, tmp_path, "default", seconds=0.5).say("promoted", "it is better")
    assert time.monotonic() - begun < 20
    assert "more than 0.5 s" in capsys.readouterr().err
    time.sleep(0.1)
    alive.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not alive.exists()


def test_a_command_that_leaves_a_process_behind_is_not_waited_for(tmp_path: Path) -> None:
    begun = time.monotonic()
    Notifier("sh -c 'sleep 20 &'", tmp_path, "default").say("promoted", "it is better")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("command", ["it's", "", "  "])
def test_a_command_that_is_none_is_refused_before_the_update(
    run, filled, tmp_path: Path, command: str
) -> None:
    with pytest.raises(typer.BadParameter):
        Notifier(command, tmp_path, "default")
    run("update", "--model", "tiny", "--notify", command, exits=2)
    assert run("updates", "--json").json["updates"] == []
