"""What a home needs of its machine: owners and modes, locks, and room for a night. For `doctor`."""

from __future__ import annotations

import os
import shutil
import stat
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from agentpref.home import Home
    from agentpref.models.base_files import BaseSize

_SHOWN = 5
_COMMAND_WIDTH = 120
_PROGRAM_BYTES = 750 << 20
"""What Python, torch and small passes take beside the weights: the peak of a night with `tiny`."""

_DISK_BYTES = 64 << 20
_COPIES = 8
"""Of an adapter on disk: training's state with two moments, old and new; candidate; revision."""


class Finding(NamedTuple):
    """What was looked at, whether it can be used, and what was found."""

    name: str
    passed: bool
    message: str


def checked(name: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; if it cannot go on, that is its last finding.

    So the table is whole, however broken the home is.
    """
    import sqlite3

    from agentpref.errors import AgentprefError
    from agentpref.owners import access_cure

    try:
        yield from look()
    except PermissionError as error:
        path = Path(error.filename or ".")
        yield Finding(name, False, f"{path}: {error.strerror}; {access_cure(path)}")
    except (AgentprefError, ImportError, OSError, sqlite3.Error, ValueError) as error:
        yield Finding(name, False, str(error) or type(error).__name__)


def owners(home: Home) -> Iterator[Finding]:
    """Whether this user, and the owner of the home, may use all that is in it."""
    from agentpref.owners import access_cure, is_locked_out, user_name

    if not home.path.is_dir():
        return
    around = home.path.stat()
    owner, mode = user_name(around.st_uid), stat.S_IMODE(around.st_mode)
    whose = f"{owner}:{_group(around.st_gid)}, mode {mode:04o}"
    shut = is_locked_out(home.path) or not os.access(home.path, os.X_OK)
    cure = access_cure(home.path) if shut else f"this is {user_name(os.geteuid())}"
    if is_readonly := bool(os.statvfs(home.path).f_flag & os.ST_RDONLY):
        cure = "its file system is read-only: mount it for writing"
    yield Finding("owner", not (shut or is_readonly), f"{home.path} is {whose}; {cure}")
    if shut:
        return
    foreign, closed = [], []
    for path in _parts(home):
        with suppress(FileNotFoundError):
            if is_locked_out(path):
                closed.append(path)
            if not _is_everybodys(path.lstat(), around):
                foreign.append(path)
    if closed:
        message = f"this user cannot read and write {_named(closed, home)}"
        yield Finding("files", False, f"{message}; {access_cure(closed[0])}")
    if foreign:
        message = f"other users of this home cannot use {_named(foreign, home)}"
        cure = f"as root: chown -R {owner}:{_group(around.st_gid)} {home.path}"
        if around.st_mode & (stat.S_IWGRP | stat.S_ISGID):
            cure += f" && chmod -R g+rwX {home.path}"
        yield Finding("files", False, f"{message}; {cure}")
    if not closed and not foreign:
        yield Finding("files", True, f"{owner} and this user can read and write all of them")


def _parts(home: Home) -> Iterator[Path]:
    """The files and folders of a home, without what is inside the folders of revisions."""
    for folder, folders, files in os.walk(home.path):
        yield from (Path(folder, name) for name in (*folders, *files))
        if Path(folder) == home.adapters:
            folders.clear()


def _is_everybodys(found: os.stat_result, home: os.stat_result) -> bool:
    """Whether a file is its home's owner's, and in a shared home also the group's."""
    if stat.S_ISLNK(found.st_mode):
        return True
    if not home.st_mode & (stat.S_IWGRP | stat.S_ISGID) or home.st_mode & stat.S_IWOTH:
        return found.st_uid == home.st_uid
    both = stat.S_IRGRP | stat.S_IWGRP
    return found.st_gid == home.st_gid and found.st_mode & both == both


def _named(paths: list[Path], home: Home) -> str:
    names = [str(path.relative_to(home.path)) for path in sorted(paths)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def locks(home: Home) -> Iterator[Finding]:
    """Which processes hold the home's locks. A lock ends with its process, so none is stale."""
    table = Path("/proc/locks")
    if not home.path.is_dir() or not table.exists():  # only Linux says who holds one
        return
    holders: dict[str, str] = {}
    for line in table.read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if "->" not in fields and len(fields) >= 6:  # an arrow marks who waits
            holders[fields[5].rpartition(":")[2]] = fields[4]
    held = [
        f"{lock.name} is held by {_process(holders[inode])}"
        for lock in sorted(home.path.glob("*.lock"))
        if (inode := str(lock.stat().st_ino)) in holders
    ]
    free = "no process holds one; a file that is left over locks nothing"
    yield Finding("locks", True, "; ".join(held) or free)


def _process(pid: str) -> str:
    """A process by its number, its user and its command, as far as this user may see them."""
    from agentpref.owners import user_name

    if int(pid) <= 0:
        return "a process of another container"
    process, words, user = Path("/proc", pid), list[str](), ""
    with suppress(OSError):
        words = (process / "cmdline").read_bytes().decode(errors="replace").strip("\0").split("\0")
    with suppress(OSError):
        user = f" of {user_name(process.stat().st_uid)}"
    if not words or not words[0]:
        return f"process {pid}{user}, whose command this user may not see"
    command = " ".join([Path(words[0]).name, *words[1:]])
    return f"process {pid}{user} ({textwrap.shorten(command, _COMMAND_WIDTH, placeholder=' …')})"


def night(
    home: Home, size: BaseSize, rank: int, bytes_each: int, *, gpu: bool
) -> Iterator[Finding]:
    """Whether the disk and the memory have room for an update of a model."""
    adapter = 4 * size.per_rank * rank
    need = _COPIES * adapter + _DISK_BYTES
    place = next(path for path in (home.path, *home.path.parents) if path.exists())
    free = shutil.disk_usage(place).free
    message = f"{_size(free)} free; a night needs about {_size(need)} beside what it logs"
    cure = "" if free >= need else f"; free space on the disk of {place}"
    yield Finding("disk", free >= need, message + cure)
    need = size.parameters * bytes_each + 4 * adapter + (0 if gpu else _PROGRAM_BYTES)
    free = _free_on_gpu() if gpu else free_memory()
    where = "of the GPU" if gpu else "of memory"
    message = f"{_size(free)} {where} free; training needs at least {_size(need)}"
    cure = "; stop other programs, take a smaller model, or set precision" if free < need else ""
    yield Finding("memory", free >= need, message + cure)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _free_on_gpu() -> int:
    from agentpref.learn.memory import free_bytes

    return free_bytes("cuda")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still take, within the limit of its container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with suppress(OSError):
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    groups = root / "sys/fs/cgroup"
    with suppress(OSError):
        own = (root / "proc/self/cgroup").read_text(encoding="utf-8").strip()
        group = groups / own.rpartition("::")[2].strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(groups) and (left := _left_in(folder)) is not None:
                free = min(free, left)
    return free


def _left_in(group: Path) -> int | None:
    """What the limit of a control group (version 2) leaves, where pages of files can be dropped."""
    try:
        limit, used = (
            (group / f"memory.{end}").read_text(encoding="utf-8").strip()
            for end in ("max", "current")
        )
        stat_file = group / "memory.stat"
        counts = dict(line.split() for line in stat_file.read_text(encoding="utf-8").splitlines())
        return None if limit == "max" else int(limit) - int(used) + int(counts["inactive_file"])
    except (OSError, KeyError):
        return None
