"""A home on a file system that becomes read-only and writable again.

Run in a mount namespace of its own: `unshare -rm python readonly_home.py FOLDER`. Prints "ok".
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from full_disk import ASKED, READING, agentpref, doctor_finds, mounted, thumbs_once_it_is_kept

from agentpref.errors import AgentprefError, NotKept
from agentpref.record.log import Log


def remount(folder: Path, how: str) -> None:
    """Mount the folder's file system anew, with other rights."""
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def close_the_database() -> None:
    """Make a log let go of its files, as it does around every fork: open ones forbid a remount."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def main(folder: Path) -> None:
    """Log before, while and after nothing can be written."""
    with mounted(folder, "8m"), closing(Log(folder / "home")) as log:
        first = log.record(ASKED, "4")
        log.flush()
        close_the_database()
        remount(folder, "ro")
        with pytest.raises(NotKept, match="let this user write"):
            log.feedback(first, key="thumbs", score=1)
        log.record(ASKED, "5")
        assert log.flush() is False
        with pytest.raises(AgentprefError, match="write"):
            Log(folder / "home")
        for command in READING:
            done = agentpref(command, folder / "home")
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        assert doctor_finds(folder / "home") == {"owner", "disk"}
        remount(folder, "rw")
        thumbs_once_it_is_kept(log, first)
        assert log.flush()
        assert log.verify() == []
        assert log.dropped == {}
    print("ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
