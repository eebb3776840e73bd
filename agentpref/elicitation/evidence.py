"""Which comparisons the gate lacks: those at held-out prompts, where the fewest were compared.

Held-out prompts prove and the others do not, and one pair of each prompt is enough: the gate counts
prompts. What is learned of a tag is protected by the prompts of that tag.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from agentpref.judging.running import Pair
from agentpref.prefer.examples import is_held_out


def lacking(
    pairs: Iterable[Pair], compared: Iterable[Pair], *, held_out: float, most: int
) -> list[Pair]:
    """The pairs that help the gate, in the order in which they do.

    Args:
        pairs: which nobody compared, the newest first; one of each prompt is taken.
        compared: what people decided.
        held_out: the share of prompts that is.
        most: so many pairs at most are chosen from.
    """

    def proves(pair: Pair) -> bool:
        return is_held_out(pair.a.prompt.messages, held_out)

    decided = {pair.a.prompt.id: pair.a.tag for pair in compared if proves(pair)}
    by_prompt: dict[str, Pair] = {}
    for pair in islice((one for one in pairs if proves(one)), most):
        if pair.a.prompt.id not in decided:
            by_prompt.setdefault(pair.a.prompt.id, pair)
    found = [*by_prompt.values()]
    order = fewest_first([pair.a.tag for pair in found], Counter(decided.values()))
    return [found[number] for number in order]


def fewest_first(tags: Sequence[str], proven_by: Mapping[str, int]) -> list[int]:
    """The numbers of some questions, each next one of the tag with the fewest by then.

    Args:
        tags: of each question.
        proven_by: how many held-out prompts were compared in each tag.

    >>> fewest_first(["a", "b", "a", "b"], {"a": 3, "b": 2})
    [1, 0, 3, 2]
    """
    left: dict[str, list[int]] = {}
    for number, tag in enumerate(tags):
        left.setdefault(tag, []).append(number)
    have = {tag: proven_by.get(tag, 0) for tag in left}
    order: list[int] = []
    while left:
        tag = min(left, key=lambda one: (have[one], one))
        order.append(left[tag].pop(0))
        have[tag] += 1
        if not left[tag]:
            del left[tag]
    return order
