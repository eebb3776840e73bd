"""The evidence for a verdict: what was measured of a candidate, and of live beside it.

``evaluate.py`` and ``probes.py`` gather it, and the checks of the gate read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from agentpref.prove.asked import Asked, Odd
from agentpref.prove.bootstrap import Paired
from agentpref.prove.features import Features, most_common
from agentpref.types import Stratum


@dataclass(frozen=True, slots=True)
class Generations:
    """Statistics of one policy's answers to the probe prompts, or of what people judged there.

    ``mean_length`` is in tokens. The counts are of answers that say nothing (``empty``), were cut
    off at the token limit (``endless``), say the same over and over (``repeated``) or stop within a
    sentence (``broken``); ``harmed`` counts each of these answers once. ``tool_parse`` is the share
    of the written tool calls that parse as JSON, ``None`` if none was written, and ``broken_calls``
    counts the answers with one that does not; ``finite`` is whether every log-probability was
    finite. ``common`` is the share of the most common answer,
    which has ``common_words`` words. ``answers`` and ``texts`` have the features and the text of
    each answer, in the order of the probes.
    """

    distinct_2: float
    mean_length: float
    empty: int = 0
    endless: int = 0
    tool_parse: float | None = None
    broken_calls: int = 0
    finite: bool = True
    repeated: int = 0
    broken: int = 0
    harmed: int = 0
    common: float = 0.0
    common_words: int = 0
    answers: tuple[Features, ...] = ()
    texts: tuple[str, ...] = field(default=(), repr=False)

    def first(self, number: int) -> Generations:
        """The first answers alone, and the most common one among them; no other count is taken."""
        texts = self.texts[:number]
        common, words = most_common(texts)
        return replace(
            self,
            common=common,
            common_words=words,
            answers=self.answers[:number],
            texts=texts,
        )

    def to_mapping(self) -> dict[str, Any]:
        """The numbers as plain values, without texts, for the report."""
        values = asdict(self)
        del values["answers"], values["texts"]
        return values | {"answers": len(self.answers)}


@dataclass(frozen=True, slots=True)
class Sampled:
    """Answers of live and candidate to the first probes, drawn at a temperature with one seed."""

    live: Generations
    candidate: Generations
    temperature: float


@dataclass(frozen=True, slots=True)
class OrdinaryEvidence:
    """What became of answers that nobody judged.

    ``falls`` are losses of log-likelihood against live in nats per token, 0 or more; ``live`` and
    ``candidate`` are what both write on some of their prompts.
    """

    falls: Sequence[float]
    live: Generations
    candidate: Generations


@dataclass(frozen=True, slots=True)
class ValueEvidence:
    """What held-out conversations earn with live's answers and with the candidate's.

    ``error`` is the standard error of ``candidate`` less ``live``, over conversations.
    ``unsupported`` and ``unsupported_live`` are the shares of what the candidate and live say that
    are like no logged answer, so that the log does not tell what they earn. ``explained`` is the
    share of the variance of returns that answers tell of in conversations that were left out.
    """

    live: float
    candidate: float
    error: float
    conversations: int
    unsupported: float = 0.0
    unsupported_live: float = 0.0
    explained: float = 1.0

    @property
    def gain(self) -> float:
        """What the candidate earns more."""
        return self.candidate - self.live


@dataclass(frozen=True, slots=True)
class EarnedEvidence:
    """What logged answers say that live and the candidate earn in thumbs, by off-policy estimates.

    ``low`` and ``high`` are the interval of the candidate's value less live's, from ``answers``.
    """

    live: float
    candidate: float
    low: float
    high: float
    answers: int


@dataclass(frozen=True, slots=True)
class UserCheckResult:
    """The result of one of the user's own checks."""

    name: str
    passed: bool
    message: str = ""


