"""The ways to learn that are compared. All but the joint one are ``agentpref.update`` on a home.

``full`` is the shipped product and nothing else. Every other arm leaves out a part of it: by
settings where there is one, and else by a block of ``altered.py``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import agentpref
from agentpref.config import UpdateConfig
from agentpref.errors import AgentprefError, UpdateInterrupted
from agentpref.learn.schedule import epochs_for
from agentpref.types import Example
from benchmarks.streams import altered
from benchmarks.streams.items import Night, judge

_NO_ANCHOR: Mapping[str, Any] = {"anchor": {"size": 0}}
_NO_KL: Mapping[str, Any] = {"kl": {"weight": 0.0}}
_NO_REPLAY: Mapping[str, Any] = {"replay": {"minimum": 0}}
_NAIVE: Mapping[str, Any] = {**_NO_KL, **_NO_REPLAY, **_NO_ANCHOR}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to learn.

    ``settings`` differ from the defaults. ``gate``: only what is proven serves. ``traffic``: the
    home also has ordinary answers that nobody judged, as the product's has. ``replay`` is a share
    of what is new (``None``: the product's own). ``matched``: as many gradient steps as with
    replay, on new examples alone. ``joint``: each night all over, from the base, on all nights.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    gate: bool = False
    traffic: bool = False
    replay: float | None = None
    previous: bool = False
    matched: bool = False
    joint: bool = False


ARMS: dict[str, Arm] = {
    "naive-previous": Arm(_NAIVE, previous=True),
    "naive": Arm(_NAIVE),
    "matched": Arm(_NAIVE, matched=True),
    "kl": Arm({**_NO_REPLAY, **_NO_ANCHOR}),
    "replay-5": Arm({**_NO_KL, **_NO_ANCHOR}, replay=0.05),
    "replay-20": Arm({**_NO_KL, **_NO_ANCHOR}, replay=0.2),
    "replay-100": Arm({**_NO_KL, **_NO_ANCHOR}, replay=1.0),
    "replay-kl": Arm(_NO_ANCHOR, replay=1.0),
    "full-ungated": Arm(traffic=True),
    "full": Arm(gate=True, traffic=True),
    "joint": Arm(_NAIVE, joint=True),
}
FROZEN = "frozen"
"""The base, which learns nothing: one row before the first night, to compare all others with."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of a night: its verdict, why, what it took, and the means of the old strata.

    ``seconds`` are those of the clock; ``cpu`` are the processor's, in which other work on the
    machine hardly shows.
    """

    verdict: str
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0
    cpu: float = 0.0
    training: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    inside: tuple[float, ...] = ()


def learn(
    arm: Arm,
    home: Path,
    model: str,
    nights: Sequence[Night],
    config: Mapping[str, Any],
    *,
    watch: Sequence[Sequence[Example]] = (),
) -> Learned:
    """Learn the last of the nights in a home that has learned the others; log it before.

    A joint home has learned nothing, and all nights are logged. ``watch`` are pairs of earlier
    nights to measure inside the update; never in ``full``, which serves its predecessor meanwhile.
    """
    with agentpref.Log(home) as log:
        for night in nights if arm.joint else nights[-1:]:
            judge(log, night)
    new = sum(not item.held_out for item in nights[-1].logged)
    settings = _merged(_merged(config, arm.settings), _epochs(arm, new, len(nights), config, model))
    with ExitStack() as stack:
        seen = altered.Watch()
        if not arm.gate:
            stack.enter_context(altered.no_gate())
            seen = stack.enter_context(altered.watched([] if arm.joint else watch))
        if arm.replay is not None:
            stack.enter_context(altered.replay_share(arm.replay))
        if arm.previous:
            stack.enter_context(altered.previous_as_reference())
        started = time.perf_counter(), time.process_time()
        try:
            report = agentpref.update(home, model=model, config=UpdateConfig.from_mapping(settings))
        except UpdateInterrupted:
            raise
        except AgentprefError as error:
            return Learned("failed", (f"{type(error).__name__}: {error}",))
        seconds = time.perf_counter() - started[0] - seen.seconds
        cpu = time.process_time() - started[1] - seen.cpu
    return Learned(
        report.verdict,
        tuple(report.reasons),
        seconds,
        cpu,
        {key: report.training.get(key) for key in ("steps", "epochs", "seconds", "kl")},
        report.counts,
        tuple(seen.means),
    )


def _epochs(
    arm: Arm, new: int, night: int, config: Mapping[str, Any], model: str
) -> Mapping[str, Any]:
    """The epochs of a joint arm are a night's own; matched steps make up for the missing replay."""
    own = config.get("epochs") or epochs_for(new, small=model == "tiny")
    if arm.joint:
        return {"epochs": own}
    return {"epochs": own * (2 if night > 1 else 1)} if arm.matched else {}


def _merged(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others laid over them, group by group."""
    found = dict(settings)
    for name, value in more.items():
        known = found.get(name)
        both = isinstance(value, Mapping) and isinstance(known, Mapping)
        found[name] = {**known, **value} if both else value  # type: ignore[dict-item]
    return found
