"""The registry over a real SQLite file and a real folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agentpref.errors import (
    GenerationConflict,
    InvalidAdapter,
    NotAHome,
    NotKept,
    RevisionError,
    UnknownRevision,
)
from agentpref.home import Home
from agentpref.leftovers import claimed
from agentpref.models.adapter_files import read_adapter
from agentpref.record.weights import tensor_digest
from agentpref.serve.backend import Revision
from agentpref.serve.folders import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    encode,
)
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

BASE_IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


@pytest.fixture
def registry(home: Home) -> Registry:
    return Registry(home)


def publish(registry: Registry, tmp_path: Path, seed: int = 0, parent: str | None = None):
    folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed)
    return registry.publish(folder, parent=parent, model=BASE_IDENTITY, training={"seed": seed})


def test_a_new_home_serves_the_base_model(registry: Registry) -> None:
    assert registry.live() is None
    assert registry.list() == []
    assert registry.history() == []
    assert registry.state() == ("default", None, None, 0.0, 0)


def test_a_folder_that_is_not_a_home_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAHome):
        Registry(tmp_path)


def test_publish_copies_the_adapter_and_describes_it(registry: Registry, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    first = publish(registry, tmp_path, 1)
    revision = registry.publish(
        folder,
        parent=first.revision_id,
        model=BASE_IDENTITY,
        training={"beta": 0.1},
        watermark={"runs": 7},
    )
    assert revision.revision_id.startswith("rev-000002-")
    assert registry.get(revision.revision_id) == revision
    assert registry.list() == [first, revision]
    assert registry.live() is None, "publishing must not serve"
    assert revision.manifest == {
        "format": 1,
        "namespace": "default",
        "files": read_adapter(folder).digests,
        "tensors": tensor_digest(read_adapter(folder).weights),
        "parent": first.revision_id,
        "base": BASE_IDENTITY,
        "training": {"beta": 0.1},
        "watermark": {"runs": 7},
    }
    assert (revision.path / MANIFEST_FILE).read_bytes() == encode(revision.manifest)
    assert read_adapter(revision.path).digests == read_adapter(folder).digests


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_modes_do_not_depend_on_the_umask(registry: Registry, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = publish(registry, tmp_path).path
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_a_revision_shares_no_file_with_the_saved_adapter(
    registry: Registry, tmp_path: Path
) -> None:
    saved, linked = write_adapter(tmp_path / "saved"), tmp_path / "linked"
    linked.mkdir()
    for file in saved.iterdir():
        os.link(file, linked / file.name)
    revision = registry.publish(linked, parent=None, model=BASE_IDENTITY, training={})
    assert {file.stat().st_nlink for file in revision.path.iterdir()} == {1}


def test_a_folder_gets_its_name_after_its_files_are_synced(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    publish(registry, tmp_path)
    temporary = steps.pop(4)
    assert temporary.startswith(".publishing-")
    copied = [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, registry.home.path.name]
    assert steps == [*copied, "rename", "adapters"]


def test_a_failed_publishing_raises_not_kept_and_leaves_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NotKept, match="No space left on device"):
            publish(registry, tmp_path)
    assert registry.list() == []
    assert list(registry.home.adapters.iterdir()) == []


def test_a_revision_is_named_by_its_content(registry: Registry, tmp_path: Path) -> None:
    names = [publish(registry, tmp_path, seed).revision_id for seed in (0, 0, 1)]
    numbers, digests = zip(*(name.removeprefix("rev-").split("-") for name in names), strict=True)
    assert numbers == ("000001", "000002", "000003")
    assert digests[0] == digests[1] != digests[2]


def test_a_broken_adapter_is_not_published(registry: Registry, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(InvalidAdapter, match="truncated"):
        registry.publish(folder, parent=None, model=BASE_IDENTITY, training={})
    assert registry.list() == []
    assert list(registry.home.adapters.iterdir()) == []


def test_an_unknown_parent_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UnknownRevision, match="rev-000009-0123456789ab"):
        publish(registry, tmp_path, parent="rev-000009-0123456789ab")


def test_namespaces_do_not_see_each_other(registry: Registry, tmp_path: Path) -> None:
    other = Registry(registry.home, namespace="other")
    ours, theirs = publish(registry, tmp_path), publish(other, tmp_path)
    assert ours.revision_id != theirs.revision_id
    registry.promote(ours.revision_id)
    assert other.live() is None
    assert other.list() == [theirs]
    with pytest.raises(UnknownRevision):
        other.promote(ours.revision_id)


def test_each_rollback_undoes_one_promotion(registry: Registry, tmp_path: Path) -> None:
    a, b = (publish(registry, tmp_path, seed) for seed in range(2))
    registry.promote(a.revision_id)
    assert registry.previous() is None
    registry.promote(b.revision_id)
    assert registry.live() == b
    assert registry.previous() == a.revision_id
    assert registry.rollback().live == a.revision_id
    assert registry.rollback().live is None, "from the first promotion back to the base model"
    with pytest.raises(RevisionError, match="nothing to roll back"):
        registry.rollback()
    assert [(e.generation, e.action, e.live) for e in registry.history()] == [
        (1, "promote", a.revision_id),
        (2, "promote", b.revision_id),
        (3, "rollback", a.revision_id),
        (4, "rollback", None),
    ]


def test_a_rollback_never_returns_to_what_was_rolled_back(
    registry: Registry, tmp_path: Path
) -> None:
    a, bad, c = (publish(registry, tmp_path, seed).revision_id for seed in range(3))
    registry.promote(a)
    registry.promote(bad)
    registry.rollback()
    registry.promote(c)
    assert registry.rollback().live == a


def test_promoting_what_is_live_adds_no_step_to_roll_back(
    registry: Registry, tmp_path: Path
) -> None:
    a = publish(registry, tmp_path).revision_id
    registry.promote(a)
    assert registry.promote(a).generation == 2
    assert registry.rollback().live is None


def test_a_canary_is_ended_by_hand_by_promotion_and_by_rollback(
    registry: Registry, tmp_path: Path
) -> None:
    a, b = (publish(registry, tmp_path, seed).revision_id for seed in range(2))
    assert registry.canary(a, 0.25) == ("default", None, a, 0.25, 1)
    assert registry.canary(None, 0) == ("default", None, None, 0.0, 2)
    registry.canary(a, 1.0)
    assert registry.promote(b) == ("default", b, None, 0.0, 4)
    registry.canary(a, 0.5)
    assert registry.rollback() == ("default", None, None, 0.0, 6)


@pytest.mark.parametrize("weight", [0, -0.1, 1.01, float("nan")])
def test_a_canary_weight_is_a_share(registry: Registry, tmp_path: Path, weight: float) -> None:
    name = publish(registry, tmp_path).revision_id
    with pytest.raises(RevisionError, match=r"share above 0"):
        registry.canary(name, weight)
    with pytest.raises(RevisionError, match=r"canary\(None, 0\)"):
        registry.canary(None, 0.5)
    assert registry.state().generation == 0


def test_an_unknown_revision_is_not_promoted(registry: Registry) -> None:
    with pytest.raises(UnknownRevision, match=r"\.\./escape"):
        registry.promote("../escape")


@pytest.mark.parametrize("file", [WEIGHTS_FILE, MANIFEST_FILE])
def test_an_edited_revision_is_not_promoted(registry: Registry, tmp_path: Path, file: str) -> None:
    revision = publish(registry, tmp_path)
    edited = revision.path / file
    edited.chmod(0o644)
    edited.write_bytes(edited.read_bytes()[:-1] + b"!")
    for change in (registry.promote, lambda name: registry.canary(name, 0.5)):
        with pytest.raises(InvalidAdapter, match=file):
            change(revision.revision_id)
    assert registry.live() is None


def test_one_of_two_promotions_of_the_same_generation_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    names = [publish(registry, tmp_path, seed).revision_id for seed in range(2)]
    for _ in range(10):
        generation = registry.state().generation
        start, outcomes = threading.Barrier(2), []

        def promote(name: str, expected: int, start=start, outcomes=outcomes) -> None:
            own = Registry(registry.home)
            start.wait()
            try:
                outcomes.append(own.promote(name, expected_generation=expected))
            except GenerationConflict as conflict:
                outcomes.append(conflict)

        threads = [threading.Thread(target=promote, args=(name, generation)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (won,) = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        (lost,) = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        assert registry.state() == won
        assert f"not {generation}" in str(lost)


def test_every_change_compares_the_generation(registry: Registry, tmp_path: Path) -> None:
    name = publish(registry, tmp_path).revision_id
    registry.promote(name, expected_generation=0)
    for change in (
        lambda: registry.promote(name, expected_generation=0),
        lambda: registry.canary(name, 0.5, expected_generation=0),
        lambda: registry.rollback(expected_generation=0),
    ):
        with pytest.raises(GenerationConflict):
            change()
    assert registry.state().generation == 1
    assert len(registry.history()) == 1


KILLED = """
import os, shutil, sys
from pathlib import Path
import agentpref.serve.registry as module

