"""Lets a judge compare what revisions answer to held-out prompts: win rates, and their worth.

Every revision answers the same prompts; the judge is asked about each pair of answers in both
orders. A raw win rate has the judge's errors and its taste for length in it. So beside it stand the
rate that is corrected by what people's comparisons say of the judge's errors, and the rate at equal
lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from agentpref.errors import EvaluationError, JudgeError
from agentpref.evaluation.choices import LIVE, Where, find_examples, named_revisions
from agentpref.home import Home
from agentpref.judging.gold import gold_of_home
from agentpref.judging.opened import ASKING, Asking, OpenedJudge, open_judge
from agentpref.prefer.judges.asking import said
from agentpref.prefer.judges.calibration import GoldVerdict
from agentpref.prefer.judges.hearing import Case, Spending
from agentpref.prefer.judges.verdicts import Judge, Opinion, Question
from agentpref.prefer.judges.winrate import (
    LengthControlled,
    WinRate,
    corrected_win_rate,
    length_controlled_win_rate,
    ratings,
)
from agentpref.prefer.strata import sample
from agentpref.record.database import connect, translated
from agentpref.record.pages import selection
from agentpref.record.store import Store
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.registry import Registry
from agentpref.types import BASE, Message, Progress, Prompt, Winner

Answer = Callable[[str, GenerationRequest], Reply]
"""Answers a request with one revision, as ``ServingBackend.generate`` does."""

_SCORES: Mapping[Winner, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}


class Answers(NamedTuple):
    """What a revision answered to prompts, in their order."""

    revision: str
    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Duel:
    """How often ``revision``'s answers are better than ``against``'s, by a judge.

    ``position`` counts the ties in which the verdicts followed the order of the answers; ``same``
    counts prompts to which both gave the same answer, which are ties without a question.
    """

    revision: str
    against: str
    wins: int
    losses: int
    ties: int
    position: int
    same: int
    rate: WinRate
    controlled: LengthControlled


@dataclass(frozen=True, slots=True)
class Duels:
    """An evaluation of revisions by a judge; ``ratings`` are Bradley and Terry's strengths."""

    judge: str
    namespace: str
    on: str
    prompts: int
    duels: tuple[Duel, ...]
    ratings: Mapping[str, float] = field(default_factory=dict)
    spending: Spending = field(default_factory=Spending)
    notes: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """The evaluation as plain values: what ``--json`` prints."""
        found = {name: getattr(self, name) for name in self.__slots__}
        found |= {"duels": [_plain(asdict(one)) for one in self.duels], "notes": [*self.notes]}
        return found | {"ratings": dict(self.ratings), "spending": self.spending.to_mapping()}


def _plain(value: Any) -> Any:
    """Named tuples as mappings."""
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def judge_revisions(
    home: str | Path | None,
    judge: str | Judge,
    revisions: Sequence[str] = (),
    *,
    answer: Callable[[Registry, Sequence[str]], Answer],
    on: Where | None = None,
    format: str | None = None,
    namespace: str = "default",
    prompts: int = 100,
    max_tokens: int = 256,
    asking: Asking = ASKING,
) -> Duels:
    """Let a judge compare the greedy answers of revisions to held-out prompts.

    Later revisions are compared with earlier ones.

    Args:
        home: a home folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        judge: a judge of the home.
        revisions: as for :func:`agentpref.evaluate`; by default the base and what serves.
        answer: given the registry and the names of the revisions, makes them ready, and returns
            what answers a request with one of them.
        on: a tag, a stratum or a file whose prompts to answer; by default all held-out prompts.
        format: the format of a file's rows.
        namespace: whose revisions and prompts.
        prompts: so many prompts at most, as equally of each stratum as possible.
        max_tokens: so many tokens at most in each answer.
        asking: how the judge is asked.

    Raises:
        JudgeError: there is no such judge, or it cannot be asked.
        EvaluationError: there is no prompt, or fewer than two revisions.
    """
    which = selection(namespace, None, None)
    place = Home.open(home)
    with translated(place), closing(connect(place)) as connection:
        Store(connection).require_namespace(namespace)
        registry = Registry(place, namespace=namespace)
        found = find_examples(connection, which, on, format)
        chosen = [one.prompt for one in sample(found.examples, prompts)]
        asked = [*{one.id: one for one in chosen}.values()]
        if not asked:
            raise EvaluationError(
                f"there is no prompt among {found.on}; log or import comparisons: one prompt in "
                "five is held out, or name a file of preferences"
            )
        live = registry.state().live or BASE
        if {live if one == LIVE else one for one in revisions or (BASE, LIVE)} == {BASE}:
            raise EvaluationError(
                f"there is only the base to compare, which is what serves in {namespace!r}; name a "
                "revision beside it (`agentpref adapters list`)"
            )
        names = [one.revision_id if one else BASE for one in named_revisions(registry, revisions)]
        if len(names) < 2:
            raise EvaluationError(
                f"a judge compares two revisions or more; only {names[0]} is named"
            )
        opened = open_judge(place, connection, judge, namespace)
        generate = answer(registry, names)
        written = [
            answers_of(generate, name, asked, max_tokens=max_tokens, progress=asking.progress)
            for name in names
        ]
        gold = known_gold(opened, namespace, {one.tag for one in found.examples})
        return _judged(opened, written, asked, gold, found.on, namespace, asking)


