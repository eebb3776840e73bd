"""Kills an operation before each of its steps in turn, and looks at what is left.

``python killed_steps.py OPERATION WORLD`` prints ``ok`` and how many steps there were. Each try is
on a fresh copy of the homes that ``killed_world.py`` made. After each kill, the operation is done
again and must complete the work; then everybody is forgotten, and the files are searched for what
they said.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import invariants
from killed_operations import OPERATIONS, Operation
from killed_world import World
from killing import is_done


def main(name: str, folder: Path) -> None:
    """Kill it before each step."""
    kind, world = OPERATIONS[name], World(folder, folder / "adapters")
    told = world.told()
    kind.prepare()

    def fresh() -> Operation:
        return kind(world.copy(folder / f"{name}-tried", kind.first, *kind.beside), told)

    whole = fresh()
    for _ in range(2):
        whole.run()
    expected, before = invariants.contents(whole.world.home), None
    for steps in count():
        tried = fresh()
        done = is_done(tried.run, steps)
        left = kind(tried.world.copy(folder / f"{name}-left"), told)  # looking changes files
        found = invariants.fingerprint(left.world.folder)
        left.check_left()
        if found != before:  # else all that follows is as it was after the kill before
            tried.go_on(expected)
        before = found
        if done:
            break
    print("ok", steps)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