home, folder, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
steps = 0

def fatal(function):
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps > last:
            os._exit(9)
        return function(*args, **kwargs)
    return step

os.fsync = fatal(os.fsync)
os.fchmod = fatal(os.fchmod)
shutil.copyfileobj = fatal(shutil.copyfileobj)
Path.mkdir = fatal(Path.mkdir)
Path.rename = fatal(Path.rename)
module.Registry._find = fatal(module.Registry._find)
module.Registry(home).publish(folder, parent=None, model={}, training={})
"""


def test_a_publish_that_is_killed_at_any_step_leaves_a_valid_registry(
    registry: Registry, tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = write_adapter(tmp_path / "adapter")
    finished, last = False, 0
    while not finished:
        command = [sys.executable, str(script), str(registry.home.path), str(folder), str(last)]
        code = subprocess.run(command, check=False, timeout=60).returncode
        finished = code == 0
        assert code in (0, 9)
        for revision in registry.list():
            registry.promote(revision.revision_id)
        assert len(registry.list()) == finished
        last += 1
    assert last > 8, "the kill must have been tried between the steps"
    rename_to = registry.list()[0].path
    orphans = [f for f in registry.home.adapters.iterdir() if f != rename_to]
    assert not orphans, "each publisher removes what those before it left"


def test_the_next_publish_removes_what_crashes_left(registry: Registry, tmp_path: Path) -> None:
    kept = publish(registry, tmp_path)
    adapters = registry.home.adapters
    unnamed = write_adapter(adapters / "rev-000007-0123456789ab")
    abandoned = write_adapter(adapters / ".publishing-abandoned")
    busy = adapters / ".publishing-by-another-thread"
    foreign = adapters / "notes"
    foreign.mkdir()
    with claimed(busy, lambda: write_adapter(busy)):
        new = publish(registry, tmp_path, seed=1)
    assert not unnamed.exists()
    assert not abandoned.exists()
    assert busy.exists(), "somebody is at work"
    assert foreign.exists(), "not ours to remove"
    assert {kept.path, new.path} <= set(adapters.iterdir())


def test_an_orphan_of_the_same_name_does_not_block_publishing(
    registry: Registry, tmp_path: Path
) -> None:
    there = Home.create(tmp_path / "elsewhere")
    name = publish(Registry(there), tmp_path).revision_id
    assert registry.list() == []  # opened before a crash could leave anything
    write_adapter(registry.home.adapters / name, seed=5)
    revision: Revision = publish(registry, tmp_path)
    assert revision.revision_id == name
    registry.promote(name)


def test_concurrent_publishers_get_different_numbers(registry: Registry, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(6)]

    def work(folder: Path) -> None:
        registry.publish(folder, parent=None, model=BASE_IDENTITY, training={})

    threads = [threading.Thread(target=work, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [revision.revision_id.split("-")[1] for revision in registry.list()]
    assert numbers == [f"{number:06d}" for number in range(1, 7)]
    for revision in registry.list():
        registry.promote(revision.revision_id)


@pytest.mark.guarantee("crashes")
def test_what_belongs_to_a_revision_is_published_with_it_or_not_at_all(
    registry: Registry, tmp_path: Path
) -> None:
    folder, given = write_adapter(tmp_path / "adapter"), {"parent": None, "model": {}}

    def dies() -> None:
        with registry.publishing(folder, **given, training={}) as one:
            assert one.promote(registry.state())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dies()
    assert registry.list() == []
    assert registry.state().live is None
    with registry.publishing(folder, **given, training={}) as one:
        assert one.promote(registry.state())
    assert registry.state().live == one.revision.revision_id
    assert [path.name for path in registry.home.adapters.iterdir()] == [one.revision.revision_id]


def test_a_service_says_since_when_and_until_when_a_revision_was_live(
    registry: Registry, tmp_path: Path
) -> None:
    first, second = (
        registry.publish(
            write_adapter(tmp_path / str(seed), seed=seed), parent=None, model={}, training={}
        ).revision_id
        for seed in range(2)
    )
    assert registry.service(first) == (None, None, None, None)
    registry.promote(first)
    registry.canary(second, 0.5)
    (promoted, _) = registry.history()
    assert registry.service(first) == ("live", promoted.at, None, None)
    assert registry.service(second) == ("canary", None, None, None)
    registry.canary(None, 0.0)
    ended = registry.history()[-1].at
    assert registry.service(second) == (None, None, None, ended)
    registry.promote(second)
    again = registry.history()[-1].at
    assert registry.service(first) == (None, promoted.at, again, None)
    assert registry.service(second) == ("live", again, None, ended)
    assert registry.service(None) == (None, None, None, None)


def test_the_base_is_no_canary(registry):
    with pytest.raises(RevisionError, match="cannot be a canary; promote 'base'"):
        registry.canary("base", 0.1)
    assert registry.state().generation == 0
