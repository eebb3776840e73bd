"""Evaluates a candidate: gathers all the evidence that the gate needs.

The learner scores held-out examples under the live policy and the candidate, measures how far the
candidate is from the base, and answers the same probe prompts with both (``probes.py``).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from agentpref.config import UpdateConfig
from agentpref.learn.adapter import Policy
from agentpref.learn.encode import EncodedExample
from agentpref.learn.learner import Learner
from agentpref.learn.logps import Logps
from agentpref.learn.losses.kto import is_liked
from agentpref.models.continuation import greedy
from agentpref.models.instructions import instructed
from agentpref.models.tokenizer import encode_prompt
from agentpref.prefer.strata import coarsen, stratify
from agentpref.prove import probes as writing
from agentpref.prove.asked import asked
from agentpref.prove.bootstrap import Paired
from agentpref.prove.checks import Scorer, UserCheck, run_checks, run_scorers
from agentpref.prove.evidence import (
    Evidence,
    FirstToken,
    Generations,
    OrdinaryEvidence,
    Sampled,
    Shown,
)
from agentpref.prove.metrics import (
    accuracy,
    correctness,
    evenly,
    ranking_accuracy,
    thumb_margins,
)
from agentpref.prove.ordinary import falls
from agentpref.prove.probes import MOST_TOKENS, PROBES, SAMPLED, Writing, token_limit
from agentpref.prove.results import dot
from agentpref.types import BY_JUDGES, Message, Prompt, Stratum

K = TypeVar("K")

ORDINARY_PROBES = 16
_SERVED: tuple[Policy, Policy] = ("live", "candidate")
KL_ROWS = 256
_FEW_PAIRS, _ONE_ANSWER = 20, 0.9
COST_OF_WRITING = 4
"""How many tokens are scored in the time that one is generated."""


@dataclass(frozen=True, slots=True)
class Margins:
    """How far live and candidate put the chosen answer of one pair above the rejected one, in nats.

    ``whole`` is h = log[π/π_0](chosen) − log[π/π_0](rejected) of whole answers, ``first`` the same
    of the first token in which they differ, and ``stands`` is log π(chosen) − log π(rejected) of
    that token, whatever the base says.
    """

    whole: tuple[float, float]
    first: tuple[float, float]
    stands: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Scores:
    """How right live and candidate are about some held-out rows, from 0 to 1, row by row.

    ``margins`` are those of the pairs among them whose answers differ in a token that counts.
    """

    rows: Sequence[EncodedExample]
    live: Sequence[float]
    candidate: Sequence[float]
    margins: Sequence[Margins] = ()

    def paired(self, numbers: Sequence[int] | None = None, *, matched: bool = False) -> Paired:
        """The scores of some rows, or of all, as evidence; see :meth:`counted`.

        With ``matched``, a like and a dislike of one tag stand for one prompt together. Since as
        many of both count, their labels are no independent coins; but which of the two is the like
        is one, so that the sign of the change of both is one, too.
        """
        counted = self.counted(range(len(self.rows)) if numbers is None else numbers)
        prompts = {i: self.rows[i].example.prompt.id for i in counted}
        return Paired(
            tuple(self.live[i] for i in counted),
            tuple(self.candidate[i] for i in counted),
            tuple((prompts | (self._matches(counted) if matched else {})).values()),
        )

    def _matches(self, counted: Sequence[int]) -> dict[int, str]:
        """The common name of each lone row and its opposite, by its number."""
        sides: dict[str, tuple[list[int], list[int]]] = {}
        for i in sorted(counted, key=lambda i: self.rows[i].example.example_id):
            example = self.rows[i].example
            if example.lone:
                sides.setdefault(example.tag, ([], []))[is_liked(example)].append(i)
        couples = [pair for both in sides.values() for pair in zip(*both, strict=True)]
        prompt = {i: self.rows[i].example.prompt.id for couple in couples for i in couple}
        return {i: f"{prompt[a]} {prompt[b]}" for a, b in couples for i in (a, b)}

    def counted(self, numbers: Sequence[int]) -> list[int]:
        """The rows that count as evidence: all but surplus lone ones.

        Of the lone rows in each tag, as many likes as dislikes count, lest a tag that is mostly
        liked outweigh one that is mostly disliked.
        """
        by_tag: dict[str, dict[str, bool]] = {}
        examples = [(i, self.rows[i].example) for i in numbers]
        for _, example in examples:
            if example.lone:
                by_tag.setdefault(example.tag, {})[example.example_id] = is_liked(example)
        chosen = frozenset[str]().union(*map(evenly, by_tag.values()))
        return [i for i, example in examples if not example.lone or example.example_id in chosen]

    def counted_thumbs(self) -> int:
        """How many lone rows count as evidence."""
        return sum(self.rows[i].example.lone for i in self.counted(range(len(self.rows))))

    def notes(self) -> list[str]:
        """Says where some lone rows do not count."""
        thumbs, counted = sum(row.example.lone for row in self.rows), self.counted_thumbs()
        if counted == thumbs:
            return []
        return [
            f"{counted} of {thumbs} new held-out thumbs count as evidence: as many likes as "
            "dislikes in every tag, since a policy that moves all answers alike is right about one "
            "kind"
        ]

    def joined(self, other: Scores) -> Scores:
        """These scores and others', as one."""
        return Scores(
            [*self.rows, *other.rows],
            [*self.live, *other.live],
            [*self.candidate, *other.candidate],
            [*self.margins, *other.margins],
        )

    def first_token(self) -> FirstToken | None:
        """Ranking by the token that decides; ``None`` without pairs."""
        if not self.margins:
            return None

        def both(of: Callable[[Margins, int], float]) -> tuple[float, float]:
            live, candidate = ([of(m, policy) for m in self.margins] for policy in (0, 1))
            return sum(live) / len(live), sum(candidate) / len(candidate)

        return FirstToken(
            len(self.margins),
            accuracy=both(lambda m, policy: correctness([m.first[policy]])[0]),
            likelier=both(lambda m, policy: correctness([m.stands[policy]])[0]),
            margin=both(lambda m, policy: m.whole[policy]),
            margin_first=both(lambda m, policy: m.first[policy]),
        )

    def by_tag(self) -> dict[str, dict[str, float]]:
        """Accuracy of live (``before``) and candidate (``after``) per tag with any evidence."""
        found: dict[str, dict[str, float]] = {}
        for tag, numbers in sorted(_group([row.example.tag for row in self.rows]).items()):
            paired = self.paired(numbers)
            if len(paired):
                before, after = accuracy(paired.live), accuracy(paired.candidate)
                found[tag] = {"pairs": len(paired), "before": before, "after": after}
        return found


