"""The evidence for a verdict: what was measured of a candidate, and of live beside it.

``evaluate.py`` gathers it, and the checks of the gate read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agentpref.prove.bootstrap import Paired
from agentpref.prove.ordinary import OrdinaryEvidence
from agentpref.types import Stratum


@dataclass(frozen=True, slots=True)
class Generations:
    """Statistics of one policy's greedy answers to the probe prompts.

    ``mean_length`` is in tokens; ``empty`` and ``endless`` count answers without text and answers
    cut off at the token limit; ``tool_parse`` is the share of the written tool calls that parse as
    JSON, ``None`` if none was written; ``finite`` is whether every log-probability was finite.
    """

    distinct_2: float
    mean_length: float
    empty: int = 0
    endless: int = 0
    tool_parse: float | None = None
    finite: bool = True


@dataclass(frozen=True, slots=True)
class UserCheckResult:
    """The result of one of the user's own checks."""

    name: str
    passed: bool
    message: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence for a verdict.

    ``new`` has the scores of held-out examples that live has not learned. ``retention`` has those
    that it has learned, by group of :func:`~agentpref.prefer.strata.coarsen`; it is empty while the
    base serves, which has nothing to forget. ``kl`` is KL(π_0‖π_θ) in nats per token. ``live`` and
    ``candidate`` answered the same probes. ``asked_length`` and ``asked_distinct`` are the ratios
    of length and of distinct-2 between chosen and rejected answers of the new examples: the change
    that the examples ask for. ``cut_short`` says whether a limit of time stopped the training.
    ``ordinary`` is what became of answers that nobody judged, ``None`` where there are none.
    ``notes`` say what a reader should know of how it was gathered.

    ``looks`` is how often judgements that live has not learned were looked at before.
    ``cross_fitted`` has the scores of trained examples, each by a model that had not seen it, and
    ``to_cross_fit`` how many prompts of these there will be if it takes them to decide.
    ``comparisons`` counts all new examples, trained and held out.
    """

    new: Paired
    kl: float
    live: Generations
    candidate: Generations
    retention: Mapping[Stratum, Paired] = field(default_factory=dict)
    asked_length: float = 1.0
    asked_distinct: float = 1.0
    user_checks: tuple[UserCheckResult, ...] = ()
    ordinary: OrdinaryEvidence | None = None
    cut_short: bool = False
    notes: tuple[str, ...] = ()
    looks: int = 0
    cross_fitted: Paired = field(default_factory=Paired)
    to_cross_fit: int = 0
    comparisons: int = 0
