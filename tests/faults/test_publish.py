"""Publishing, promoting and pruning: at once, and with files that somebody touched."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from agentpref.errors import InvalidAdapter, RevisionError
from agentpref.home import Home
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.folders import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
REQUEST = GenerationRequest(messages=({"role": "user", "content": "Hello"},))


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder where an fsync costs nothing: what is killed here is the process, not the power."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


OPERATOR = """
import sys
from agentpref.errors import GenerationConflict
from agentpref.serve.registry import Registry

registry, name = Registry(sys.argv[1]), sys.argv[2]
for line in sys.stdin:
    try:
        registry.promote(name, expected_generation=int(line))
    except GenerationConflict as told:
        print("told:", told, flush=True)
    else:
        print("won", flush=True)
"""


@pytest.mark.guarantee("crashes")
def test_of_two_operators_at_once_one_wins_and_one_is_told(tmp_path: Path) -> None:
    registry = Registry(Home.create(tmp_path / "home"))
    names = publish(registry, tmp_path, 2)
    with operator(registry, names[0]) as one, operator(registry, names[1]) as other:
        for _ in range(50):
            generation = registry.state().generation
            for process in (one, other):
                assert process.stdin is not None
                process.stdin.write(f"{generation}\n")
            for process in (one, other):
                process.stdin.flush()
            said = [process.stdout.readline() for process in (one, other)]
            (loser,) = [words for words in said if words != "won\n"]
            assert f"is at generation {generation + 1}, not {generation}" in loser
            winner = names[said.index("won\n")]
            assert registry.state()[1::3] == (winner, generation + 1)
        for process in (one, other):
            process.stdin.close()
    assert [entry.generation for entry in registry.history()] == list(range(1, 51))


def operator(registry: Registry, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPERATOR, str(registry.home.path), name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def publish(registry: Registry, tmp_path: Path, count: int) -> list[str]:
    folders = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(count)]
    return [
        registry.publish(folder, parent=None, model=IDENTITY, training={}).revision_id
        for folder in folders
    ]


def deleted(file: Path) -> None:
    file.unlink()


def edited(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def linked(file: Path) -> None:
    """The very same bytes, but of a file that others may change."""
    elsewhere = file.parent.parent.parent / "elsewhere"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


def made_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def joined_by_a_pickle(file: Path) -> None:
    file.with_name("adapter_model.bin").touch()


@pytest.mark.parametrize(
    "damage", [deleted, edited, cut_off, emptied, linked, made_a_folder, joined_by_a_pickle]
)
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE])
def test_a_file_that_somebody_touched_is_noticed_before_it_is_used(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    registry = Registry(Home.create(tmp_path / "home"))
    sound, spoilt = publish(registry, tmp_path, 2)
    router = Router(registry, FakeBackend())
    router.activate(sound)
    damage(registry.get(spoilt).path / name)
    for change in (registry.promote, lambda revision: registry.canary(revision, 0.5)):
        with pytest.raises(InvalidAdapter):
            change(spoilt)
    for swap in (router.activate, lambda revision: router.canary(revision, 0.5)):
        with pytest.raises(RevisionError):
            swap(spoilt)
    assert registry.state().live == sound
    assert registry.state().canary is None
    assert router.generate(REQUEST, thread_id="t").revision == sound
    assert spoilt not in router.backend.list_loaded()


USER = """
import random, sys
from agentpref.errors import RevisionError
from agentpref.serve.pins import Pins
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_revision

registry, seed = Registry(sys.argv[1]), int(sys.argv[2])
pins, rng, used = Pins(registry.home.pins, f"http://{seed}"), random.Random(seed), 0
seen = set()  # revisions come and go meanwhile
while used <= 50 or len(seen) <= 10:
    revision = rng.choice([one for one in registry.list() if one.pruned_at is None])
    pins.take(revision.revision_id)
    try:
        registry.require_fit(revision, untainted=False)
    except RevisionError:
        pass
    else:
        for _ in range(rng.randrange(1, 4)):
            check_revision(revision)  # nobody removes it while it is held
        used += 1
        seen.add(revision.revision_id)
    with pins.drop(revision.revision_id):
        pass
print(used)
"""

PRUNER = """
import sys
from pathlib import Path
from agentpref.serve.registry import Registry

registry, adapter, removed = Registry(sys.argv[1]), Path(sys.argv[2]), 0
while removed <= 10 or not adapter.with_name("enough").exists():
    for _ in range(3):
        registry.publish(adapter, parent=None, model={}, training={})
    removed += len(registry.prune(keep=1, ask=lambda place, name: False).removed)
print(removed)
"""


def test_what_a_process_holds_no_pruning_removes(in_memory: Path) -> None:
    """Two that use revisions and two that prune, at once, over one home."""
    registry = Registry(Home.create(in_memory / "home"))
    publish(registry, in_memory, 1)
    pruners = [run(PRUNER, registry, in_memory / "0") for _ in range(2)]
    users = [run(USER, registry, seed) for seed in range(2)]
    used = [int(user.communicate()[0]) for user in users]
    (in_memory / "enough").touch()
    removed = [int(pruner.communicate()[0]) for pruner in pruners]
    assert [process.returncode for process in (*users, *pruners)] == [0] * 4
    assert min(used) > 50
    assert sum(removed) > 20
    registry.prune(keep=1)
    there = {path.name for path in registry.home.adapters.iterdir()}
    assert there == {one.revision_id for one in registry.list() if one.pruned_at is None}


def run(code: str, registry: Registry, argument: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(registry.home.path), str(argument)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