def tokens_needed(rows: Sequence[EncodedExample]) -> int:
    """An upper estimate of an evaluation's cost on these rows, in tokens scored.

    Every row is scored under three policies, and for KL some under the base again. The user's own
    checks are not included.
    """
    tokens = sum(row.width for row in rows)
    for_kl = tokens * min(KL_ROWS, len(rows)) // max(1, len(rows))
    probes = min(PROBES, len({row.example.prompt.id for row in rows}))
    written = 2 * (probes + min(SAMPLED, probes)) * token_limit(rows) if rows else 0
    return 3 * tokens + for_kl + COST_OF_WRITING * written


def kl_from_base(learner: Learner, rows: Sequence[EncodedExample], *, seed: int) -> float:
    """KL(π_0 ‖ π_θ) in nats per completion token, exact at each token of some of the rows.

    The mean over the examples' own completions of each one's mean over its tokens, as in training.
    Call it before :func:`score`, which then needs no pass of its own for these rows.
    """
    rows = random.Random(seed).sample(list(rows), min(KL_ROWS, len(rows)))
    values = [
        kl
        for row, kls in zip(rows, learner.divergences(rows), strict=True)
        for kl in kls[: len(row.own)]
    ]
    return sum(values) / len(values)


def score(learner: Learner, rows: Sequence[EncodedExample]) -> Scores:
    """Score live and candidate on held-out rows.

    A policy is right about completions when it ranks them as people did. It is right about a lone
    one when it has moved it the way that was asked for, against its mean over all mismatched
    completions among the rows.
    """
    live, candidate, base = (learner.scored(p, rows) for p in ("live", "candidate", "base"))
    ratios = [_ratios([s.sums for s in own], [s.sums for s in base]) for own in (live, candidate)]
    firsts = [
        _ratios([s.deciding for s in o], [s.deciding for s in base]) for o in (live, candidate)
    ]
    margins = []
    for i, row in enumerate(rows):
        if row.example.lone or len(row.own) != 2 or math.isnan(base[i].deciding[0]):
            continue
        better, worse = _best_and_worst(row)
        policies = [
            (each[0][better] - each[0][worse], each[1][better] - each[1][worse], stands)
            for each, stands in (
                ((ratios[n][i], firsts[n][i]), own[i].deciding[better] - own[i].deciding[worse])
                for n, own in enumerate((live, candidate))
            )
        ]
        margins.append(Margins(*zip(*policies, strict=True)))
    before, after = (_rightness(own, rows) for own in ratios)
    return Scores(rows, before, after, margins)


