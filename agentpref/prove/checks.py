"""The user's own checks: any callable that may veto an adapter.

A check is given ``ask``, which answers a list of messages greedily with the candidate, and returns
whether it is content, or that and the reason. Installed packages offer checks under the entry
point group ``agentpref.checks``. A check that raises has failed: it is there to protect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TypeAlias

from agentpref.errors import ConfigError
from agentpref.prove.gate import UserCheck
from agentpref.types import Message

GROUP = "agentpref.checks"

Ask: TypeAlias = Callable[[Sequence[Message]], str]
Check: TypeAlias = Callable[[Ask], "bool | tuple[bool, str]"]


def installed_checks() -> dict[str, Check]:
    """Checks of installed packages, by the name of their entry point.

    Raises:
        ConfigError: one of them cannot be imported; without it nothing may be promoted.
    """
    return {point.name: _load(point) for point in entry_points(group=GROUP)}


def run_checks(checks: Mapping[str, Check], ask: Ask) -> tuple[UserCheck, ...]:
    """Run every check, in name order."""
    return tuple(_run(name, checks[name], ask) for name in sorted(checks))


def _load(point: EntryPoint) -> Check:
    try:
        check: Check = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the check {point.name!r} cannot be loaded from {point.value!r}: {error}; repair or "
            f"uninstall the package that offers it"
        ) from error
    return check


def _run(name: str, check: Check, ask: Ask) -> UserCheck:
    try:
        outcome = check(ask)
    except (
        Exception
    ) as error:  # a stranger's code: whatever it raises, the candidate has not passed
        return UserCheck(name, False, f"raised {type(error).__name__}: {error}")
    passed, words = outcome if isinstance(outcome, tuple) else (outcome, "")
    return UserCheck(name, bool(passed), words or ("passed" if passed else "did not pass"))
