"""What all commands have in common: help, versions, errors and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import typer

import agentpref
from agentpref.home import Home
from agentpref.record.database import connect, exclusive
from agentpref_cli.main import app

COMMANDS = (
    [],
    ["adapters"],
    ["judge"],
    ["ask"],
    ["review"],
    ["reward"],
    *[["reward", name] for name in ("fit", "frontier", "list", "score")],
    *[["judge", name] for name in ("new", "list", "calibrate", "run", "revise")],
    *[[name] for name in ("init", "demo", "import", "export", "stats", "pairs", "update", "adopt")],
    *[
        [name]
        for name in (
            "report",
            "eval",
            "ope",
            "traces",
            "online",
            "verify",
            "forget",
            "backup",
            "merge",
            "ship",
            "schedule",
            "gateway",
            "retract",
            "doctor",
            "serve",
        )
    ],
    *[[name] for name in ("runs", "show", "thumbs", "keys", "updates", "watch")],
    *[["keys", name] for name in ("list", "declare", "undeclare")],
    *[["adapters", name] for name in ("list", "show", "promote", "rollback", "hold")],
    *[["adapters", name] for name in ("canary", "quarantine", "release", "prune", "export")],
)
GROUPS = ("adapters", "gateway", "judge", "keys", "reward")
AGENTPREF = [sys.executable, "-m", "agentpref_cli"]


def called(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*AGENTPREF, *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_prints_its_help(run, command) -> None:
    out = run(*command, "--help").out
    assert out.startswith(" ".join(["Usage: agentpref", *command]))
    assert out == run(*command, "-h").out


def test_the_list_above_has_every_command() -> None:
    group = typer.main.get_command(app)
    names = {(name,) for name in group.commands}
    for group_name in GROUPS:
        parts = group.commands[group_name].commands.items()
        names |= {(group_name, name) for name, part in parts if not hasattr(part, "commands")}
    assert names == {tuple(command) for command in COMMANDS if command}


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c and c[-1] not in GROUPS], ids=" ".join
)
def test_every_command_takes_home_and_json(run, command) -> None:
    out = run(*command, "--help").out
    assert "--home FOLDER" in out
    assert "--json" in out


def test_the_version_is_printed(run) -> None:
    assert run("--version").out == f"agentpref {agentpref.__version__}\n"


def test_the_help_is_printed_when_no_command_is_given(run) -> None:
    assert "".join(run(exits=2)).count("Commands:") == 1


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["stats", "--wings"], ["import"], ["update"], ["pairs", "--limit", "-1"]],
    ids=" ".join,
)
def test_bad_usage_exits_2_and_points_to_the_help(run, arguments) -> None:
    result = run(*arguments, exits=2)
    assert result.out == ""
    assert "--help" in result.err or "-h'" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["stats"],
        ["pairs", "--json"],
        ["verify"],
        ["watch", "--once"],
        ["report"],
        ["eval"],
        ["export"],
        ["adapters", "list"],
        ["import", "{rows}"],
        ["update", "--model", "tiny"],
    ],
    ids=" ".join,
)
def test_a_folder_without_a_home_is_one_clear_error_line(run, rows, tmp_path, arguments) -> None:
    arguments = [argument.format(rows=rows) for argument in arguments]
    result = run(*arguments, "--home", tmp_path, exits=1)
    assert result.out == ""
    assert result.err.startswith(f"error: {tmp_path} is not an agentpref home")
    assert "agentpref init" in result.err
    assert result.err.count("\n") == 1


def test_an_error_of_a_real_process_is_one_line_on_standard_error(tmp_path) -> None:
    done = called("stats", "--home", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_damaged_database_is_named(run, filled) -> None:
    (filled / "agentpref.db").write_bytes(b"not a database at all" * 100)
    for suffix in ("-wal", "-shm"):
        (filled / f"agentpref.db{suffix}").unlink(missing_ok=True)
    err = run("stats", exits=1).err
    assert err.startswith("error: ")
    assert str(filled / "agentpref.db") in err


def test_ctrl_c_prints_one_line_exits_130_and_damages_nothing(run, filled, tmp_path) -> None:
    pipe = tmp_path / "endless.jsonl"
    os.mkfifo(pipe)
    command = [*AGENTPREF, "import", str(pipe)]
    with (
        subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process,
        pipe.open("wb", buffering=0) as feed,  # opens once the command reads
    ):
        feed.write(b'{"prompt": "half a li')
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            # It came just before a read, which Python then begins: people press it again.
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.startswith("error: interrupted")
    assert err.count("\n") == 1
    assert run("verify", "--json").json["problems"] == []
    assert run("stats", "--json").json["default"]["comparisons"] == 40


def test_another_update_or_removal_is_busy_and_exits_75(run, filled) -> None:
    with exclusive(Home.open(filled)):
        for command in (
            ["update", "--model", "tiny"],
            ["forget", "--user-id", "ana", "--yes"],
            ["forget", "--older-than", "90d", "--yes"],
        ):
            assert "wait for it to end" in run(*command, exits=75).err


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EACCES, "this user (root): let it read and write (chmod u+rwX "),
        (errno.ENOSPC, "free space on its disk"),
        (errno.EROFS, "mount it for writing"),
        (errno.EIO, "check the disk"),
    ],
)
def test_an_error_of_the_system_is_one_line_with_the_path_and_the_cure(
    run, filled, monkeypatch, number, cure
) -> None:
    def fails(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number), str(filled))

    monkeypatch.setattr("agentpref.record.store.Store.stats", fails)
    monkeypatch.setattr("agentpref.owners.user_name", lambda uid: "root")
    err = run("stats", exits=1).err
    assert err.startswith(f"error: {filled}: {os.strerror(number)}; ")
    assert cure in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_heading_of_the_help_is_broken_at_80_columns(run, command, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(*command, "--help").out.splitlines()
    assert max(map(len, lines)) <= 80
    headings = lines[lines.index("Commands:") :] if "Commands:" in lines else []
    assert [line for line in headings if line.endswith("...")] == []


def test_the_shell_completes_commands_and_options() -> None:
    asked = {"_AGENTPREF_COMPLETE": "complete_bash", "COMP_CWORD": "1"}

    def completed(words: str, number: int) -> list[str]:
        typed = asked | {"COMP_WORDS": words, "COMP_CWORD": str(number)}
        return called(env=os.environ | typed).stdout.split()

    assert completed("agentpref up", 1) == ["update", "updates"]
    assert completed("agentpref forget --dry", 2) == ["--dry-run"]
    script = called("--show-completion", env=os.environ | {"SHELL": "/bin/bash"})
    assert script.returncode in (0, 1)  # 1 where the shell cannot be told
    assert "--install-completion" in called("--help").stdout


def test_a_closed_pipe_is_no_error(filled) -> None:
    command = [*AGENTPREF, "export", "--home", str(filled)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_help_imports_no_heavy_package() -> None:
    heavy = ["torch", "transformers", "sqlite_utils", "sqlite3", "numpy", "rich", "langchain_core"]
    heavy += ["pydantic"]
    code = f"""