def best_case(learner: Learner, rows: Sequence[EncodedExample]) -> Paired:
    """Live against a candidate that would be right about all of some rows."""
    live = policy_scores(learner, "live", rows)
    return Scores(rows, live, (1.0,) * len(rows)).paired()


def _ratios(own: Sequence[Logps], base: Sequence[Logps]) -> list[Logps]:
    return [tuple(p - b for p, b in zip(*row, strict=True)) for row in zip(own, base, strict=True)]


def _best_and_worst(row: EncodedExample) -> tuple[int, int]:
    """The numbers of the completions that were liked most and least."""
    labels = [c.label or 0.0 for c in row.example.completions]
    return labels.index(max(labels)), labels.index(min(labels))


def policy_scores(
    learner: Learner, policy: Policy, rows: Sequence[EncodedExample]
) -> tuple[float, ...]:
    """How right one policy is about each row, from 0 to 1."""
    return _rightness(learner.ratios(policy, rows), rows)


def _rightness(ratios: Sequence[Logps], rows: Sequence[EncodedExample]) -> tuple[float, ...]:
    lone = [i for i, row in enumerate(rows) if row.example.lone]
    margins = thumb_margins(
        [ratios[i][0] for i in lone],
        [ratios[i][-1] for i in lone],
        [is_liked(rows[i].example) for i in lone],
    )
    of_lone = dict(zip(lone, correctness(margins), strict=True))
    labels = ([c.label or 0.0 for c in row.example.completions] for row in rows)
    return tuple(
        of_lone[i] if i in of_lone else ranking_accuracy(ratio, wanted)
        for i, (ratio, wanted) in enumerate(zip(ratios, labels, strict=True))
    )


def gather(
    learner: Learner,
    new: Scores,
    old: Scores,
    *,
    kl: float,
    trained: Sequence[EncodedExample],
    checks: Mapping[str, UserCheck],
    scorers: Mapping[str, Scorer] | None = None,
    config: UpdateConfig,
    ordinary: Sequence[EncodedExample] = (),
    cut_short: bool = False,
) -> Evidence:
    """Everything the gate's verdict rests on.

    Args:
        learner: holds live and candidate.
        new: scores of the held-out rows that live has not learned.
        old: scores of those that it has; they are what must not be forgotten.
        kl: the candidate's distance from the base, see :func:`kl_from_base`.
        trained: the new training rows, which say what is asked for beside the held-out ones.
        checks: the user's own checks.
        scorers: the user's own scorers of answers.
        config: the seed and the settings of the gate.
        ordinary: held-out answers that nobody judged.
        cut_short: whether a limit of time stopped the training.
    """
    rows = [*new.rows, *old.rows, *trained]
    limit, seed = token_limit(rows), config.seed
    probes = writing.choose_probes(learner, new.rows, old.rows, trained, limit=limit, seed=seed)
    judged = writing.judged(learner, [*new.rows, *trained], seed=seed)
    temperature = config.gate.temperature
    beside = (
        writing.choose_probes(learner, ordinary, limit=token_limit(ordinary), seed=seed)
        if ordinary
        else None
    )

    def write(policy: Policy) -> list[Generations]:
        prompts = probes.prompts_of(learner, policy)
        drawn = prompts[:SAMPLED]
        wanted = [
            Writing(prompts, limit, judged.phrases),
            Writing(drawn, limit, judged.phrases, temperature, seed),
        ]
        if beside is not None:
            ordinary_prompts = beside.prompts_of(learner, policy)[:ORDINARY_PROBES]
            wanted.append(Writing(ordinary_prompts, token_limit(ordinary)))
        return writing.generations(learner, policy, wanted)

    (live, *lives), (candidate, *candidates) = map(write, _SERVED)
    chosen, rejected = writing.judged_probes(learner, probes.rows, judged.phrases)
    fresh_chosen, fresh_rejected = writing.sides_of(probes.rows[: probes.fresh])
    asked_of = [row.example.prompt.messages for row in probes.rows]
    held_out = {row.example.example_id for row in (*new.rows, *old.rows)}
    return Evidence(
        new=new.paired(matched=True),
        retention=_retention(old, config.gate.min_stratum),
        people=_people(new.joined(old), trained),
        kl=kl,
        live=live,
        candidate=candidate,
        asked=asked(judged.answers),
        odd=judged.odd,
        fresh=probes.fresh,
        fresh_chosen=fresh_chosen,
        fresh_rejected=fresh_rejected,
        unseen=probes.unseen,
        chosen=chosen,
        rejected=rejected,
        sampled=Sampled(lives[0], candidates[0], temperature),
        first_token=new.first_token(),
        scorers=run_scorers(scorers or {}, asked_of, live.texts, candidate.texts),
        user_checks=run_checks(checks, lambda messages: answer(learner, messages)),
        ordinary=OrdinaryEvidence(_falls(learner, ordinary), lives[1], candidates[1])
        if ordinary
        else None,
        liked=_falls(
            learner, [row for row in new.rows if row.example.lone and is_liked(row.example)]
        ),
        shown=tuple(
            Shown(row.example.prompt.id, *texts)
            for row, *texts in zip(probes.rows, live.texts, candidate.texts, strict=True)
            if row.example.example_id in held_out
        )[: writing.SHOWN],
        cut_short=cut_short,
        notes=(
            *(odd.warning for odd in judged.odd),
            *probes.notes,
            *_first_token_note(new),
            *_one_sided_note([*new.rows, *trained]),
        ),
        comparisons=len(trained) + len(new.rows),
    )


