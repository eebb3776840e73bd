"""`forget`: what it removes, what it says, and what it asks."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import typer

import agentpref
from agentpref.home import Home
from agentpref.record.database import connect, exclusive
from agentpref.record.store import Store
from agentpref.record.updates import UpdateRow, Updates
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref_cli.commands import forget as command


@pytest.fixture
def shared(home: Path) -> Path:
    """A home with a run of Ada's, one of Bob's, and one of nobody's from a hundred days ago."""
    asked = [{"role": "user", "content": "hello"}]
    with agentpref.Log(home) as log:
        for user in ("ada", "bob", None):
            run = log.record(asked, f"hello, {user}", user_id=user)
            log.feedback(run, key="thumbs", score=1)
    with closing(connect(Home.open(home))) as connection:
        connection.execute(
            "UPDATE run SET created_at = ? WHERE user_id IS NULL", [time.time() - 100 * 86_400]
        )
    return home


@pytest.fixture
def trained(shared: Path, tmp_path: Path) -> str:
    """A live revision that all of it trained."""
    registry = Registry(shared, namespace="default")
    folder = write_adapter(tmp_path / "adapter")
    identity = {"name": "tiny", "digest": "d", "template_digest": "t"}
    made = registry.publish(folder, parent=None, model=identity, training={}).revision_id
    with closing(connect(Home.open(shared))) as connection:
        said = tuple(each.feedback_id for each in Store(connection).feedback("default"))
        update = UpdateRow("u", "default", 1.0, 2.0, None, made, "promoted", {})
        Updates(connection).add(replace(update, pairs={"p": "new"}, sources={"p": said}))
    registry.promote(made)
    return made


def users(run) -> int:
    return run("stats", "--json").json["default"]["users"]


def runs(run) -> int:
    return run("stats", "--json").json["default"]["runs"]


def test_a_user_is_removed_and_the_others_stay(run, shared) -> None:
    out = run("forget", "--yes", "--user-id", "ada").out
    assert out == (
        "removed: runs 1, feedback 1, comparisons 0, messages 1\n"
        "messages that stay, because other runs contain them: 1\n"
    )
    assert (runs(run), users(run)) == (2, 1)
    again = run("forget", "--yes", "--user-id", "ada")
    assert again.out == "removed: runs 0, feedback 0, comparisons 0, messages 0\n"
    assert again.err.splitlines() == ["remove", "scrub"]


@pytest.mark.parametrize("content", [None, "ab" * 32 + "\n"])
def test_a_home_that_lost_its_user_keys_says_so_and_forgets_nobody(run, shared, content) -> None:
    keys = Home.open(shared).user_keys
    keys.unlink()
    if content is not None:
        keys.write_text(content, encoding="ascii")
    agentpref.Log(shared).close()
    failed = run("forget", "--yes", "--user-id", "ada", exits=1)
    assert "user.keys" in failed.err
    assert "restore it from a backup of the home" in failed.err
    for name in ("verify", "doctor"):
        assert "user.keys" in run(name, exits=1).out
    assert runs(run) == 3


def test_tainted_revisions_and_the_commands_to_rebuild_are_printed(run, shared, trained) -> None:
    lines = run("forget", "--yes", "--user-id", "ada").out.splitlines()
    where = f"--home {shared} --namespace default"
    assert lines[2:] == [
        f"tainted, because they were trained on it: {trained}",
        f"default is served by {trained}; to rebuild:",
        f"  agentpref adapters promote base {where}",
        f"  agentpref update --model tiny {where}",
    ]
    command = lines[4].split()[1:]
    assert run(*command).out.startswith("live: base ")
    assert "to rebuild" not in run("forget", "--yes", "--user-id", "ada").out


def test_json_has_every_field(run, shared, trained) -> None:
    output = run("forget", "--yes", "--user-id", "ada", "--json")
    value = output.json
    assert output.err.splitlines() == ["remove", "scrub"]
    quiet = run("forget", "--yes", "--user-id", "ada", "--json", "--quiet")
    assert (quiet.json["runs"], quiet.err) == (0, "")
    assert (value["runs"], value["revisions"]) == (1, [trained])
    (rebuild,) = value["rebuild"]
    assert (rebuild["clean"], rebuild["tainted"]) == ("base", [trained])
    assert len(rebuild["commands"]) == 2


def test_old_runs_are_removed(run, shared) -> None:
    assert run("forget", "--yes", "--older-than", "90d").out.startswith(
        "removed: runs 1, feedback 1, "
    )
    assert runs(run) == 2
    assert run("forget", "--yes", "--older-than", "90d", "--json").json["runs"] == 0
    assert users(run) == 2


@pytest.mark.parametrize(
    ("age", "left"), [("2399h", 2), ("2401h", 3), ("14.2w", 2), ("144001m", 3)]
)
def test_an_age_may_have_any_of_its_units(run, shared, age, left) -> None:
    run("forget", "--yes", "--older-than", age)
    assert runs(run) == left


def test_an_implausible_clock_is_refused_unless_forced(run, shared) -> None:
    time.sleep(0.002)
    err = run("forget", "--yes", "--older-than", "0.001s", exits=1).err
    assert "nothing was removed; set the clock, or force the removal (--force)" in err
    assert runs(run) == 3
    run("forget", "--yes", "--older-than", "0.001s", "--force")
    assert run("stats", "--json").json == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give exactly one of them"),
        (("--user-id", "ada", "--older-than", "90d"), "give exactly one of them"),
        (("--older-than", "90"), "'90' is no age"),
        (("--older-than", "d"), "'d' is no age"),
        (("--older-than", ""), "'' is no age"),
        (("--older-than", "ninety days"), "is no age"),
        (("--older-than", "-1d"), "is no age"),
        (("--older-than", "0d"), "must be above 0"),
        (("--older-than", "infd"), "is no age"),
        (("--user-id", "ada", "--force"), "needs --older-than"),
        (("--user-id", "ada", "--run", "r"), "give exactly one of them"),
        (("--older-than", "90d", "--missing-ok"), "needs --user-id or --run"),
    ],
)
def test_wrong_options_are_bad_usage(run, shared, arguments, words) -> None:
    assert words in " ".join(
        run("forget", "--yes", *arguments, exits=2).err.replace("│", " ").split()
    )
    assert runs(run) == 3


