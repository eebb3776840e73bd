"""Files of arrays that are named by their content: safetensors, with what is said of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from agentpref.errors import RewardError
from agentpref.home import Home, make_private_folder, reading, replacing, writing
from agentpref.record.messages import as_json

if TYPE_CHECKING:
    from numpy.typing import NDArray


class KeptArrays(NamedTuple):
    """What a file holds."""

    path: Path
    arrays: Mapping[str, NDArray[Any]]
    about: Mapping[str, Any]


def keep_arrays(
    home: Home,
    namespace: str,
    prefix: str,
    arrays: Mapping[str, NDArray[Any]],
    about: Mapping[str, Any],
) -> Path:
    """Write ``PREFIX-SHA12.safetensors`` beside a namespace's reward models."""
    from safetensors.numpy import save

    content = save(dict(arrays), {"about": as_json(about)})
    folder = make_folder(home, namespace)
    path = folder / f"{prefix}-{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
    with writing(path), replacing(path) as draft:
        draft.write_bytes(content)
    return path


def make_folder(home: Home, namespace: str) -> Path:
    """The folder of a namespace's reward models, which is made if it is missing."""
    folder = home.rewards_of(namespace)
    with writing(home.rewards):
        make_private_folder(home.rewards)
        make_private_folder(folder)
    return folder


def read_arrays(path: Path) -> KeptArrays:
    """Read a file.

    Raises:
        RewardError: it is not the file that was written.
        CorruptHome, HomeError: it cannot be read.
    """
    from safetensors.numpy import load

    with reading(path) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest()[:12] != path.stem.rpartition("-")[2]:
        raise RewardError(f"{path} is not the file that was written; make it again")
    size = int.from_bytes(content[:8], "little")
    about = orjson.loads(orjson.loads(content[8 : 8 + size])["__metadata__"]["about"])
    return KeptArrays(path, load(content), about)
