"""Who may use what is in a home: owners, groups and modes, whoever makes a file and when.

Who may read a home does not depend on the umask. Every file that may hold what people wrote is made
by :func:`open_private`: its owner alone reads and writes it (0600). Where the folder is shared with
a group on purpose, the group does too (0660): its group may write it, or it gives its group to what
is made in it (setgid). Revisions are for everybody to read, because an engine may run as another
user. So others may pass through the folder of a home (0711), but they cannot list it.

Two users may work on one home, such as cron as root and an app as www-data. What is made inside a
home gets the owner and the group of the folder that it is made in, as far as the system lets this
process give it away: root may, and others may give a file to a shared folder's group that they are
in. Elsewhere, as in exports and in copies of a home, a file stays with who made it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

StrPath: TypeAlias = "str | os.PathLike[str]"

DATABASE = "agentpref.db"
"""The file that makes a folder a home."""

READABLE_FOLDER, READABLE_FILE = 0o755, 0o644
"""The modes of the folders and files of revisions, which an engine of another user reads too."""

OTHERS = 0o007
"""The bits of all users but the owner and the group."""


def open_private(path: StrPath, flags: int = os.O_RDWR) -> int:
    """Open a file that only its home's people may read, and make it if it is missing.

    A new file gets the owner and the group of its home. Other users lose their access to an older
    file. As the ``opener`` of ``open``, it keeps what is written from the first byte on.

    >>> with open(home.spill, "ab", opener=open_private) as file:
    ...     file.write(line)
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        descriptor = os.open(path, flags | os.O_CREAT, 0o600)
        tighten(Path(path))
    else:
        folder = Path(path).parent
        _give_to_home(descriptor, folder)
        os.fchmod(descriptor, _file_mode(os.fstat(descriptor), folder))
    return descriptor


def make_private_folder(path: Path) -> None:
    """Make a folder inside a home for its people only; an existing one stays as it is."""
    if not path.is_dir():
        path.mkdir(mode=0o700, exist_ok=True)
        own_folder(path)


def make_readable_folder(path: Path) -> None:
    """Make a folder of revisions, which everybody may read; an existing one stays as it is."""
    if not path.is_dir():
        path.mkdir(mode=0o700, exist_ok=True)
        own_folder(path, READABLE_FOLDER)


def own_folder(path: Path, mode: int = 0o700) -> None:
    """Give a folder that was just made to the people of its home, with ``mode`` for all others.

    In a home that is shared with a group, the group may write in this folder too.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _give_to_home(descriptor, path.parent)
        if mode == 0o700 or enclosing_home(path.parent) is not None:  # an export stays as asked
            mode |= folder_mode(path.parent)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def own_file(path: Path) -> None:
    """Give a file that another program made in a home to the home's people, and to them alone.

    What this process may not change stays as it is; ``agentpref doctor`` names it.
    """
    with _as_far_as_allowed():
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                _give_to_home(descriptor, path.parent)
                os.fchmod(descriptor, _file_mode(os.fstat(descriptor), path.parent))
        finally:
            os.close(descriptor)


def join_group(path: Path) -> None:
    """Give a file of this user's to the group of its shared folder; SQLite leaves it in ours.

    The file is not opened: to close it again would end the locks that SQLite has on it.
    """
    with _as_far_as_allowed():
        found, around = os.lstat(path), path.parent.stat()
        is_foreign = found.st_gid != around.st_gid and _is_shared(around)
        if is_foreign and found.st_uid == os.geteuid():
            os.chown(path, -1, around.st_gid, follow_symlinks=False)


def tighten(path: Path) -> None:
    """Take a file from all other users, if an older agentpref or another program let them at it.

    What this process may not change stays as it is; ``agentpref doctor`` names it.
    """
    with _as_far_as_allowed():
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) and found.st_mode & OTHERS:
            path.chmod(_file_mode(found, path.parent))


def _give_to_home(descriptor: int, folder: Path) -> None:
    """Give what was made in a folder of a home to the owner and the group of the folder."""
    made, around = os.fstat(descriptor), folder.stat()
    is_root = os.geteuid() == 0
    owner = around.st_uid if is_root and around.st_uid != made.st_uid else -1
    may_group = (is_root or _is_shared(around)) and around.st_gid != made.st_gid
    group = around.st_gid if may_group else -1
    if (owner, group) != (-1, -1) and enclosing_home(folder) is not None:
        with _as_far_as_allowed():  # not in the group, or a container's root that may not
            os.fchown(descriptor, owner, group)


def _is_shared(folder: os.stat_result) -> bool:
    """Whether a folder is shared with its group on purpose, and not with everybody as /tmp is."""
    mode = folder.st_mode
    return bool(mode & (stat.S_ISGID | stat.S_IWGRP)) and not mode & stat.S_IWOTH


def _file_mode(file: os.stat_result, folder: Path) -> int:
    around = folder.stat()
    return 0o660 if _is_shared(around) and file.st_gid == around.st_gid else 0o600


def folder_mode(around: Path) -> int:
    """The mode of a folder for the people of the one around it."""
    found = around.stat()
    return 0o770 | found.st_mode & stat.S_ISGID if _is_shared(found) else 0o700


def enclosing_home(path: StrPath) -> Path | None:
    """The home that a path is, or is inside of, links resolved; ``None`` if it is in none.

    What a command writes for its user must not go there: it could replace the database.
    """
    real = Path(os.path.realpath(path))
    return next((up for up in (real, *real.parents) if (up / DATABASE).is_file()), None)


def is_locked_out(path: Path) -> bool:
    """Whether owners and modes, and not a read-only disk, keep this user from using a path.

    A path that is missing keeps nobody out.
    """
    try:
        is_writable = not os.statvfs(path).f_flag & os.ST_RDONLY
    except OSError as error:
        if not is_of_system(error):
            raise
        return isinstance(error, PermissionError)
    return is_writable and not os.access(path, os.R_OK | os.W_OK)


def access_cure(path: Path) -> str:
    """Say how this user gets to use a file or folder of another user: who owns it, and what to do.

    Of what is missing or hidden from this user, the nearest folder above counts.
    """
    for place in (path, *path.parents):
        with _as_far_as_allowed():
            owner = place.stat().st_uid
            break
    who, this = user_name(owner), user_name(os.geteuid())
    it = "it" if place == path else str(place)
    if owner == os.geteuid():
        return f"{it} belongs to this user ({this}): let it read and write (chmod u+rwX {place})"
    return (
        f"{it} belongs to {who}, and this is {this}: run this as {who}, or let this user read and "
        "write it and its folder (chown or chmod)"
    )


def is_of_system(error: OSError) -> bool:
    """Whether the system raised an error, and not the app or agentpref.

    A signal handler of the app may raise one anywhere, such as ``TimeoutError``; some of ours are
    OSErrors, too. Only the system's have a number.
    """
    return error.errno is not None


@contextmanager
def _as_far_as_allowed() -> Iterator[None]:
    """Leave as it is what the system does not let this process change."""
    try:
        yield
    except OSError as error:
        if not is_of_system(error):
            raise


def user_name(uid: int) -> str:
    """The name of a user of this machine, or the number where there is none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