import sys
sys.argv = ["agentpref", "--help"]
from agentpref_cli.main import main
try:
    main()
except SystemExit:
    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_the_installed_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("agentpref")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == called("--version").stdout


NOT_UTF8 = "ad\udce9"
"""How Python gives an argument of Latin-1."""


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["forget", "--yes", "--user-id", NOT_UTF8], "--user-id"),
        (["retract", NOT_UTF8], "RUN"),
        (["retract", "run", "--user-id", NOT_UTF8], "--user-id"),
        (["adapters", "promote", NOT_UTF8], "REVISION"),
        (["import", "rows.jsonl", "--user-id", NOT_UTF8], "--user-id"),
        (["update", "--model", "tiny", "--set", "seed=1", "--set", NOT_UTF8], "--set"),
    ],
)
def test_an_argument_that_is_not_utf8_is_bad_usage_and_is_named(run, command, named) -> None:
    run("init")
    err = run(*command, exits=2).err
    assert f"Invalid value for {named}: 'ad\\udce9" in err
    assert "is not UTF-8" in err


def test_bytes_that_are_not_utf8_are_bad_usage(tmp_path: Path) -> None:
    call = [*AGENTPREF, "forget", "--yes", "--user-id", b"ad\xe9", "--home", "home"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Invalid value for --user-id: 'ad\\udce9' is not UTF-8" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_whose_path_is_not_utf8_is_refused(tmp_path: Path) -> None:
    call = [*AGENTPREF, "init", "--json", "--home", b"home\xe9"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not UTF-8; rename the folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_logged_is_one_line_on_standard_error_that_says_warning(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home")
    with closing(connect(home)) as connection:
        connection.execute("INSERT INTO migration VALUES (9999, 'of a newer version', 0)")
    done = called("stats", "--home", str(home.path), check=True)
    assert done.stdout == "nothing is logged yet\n"
    assert done.stderr.startswith(f"warning: {home.database} has schema 9999, this agentpref knows")
    assert done.stderr.count("\n") == 1
