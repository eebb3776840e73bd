"""Operations that are killed before each of their steps: what they leave, and how they go on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

HERE = Path(__file__).parent

# How many steps there must be at least, else this has not tried what it is for.
STEPS = {
    "publish": 40, "update": 150, "promote": 30, "canary": 30, "rollback": 25, "withdraw": 25,
    "prune": 80, "quarantine": 15, "release": 25, "judge": 90, "forget": 130, "merge": 300,
    "backup": 180, "restore": 180, "upgrade": 110,
}  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    """The homes, where an fsync costs nothing: the process is killed here, and not the power."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        run("killed_world.py", folder)
        yield Path(folder)


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.guarantee(
    "crashes",
    f"at least {sum(STEPS.values()):,} kills: {', '.join(STEPS)}",
)
@pytest.mark.parametrize("operation", STEPS)
def test_an_operation_that_is_killed_before_any_step_loses_nothing_and_the_same_again_completes_it(
    world: Path, operation: str
) -> None:
    word, steps = run("killed_steps.py", operation, world).split()
    assert word == "ok"
    assert int(steps) >= STEPS[operation]
