"""What is being made is told from what a killed process left, without a clock."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentpref.home import replacing
from agentpref.leftovers import abandoned, claimed, clear_adapters, clear_drafts, unfinished

KILLED = """
import os, signal, sys
from pathlib import Path
from agentpref.home import replacing
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
with replacing(Path(sys.argv[1])) as draft:
    draft.write_text("a secret")
"""


def killed(path: Path) -> None:
    """Write a file in a process that is killed before it renames the draft."""
    command = [sys.executable, "-c", KILLED, str(path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["refused.jsonl", "user.keys", "[x]*.jsonl", ".hidden"])
def test_the_draft_of_a_killed_process_is_removed(tmp_path: Path, name: str) -> None:
    for other in (name, "other"):
        killed(tmp_path / other)
    assert len(list(tmp_path.iterdir())) == 2
    clear_drafts(tmp_path, name)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".other.")
    clear_drafts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_draft_that_somebody_writes_stays(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as draft:
        draft.write_text("mine", encoding="utf-8")
        clear_drafts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_that_look_like_no_draft_stay(tmp_path: Path) -> None:
    for name in (".file.txt", "file.0123456789abcdef", ".bashrc"):
        (tmp_path / name).touch()
    clear_drafts(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_removed_before_it_is_locked_is_made_again(tmp_path: Path) -> None:
    folder, made = tmp_path / "folder", []

    def make() -> None:
        folder.mkdir()
        made.append(folder)
        if len(made) == 1:
            folder.rmdir()

    with claimed(folder, make):
        assert folder.exists()
    assert len(made) == 2


def test_nobody_claims_what_somebody_removes(tmp_path: Path) -> None:
    """The claim waits, then finds it gone, and makes it again."""
    code = """if True:
        import sys
        from pathlib import Path
        from agentpref.leftovers import claimed
        path = Path(sys.argv[1])
        with claimed(path, lambda: (path.mkdir(exist_ok=True), print("made", flush=True))):
            print("mine", path.exists(), flush=True)
    """
    folder = tmp_path / "folder"
    folder.mkdir()
    with abandoned(folder) as is_left:
        assert is_left
        command = [sys.executable, "-c", code, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        folder.rmdir()
    assert process.communicate()[0] == "made\nmine True\n"


def test_half_made_folders_of_the_dead_are_removed_and_those_of_the_living_stay(
    tmp_path: Path,
) -> None:
    left, leaving, busy = (tmp_path / n for n in (".publishing-1", ".pruning-1", ".publishing-2"))
    unknown, known = tmp_path / "rev-000001-0123456789ab", tmp_path / "rev-000002-0123456789ab"
    for folder in (left, leaving, unknown, known):
        folder.mkdir()
        (folder / "weights").touch()
    (tmp_path / ".publishing-link").symlink_to(known)
    with claimed(busy, busy.mkdir):
        assert unfinished(tmp_path) == [".pruning-1", ".publishing-1", ".publishing-link"]
        clear_adapters(tmp_path, {known.name})
        assert {*tmp_path.iterdir()} == {busy, known}
        assert list(known.iterdir())
    shutil.rmtree(busy)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from agentpref.leftovers import claimed
        path = Path(sys.argv[1])
        with claimed(path, path.mkdir):
            print("mine", flush=True)
            sys.stdin.readline()
    """
    command = [sys.executable, "-c", code, str(tmp_path / "folder")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    with abandoned(tmp_path / "folder") as is_left:
        assert not is_left
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with abandoned(tmp_path / "folder") as is_left:
        assert is_left
