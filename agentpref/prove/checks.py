"""The user's own checks: any callable that may veto an adapter.

A check gets ``ask``, which answers a list of messages greedily with the candidate, and returns
whether the candidate passed, or that and the reason. Installed packages offer checks in the entry
point group ``agentpref.checks``. A check that raises counts as failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from agentpref import plugins
from agentpref.prove.evidence import UserCheckResult
from agentpref.types import Message

Ask: TypeAlias = Callable[[Sequence[Message]], str]
UserCheck: TypeAlias = Callable[[Ask], "bool | tuple[bool, str]"]


def installed_checks() -> dict[str, UserCheck]:
    """The checks of installed packages, by name.

    Raises:
        ConfigError: one of them cannot be imported; without it nothing may be promoted.
    """
    return {name: plugins.load(plugins.CHECKS, name) for name in plugins.names(plugins.CHECKS)}


def run_checks(checks: Mapping[str, UserCheck], ask: Ask) -> tuple[UserCheckResult, ...]:
    """Run every check, in name order."""
    return tuple(_run(name, checks[name], ask) for name in sorted(checks))


def _run(name: str, check: UserCheck, ask: Ask) -> UserCheckResult:
    try:
        result = check(ask)
    except Exception as error:  # the check is foreign code, and may raise anything
        return UserCheckResult(name, False, f"raised {type(error).__name__}: {error}")
    passed, message = result if isinstance(result, tuple) else (result, "")
    return UserCheckResult(name, bool(passed), message or ("passed" if passed else "did not pass"))
