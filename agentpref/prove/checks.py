"""The user's own checks and scorers: callables that may veto an adapter.

A *check* gets ``ask``, which answers a list of messages greedily with the candidate, and returns
whether the candidate passed, or that and the reason. A *scorer* gets the messages of a prompt and
an answer, and returns a number, where larger is better: a calibrated judge, a reward model, a rule.
It scores live's and the candidate's answers to the same held-out prompts, and a proven loss is a
veto. Installed packages offer them in the entry point groups ``agentpref.checks`` and
``agentpref.scorers``. One that raises counts as failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from agentpref import plugins
from agentpref.prove.bootstrap import scipy
from agentpref.prove.evidence import ScorerResult, UserCheckResult
from agentpref.types import Message

Ask: TypeAlias = Callable[[Sequence[Message]], str]
UserCheck: TypeAlias = Callable[[Ask], "bool | tuple[bool, str]"]

Scorer: TypeAlias = Callable[[Sequence[Message], str], float]


def installed_checks() -> dict[str, UserCheck]:
    """The checks of installed packages, by name.

    Raises:
        ConfigError: one of them cannot be imported; without it nothing may be promoted.
    """
    return _installed(plugins.CHECKS)


def installed_scorers() -> dict[str, Scorer]:
    """The scorers of installed packages, by name; raises as :func:`installed_checks` does."""
    return _installed(plugins.SCORERS)


def _installed(group: str) -> dict[str, Any]:
    return {name: plugins.load(group, name) for name in plugins.names(group)}


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


def run_scorers(
    scorers: Mapping[str, Scorer],
    prompts: Sequence[Sequence[Message]],
    live: Sequence[str],
    candidate: Sequence[str],
) -> tuple[ScorerResult, ...]:
    """Let every scorer compare live's and the candidate's answers to prompts, in name order."""
    return tuple(_scored(name, scorers[name], prompts, live, candidate) for name in sorted(scorers))


def _scored(
    name: str,
    scorer: Scorer,
    prompts: Sequence[Sequence[Message]],
    live: Sequence[str],
    candidate: Sequence[str],
) -> ScorerResult:
    try:
        sides = [
            [float(scorer(messages, text)) for messages, text in zip(prompts, texts, strict=True)]
            for texts in (live, candidate)
        ]
    except Exception as error:  # the scorer is foreign code, and may raise anything
        return ScorerResult(
            name, math.nan, math.nan, 0, 0.0, f"raised {type(error).__name__}: {error}"
        )
    if not all(map(math.isfinite, (*sides[0], *sides[1]))):
        return ScorerResult(
            name, math.nan, math.nan, 0, 0.0, "gave a score that is no finite number"
        )
    changes = [new - old for old, new in zip(*sides, strict=True)]
    p = 1.0
    if any(changes):  # Wilcoxon's test of the signed ranks; prompts that score alike say nothing
        found = scipy("stats").wilcoxon(changes, alternative="less", zero_method="wilcox")
        p = float(found.pvalue)
    before, after = (sum(side) / max(1, len(side)) for side in sides)
    return ScorerResult(name, before, after, len(changes), p)