@dataclass(frozen=True, slots=True)
class ScorerResult:
    """What one of the user's scorers gave live's and the candidate's answers to the same prompts.

    ``live`` and ``candidate`` are means. ``p`` is how likely a loss like this is by chance; 1 where
    nothing was lost. ``error`` says why the scorer gave no numbers, if it did not.
    """

    name: str
    live: float
    candidate: float
    prompts: int
    p: float = 1.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Ranking of pairs by the first token in which their answers differ, live's and candidate's.

    That token decides which of both is written. ``accuracy`` is the share of pairs that are ranked
    rightly by it alone, as against the base; ``likelier`` the share where the chosen answer's token
    is the likelier one, as it stands. The margins h = log[π/π_0](chosen) − log[π/π_0](rejected) are
    means in nats: of whole answers, and of that token.
    """

    pairs: int
    accuracy: tuple[float, float]
    likelier: tuple[float, float]
    margin: tuple[float, float]
    margin_first: tuple[float, float]


class Shown(NamedTuple):
    """A held-out prompt, by id, and the greedy answers of live and candidate to it."""

    prompt_id: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence for a verdict.

    ``new`` has the scores of held-out examples that live has not learned. ``retention`` has those
    that it has learned, by group of :func:`~agentpref.prefer.strata.coarsen`; it is empty while the
    base serves, which has nothing to forget. ``people`` has those that people decided, new ones
    too, where a judge's verdicts trained. ``kl`` is KL(π_0‖π_θ) in nats per token.

    ``live`` and ``candidate`` answered the same probes greedily, of which the first ``fresh`` are
    prompts of new examples, and the first ``unseen`` of these were held out; ``sampled`` has drawn
    answers to some. ``chosen`` and ``rejected`` are what people judged there, of which the first
    ``fresh_chosen`` and ``fresh_rejected`` are of new examples; ``asked`` is what all new examples
    ask for, and ``odd`` what of it nobody can have meant. ``shown`` are answers to show to people,
    chosen by the seed alone. ``ordinary`` is what became of answers that nobody judged, ``None``
    where there are none. ``liked`` are such falls of the new held-out answers that people gave a
    lone like.

    ``known`` is whether live is right about so many of the new examples, trained ones too, that
    nothing is left to gain in ranking; ``untold`` counts new prompts with lone thumbs of which
    nobody can tell that, since they have no opposite. ``looks`` is how often judgements that live
    has not learned were looked at before, and ``choices`` how many candidates the last looks, with
    this one, might have been at instead. ``cross_fitted`` has the scores of trained examples, each
    by a model that had not seen it, and ``to_cross_fit`` how many prompts of these there will be if
    it takes them to decide. ``comparisons`` counts all new examples, trained and held out.

    ``value`` is what conversations earn, where these trained the candidate: then a gain is one in
    that. ``earned`` is what logged answers say of live and candidate, where they say anything.
    ``cut_short`` says whether a limit of time stopped the training. ``notes`` say what a reader
    should know of how it was gathered.
    """

    new: Paired
    kl: float
    live: Generations
    candidate: Generations
    retention: Mapping[Stratum, Paired] = field(default_factory=dict)
    people: Paired | None = None
    asked: tuple[Asked, ...] = ()
    odd: tuple[Odd, ...] = ()
    fresh: int = 0
    fresh_chosen: int = 0
    fresh_rejected: int = 0
    unseen: int = 0
    chosen: Generations | None = None
    rejected: Generations | None = None
    sampled: Sampled | None = None
    first_token: FirstToken | None = None
    scorers: tuple[ScorerResult, ...] = ()
    user_checks: tuple[UserCheckResult, ...] = ()
    ordinary: OrdinaryEvidence | None = None
    liked: Sequence[float] = ()
    shown: tuple[Shown, ...] = ()
    cut_short: bool = False
    notes: tuple[str, ...] = ()
    known: bool = False
    untold: int = 0
    looks: int = 0
    choices: int = 1
    cross_fitted: Paired = field(default_factory=Paired)
    to_cross_fit: int = 0
    comparisons: int = 0
    value: ValueEvidence | None = None
    earned: EarnedEvidence | None = None
