"""Whether an update may continue with the state of an interrupted one.

Every condition is checked before a weight is read; above all, text that was forgotten since must
not come back in weights that were partly trained on it. Where a condition fails, the state is
removed and the reason reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import orjson

from agentpref.config import UpdateConfig
from agentpref.errors import UnusableState
from agentpref.learn.checkpoint import FORMAT, Checkpoint, peek, read
from agentpref.learn.data import UpdateData
from agentpref.learn.objective import TrainingRow
from agentpref.models.base import BaseModel
from agentpref.types import Example

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StartedUpdate:
    """An update that has started: its id, when it was created, and what it works on."""

    update_id: str
    created_at: float
    data: UpdateData

    def freeze(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """What is stored with the state, so :func:`find` can make an equal value of it."""
        return {
            **conditions,
            "update_id": self.update_id,
            "created_at": self.created_at,
            "data": self.data.freeze(),
        }


def conditions(
    namespace: str, live: str | None, base: BaseModel, config: UpdateConfig
) -> dict[str, Any]:
    """What must be the same now as when the update started."""
    return {
        "namespace": namespace,
        "live revision": live,
        "base model": [base.digest, base.template_digest],
        "config": training_settings(config),
    }


def find(
    checkpoint: Checkpoint,
    needed: Mapping[str, Any],
    examples: Sequence[Example],
    *,
    ended: Callable[[str], bool],
) -> StartedUpdate | None:
    """The update that was interrupted, if there is one that can continue.

    Args:
        checkpoint: where its state would be; it reports why a state is not used.
        needed: the :func:`conditions` as they are now.
        examples: all examples that there are now.
        ended: whether the update of an id has ended, and only its state was left behind.
    """
    if not checkpoint.path.exists():
        return None
    try:
        about = read(checkpoint.path).about
        for name, value in needed.items():
            if about.get(name) != value:
                raise UnusableState(f"its {name} is not that of this update")
        update_id = _part(about, "update_id", str)
        if ended(update_id):
            raise UnusableState("its update has ended")
        data = UpdateData.thaw(_part(about, "data", dict), examples)
        return StartedUpdate(update_id, _part(about, "created_at", float), data)
    except UnusableState as error:
        checkpoint.discard(str(error))
        return None


def outlook(path: Path) -> str:
    """What the next update will do with the state in ``path``, in words."""
    if not path.exists():
        return "the next `agentpref update` starts over"
    try:
        saved = peek(path).state
    except UnusableState as error:
        return f"the next `agentpref update` starts over; the saved state cannot be used: {error}"
    return f"the next `agentpref update` resumes at step {saved.step} of {saved.planned}"


def training_settings(config: UpdateConfig) -> dict[str, Any]:
    """The settings that determine what is trained, as plain values: all but gate and budget."""
    settings = config.to_mapping()
    return {key: settings[key] for key in settings if key not in ("gate", "max_minutes")}


def fingerprint(batches: Sequence[Sequence[TrainingRow]], **facts: Any) -> str:
    """The address of a run by all that determines it: its rows in order, and plain values.

    Of a row: its token ids, its references to the last bit, and what the losses read of it.
    """
    import torch

    try:
        installed = version("agentpref")  # another version may train differently
    except PackageNotFoundError:
        installed = "a checkout"
    facts |= {"torch": torch.__version__, "agentpref": installed, "format": FORMAT}
    digest = hashlib.blake2b(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS), digest_size=16)
    keys: dict[int, bytes] = {}
    for batch in batches:
        digest.update(b"batch")
        for row in batch:
            if id(row) not in keys:
                keys[id(row)] = hashlib.blake2b(orjson.dumps(row.freeze()), digest_size=16).digest()
            digest.update(keys[id(row)])
    return digest.hexdigest()


def _part(about: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = about.get(name)
    if not isinstance(value, kind):
        raise UnusableState(f"it is damaged ({name})")
    return value
