"""User ids as keyed hashes, which tell users apart without naming them.

The key is a file beside the database, so a copy of the database alone identifies no user. Apps that
share a key give a user the same name. A home that was merged with others has their keys too: the
first key writes names, and all of them find a user again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from agentpref.errors import CorruptHome, NotKept
from agentpref.home import Home, is_of_system, open_private, reading, replacing, sync
from agentpref.leftovers import claimed, draft_name
from agentpref.owners import access_cure

_KEY_BYTES = 32

UNNAMED = "agentpref:unnamed"
"""What all users are called while a home's keys are lost. No user's name looks like it."""


class Pseudonyms:
    """The names that a home gives to its users, under one or more keys."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def of(cls, home: Home) -> Pseudonyms:
        """Read a home's keys; if there are none, make one.

        Raises:
            CorruptHome: the file does not hold keys.
            NotKept: it cannot be read or made.
        """
        try:
            if not home.user_keys.exists():
                _create(home.user_keys, os.urandom(_KEY_BYTES))
            return cls(_read(home.user_keys))
        except OSError as error:
            if not is_of_system(error):
                raise
            is_denied = isinstance(error, PermissionError)
            cure = (
                access_cure(home.user_keys)
                if is_denied
                else "free space on its disk, and try again"
            )
            raise NotKept(
                f"{home.user_keys} cannot be read or made ({error.strerror}); {cure}"
            ) from error

    def name(self, user_id: str) -> str:
        """Return the name that a user's rows are written under: 32 hex digits.

        Without keys, all users are ``UNNAMED``.
        """
        return self._name(self._keys[0], user_id) if self._keys else UNNAMED

    def names(self, user_id: str) -> tuple[str, ...]:
        """Return every name that a user's rows may have been written under."""
        return tuple(self._name(key, user_id) for key in self._keys)

    def fingerprints(self) -> tuple[str, ...]:
        """Return for each key what tells it apart from others, and nothing else of it."""
        return tuple(self._name(key, "agentpref: fingerprint of a key") for key in self._keys)

    def adopt(self, others: Pseudonyms, home: Home, drafts: Path | None = None) -> Pseudonyms:
        """Add the keys of another home to those of ``home``, after its own, and save them.

        ``drafts`` is a folder that the caller clears after a kill, as for ``home.replacing``.
        """
        together = tuple(dict.fromkeys((*self._keys, *others._keys)))
        if together != self._keys:
            with replacing(home.user_keys, drafts) as draft:
                _write(draft, together)
        return Pseudonyms(together)

    @staticmethod
    def _name(key: bytes, user_id: str) -> str:
        return hashlib.blake2b(user_id.encode(), key=key, digest_size=16).hexdigest()


class AsGiven(Pseudonyms):
    """Leaves users the ids that they come with: for rows that a home names later, or has named."""

    def __init__(self) -> None:
        super().__init__(())

    def name(self, user_id: str) -> str:
        """Return the id itself."""
        return user_id


def _read(path: Path) -> list[bytes]:
    cure = "restore it from a backup: without it, no user of this home can be found again"
    try:
        with reading(path) as file:
            keys = [bytes.fromhex(line) for line in file.read().decode("ascii").split()]
    except ValueError as error:
        raise CorruptHome(f"{path} does not hold keys in hexadecimal; {cure}") from error
    if not keys or any(len(key) != _KEY_BYTES for key in keys):
        raise CorruptHome(f"{path} does not hold keys of {_KEY_BYTES} bytes; {cure}")
    return keys


def _create(path: Path, key: bytes) -> None:
    """Make the file, whole or not at all; if another process was faster, its file stays."""
    draft = path.with_name(draft_name(path.name))
    try:
        with claimed(draft, lambda: _write(draft, [key])):
            sync(draft)
            with suppress(FileExistsError):
                os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _write(path: Path, keys: Iterable[bytes]) -> None:
    with open(path, "w", encoding="ascii", opener=open_private) as file:
        file.writelines(f"{key.hex()}\n" for key in keys)
