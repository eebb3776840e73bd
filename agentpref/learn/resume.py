"""What an interrupted update had begun with, and whether the next one may go on with it.

A state stands for a promise that nothing it rests on has changed. Every condition is looked at
before a weight is read, and what was forgotten since must above all not come back in weights that
were half trained on it. Where one does not hold, the state is removed and the reason said. Knows
nothing of how the training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agentpref.config import UpdateConfig
from agentpref.errors import UnusableState
from agentpref.learn.state import Checkpoint, determining, peek, read
from agentpref.models.base import BaseModel
from agentpref.prefer.night import Agenda
from agentpref.types import Example

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Begun:
    """An update that has begun: its id, when that was, and what it works on."""

    update_id: str
    created_at: float
    agenda: Agenda

    def freeze(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """What is kept with the state, so that :func:`find` makes an equal value of it."""
        return {
            **conditions,
            "update_id": self.update_id,
            "created_at": self.created_at,
            "agenda": self.agenda.freeze(),
        }


def conditions(
    namespace: str, live: str | None, base: BaseModel, config: UpdateConfig
) -> dict[str, Any]:
    """What must be now as it was when the update began."""
    return {
        "namespace": namespace,
        "live revision": live,
        "base model": [base.digest, base.template_digest],
        "config": determining(config),
    }


def find(
    checkpoint: Checkpoint,
    needed: Mapping[str, Any],
    examples: Sequence[Example],
    *,
    ended: Callable[[str], bool],
) -> Begun | None:
    """The update that was interrupted, if there is one and it can still be gone on with.

    Args:
        checkpoint: where its state would be; it is told why a state is refused.
        needed: the :func:`conditions` as they are now.
        examples: all pairs and thumbs that there are now.
        ended: whether the update of an id came to its end, and only its state was left behind.
    """
    if not checkpoint.path.exists():
        return None
    try:
        return _thaw(read(checkpoint.path).about, needed, examples, ended)
    except UnusableState as error:
        checkpoint.refuse(str(error))
        return None


def outlook(path: Path) -> str:
    """Say in words what the next update will do with the state in ``path``."""
    if not path.exists():
        return "the next `agentpref update` starts anew"
    try:
        saved = peek(path).snapshot
    except UnusableState as error:
        return f"the next `agentpref update` starts anew, as of the state {error}"
    return f"the next `agentpref update` resumes at step {saved.step} of {saved.planned}"


def _thaw(
    about: Mapping[str, Any],
    needed: Mapping[str, Any],
    examples: Sequence[Example],
    ended: Callable[[str], bool],
) -> Begun:
    for name, value in needed.items():
        if about.get(name) != value:
            raise UnusableState(f"its {name} is not that of this update")
    update_id = _part(about, "update_id", str)
    if ended(update_id):
        raise UnusableState("its update has ended")
    agenda = Agenda.thaw(_part(about, "agenda", dict), examples)
    return Begun(update_id, _part(about, "created_at", float), agenda)


def _part(about: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = about.get(name)
    if not isinstance(value, kind):
        raise UnusableState(f"it is damaged ({name})")
    return value
