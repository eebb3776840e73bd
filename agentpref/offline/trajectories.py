"""Pairs of whole conversations as examples: what was answered counts, what was heard does not.

Such an example has the prompt that both conversations begin with, and two completions: all that
came after it, as the tokens that the model read and wrote, with a mask over the answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from agentpref.offline.decisions import Conversations, Layout, teachable
from agentpref.prefer.examples import example_id_of
from agentpref.types import Completion, Example, Run

if TYPE_CHECKING:
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner
    from agentpref.models.tokenizer import Ids, Mask
    from agentpref.offline.methods import Lesson


def paired(
    learner: Learner,
    logged: Conversations,
    train: Layout,
    lesson: Lesson,
    held_out_prompts: frozenset[str],
    rows: Mapping[str, EncodedExample],
) -> tuple[tuple[Example, ...], Counter[str]]:
    """The examples of a lesson's pairs, and why some pairs are none."""
    runs = {step.run.run_id: step.run for trace in logged.traces for step in trace.steps}
    steps: dict[int, list[str]] = {}
    for number, run in enumerate(train.runs):
        steps.setdefault(int(train.data.trace[number]), []).append(run)
    found, left_out = list[Example](), Counter[str]()
    for pair in lesson.pairs or ():
        names = [steps[trace] for trace in pair]
        why = next(filter(None, (_objection(own, logged, runs, held_out_prompts)
                                 for own in names)), "")  # fmt: skip
        whole = [joined([rows[run] for run in own]) for own in names]
        if why or None in whole:
            left_out[why or "conversation_rendered_anew"] += 1
            continue
        completions = tuple(
            _completion(learner, *one, label=label)
            for one, label in zip((one for one in whole if one is not None), (1.0, 0.0),
                                  strict=True)
        )  # fmt: skip
        first = logged.examples[names[0][0]]
        found.append(
            replace(
                first,
                example_id=example_id_of(first.prompt.id, completions),
                completions=completions,
                provenance=tuple(dict.fromkeys(run for own in names for run in own)),
            )
        )
    return tuple(found), left_out


def joined(rows: list[EncodedExample]) -> tuple[Ids, Mask] | None:
    """All that comes after the first prompt, and which tokens of it were answered.

    ``None`` where the template writes what was said before otherwise as the conversation goes on
    (or old turns were dropped): then these are not the tokens that the model read.
    """
    ids: Ids = ()
    mask: list[bool] = []
    begin = rows[0].prompt
    for row in rows:
        heard, (said, *_) = row.prompt, row.own
        if heard[: len(begin) + len(ids)] != (*begin, *ids):
            return None
        heard = heard[len(begin) + len(ids) :]
        ids = (*ids, *heard, *said)
        mask += [False] * len(heard) + [True] * len(said)
    return ids, tuple(mask)


def _objection(
    names: list[str], logged: Conversations, runs: Mapping[str, Run], held_out: frozenset[str]
) -> str:
    """Why a conversation is not to be taught; empty if it may be."""
    reasons = (teachable(logged.examples[run], runs[run], held_out) for run in names)
    return next(filter(None, reasons), "")


def _completion(learner: Learner, ids: Ids, mask: Mask, *, label: float) -> Completion:
    """What came after the prompt, as a completion that says just these tokens."""
    tokenizer = learner.base.template.tokenizer
    text = tokenizer.decode([*ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    message = {"role": "assistant", "content": text}
    return Completion(message, label, token_ids=ids, loss_mask=mask)
