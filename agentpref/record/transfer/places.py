"""Where segments lie: a folder, or a bucket of any object storage that fsspec reaches.

Writing is whole or not at all, as object storage has it; a folder gets it by a rename.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentpref.errors import (
    AgentprefError,
    ConfigError,
    ExchangeError,
    MissingDependency,
    NotKept,
)
from agentpref.home import open_private, replacing
from agentpref.record.transfer.segments import MAX_BYTES, is_segment

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs",
             "abfs": "adlfs", "abfss": "adlfs"}  # fmt: skip


class Place:
    """One folder or prefix of segments. Raises ``NotKept`` where it cannot be read or written."""

    def __init__(self, url: str) -> None:
        """Open a place; nothing is asked of it yet.

        Raises:
            MissingDependency: fsspec, or its package for this kind of address, is not installed.
            ConfigError: it is no address that fsspec knows.
        """
        try:
            from fsspec.core import url_to_fs
            from fsspec.implementations.local import LocalFileSystem
        except ModuleNotFoundError as error:
            raise MissingDependency(
                "segments need fsspec, which is not installed; run `pip install 'agentpref[ship]'`"
            ) from error
        self.url = url.rstrip("/")
        kind = url.partition("://")[0]
        try:
            self._fs, path = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            package = _PACKAGES.get(kind, f"fsspec's package for {kind}://")
            raise MissingDependency(
                f"{kind}:// needs {package}, which is not installed; run `pip install {package}`"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{url} is no address that fsspec knows ({error})") from error
        self._path = path.rstrip("/")
        self._is_folder = isinstance(self._fs, LocalFileSystem)

    def names(self) -> list[str]:
        """The names of the segments, in the order of their times; other files do not matter."""
        with self._reached():
            try:
                found = self._fs.ls(self._path, detail=False)
            except FileNotFoundError:
                return []
        names = (str(path).rpartition("/")[2] for path in found)
        return sorted((name for name in names if is_segment(name)), key=_by_time)

    def read(self, name: str) -> bytes | None:
        """The bytes of a segment; None if somebody has removed it.

        Raises:
            ExchangeError: it is larger than a segment can be.
        """
        path = f"{self._path}/{name}"
        with self._reached():
            try:
                size = self._fs.info(path)["size"]
                if size > MAX_BYTES:
                    raise ExchangeError(
                        f"it has {size:,} bytes, more than the {MAX_BYTES:,} of a segment; "
                        f"remove {self.url}/{name}"
                    )
                return bytes(self._fs.cat_file(path))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write a segment; one that is there has the same content."""
        with self._reached():
            if self._is_folder:
                folder = Path(self._path)
                if not folder.exists():
                    folder.mkdir(mode=0o700, parents=True)
                with (
                    replacing(folder / name) as draft,
                    open(draft, "wb", opener=open_private) as file,
                ):
                    file.write(data)
            else:
                self._fs.pipe_file(f"{self._path}/{name}", data)

    def remove(self, name: str) -> None:
        """Remove a segment."""
        with self._reached():
            try:
                self._fs.rm_file(f"{self._path}/{name}")
            except FileNotFoundError:
                return

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except AgentprefError:
            raise
        except Exception as error:  # each storage's library has errors of its own
            raise NotKept(
                f"{self.url} cannot be used ({type(error).__name__}: {error}); check the address, "
                "the credentials and their rights, then run the same command again"
            ) from error


def _by_time(name: str) -> tuple[str, ...]:
    return tuple(name.split("-")[1:])


def holds_segments(text: Any) -> bool:
    """Whether an argument names a place of segments, and not a home."""
    if "://" in str(text):
        return True
    folder = Path(text)
    return folder.is_dir() and any(is_segment(path.name) for path in folder.iterdir())
