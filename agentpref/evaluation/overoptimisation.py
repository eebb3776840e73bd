"""Draws what it takes to see how far a reward model can be followed, and keeps what was found.

The scorer beside the reward model (:mod:`agentpref.evaluation.frontier`) is a judge; or, without
one, *cross-fitted*: what people said is halved by prompt, one model of each half chooses and the
other one scores, and over again with other halves. That sees the errors that come with few and
noisy labels. It does not see those that both halves share, such as a taste that the features cannot
express; a judge does.

What was found is kept for ``gate.kl_budget=auto`` (:mod:`agentpref.prove.kl_budget`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.config import UpdateConfig
from agentpref.errors import ConfigError, EvaluationError
from agentpref.evaluation import evaluate
from agentpref.evaluation.choices import LIVE, find_examples, named_revisions
from agentpref.evaluation.duels import Answer
from agentpref.evaluation.frontier import Frontier, Read, Seen, frontier, seen_by
from agentpref.home import Home
from agentpref.judging.opened import ASKING, Asking, OpenedJudge, open_judge
from agentpref.prefer.judges.asking import said
from agentpref.prefer.judges.hearing import Case, Spending
from agentpref.prefer.judges.verdicts import Judge, Question
from agentpref.prefer.strata import sample
from agentpref.prove import kl_budget
from agentpref.record.database import connect, translated
from agentpref.record.pages import selection
from agentpref.record.store import Store
from agentpref.reward import heads as fitted
from agentpref.reward.fitting import read_judged
from agentpref.reward.heads import Heads, Judged
from agentpref.reward.judge import RewardJudge
from agentpref.reward.kept import Shelf
from agentpref.reward.model import RewardModel, open_reward
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.registry import Registry
from agentpref.types import BASE, Message, Progress, Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLES, MOST_SAMPLES = 16, 256
HALVINGS = 4
"""So often what people said is halved: each half chooses once and scores once."""

_OF_REVISION = 4  # answers of each revision to a prompt
_READ_AT_ONCE = 16  # answers that are read with their prompt
_AT_ONCE = 16
_MUCH_CUT = 0.25
_SCORES = {"a": 1.0, "b": 0.0, "tie": 0.5}

Sides = Sequence[tuple[Sequence[Seen], Sequence[Seen]]]


def measure_frontier(
    home: str | Path | Home | None,
    *,
    answer: Callable[[Registry, Sequence[str]], Answer],
    namespace: str = "default",
    model: str | None = None,
    judge: str | Judge | None = None,
    revisions: Sequence[str] = (),
    prompts: int = 40,
    samples: int = SAMPLES,
    temperature: float = 0.8,
    max_tokens: int = 128,
    config: UpdateConfig | None = None,
    asking: Asking = ASKING,
) -> Frontier:
    """Measure a namespace's newest reward model against another scorer, and keep what was found.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        answer: given the registry and the names of revisions, makes them ready, and returns what
            answers a request with one of them or the base.
        namespace: whose.
        model: where the base of the reward model is; by default the name that it was fitted with.
        judge: the other scorer, a judge of the home; without one, models of halves of the labels.
        revisions: which to show beside; by default what serves, if it is not the base.
        prompts: so many held-out prompts at most, as equally of each stratum as possible.
        samples: answers of the base to each; the largest n.
        temperature: at which they are drawn.
        max_tokens: so many tokens at most in each.
        config: the settings that the reward model was fitted with.
        asking: how the judge is asked.

    Raises:
        ConfigError: a number is out of range, or the judge is the reward model itself.
        RewardError: there is no reward model.
        EvaluationError: there is no prompt, or no answer that could be compared.
        JudgeError: there is no such judge, or it cannot be asked.
        Everything that loading a model raises.
    """
    if not 2 <= samples <= MOST_SAMPLES:
        raise ConfigError(f"samples is {samples}, but must be from 2 to {MOST_SAMPLES}")
    if prompts < 2:
        raise ConfigError(f"prompts is {prompts}, but must be 2 or more")
    place, settings = Home.open(home), config or UpdateConfig()
    tell: Progress = asking.progress or (lambda stage, done, total: None)
    with translated(place), closing(connect(place)) as connection:
        Store(connection).require_namespace(namespace)
        Shelf(place, namespace).read()  # without a model, nothing else matters
        registry = Registry(place, namespace=namespace)
        asked = _prompts(connection, namespace, prompts)
        names = _names(registry, revisions)
        scorer = None if judge is None else open_judge(place, connection, judge, namespace)
        members = () if scorer is None else (scorer, *scorer.members)
        if any(isinstance(one.judge, RewardJudge) for one in members):
            raise ConfigError("the reward model cannot judge itself; name another judge, or none")
        reward = open_reward(place, namespace=namespace, model=model)
        drawer = _Drawer(answer(registry, names), samples, temperature, max_tokens, tell)
        drawn = _read(reward, [*drawer.draw(asked, names)], tell)
        notes, spending = list[str](), Spending()
        cut = sum(one.drawn.cut for one in drawn) / max(1, len(drawn))
        if cut > _MUCH_CUT:
            notes.append(f"{cut:.0%} of the base's answers were cut off at {max_tokens} tokens: "
                         "with more, a token is worth less of the distance")  # fmt: skip
        if len(drawn) < len(asked):
            notes.append(f"answers to {len(asked) - len(drawn)} of {len(asked)} prompts cannot be "
                         f"read under {reward.base.name!r}")  # fmt: skip
        if scorer is None:
            judged = read_judged(place, connection, reward.base, namespace, settings, tell)
            sides: Sides = [
                *_crossed(judged, [one.read for one in drawn], reward.heads, settings.seed, tell)
            ]
        else:
            heard = _heard(scorer, drawn, spending, asking)
            if len(heard) < len(drawn):
                notes.append(f"{scorer.name} did not compare all answers to "
                             f"{len(drawn) - len(heard)} prompts, which are left out")  # fmt: skip
            drawn = [drawn[number] for number in heard]
            sides = [([seen_by(reward.heads, one.read) for one in drawn], [*heard.values()])]
        if not drawn:
            raise EvaluationError(f"no answers could be compared: {'; '.join(notes)}")
        kls = _kls(place, names, namespace, model, prompts) if names else {}
        found = replace(
            frontier(sides, [one.tokens for one in drawn], kls, seed=settings.seed),
            reward=reward.name,
            namespace=namespace,
            gold="cross-fitted" if scorer is None else scorer.name,
            spending=spending,
            notes=tuple(notes),
        )
        if not kl_budget.keep(place, namespace, found.to_mapping()):
            note = (
                f"{reward.name} is no longer the newest reward model (a fit or a removal came "
                "between), so nothing is kept for gate.kl_budget=auto; measure again"
            )
            found = replace(found, notes=(*found.notes, note))
        return found


def _prompts(connection: sqlite3.Connection, namespace: str, count: int) -> list[Prompt]:
    """Held-out prompts, each once."""
    found = find_examples(connection, selection(namespace, None, None), None, None)
    asked = [*{one.prompt.id: one.prompt for one in sample(found.examples, count)}.values()]
    if len(asked) < 2:
        raise EvaluationError(
            "fewer than two prompts are held out; log or import comparisons: one prompt in five is"
        )
    return asked


def _names(registry: Registry, revisions: Sequence[str]) -> list[str]:
    """The revisions to show: those that are named, or what serves."""
    named = named_revisions(registry, revisions or (LIVE,), base_alone=True)
    return [one.revision_id for one in named if one is not None]


def _kls(
    home: Home, names: Sequence[str], namespace: str, model: str | None, prompts: int
) -> dict[str, float]:
    """KL of revisions from the base, in nats per token, as the gate measures it."""
    found = evaluate(
        home.path, names, namespace=namespace, model=model, limit=prompts, with_trained=True
    )
    return {one.revision: one.kl for one in found.revisions}


# --- Answers ---


class _Drawn(NamedTuple):
    """Answers to a prompt, the base's and each revision's.

    ``tokens`` is the mean length of the base's, and ``cut`` the share of them that was cut off.
    """

    prompt: Prompt
    base: Sequence[Message]
    others: Mapping[str, Sequence[Message]]
    tokens: float
    cut: float


class _Read(NamedTuple):
    """Answers that the reward model can read."""

    drawn: _Drawn
    read: Read

    @property
    def tokens(self) -> float:
        return self.drawn.tokens


class _Drawer(NamedTuple):
    """Draws answers, several at a time: they share the engine's batches."""

    generate: Answer
    samples: int
    temperature: float
    max_tokens: int
    tell: Progress

    def draw(self, prompts: Sequence[Prompt], revisions: Sequence[str]) -> Iterator[_Drawn]:
        """All answers to each prompt."""
        for number, prompt in enumerate(prompts):
            self.tell("answers", number, len(prompts))
            base = self._replies(prompt, BASE, self.samples)
            others = {
                name: [one.message for one in self._replies(prompt, name, _OF_REVISION)]
                for name in revisions
            }
            tokens = sum(len(one.token_ids) for one in base) / len(base)
            cut = sum(one.finish_reason == "length" for one in base) / len(base)
            yield _Drawn(prompt, [one.message for one in base], others, tokens, cut)
        self.tell("answers", len(prompts), len(prompts))

    def _replies(self, prompt: Prompt, revision: str, count: int) -> list[Reply]:
        requests = [
            GenerationRequest(
                prompt.messages,
                prompt.tools,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=seed,
                chat_template_kwargs=prompt.chat_template_kwargs,
            )
            for seed in range(count)
        ]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [*pool.map(lambda one: self.generate(revision, one), requests)]


