"""Whether an update may resume an interrupted one.

Every condition is checked before a weight is read; above all, text that was forgotten since must
not come back in weights that were partly trained on it. Where a condition fails, the state is
removed and the reason reported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agentpref.config import UpdateConfig
from agentpref.errors import UnusableState
from agentpref.learn.checkpoint import Checkpoint, peek, read, training_settings
from agentpref.learn.data import UpdateData
from agentpref.models.base import BaseModel
from agentpref.types import Example

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StartedUpdate:
    """An update that has started: its id, its time of creation, and the data it works on.

    ``plan`` says which attempt of the update it is, in plain values; it is empty in states of older
    versions, which had one. ``threads`` are those of torch that it computes with: the last bits may
    depend on their number. States of older versions do not have it.
    """

    update_id: str
    created_at: float
    data: UpdateData
    threads: int | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)

    def freeze(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """Plain values to store with the state, from which :func:`find` makes an equal update."""
        return {
            **conditions,
            "update_id": self.update_id,
            "created_at": self.created_at,
            "data": self.data.freeze(),
            "threads": self.threads,
            "plan": dict(self.plan),
        }


def conditions(
    namespace: str, live: str | None, base: BaseModel, config: UpdateConfig
) -> dict[str, Any]:
    """The facts that must be the same now as when the update started."""
    return {
        "namespace": namespace,
        "live revision": live,
        "base model": [base.digest, base.template_digest],
        "config": training_settings(config),
    }


def find(
    checkpoint: Checkpoint,
    needed: Mapping[str, Any],
    find_examples: Callable[[Collection[str]], Sequence[Example]],
    *,
    ended: Callable[[str], bool],
    find_ordinary: Callable[[Collection[str]], Sequence[Example]] = lambda runs: (),
) -> StartedUpdate | None:
    """Find the interrupted update, if there is one that can be resumed.

    Args:
        checkpoint: the place of its state; it reports why a state is not used.
        needed: the :func:`conditions` as they are now.
        find_examples: reads the examples of some ids, as far as there are any now.
        ended: whether the update of an id has ended, so that only its state was left behind.
        find_ordinary: makes the ordinary answers of some runs, as far as they are that now.
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
        frozen = _part(about, "data", dict)
        examples = [
            *find_examples(UpdateData.frozen_ids(frozen)),
            *find_ordinary(UpdateData.frozen_runs(frozen)),
        ]
        data = UpdateData.thaw(frozen, examples)
        threads = None if about.get("threads") is None else _part(about, "threads", int)
        plan = _part(about, "plan", dict) if "plan" in about else {}
        return StartedUpdate(update_id, _part(about, "created_at", float), data, threads, plan)
    except UnusableState as error:
        checkpoint.discard(str(error))
        return None


def outlook(path: Path) -> str:
    """What the next update will do with the state in ``path``, as a phrase for a message."""
    if not path.exists():
        return "the next `agentpref update` starts over"
    try:
        saved = peek(path).state
    except UnusableState as error:
        return f"the next `agentpref update` starts over; the saved state cannot be used: {error}"
    return f"the next `agentpref update` resumes at step {saved.step} of {saved.planned}"


def _part(about: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = about.get(name)
    if not isinstance(value, kind):
        raise UnusableState(f"it is damaged ({name})")
    return value
