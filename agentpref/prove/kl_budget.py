"""How far from the base a candidate may go where ``gate.kl_budget`` is ``auto``.

``agentpref reward frontier`` measures from which distance on answers become worse although the
reward model likes them more (:mod:`agentpref.evaluation.frontier`). What it found is kept beside
the reward model that it was measured with, and goes with it: a fit or a removal deletes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from agentpref.config import GateSettings, UpdateConfig
from agentpref.errors import ConfigError
from agentpref.home import Home, replacing, writing
from agentpref.record.messages import as_json


def path_of(home: Home, namespace: str) -> Path:
    """The file of what was measured for a namespace."""
    return home.rewards_of(namespace) / "frontier.json"


def keep(home: Home, namespace: str, found: Mapping[str, Any]) -> None:
    """Keep what was measured, instead of what was kept before."""
    path = path_of(home, namespace)
    with writing(path), replacing(path) as draft:
        draft.write_text(as_json(found), encoding="utf-8")


def settled(config: UpdateConfig, home: Home, namespace: str) -> UpdateConfig:
    """The settings with a number for the budget.

    ``auto`` becomes the distance from which on answers were seen to become worse, or the default
    where none were, or where that is nearer.

    Raises:
        ConfigError: nothing was measured since the reward model was fitted.
    """
    if config.gate.kl_budget != "auto":
        return config
    try:
        seen = orjson.loads(path_of(home, namespace).read_bytes())["kl_budget"]
        within = GateSettings().budget if seen is None else min(float(seen), GateSettings().budget)
    except FileNotFoundError as error:
        raise ConfigError(
            f"gate.kl_budget is 'auto', but nothing was measured for namespace {namespace!r} since "
            "its reward model was fitted; run `agentpref reward frontier`, or set a number"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path_of(home, namespace)} is not what was written; run `agentpref reward frontier`"
        ) from error
    return replace(config, gate=replace(config.gate, kl_budget=within))
