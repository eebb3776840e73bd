"""Parts that packages register by name: losses, formats, checks, scorers, judges, methods.

A package names an object in the entry-point group of its kind, and a setting or a flag names it
from then on. Our own parts go through the same door, so ``pyproject.toml`` lists them as a
stranger's package would:

    [project.entry-points."agentpref.losses"]
    sigmoid = "agentpref.learn.losses.dpo:Sigmoid"

Listing names imports nothing; a part is imported when it is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from agentpref.errors import ConfigError

T = TypeVar("T")

LOSSES = "agentpref.losses"
FORMATS = "agentpref.formats"
CHECKS = "agentpref.checks"
SCORERS = "agentpref.scorers"
JUDGES = "agentpref.judges"
METHODS = "agentpref.methods"


def names(group: str) -> tuple[str, ...]:
    """The registered names of a group, in alphabetical order."""
    return tuple(sorted({point.name for point in entry_points(group=group)}))


def load(group: str, name: str) -> Any:
    """Import the part that is registered under ``name``.

    Raises:
        ConfigError: no part has that name (the nearest one is suggested), or its package cannot be
            imported.
    """
    for point in entry_points(group=group):
        if point.name == name:
            return _import(point, group)
    hint = suggest(name, names(group))
    raise ConfigError(f"nothing is registered as {name!r} in {group}; {hint}")


def load_subclass(group: str, name: str, base: type[T]) -> type[T]:
    """Import the class that is registered under ``name``.

    Raises:
        ConfigError: no part has that name, its package cannot be imported, or it is no such class.
    """
    part = load(group, name)
    if not (isinstance(part, type) and issubclass(part, base)):
        raise ConfigError(
            f"{name!r} of {group} is {part!r}, but must be a subclass of {base.__name__}; repair "
            "or uninstall the package that offers it"
        )
    return part


def suggest(name: str, known: Iterable[str]) -> str:
    """For an error about an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"


def _import(point: EntryPoint, group: str) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{point.name!r} of {group} cannot be loaded from {point.value!r}: {error}; repair or "
            "uninstall the package that offers it"
        ) from error
