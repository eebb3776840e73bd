"""An adapter's files as bytes: read once, hashed, checked, and used as they were read.

A file that is checked and then opened again may have changed in between, and a mapping of it may
change at any later moment. So whoever checks an adapter gets the bytes that were checked, and
serves, trains on or copies those.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.errors import InvalidAdapter, NotKept
from agentpref.home import is_of_system
from agentpref.models.base_files import parse_object

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, repr=False)
class AdapterFiles:
    """The bytes of an adapter's settings and weights, and the folder that they were read from."""

    folder: Path
    config: bytes
    weights: bytes

    @property
    def digests(self) -> dict[str, str]:
        """Sha256 of each file in hex, by name."""
        files = {CONFIG_FILE: self.config, WEIGHTS_FILE: self.weights}
        return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

    def settings(self) -> dict[str, Any]:
        """The settings; ``ValueError`` if they are not strict JSON."""
        return parse_object(self.config)

    def tensors(self) -> dict[str, Tensor]:
        """The weights as tensors of the process's own memory, on the CPU."""
        from safetensors.torch import load

        return load(self.weights)


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter's files, each of them once.

    Raises:
        InvalidAdapter: the folder or a file is missing, a link, or too large for what it is.
        NotKept: a file cannot be read.
    """
    with readable(folder):
        if folder.is_symlink() or not folder.is_dir():
            raise InvalidAdapter(f"{folder} is not a folder; give the folder that peft saved to")
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_symlink() and not (folder / name).is_file():
                raise InvalidAdapter(
                    f"{folder} has no {name}; save the adapter with "
                    f"save_pretrained(folder, safe_serialization=True)"
                )
        config = read_plain(folder / CONFIG_FILE, _MAX_CONFIG_BYTES)
        return AdapterFiles(folder, config, read_plain(folder / WEIGHTS_FILE))


def read_plain(file: Path, most: int | None = None) -> bytes:
    """Read a plain file whole, which must not be a link and may have a limit of bytes.

    Raises:
        InvalidAdapter: it is a link, no plain file, or larger than ``most``.
        OSError: it cannot be read.
    """
    if file.is_symlink():  # O_NOFOLLOW refuses it too, should it become one now
        raise InvalidAdapter(f"{file} is a symbolic link; copy the file itself (cp -L)")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(file, flags), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise InvalidAdapter(f"{file} is not a plain file; publish the adapter again")
        data = stream.read() if most is None else stream.read(most + 1)
    if most is not None and len(data) > most:
        raise InvalidAdapter(f"{file}: has more than {most} bytes; save the adapter again")
    return data


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Part a file that was removed while it was read from one that cannot be read at all."""
    try:
        yield
    except FileNotFoundError as error:
        if not is_of_system(error):
            raise
        raise InvalidAdapter(
            f"{error.filename} was removed while it was read; publish the adapter again"
        ) from error
    except OSError as error:
        if not is_of_system(error):
            raise
        raise NotKept(
            f"{error.filename or folder} cannot be read ({error.strerror}); let this user read it, "
            f"or check the disk"
        ) from error
