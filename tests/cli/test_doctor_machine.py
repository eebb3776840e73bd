"""What `doctor` looks at on the machine: owners and modes, locks, disk and memory."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentpref.home import Home
from agentpref.models.base import find_base
from agentpref.models.base_files import BaseSize, measure_base
from agentpref.owners import user_name
from agentpref.record.database import exclusive
from agentpref_cli import machine

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")


def rows(value: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for check in value["checks"]:
        found.setdefault(check["name"], []).append(check)
    return found


@pytest.fixture
def doctor(run, home: Path) -> Callable[[int], dict[str, list[dict]]]:
    return lambda exits: rows(run("doctor", "--home", home, "--json", exits=exits).json)


def test_a_home_that_is_as_agentpref_made_it_passes(doctor, filled) -> None:
    found = doctor(0)
    [owner], [files] = found["owner"], found["files"]
    assert owner["message"].startswith(f"{filled} is ")
    assert "mode 0711" in owner["message"]
    assert "can read and write all of them" in files["message"]


@as_root
def test_files_that_shut_out_the_homes_owner_are_named_with_the_command_that_mends_them(
    doctor, filled
) -> None:
    """As a night of root's left them before agentpref gave them to the owner."""
    os.chown(filled, 65534, 65534)
    [files] = doctor(1)["files"]
    assert "cannot use adapters, agentpref.db, reports; as root" in files["message"]
    cure = files["message"].partition("as root: ")[2]
    assert cure.startswith("chown -R nobody:")
    assert os.system(cure) == 0
    assert [row["passed"] for row in doctor(0)["files"]] == [True]


@as_root
def test_files_that_the_group_of_a_shared_home_cannot_use_are_named(doctor, filled) -> None:
    filled.chmod(0o2770)
    [files] = doctor(1)["files"]
    cure = files["message"].partition("as root: ")[2]
    assert os.system(cure) == 0
    assert [row["passed"] for row in doctor(0)["files"]] == [True]


def test_a_process_that_holds_a_lock_is_named(doctor, filled) -> None:
    assert doctor(0)["locks"][0]["message"].startswith("no process holds one")
    with exclusive(Home.open(filled)):
        [locks] = doctor(0)["locks"]
        user, command = user_name(os.geteuid()), Path(sys.orig_argv[0]).name
        held = f"update.lock is held by process {os.getpid()} of {user} ({command} "
        assert held in locks["message"]
    assert (filled / "update.lock").exists(), "a file that is left over"
    assert doctor(0)["locks"][0]["message"].startswith("no process holds one")


def _database_is_text(home: Path) -> None:
    (home / "agentpref.db").write_bytes(b"not a database" * 100)


def _adapters_is_a_file(home: Path) -> None:
    shutil.rmtree(home / "adapters")
    (home / "adapters").touch(0o600)


def _refused_is_a_folder(home: Path) -> None:
    (home / "refused.jsonl").mkdir()


def _spill_is_a_folder(home: Path) -> None:
    (home / "spill.jsonl").mkdir()


def _pins_are_a_loop(home: Path) -> None:
    (home / "holds").symlink_to(home / "holds")


def _the_home_is_a_file(home: Path) -> None:
    shutil.rmtree(home)
    home.write_bytes(b"text")


def _everything_is_gone(home: Path) -> None:
    for path in home.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("broken", "row"),
    [
        (_database_is_text, "home"),
        (_adapters_is_a_file, None),
        (_refused_is_a_folder, "refused"),
        (_spill_is_a_folder, "spill"),
        (_pins_are_a_loop, None),
        (_the_home_is_a_file, "home"),
        (_everything_is_gone, "home"),
    ],
)
def test_a_broken_home_still_gets_its_whole_table(run, filled, broken, row) -> None:
    broken(filled)
    result = run("doctor", "--home", filled, "--json", exits=0 if row is None else 1)
    found = rows(result.json)
    assert found.keys() >= {"agentpref", "home", "model", "disk", "memory"}
    failed = {name for name, checks in found.items() if not all(c["passed"] for c in checks)}
    assert failed >= ({row} - {None})


def test_the_room_for_a_night_grows_with_the_model_and_the_rank(tmp_path: Path) -> None:
    home, size = Home(tmp_path / "missing"), BaseSize(7_000_000_000, 2_500_000)
    disk, memory = machine.night(home, size, 16, 4, gpu=False)
    assert "a night needs about 1.3 GB" in disk.message  # 8 adapters of 160 MB
    assert "training needs at least 29.4 GB" in memory.message  # 28 + 0.64 + 0.79
    larger = next(iter(machine.night(home, size, 128, 4, gpu=False)))
    assert "a night needs about 10.3 GB" in larger.message


def test_too_little_room_fails_and_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1))
    disk, memory = machine.night(Home(tmp_path), BaseSize(1_000, 10), 16, 4, gpu=False)
    assert (disk.passed, memory.passed) == (False, False)
    assert disk.message.startswith("0 MB free; a night needs about 67 MB")
    assert disk.message.endswith(f"free space on the disk of {tmp_path}")
    assert "take a smaller model" in memory.message


def test_a_containers_limit_counts_as_free_memory(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/app/worker\n")
    group = tmp_path / "sys/fs/cgroup/app"
    (group / "worker").mkdir(parents=True)
    assert machine.free_memory(tmp_path) == 8_192_000_000
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("700\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    assert machine.free_memory(tmp_path) == 500
    (group / "worker/memory.max").write_text("max\n")
    assert machine.free_memory(tmp_path) == 500


def test_the_size_of_the_bundled_model_is_that_of_a_real_adapter() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(find_base("tiny"))
    size = measure_base(find_base("tiny"))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    config = peft.LoraConfig(r=16, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert 16 * size.per_rank == trained


def test_an_unreadable_mode_is_a_row_and_no_traceback(tmp_path: Path) -> None:
    def look():
        yield machine.Finding("first", True, "was found")
        raise PermissionError(13, "Permission denied", str(tmp_path))

    first, second = machine.checked("second", look)
    assert first.message == "was found"
    assert (second.name, second.passed) == ("second", False)
    assert second.message.startswith(f"{tmp_path}: Permission denied; ")
    assert stat.S_ISDIR(tmp_path.stat().st_mode)
