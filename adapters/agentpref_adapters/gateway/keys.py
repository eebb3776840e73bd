"""The API keys of a home's gateway, each of one app and of one namespace, hashed at rest.

They are in the file ``gateway.keys`` of the home, beside the secret that signs tokens for pages. A
key is random and long, so a plain hash of it is enough (no dictionary finds it); it is shown once,
when it is made. A running gateway notices a change of the file.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from agentpref.errors import ConfigError, CorruptHome
from agentpref.home import Home, reading, replacing

PREFIX = "apk"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept: the app's name, whose namespace it speaks for, and the secret's hash."""

    name: str
    namespace: str
    digest: str
    created_at: float


class Keys:
    """The keys of one home. All methods may be called from any thread, and by several processes."""

    def __init__(self, home: Home) -> None:
        self.path = home.path / "gateway.keys"
        self._lock = FileLock(home.path / ".gateway.keys.lock")
        self._seen: tuple[int, int] | None = None
        self._known: dict[str, ApiKey] = {}
        self._signing = ""

    def add(self, name: str, namespace: str = "default") -> str:
        """Make a key for an app, and return it: nobody can read it again.

        Raises:
            ConfigError: the name is taken, or the namespace or the name is none.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"the app's name is {name!r}; use letters, digits, '.', '_' and '-', at most 64"
            )
        if not namespace or not namespace.isprintable():
            raise ConfigError(f"namespace is {namespace!r}, but must be printable text")
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        with self._changing() as known:
            if name in known:
                raise ConfigError(f"there is a key of {name!r} already; remove it first")
            known[name] = ApiKey(name, namespace, _digest(secret), time.time())
        return f"{PREFIX}-{name}-{secret}"

    def remove(self, name: str) -> None:
        """Remove an app's key; requests with it are refused from now on.

        Raises:
            ConfigError: there is none.
        """
        with self._changing() as known:
            if known.pop(name, None) is None:
                have = ", ".join(known) or "none"
                raise ConfigError(f"there is no key of {name!r}; there are: {have}")

    def list(self) -> list[ApiKey]:
        """All keys, in the order in which they were made."""
        self._refresh()
        return [*self._known.values()]

    def find(self, given: str) -> ApiKey | None:
        """The key that was given, if it is one. The time it takes tells nothing of the secret."""
        self._refresh()
        prefix, _, rest = given.partition("-")
        # A name may have dashes, and so may a secret, whose length is known.
        length = len(secrets.token_urlsafe(_SECRET_BYTES))
        name, secret = rest[: -length - 1], rest[-length:]
        known = self._known.get(name) if prefix == PREFIX else None
        digest = known.digest if known is not None else _digest("")
        is_right = hmac.compare_digest(digest, _digest(secret))
        return known if is_right else None

    def secret(self) -> str:
        """The secret that signs tokens; it is made when it is asked for first."""
        self._refresh()
        if not self._signing:
            with self._changing():
                self._signing = self._signing or secrets.token_urlsafe(_SECRET_BYTES)
        return self._signing

    @contextmanager
    def _changing(self) -> Iterator[dict[str, ApiKey]]:
        with self._lock:
            self._refresh()
            known = dict(self._known)
            yield known
            kept = {"secret": self._signing, "keys": [asdict(key) for key in known.values()]}
            with replacing(self.path) as draft:
                draft.write_bytes(orjson.dumps(kept))
        self._refresh()

    def _refresh(self) -> None:
        """Read the file if it is another one than was read last."""
        try:
            state = self.path.stat()
        except FileNotFoundError:
            self._seen, self._known, self._signing = None, {}, ""
            return
        seen = (state.st_mtime_ns, state.st_ino)
        if seen != self._seen:
            self._known, self._signing = _read(self.path)
            self._seen = seen


def _read(path: Path) -> tuple[dict[str, ApiKey], str]:
    try:
        with reading(path) as file:
            kept: Any = orjson.loads(file.read())
        keys = [ApiKey(**key) for key in kept["keys"]]
        return {key.name: key for key in keys}, str(kept["secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptHome(
            f"{path} is damaged ({type(error).__name__}); restore it from a backup, or remove it "
            "and make new keys with `agentpref gateway key add`"
        ) from error


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
