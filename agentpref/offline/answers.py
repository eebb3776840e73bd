"""What a policy would say at logged states, and what the base and live make of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agentpref.models.continuation import sampled
from agentpref.types import Completion, Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.learn.adapter import Policy
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.features import FeatureReader
    from agentpref.learn.learner import Learner
    from agentpref.models.tokenizer import Ids

_AT_ONCE = 64


def draw(
    learner: Learner,
    policy: Policy,
    rows: Sequence[EncodedExample],
    *,
    each: int,
    limit: int,
    temperature: float,
    seed: int,
    progress: Progress,
) -> list[list[Ids]]:
    """Some answers of a policy to each row's prompt; those that the limit cut are among them."""
    asked = learner.asked(policy, rows)
    prompts = [row.prompt for row in asked for _ in range(each)]
    found: list[Ids] = []
    with learner.policy(policy) as model:
        for start in range(0, len(prompts), _AT_ONCE):
            answers = sampled(
                model,
                prompts[start : start + _AT_ONCE],
                learner.decoding,
                limit=limit,
                temperature=temperature,
                seed=seed + start,
            )
            found += answers.tokens
            progress(f"ask {policy}", len(found), len(prompts))
    return [found[number : number + each] for number in range(0, len(found), each)]


def own_only(row: EncodedExample) -> EncodedExample:
    """A row without the answer to another prompt, which KTO alone reads."""
    return replace(row, completions=row.own, masks=row.masks[: len(row.own)])


def answered(row: EncodedExample, ids: Ids) -> EncodedExample:
    """A row with another answer to its prompt."""
    completion = Completion({"role": "assistant", "content": ""}, token_ids=ids)
    example = replace(row.example, completions=(completion,))
    return replace(row, example=example, completions=(ids,), masks=(None,))


def features_of(
    learner: Learner,
    reader: FeatureReader,
    rows: Sequence[EncodedExample],
    answers: Sequence[Sequence[Ids]],
) -> list[NDArray[Any]]:
    """What the base makes of each row's answers, ``[k, D]`` each."""
    import numpy as np

    flat = [answered(row, ids) for row, own in zip(rows, answers, strict=True) for ids in own]
    with learner.policy("base"):
        read = iter(reader.read(flat))
    return [np.stack([next(read).answers[0] for _ in own]) for own in answers]


def likely(
    learner: Learner, rows: Sequence[EncodedExample], answers: Sequence[Sequence[Ids]]
) -> list[NDArray[Any]]:
    """The mean log-probability of a token of each answer under live, ``[k]`` each."""
    import numpy as np

    flat = [answered(row, ids) for row, own in zip(rows, answers, strict=True) for ids in own]
    scores = iter(learner.score("live", flat))
    return [np.array([next(scores)[0] / len(ids) for ids in own]) for own in answers]
