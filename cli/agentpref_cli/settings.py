"""Reads settings from a TOML file and from `--set KEY=VALUE`, the latter last.

Values are written as in TOML: `0.2`, `3`, `true`, `[0.8, 1.25]`. Which settings exist is not known
here; `UpdateConfig.from_mapping` refuses the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentpref.errors import ConfigError


def read_settings(file: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    """Return the settings of ``file`` overlaid with each ``KEY=VALUE`` in turn.

    Raises:
        ConfigError: for what is not TOML; the message names the file or the assignment.
    """
    settings: dict[str, Any] = {} if file is None else _parse(_read(file), f"{file} is not TOML")
    for assignment in assignments:
        settings = _overlay(settings, _parse_assignment(assignment))
    return settings


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}; give a TOML file in UTF-8") from error


def _parse_assignment(assignment: str) -> dict[str, Any]:
    what = f"--set {assignment!r} is not KEY=VALUE with VALUE as in TOML, e.g. loss.beta=0.2"
    if "=" not in assignment or "\n" in assignment:
        raise ConfigError(what)
    return _parse(assignment, what)


def _parse(text: str, what: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{what} ({error})") from error


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        beneath = merged.get(key)
        both = isinstance(beneath, Mapping) and isinstance(value, Mapping)
        merged[key] = _overlay(beneath, value) if both else value  # type: ignore[arg-type]
    return merged