def _read(reward: RewardModel, drawn: Sequence[_Drawn], tell: Progress) -> list[_Read]:
    """The prompts of which all answers can be read, with their features."""
    import numpy as np

    found = []
    for number, one in enumerate(drawn):
        tell("features", number, len(drawn))
        answers = [*one.base, *(answer for own in one.others.values() for answer in own)]
        parts = [
            (one.prompt, answers[start : start + _READ_AT_ONCE])
            for start in range(0, len(answers), _READ_AT_ONCE)
        ]
        read = [part for part in reward.features(parts) if part is not None]
        if len(read) < len(parts):
            continue
        everything = np.concatenate([part.answers for part in read])
        start = len(one.base)
        others: dict[str, NDArray[Any]] = {}
        for name, own in one.others.items():
            others[name] = everything[start : start + len(own)]
            start += len(own)
        found.append(_Read(one, Read(read[0].prompt, everything[: len(one.base)], others)))
    tell("features", len(drawn), len(drawn))
    return found


# --- Other scorers ---


def _crossed(
    judged: Judged, read: Sequence[Read], whole: Heads, seed: int, tell: Progress
) -> Iterator[tuple[list[Seen], list[Seen]]]:
    """What two models of a half of the labels each saw, both ways round, with several halves."""
    import numpy as np

    prompts = sorted(set(judged.prompts))
    if len(prompts) < 2:
        raise EvaluationError("all that was said is about one prompt, which cannot be halved")
    source = np.random.default_rng(seed)
    for number in range(HALVINGS):
        tell("fit", number, HALVINGS)
        half = {prompts[n] for n in source.permutation(len(prompts))[: len(prompts) // 2]}
        inside = np.array([prompt in half for prompt in judged.prompts])
        models = [
            fitted.fit(
                judged.only(side), heads=len(whole.alphas), seed=seed, strength=whole.strength
            )
            for side in (inside, ~inside)
        ]
        seen = [[seen_by(model, one) for one in read] for model in models]
        yield seen[0], seen[1]
        yield seen[1], seen[0]
    tell("fit", HALVINGS, HALVINGS)


def _heard(
    judge: OpenedJudge, drawn: Sequence[_Read], spending: Spending, asking: Asking
) -> dict[int, Seen]:
    """What a judge saw, by the number of the prompt: those of which it compared all answers.

    Each of the base's answers is compared with the next one, in a ring, and each of a revision's
    with one of the base's.
    """
    import numpy as np

    asked: list[tuple[int, str, int, Message, Message]] = []
    for number, one in enumerate(drawn):
        base = one.drawn.base
        sides = {BASE: [*base[1:], base[0]], **one.drawn.others}
        for name, own in sides.items():
            asked += [(number, name, n, a, base[n % len(base)]) for n, a in enumerate(own)]
    scores = {row: 0.5 for row, (*_, a, b) in enumerate(asked) if said(a) == said(b)}
    differ = [row for row in range(len(asked)) if row not in scores]
    cases = [
        Case(Question(drawn[number].drawn.prompt.messages, a, b), drawn[number].drawn.prompt.id)
        for number, _, _, a, b in (asked[row] for row in differ)
    ]
    for place, opinion in judge.hear(cases, spending, asking):
        scores[differ[place]] = _SCORES[opinion.winner]
    by_prompt: dict[int, dict[str, list[float]]] = {}
    for row, (number, name, *_) in enumerate(asked):
        if row in scores:
            by_prompt.setdefault(number, {}).setdefault(name, []).append(scores[row])
    found = {}
    for number, heard in by_prompt.items():
        answers = drawn[number].drawn
        counts = {BASE: len(answers.base), **{k: len(own) for k, own in answers.others.items()}}
        if {name: len(heard.get(name, ())) for name in counts} != counts:
            continue
        over_last = np.array(heard.pop(BASE))  # of answer k + 1 over answer k
        better = (np.roll(over_last, 1) + 1 - over_last) / 2
        found[number] = Seen(better, better, {k: float(np.mean(own)) for k, own in heard.items()})
    return found