def _falls(learner: Learner, rows: Sequence[EncodedExample]) -> list[float]:
    """How much less likely than under live the first completion of each row has become."""
    live, candidate = ([logp for logp, *_ in learner.score(policy, rows)] for policy in _SERVED)
    tokens = [sum(row.masks[0] or (True,) * len(row.completions[0])) for row in rows]
    return falls(live, candidate, tokens)


def _first_token_note(new: Scores) -> list[str]:
    """Says where a better ranking does not reach the token that decides what is written."""
    first = new.first_token()
    if first is None:
        return []
    before, after = (accuracy(side) for side in (new.live, new.candidate))
    old, now = first.likelier
    if after - before < 0.1 or now - old >= (after - before) / 4:
        return []
    return [
        f"ranking improved from {dot(before)} to {dot(after)}, but the first token in which two "
        f"answers differ decides for the chosen one in {dot(old)} -> {dot(now)} of {first.pairs} "
        f"pairs; {first.margin_first[1] - first.margin_first[0]:.1f} of the "
        f"{first.margin[1] - first.margin[0]:.1f} nats by which the margin grew are that token's"
    ]


def _one_sided_note(rows: Sequence[EncodedExample]) -> list[str]:
    """Says where people correct to one and the same answer, and like none of the others."""
    pairs = [row for row in rows if not row.example.lone and len(row.own) == 2]
    likes = any(row.example.lone and is_liked(row.example) for row in rows)
    corrected = sum(row.example.origin == "correction" for row in pairs)
    if likes or len(pairs) < _FEW_PAIRS or corrected < len(pairs):
        return []
    chosen = Counter(row.own[_best_and_worst(row)[0]] for row in pairs)
    same = chosen.most_common(1)[0][1]
    if same < _ONE_ANSWER * len(pairs):
        return []
    return [
        f"{same} of {len(pairs)} corrections are to one and the same answer, and nothing says "
        "where another one is right: a candidate that always gives it would pass; take in likes "
        "of right answers, too"
    ]


def _retention(old: Scores, minimum: int) -> dict[Stratum, Paired]:
    """Evidence by group; a group of lone rows that are all liked, or all disliked, gives none."""
    groups = _group(coarsen(stratify([row.example for row in old.rows]), minimum))
    found = {stratum: old.paired(numbers) for stratum, numbers in groups.items()}
    return {stratum: paired for stratum, paired in found.items() if len(paired)}


def _people(held_out: Scores, trained: Sequence[EncodedExample]) -> Paired | None:
    """What people decided of all that is held out, if a judge's verdicts are among the trained."""
    if all(row.example.origin not in BY_JUDGES for row in trained):
        return None
    origins = [row.example.origin for row in held_out.rows]
    paired = held_out.paired([i for i, one in enumerate(origins) if one not in BY_JUDGES])
    return paired if len(paired) else None


def answer(learner: Learner, messages: Sequence[Message]) -> str:
    """The candidate's greedy answer to a list of messages, as the text that servers stream.

    Raises:
        GenerationFailed: the messages leave no room in the model's positions.
    """
    asked = instructed(messages, learner.instructions("candidate"))
    prompt = encode_prompt(Prompt("", asked), learner.base.template)
    with learner.policy("candidate") as model:
        ((ids,), _) = greedy(model, [prompt], learner.decoding, limit=MOST_TOKENS)
    return learner.decoding.text(ids)


def _group(keys: Sequence[K]) -> dict[K, list[int]]:
    """Indices of equal keys, in order."""
    groups: dict[K, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups
