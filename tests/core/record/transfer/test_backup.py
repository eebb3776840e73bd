"""A backup is the home as it was at one moment, whole or not at all."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.errors import ConfigError, CorruptHome, NotAHome, NotKept
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.messages import prompt_of, run_row
from agentpref.record.spill import Spill
from agentpref.record.store import Store
from agentpref.record.transfer import backup as module
from agentpref.record.transfer.backup import backup
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref.types import Run

ASK = [{"role": "user", "content": "Is it raining?"}]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "home") as log:
        run = log.record(ASK, "Yes.", user_id="ada")
        log.feedback(run, key="thumbs", score=1, user_id="ada")
        yield log


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "backups" / "monday"


def publish(home: Home, name: str) -> Path:
    """Put a revision into a home as the registry would."""
    folder = home.adapters / name
    folder.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
        (folder / file).write_bytes(os.urandom(3_000_000 if "model" in file else 30))
        (folder / file).chmod(0o444)
    with closing(connect(home)) as connection:
        connection.execute(
            "INSERT INTO revision (revision_id, namespace, seq, created_at, manifest)"
            " VALUES (?, 'default', (SELECT count(*) + 1 FROM revision), 1.0, '{}')",
            (name,),
        )
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def count(folder: Path, table: str) -> int:
    with closing(sqlite3.connect(folder / "agentpref.db")) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_the_copy_is_a_working_home(log: Log, target: Path) -> None:
    backup(log.home, target)
    with Log(target) as copy:
        assert copy.verify() == []
        copy.feedback(copy.record(ASK, "No."), key="thumbs", score=0)
        copy.flush()
        assert count(target, "run") == 2
    assert count(log.home.path, "run") == 1


@pytest.mark.guarantee("record")
def test_acknowledged_feedback_is_in_the_copy_while_writers_continue(
    log: Log, target: Path
) -> None:
    def write() -> None:
        while not enough.is_set():
            said.append(log.feedback(log.record(ASK, f"answer {len(said)}"), key="k", score=1))

    said: list[str] = []
    enough = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    while len(said) < 50 and writer.is_alive():
        enough.wait(0.01)
    before = list(said)
    backup(log.home, target)
    after = len(said)
    while len(said) == after and writer.is_alive():
        enough.wait(0.01)
    enough.set()
    writer.join()
    with closing(connect(Home.open(target), readonly=True)) as connection:
        assert examine(connection).problems == []
        there = {one.feedback_id for one in Store(connection).feedback("default")}
    assert set(before) <= there < {*said, *there}


def test_a_backup_does_not_restart_when_somebody_writes(
    log: Log, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own backup does so at every write in between, and then never ends."""
    monkeypatch.setattr(module, "_PAGES", 5)
    told: list[tuple[int, int]] = []

    def write_meanwhile(stage: str, done: int, total: int) -> None:
        if stage == "pages":
            told.append((done, total))
            assert len(told) < 1_000
            log.feedback(log.record(ASK, f"answer {done}"), key="k", score=1)

    backup(log.home, target, progress=write_meanwhile)
    assert len(told) > 5
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1]
    assert count(target, "run") == 1


def test_entries_in_the_spill_are_in_the_copy(log: Log, target: Path) -> None:
    waiting = Run("w", "default", 1.0, prompt_of(ASK), {"role": "assistant", "content": "Spilt."})
    Spill(log.home).append([run_row(waiting)])
    backup(log.home, target)
    assert count(target, "run") == 2
    assert not (target / "spill.jsonl").exists()


def test_keys_and_file_modes_are_copied(log: Log, target: Path) -> None:
    log.home.path.chmod(0o750)
    log.home.database.chmod(0o600)
    backup(log.home, target)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (target, *target.iterdir())}
    assert modes["user.keys"] == modes["agentpref.db"] == 0o600
    assert modes["monday"] == 0o750
    assert (target / "user.keys").read_bytes() == log.home.user_keys.read_bytes()


def test_only_published_adapters_are_copied(log: Log, target: Path) -> None:
    publish(log.home, "rev-000001-0123456789ab")
    publish(log.home, "rev-000002-0123456789ab")
    (log.home.adapters / "rev-000003-not-in-the-database").mkdir()
    (log.home.adapters / ".publishing-1").mkdir()
    done = backup(log.home, target)
    assert (done.revisions, done.missing) == (2, ())
    assert files(target / "adapters") == files(log.home.adapters)
    assert sorted(path.name for path in target.iterdir()) == [
        "adapters", "agentpref.db", "reports", "user.keys",
    ]  # fmt: skip


def test_a_revision_without_a_folder_is_named_as_missing(log: Log, target: Path) -> None:
    folder = publish(log.home, "rev-000001-0123456789ab")
    folder.rename(log.home.path / "moved away")
    done = backup(log.home, target)
    assert (done.revisions, done.missing) == (0, ("rev-000001-0123456789ab",))