def answers_of(
    generate: Answer,
    revision: str,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> Answers:
    """What a revision answers greedily; several requests at a time share the engine's batches."""
    requests = [
        GenerationRequest(
            one.messages,
            one.tools,
            max_tokens=max_tokens,
            chat_template_kwargs=one.chat_template_kwargs,
        )
        for one in prompts
    ]
    written = []
    with ThreadPoolExecutor(concurrency) as pool:
        for reply in pool.map(lambda request: generate(revision, request), requests):
            written.append(reply.message)
            if progress is not None:
                progress(f"answers of {revision}", len(written), len(requests))
    return Answers(revision, written)


def duel(
    judge: OpenedJudge,
    one: Answers,
    other: Answers,
    prompts: Sequence[Prompt],
    gold: Sequence[GoldVerdict],
    spending: Spending,
    asking: Asking,
) -> tuple[Duel, dict[int, Opinion]]:
    """Let a judge compare the answers of two revisions; also return its opinions by prompt."""
    pairs = list(zip(prompts, one.messages, other.messages, strict=True))
    differ = [n for n, (_, a, b) in enumerate(pairs) if said(a) != said(b)]
    cases = [_case(prompts[n], one.messages[n], other.messages[n]) for n in differ]
    swaps = [_is_swapped(case.question) for case in cases]
    turned = [
        case._replace(question=case.question.swap()) if swap else case
        for case, swap in zip(cases, swaps, strict=True)
    ]
    found = {differ[n]: _back(heard, swaps[n]) for n, heard in judge.hear(turned, spending, asking)}
    same = len(pairs) - len(differ)
    counted = [*found] + [n for n in range(len(pairs)) if n not in differ]
    scores = [_SCORES[found[n].winner] if n in found else 0.5 for n in counted]
    lengths = [len(said(pairs[n][1])) - len(said(pairs[n][2])) for n in counted]
    longer = [None if not length else length > 0 for length in lengths]
    winners = [opinion.winner for opinion in found.values()]
    return (
        Duel(
            one.revision,
            other.revision,
            winners.count("a"),
            winners.count("b"),
            winners.count("tie") + same,
            sum(opinion.follows is not None for opinion in found.values()),
            same,
            corrected_win_rate(scores, longer, gold),
            length_controlled_win_rate(scores, lengths),
        ),
        found,
    )


def _case(prompt: Prompt, a: Message, b: Message) -> Case:
    return Case(Question(prompt.messages, a, b), prompt.id)


def _is_swapped(question: Question) -> bool:
    """Whether a question is asked swapped first: as good as random, and not by which is newer."""
    return int(hashlib.blake2b(question.digest.encode()).hexdigest()[0], 16) % 2 == 0


def _back(heard: Opinion, swapped: bool) -> Opinion:
    """An opinion about the answers in the order of the revisions."""
    if not swapped:
        return heard
    turned: Mapping[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
    return heard._replace(winner=turned[heard.winner])


def known_gold(judge: OpenedJudge, namespace: str, tags: Container[str]) -> list[GoldVerdict]:
    """What the judge said of people's comparisons in some strata, when it was calibrated.

    Nothing is asked.
    """
    if judge.calibration is None or judge.source == "code":
        return []
    try:
        gold = gold_of_home(judge.connection, namespace, tags=tags)
    except JudgeError:  # it was calibrated on a file, or people compared nothing there
        return []
    return [gold[number].verdict(one) for number, one in judge.recall([one.case for one in gold])]


def _judged(
    judge: OpenedJudge,
    written: Sequence[Answers],
    prompts: Sequence[Prompt],
    gold: Sequence[GoldVerdict],
    on: str,
    namespace: str,
    asking: Asking,
) -> Duels:
    spending, duels, comparisons, notes = Spending(), list[Duel](), list[Any](), list[str]()
    for number, one in enumerate(written):
        for other in written[:number]:
            fought, opinions = duel(judge, one, other, prompts, gold, spending, asking)
            duels.append(fought)
            comparisons += [(one.revision, other.revision, o.winner) for o in opinions.values()]
            comparisons += [(one.revision, other.revision, "tie")] * fought.same
    if spending.stopped:
        notes.append(f"ended: {spending.stopped}; the same command goes on")
    if judge.calibration is None and judge.source != "code":
        notes.append(
            f"nobody knows how right {judge.name} is; `agentpref judge calibrate {judge.name}` "
            "measures it, and win rates are then corrected"
        )
    strengths = ratings(comparisons) if len(written) > 2 else {}
    return Duels(
        judge.name,
        namespace,
        on,
        len(prompts),
        tuple(duels),
        strengths,
        spending,
        tuple(notes),
    )
