"""User ids, kept as keyed hashes: who said what can be told apart and forgotten, not read off.

The key is a file of the home, beside the database and never in it, so that a copy of the database
alone names nobody. Hosts that share a key give one user one name. A home that was merged with
others holds their keys too: the first is for writing, all of them are for finding somebody again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from agentpref.errors import AgentprefError, CorruptHome, NotKept
from agentpref.home import Home
from agentpref.record.ids import new_id

_KEY_BYTES = 32
_NAME_BYTES = 16


class Pseudonyms:
    """The names that a home gives to its users, under one key or several."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def of(cls, home: Home) -> Pseudonyms:
        """Read a home's keys; the first process that asks makes one.

        Raises:
            CorruptHome: the file of keys is not one.
            NotKept: it cannot be read or made.
        """
        try:
            if not home.user_keys.exists():
                _create(home.user_keys, [os.urandom(_KEY_BYTES)])
            return cls(_read(home.user_keys))
        except AgentprefError:
            raise  # some of ours are OSErrors too
        except OSError as error:
            raise NotKept(
                f"{home.user_keys} cannot be read or made ({error.strerror}); let this user write "
                "the folder, and read what is in it"
            ) from error

    def name(self, user_id: str) -> str:
        """Give the name that a user's rows are written under: 32 hex digits."""
        return _name(self._keys[0], user_id)

    def names(self, user_id: str) -> tuple[str, ...]:
        """Give every name that a user's rows may have been written under."""
        return tuple(_name(key, user_id) for key in self._keys)

    def adopt(self, others: Pseudonyms, home: Home) -> Pseudonyms:
        """Add the keys of another home to those of ``home``, behind its own, for good."""
        together = tuple(dict.fromkeys((*self._keys, *others._keys)))
        if together != self._keys:
            _replace(home.user_keys, together)
        return Pseudonyms(together)


def _name(key: bytes, user_id: str) -> str:
    return hashlib.blake2b(user_id.encode(), key=key, digest_size=_NAME_BYTES).hexdigest()


def _read(path: Path) -> list[bytes]:
    cure = "restore it from a backup: without it, no user of this home can be found again"
    try:
        keys = [bytes.fromhex(line) for line in path.read_text(encoding="ascii").split()]
    except ValueError as error:
        raise CorruptHome(f"{path} is no file of keys in hexadecimal; {cure}") from error
    if not keys or any(len(key) != _KEY_BYTES for key in keys):
        raise CorruptHome(f"{path} holds no keys of {_KEY_BYTES} bytes; {cure}")
    return keys


def _create(path: Path, keys: Iterable[bytes]) -> None:
    """Make the file whole or not at all; where another process was faster, its file stays."""
    draft = _draft(path, keys)
    with suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()


def _replace(path: Path, keys: Iterable[bytes]) -> None:
    os.replace(_draft(path, keys), path)


def _draft(path: Path, keys: Iterable[bytes]) -> Path:
    draft = path.with_name(f".{path.name}.{new_id()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.writelines(f"{key.hex()}\n" for key in keys)
        file.flush()
        os.fsync(file.fileno())
    return draft
