"""Rules that say in words what people's comparisons show, and the choice of those that help.

Rules come from what is measured of the comparisons (``agentpref.prove.asked``), from the principles
of the home's own judges, and from whoever runs the update. None is made of what users wrote: a
system prompt speaks to every user, and must not hold one user's words. A rule is taken if, told to
the model, it makes what people chose likelier beside what they did not: rules are tried one by one,
the best is kept, and the others are tried beside it (a reflective optimiser such as GEPA,
2507.19457, searches in the same way, with rules that a model writes).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from agentpref.prove.asked import Asked
from agentpref.prove.features import LANGUAGE
from agentpref.prove.signs import sign_test

if TYPE_CHECKING:
    from agentpref.learn.learner import Learner
    from agentpref.types import Example

TRIED_ON = 32
"""So many pairs, drawn at random, say whether a rule helps."""

MOST_RULES = 5

LOST = 10.0
"""By how many nats a pair counts as worse which a rule leaves no room for."""

CHANCE = 0.05
"""How likely a rule that is taken makes so many pairs better by chance, were it useless."""

_RULES: Mapping[tuple[str, int], str] = {
    ("words", -1): "Answer briefly: about {chosen:.0f} words are enough.",
    ("words", 1): "Answer in full, in about {chosen:.0f} words.",
    ("lines", -1): "Write one paragraph.",
    ("lines", 1): "Write each point on a line of its own.",
    ("list items", 1): "Use a bulleted list.",
    ("list items", -1): "Do not use lists.",
    ("headings", 1): "Structure the answer by headings.",
    ("headings", -1): "Do not use headings.",
    ("code blocks", 1): "Show code in a code block.",
    ("code blocks", -1): "Do not use code blocks.",
    ("questions", 1): "Ask the user a question where something is unclear.",
    ("questions", -1): "Do not ask questions.",
    ("exclamation marks", 1): "Be enthusiastic, with exclamation marks.",
    ("exclamation marks", -1): "Do not use exclamation marks.",
    ("digits", 1): "Give exact numbers.",
    ("digits", -1): "Avoid numbers.",
    ("set phrase at the beginning", -1): "Begin with the answer itself, without an introduction.",
    ("yes at the beginning", 1): "Begin with Yes where that is true.",
    ("no at the beginning", 1): "Begin with No where that is true.",
    ("JSON", 1): "Answer in JSON.",
    ("JSON", -1): "Answer in plain words, not in JSON.",
    ("tool call", 1): "Call a tool where one fits.",
    ("tool call", -1): "Answer yourself, without calling a tool.",
    ("refusal", -1): "Do not refuse what you can answer.",
    ("refusal", 1): "Refuse what you should not answer.",
    ("sentence mark at the end", 1): "Answer in whole sentences.",
    ("sentence mark at the end", -1): "Answer without a full stop.",
}
_SAME = {"tokens": "words", "valid tool call": "tool call"}


class Chosen(NamedTuple):
    """The rules that were taken, of so many that were tried, and what they change.

    ``better`` and ``worse`` count the pairs of the sample that became so. ``missed`` is the best
    of the rules that were not taken, with the pairs that it makes better and worse.
    """

    rules: tuple[str, ...]
    tried: int
    pairs: int
    better: int = 0
    worse: int = 0
    missed: tuple[str, int, int] | None = None


def rules_of(asked: Sequence[Asked]) -> list[str]:
    """The rules that ask for what comparisons ask for, the surest first.

    >>> rules_of([Asked("words", -1, chosen=12.2, rejected=40.0, prompts=30, p=0.001)])
    ['Answer briefly: about 12 words are enough.']
    """
    found: dict[str, None] = {}
    for one in asked:
        if one.feature.startswith(LANGUAGE) and one.direction > 0:
            found[f"Answer in {one.feature.removeprefix(LANGUAGE)}."] = None
        if (rule := _RULES.get((_SAME.get(one.feature, one.feature), one.direction))) is None:
            continue
        is_count = one.feature == "tokens"  # of which words are about three quarters
        found[rule.format(chosen=max(1.0, one.chosen * (0.75 if is_count else 1.0)))] = None
    return [*found]


def rule_of(principle: str) -> str:
    """A judge's principle, told to whoever answers."""
    return f"Write the answer that somebody would choose who was told: {principle}"


def written(rules: Sequence[str]) -> str:
    """The instructions that some rules make."""
    return rules[0] if len(rules) == 1 else "\n".join(f"- {rule}" for rule in rules)


def read(instructions: str) -> list[str]:
    """The rules that some instructions are made of."""
    return [line.removeprefix("- ").strip() for line in instructions.splitlines() if line.strip()]


def choose(
    learner: Learner,
    examples: Sequence[Example],
    proposals: Sequence[str],
    *,
    beta: float,
    seed: int,
) -> Chosen:
    """Take the rules that make what people chose likelier; the learner's candidate is told them.

    Each round adds the rule with the lowest DPO loss (2305.18290), if it makes more pairs better
    than chance would. Those that the candidate is told already stay.
    """
    pairs = [one for one in examples if not one.lone and len(one.completions) == 2]
    some = random.Random(seed).sample(pairs, min(TRIED_ON, len(pairs)))
    rules = read(learner.instructions("candidate"))
    first = margins = _margins(learner, some)
    left = [one for one in proposals if one not in rules]
    tried, missed = 0, None
    while left and margins and len(rules) < MOST_RULES:
        found = {}
        for rule in left:
            learner.instruct(written([*rules, rule]))
            lost = {name: margin - LOST for name, margin in margins.items()}
            found[rule] = lost | _margins(learner, some)
            tried += 1
        rule = min(found, key=lambda one: _loss(found[one], beta))
        better, worse = _changes(margins, found[rule])
        is_lower = _loss(found[rule], beta) < _loss(margins, beta)
        if not is_lower or sign_test(better, worse, one_sided=True) > CHANCE:
            missed = (rule, better, worse)
            break
        rules.append(rule)
        margins, left = found[rule], [one for one in left if one != rule]
    learner.instruct(written(rules) if rules else "")
    return Chosen(tuple(rules), tried, len(margins), *_changes(first, margins), missed)


def _margins(learner: Learner, examples: Sequence[Example]) -> dict[str, float]:
    """By how much the candidate has moved from the base towards what was chosen, in nats."""
    rows = learner.measure(examples)
    found = {}
    for row, ratios in zip(rows, learner.ratios("candidate", rows), strict=True):
        labels = [completion.label or 0.0 for completion in row.example.completions]
        best, worst = (labels.index(pick(labels)) for pick in (max, min))
        found[row.example.example_id] = ratios[best] - ratios[worst]
    return found


def _loss(margins: Mapping[str, float], beta: float) -> float:
    """The mean of −log σ(β·margin)."""
    values = [-beta * margin for margin in margins.values()]
    return math.fsum(max(0.0, x) + math.log1p(math.exp(-abs(x))) for x in values) / len(values)


def _changes(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[int, int]:
    """How many pairs became better and worse."""
    changes = [after[name] - margin for name, margin in before.items()]
    return sum(change > 0 for change in changes), sum(change < 0 for change in changes)