def test_forget_fails_while_an_update_runs(run, shared) -> None:
    with exclusive(Home.open(shared)):
        assert "wait for it to end" in run("forget", "--yes", "--user-id", "ada", exits=75).err


def test_a_folder_that_is_no_home_is_refused_before_the_question(run, home) -> None:
    assert "is not an agentpref home" in run("forget", "--yes", "--user-id", "ada", exits=1).err


class Terminal(io.StringIO):
    """A standard input with somebody before it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch):
    """Call the command as on a terminal, where somebody types an answer."""

    def call(typed: str, **options: object) -> int:
        monkeypatch.setattr(sys, "stdin", Terminal(typed))
        try:
            command.forget(**options)
        except typer.Exit as exit:
            return exit.exit_code
        return 0

    return call


def test_forget_asks_first_on_a_terminal(answering, run, shared, capsys) -> None:
    assert answering("n\n", user_id="ada") == 1
    shown = capsys.readouterr()
    assert shown.out == "nothing was removed\n"
    assert f"Remove everything that user 'ada' said from {shared}, for good?" in shown.err
    assert runs(run) == 3
    assert answering("y\n", user_id="ada") == 0
    assert runs(run) == 2


def test_forget_does_not_ask_with_yes(answering, run, shared) -> None:
    assert answering("", older_than="90d", yes=True) == 0
    assert runs(run) == 2


@pytest.mark.parametrize(
    "arguments", [("--user-id", "ada"), ("--older-than", "90d"), ("--run", "r")], ids=" ".join
)
@pytest.mark.parametrize("typed", ["n\n", "y\n", ""])
def test_nothing_is_removed_where_nobody_can_be_asked(run, shared, arguments, typed) -> None:
    """Before, `printf 'n' | agentpref forget …` removed."""
    command = [sys.executable, "-m", "agentpref_cli", "forget", *arguments, "--home", str(shared)]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nothing was removed")
    assert done.stderr.endswith("add --yes\n")
    assert runs(run) == 3


def contents(home: Path) -> tuple[list[str], dict[str, bytes]]:
    """All rows of a home, and all files but locks and the database's own."""
    with closing(connect(Home.open(home))) as connection:
        rows = [*connection.iterdump()]
    files = (path for path in home.rglob("*") if path.is_file())
    kept = (f for f in files if f.suffix != ".lock" and not f.name.startswith("agentpref.db"))
    return rows, {str(file): file.read_bytes() for file in kept}


def test_a_dry_run_says_what_would_go_and_changes_nothing(run, shared, trained) -> None:
    state = Home.open(shared).training
    state.mkdir()
    (state / "half-trained").write_bytes(b"weights")
    before = contents(shared)
    shown = run("forget", "--user-id", "ada", "--dry-run").out.splitlines()
    assert shown == [
        "would remove: runs 1, feedback 1, comparisons 0, messages 1",
        "messages that would stay, because other runs contain them: 1",
        f"would be tainted, because they were trained on it: {trained}",
        "nothing was removed; run it again without --dry-run",
    ]
    dry = run("forget", "--user-id", "ada", "--dry-run", "--json").json
    old = run("forget", "--older-than", "90d", "--dry-run", "--json").json
    assert (old["runs"], old["dry_run"]) == (1, True)
    assert contents(shared) == before
    real = run("forget", "--user-id", "ada", "--yes", "--json").json
    assert real | {"dry_run": True} == dry, "a dry run counts what the removal then removes"


def run_of(home: Path, user: str) -> str:
    with closing(connect(Home.open(home))) as connection:
        found = Store(connection).runs("default")
        return next(one.run_id for one in found if one.output["content"].endswith(user))


def test_one_run_is_removed_with_its_feedback_and_taints(run, shared, trained) -> None:
    one = run_of(shared, "ada")
    lines = run("forget", "--run", one, "--yes").out.splitlines()
    assert lines[0] == "removed: runs 1, feedback 1, comparisons 0, messages 1"
    assert lines[2] == f"tainted, because they were trained on it: {trained}"
    assert (runs(run), users(run)) == (2, 1)
    assert one in run("forget", "--run", one, "--yes", exits=1).err
    assert run("forget", "--run", one, "--yes", "--missing-ok", "--json").json["runs"] == 0
    with agentpref.Log(shared) as log:
        log.record([{"role": "user", "content": "again"}], "hello", user_id="ada")
    assert users(run) == 2, "the user is not forgotten"


def test_a_user_whom_nobody_knows_is_an_error_and_one_who_was_forgotten_is_none(
    run, shared
) -> None:
    before = contents(shared)
    for how in ("--dry-run", "--yes"):
        err = run("forget", "--user-id", "eve", how, exits=1).err
        assert f"nobody with the id 'eve' is in {shared}, and nothing was removed" in err
    assert contents(shared) == before
    value = run("forget", "--user-id", "eve", "--yes", "--missing-ok", "--json").json
    assert value["runs"] == 0
    run("forget", "--user-id", "eve", "--yes")  # known from now on, as one who was forgotten