def test_a_pruned_revision_is_not_named_as_missing(log: Log, target: Path) -> None:
    publish(log.home, "rev-000001-0123456789ab")
    with closing(connect(log.home)) as connection:
        connection.execute("UPDATE revision SET pruned_at = 5.0")
    done = backup(log.home, target)
    assert (done.revisions, done.missing) == (0, ())
    assert files(target / "adapters") == {}


@pytest.mark.parametrize("name", ["../../secret", "..", ".", "", "/etc"])
def test_a_revision_name_that_is_a_path_is_not_followed(log: Log, target: Path, name: str) -> None:
    secret = log.home.path.parent / "secret"
    secret.mkdir()
    (secret / "diary").write_text("mine", encoding="utf-8")
    with closing(connect(log.home)) as connection:
        connection.execute(
            "INSERT INTO revision (revision_id, namespace, seq, created_at, manifest)"
            " VALUES (?, 'default', 1, 1.0, '{}')",
            (name,),
        )
    assert backup(log.home, target).missing == (name,)
    assert "diary" not in str(files(target.parent))


def test_a_link_in_an_adapter_is_not_followed(log: Log, target: Path) -> None:
    folder = publish(log.home, "rev-000001-0123456789ab")
    (folder / "link").symlink_to("/etc/passwd")
    backup(log.home, target)
    assert not (target / "adapters" / folder.name / "link").exists()


def test_an_empty_target_folder_becomes_the_copy(log: Log, target: Path) -> None:
    target.mkdir(parents=True)
    backup(log.home, target)
    assert count(target, "run") == 1


def test_a_target_folder_in_use_is_refused(log: Log, target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"thesis\.txt.*missing or empty"):
        backup(log.home, target)
    assert [path.name for path in target.parent.rglob("*")] == ["monday", "thesis.txt"]


def test_a_file_as_target_is_refused(log: Log, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="no folder"):
        backup(log.home, tmp_path / "file")


def test_a_target_inside_the_home_is_refused(log: Log) -> None:
    with pytest.raises(ConfigError, match="inside the home"):
        backup(log.home, log.home.path / "backup")


def test_another_home_is_no_target_and_stays(log: Log, tmp_path: Path) -> None:
    backup(log.home, tmp_path / "copy")
    with pytest.raises(ConfigError, match="copy holds a home already"):
        backup(log.home, tmp_path / "copy")
    assert Home.open(tmp_path / "copy")


def test_a_folder_that_is_no_home_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAHome, match="agentpref init"):
        backup(tmp_path, tmp_path / "copy")


def test_a_copy_that_cannot_be_written_is_deleted(
    log: Log, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(log.home, "rev-000001-0123456789ab")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(NotKept, match=r"monday cannot be written \(No space left.*free space"):
        backup(log.home, target)
    assert list(target.parent.iterdir()) == []


def test_a_target_that_is_filled_during_the_backup_is_kept(
    log: Log, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arrive(stage: str, done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(NotKept, match="not empty"):
        backup(log.home, target, progress=arrive)
    assert files(target.parent) == {"monday/thesis.txt": b"mine"}


def test_a_killed_backup_leaves_an_unfinished_folder_that_is_no_home(
    log: Log, target: Path
) -> None:
    publish(log.home, "rev-000001-0123456789ab")
    script = f"""if True:
        import os
        from agentpref.record.transfer import backup
        backup.backup({str(log.home.path)!r}, {str(target)!r},
                      progress=lambda stage, done, total: done and os._exit(9))
    """
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    (left,) = target.parent.iterdir()
    assert left.name.startswith("monday.unfinished-")
    with pytest.raises(NotAHome):
        Home.open(left)
    backup(log.home, target)
    assert count(target, "run") == 1


def test_a_damaged_home_is_refused(log: Log, target: Path) -> None:
    log.close()
    log.home.database.write_bytes(b"not a database" * 1000)
    with pytest.raises(CorruptHome):
        backup(log.home, target)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


def test_a_backup_says_that_the_user_keys_are_lost(log: Log, target: Path) -> None:
    assert backup(log.home, target).keys is None
    log.home.user_keys.unlink()
    told = backup(log.home, target.with_name("tuesday")).keys
    assert told is not None
    assert "restore it from a backup" in told


def test_a_backup_names_the_revisions_that_it_copies_damaged(
    log: Log, target: Path, tmp_path: Path
) -> None:
    registry = Registry(log.home)
    adapter = write_adapter(tmp_path / "adapter")
    good, bad = (registry.publish(adapter, parent=None, model={}, training={}) for _ in range(2))
    assert backup(log.home, target).damaged == ()
    (bad.path / "adapter_config.json").write_bytes(b"{}")
    (good.path / "manifest.json").touch()
    done = backup(log.home, target.with_name("tuesday"))
    assert (done.revisions, done.damaged) == (2, (bad.revision_id,))
