"""From logged conversations to weighed examples, by what a method makes of a critic's values."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from agentpref.config import UpdateConfig
from agentpref.learn.features import FeatureReader
from agentpref.learn.learner import Learner
from agentpref.models.threads import single_blas_thread
from agentpref.offline import answers as asking
from agentpref.offline.answers import own_only
from agentpref.offline.critics import Basis, Critic
from agentpref.offline.decisions import Conversations, Layout, imitating, lay_out, teachable
from agentpref.offline.methods import Lesson, load_method
from agentpref.offline.proof import expected
from agentpref.offline.trajectories import paired
from agentpref.prove.probes import token_limit
from agentpref.types import Example

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.learn.encode import EncodedExample
    from agentpref.models.tokenizer import Ids

_LEAST = 1e-3
"""The share of the largest weight below which a decision is not imitated."""

_FREE = 1.0
"""The temperature at which answers are drawn that live would give."""


@dataclass(frozen=True, slots=True)
class Valued:
    """Decisions to imitate and to prove by, labelled by their advantage.

    ``trained`` have the weight that each of their tokens gets; ``idle`` weigh nothing and decided
    what the others weigh. ``proving`` lays the held-out conversations out, and ``reader`` reads
    more answers as it was laid out. ``told`` are numbers for the report, and ``q`` is what answers
    are worth, where the method has that.
    """

    trained: tuple[Example, ...]
    held_out: tuple[Example, ...]
    idle: tuple[Example, ...]
    proving: Layout
    reader: FeatureReader
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)
    q: tuple[Basis, NDArray[Any]] | None = None


@single_blas_thread()
def value(
    learner: Learner,
    logged: Conversations,
    config: UpdateConfig,
    held_out_prompts: frozenset[str],
) -> Valued:
    """Value decisions by the method that the settings name.

    Args:
        learner: holds the base and live.
        logged: the conversations.
        config: the settings of the update.
        held_out_prompts: prompts to which no answer is trained.
    """
    import numpy as np

    reader = FeatureReader(learner.base, turns=True)
    encoded = learner.encode([*logged.examples.values()])
    unread = Counter(one.reason for one in learner.objections.values())
    learner.shortened.clear()  # those that train or prove are counted as they do
    learner.retokenized.clear()
    rows = {row.example.provenance[0]: row for row in encoded}
    with learner.policy("base"):
        read = reader.read([own_only(row) for row in rows.values()], learner.progress)
    features = dict(zip(rows, read, strict=True))
    train, proving = (
        lay_out(logged.side(held_out=held), rows, features, config.offline.gamma)
        for held in (False, True)
    )
    if not len(train.data):
        return Valued((), (), (), proving, reader, unread)
    method = load_method(config.method)(config.offline)
    if method.draws:
        train = _with_drawn(learner, reader, train, config)
    critic = Critic.on(train.data)
    lesson = method(critic)
    begins = train.data.begins
    earned = float(np.average(train.data.returns()[begins], weights=train.data.weight[begins]))
    guess = expected(critic, lesson)
    if lesson.pairs is None:
        trained, idle, left_out = _weighed(learner, logged, train, lesson, held_out_prompts, rows)
    else:
        trained, left_out = paired(learner, logged, train, lesson, held_out_prompts, rows)
        better = lesson.advantage(train.data) > 0
        of = dict(zip(train.runs, better, strict=True))
        idle = tuple(_labelled(logged.examples[run], bool(good)) for run, good in of.items())
    notes: tuple[str, ...] = (
        f"conversations that train earned {earned:.3g}, discounted; of answering as "
        f"{config.method} says, a critic expects {guess:.3g}",
    )
    told: dict[str, Any] = {"valued": len({*train.runs}), "earned": earned, "expected": guess}
    if lesson.pairs is not None:
        notes, told["expected"], told["pairs"] = (), None, len(lesson.pairs)
    if lesson.pairs == ():
        notes = (
            "no two conversations that train begin with the same prompt and earned differently, so "
            f"{config.method} has nothing to compare; choose another method",
        )
    data = proving.data
    labels = lesson.advantage(data) > 0 if len(data) else ()
    held_out = tuple(
        _labelled(logged.examples[run], bool(label))
        for run, label in dict(zip(proving.runs, labels, strict=True)).items()
    )
    left_out += unread
    if train.unfinished + proving.unfinished:
        left_out["unreadable_next_step"] = train.unfinished + proving.unfinished
    return Valued(
        trained,
        held_out,
        idle,
        proving,
        reader,
        left_out,
        notes,
        told,
        None if lesson.q is None else (critic.answers, lesson.q),
    )


def _labelled(example: Example, good: bool) -> Example:
    """A decision that was better than usual, or not."""
    (answer,) = example.completions
    return replace(example, completions=(replace(answer, label=float(good)),))


def _with_drawn(
    learner: Learner, reader: FeatureReader, train: Layout, config: UpdateConfig
) -> Layout:
    """The same with answers that live would give at each state, and how likely live finds all."""
    import numpy as np

    drawn = asking.draw(
        learner,
        "live",
        train.rows,
        each=config.offline.draws,
        limit=token_limit([own_only(row) for row in train.rows]),
        temperature=_FREE,
        seed=config.seed,
        progress=learner.progress,
    )
    ends = learner.decoding.end_tokens
    whole = [[ids for ids in dict.fromkeys(own) if ids[-1] in ends] for own in drawn]
    layout = train.with_answers(whole, asking.features_of(learner, reader, train.rows, whole))
    by_state: dict[int, list[int]] = defaultdict(list)
    for number, state in enumerate(layout.data.of.tolist()):
        by_state[state].append(number)
    numbers = [by_state[state] for state in range(len(layout.rows))]
    answers = [[layout.tokens[number] for number in own] for own in numbers]
    likely = layout.data.likely.copy()
    for own, found in zip(numbers, asking.likely(learner, layout.rows, answers), strict=True):
        likely[own] = found
    return replace(layout, data=replace(layout.data, likely=np.asarray(likely)))


def _weighed(
    learner: Learner,
    logged: Conversations,
    train: Layout,
    lesson: Lesson,
    held_out_prompts: frozenset[str],
    rows: Mapping[str, EncodedExample],
) -> tuple[tuple[Example, ...], tuple[Example, ...], Counter[str]]:
    """The decisions to imitate, those that weigh nothing, and why some good ones are no example.

    The weight of a decision is one of each of its tokens: it is 1 in the mean over decisions, for
    an answer of the mean length.
    """
    import numpy as np

    data, runs = train.data, {step.run.run_id: step.run for t in logged.traces for step in t.steps}
    good, left_out = lesson.advantage(data) > 0, Counter[str]()
    weights: dict[str, float] = defaultdict(float)
    labels: dict[str, bool] = {}
    said: dict[str, Ids | None] = {}
    for number, run in enumerate(train.runs):
        weights[run] += float(lesson.weights[number] * data.weight[number])
        labels[run] = bool(good[number])
        said[run] = None
        if lesson.choice is not None:
            chosen = int(lesson.choice[data.state[number]])
            labels[run] = True  # what is imitated is the best there
            said[run] = None if chosen == data.taken[number] else train.tokens[chosen]
    least = _LEAST * max(weights.values())
    kept = list[tuple[Example, float, int]]()
    idle = list[Example]()
    for run, weight in weights.items():
        example, tokens = logged.examples[run], said[run]
        why = teachable(example, runs[run], held_out_prompts) if weight >= least else ""
        if why:
            left_out[why] += 1
        if why or weight < least:
            idle.append(_labelled(example, labels[run]))
            continue
        if tokens is not None:
            example = imitating(example, learner.decoding.text(tokens), tokens)
        length = len(tokens or rows[run].own[0])
        kept.append((_labelled(example, labels[run]), weight, length))
    if not kept:
        return (), tuple(idle), left_out
    scale = float(np.mean([weight for _, weight, _ in kept]))
    tokens_each = float(np.mean([length for *_, length in kept]))
    trained = tuple(replace(e, weight=w / scale / tokens_each) for e, w, _ in kept)
    return trained, tuple(idle), left_out
