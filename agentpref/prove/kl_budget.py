"""How far from the base a candidate may go where ``gate.kl_budget`` is ``auto``.

``agentpref reward frontier`` measures from which distance on answers become worse although the
reward model likes them more (:mod:`agentpref.evaluation.frontier`). What it found is kept beside
the reward model that it was measured with, and counts while that is the newest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from agentpref.config import GateSettings, UpdateConfig
from agentpref.errors import ConfigError
from agentpref.home import Home, replacing, writing
from agentpref.record.messages import as_json

_ODD = "is not what was written; run `agentpref reward frontier`"


def path_of(home: Home, namespace: str) -> Path:
    """The file of what was measured for a namespace."""
    return home.rewards_of(namespace) / "frontier.json"


def keep(home: Home, namespace: str, found: Mapping[str, Any]) -> bool:
    """Keep what was measured, instead of what was kept before.

    ``False`` if the reward model (``found["reward"]``) is no longer the newest: nothing is kept.
    """
    path = path_of(home, namespace)
    if _newest(path) != found["reward"]:
        return False
    with writing(path), replacing(path) as draft:
        draft.write_text(as_json(found), encoding="utf-8")
    return True


def _newest(path: Path) -> str | None:
    """The reward model beside a file that counts."""
    return max((one.stem for one in path.parent.glob("reward-*.safetensors")), default=None)


def settled(config: UpdateConfig, home: Home, namespace: str) -> UpdateConfig:
    """The settings with a number for the budget.

    ``auto`` becomes the distance from which on answers were seen to become worse, or the default
    where none were, or where that is nearer.

    Raises:
        ConfigError: nothing was measured since the reward model was fitted.
    """
    if config.gate.kl_budget != "auto":
        return config
    path, usual = path_of(home, namespace), GateSettings().budget
    unmeasured = (
        f"gate.kl_budget is 'auto', but nothing was measured for namespace {namespace!r} since its "
        "reward model was fitted; run `agentpref reward frontier`, or set a number"
    )
    try:
        found = orjson.loads(path.read_bytes())
        reward, seen = found["reward"], found["kl_budget"]
    except FileNotFoundError as error:
        raise ConfigError(unmeasured) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} {_ODD}") from error
    if seen is not None and not (type(seen) is float and 0 < seen < math.inf):
        raise ConfigError(f"{path} {_ODD}")
    if reward != _newest(path):
        raise ConfigError(unmeasured)
    within = usual if seen is None else min(seen, usual)
    return replace(config, gate=replace(config.gate, kl_budget=within))
