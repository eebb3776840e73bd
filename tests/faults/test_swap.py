"""Swaps that are killed, and swaps of two serving processes at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from agentpref.home import Home
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter

STEPS = 200
SWAP = Path(__file__).with_name("swap.py")


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder where an fsync costs nothing: what is killed here is the process, not the power."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def publish(registry: Registry, folder: Path, count: int) -> list[str]:
    return [
        registry.publish(
            write_adapter(folder / str(seed), seed=seed), parent=None, model={}, training={}
        ).revision_id
        for seed in range(count)
    ]


@pytest.mark.guarantee("crashes", f"more than {STEPS} steps")
def test_a_swap_that_is_killed_at_any_step_leaves_the_old_or_the_new_one_serving(
    in_memory: Path,
) -> None:
    registry = Registry(Home.create(in_memory / "home"))
    old, _ = publish(registry, in_memory, 2)
    registry.promote(old)
    command = [sys.executable, str(SWAP), str(registry.home.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > STEPS  # else this has not tried what it is for


SERVER = """
import sys
from agentpref.errors import GenerationConflict
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend

with Router(Registry(sys.argv[1]), FakeBackend()) as router:
    for line in sys.stdin:
        generation, name = line.split()
        try:
            router.activate(name, expected_generation=int(generation))
            print("won", router.serving.live, flush=True)
        except GenerationConflict:
            print("told", router.sync().live, flush=True)
"""


@contextmanager
def server(registry: Registry) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER, str(registry.home.path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_of_two_servers_that_swap_at_once_one_wins_and_the_other_follows(in_memory: Path) -> None:
    registry = Registry(Home.create(in_memory / "home"))
    names = publish(registry, in_memory, 4)
    with server(registry) as one, server(registry) as other:
        for turn in range(40):
            generation = registry.state().generation
            for process, name in ((one, names[turn % 4]), (other, names[(turn + 1) % 4])):
                assert process.stdin is not None
                process.stdin.write(f"{generation} {name}\n")
            told = [process.stdout.readline().split() for process in (one, other)]  # type: ignore[union-attr]
            assert sorted(outcome for outcome, _ in told) == ["told", "won"]
            assert {live for _, live in told} == {registry.state().live}


KILLED = """
import os, sys
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend

router = Router(Registry(sys.argv[1]), FakeBackend())
router.activate(sys.argv[2])
os.kill(os.getpid(), 9)
"""


def test_a_killed_server_holds_nothing_up(in_memory: Path) -> None:
    registry = Registry(Home.create(in_memory / "home"))
    names = publish(registry, in_memory, 2)
    command = [sys.executable, "-c", KILLED, str(registry.home.path), names[0]]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    with Router(registry, FakeBackend()) as router:
        assert router.serving.live == names[0]
        router.activate(names[1])
        assert router.serving.live == names[1]
