"""Why an example is left out of an update once its text is known, each with the way out.

The report counts examples under these names. Reasons that need no look at the text are in
:data:`agentpref.prefer.votes.Reason`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Objection(NamedTuple):
    """Why a row is left out: a reason to count it under, and the message at fault.

    ``message`` is its number in the prompt, -1 for the answer, ``None`` for the row as a whole.
    """

    reason: str
    message: int | None = None


LEFT_OUT: Mapping[str, str] = {
    "template_refuses": "the chat template raises an error, as some do on a system message or on "
    "roles that do not alternate; use another model or template",
    "template_drops_text": "the chat template leaves out words of a message; use another model or "
    "template",
    "template_drops_tool_calls": "the chat template leaves out a tool call or its arguments; use a "
    "model whose template writes tool calls",
    "template_drops_tools": "the chat template leaves out the tools that were offered; use a model "
    "whose template writes tools",
    "template_drops_reasoning": "the chat template leaves out the answer's reasoning; use a model "
    "whose template writes it, or log token_ids",
    "template_adds_reasoning": "the answer has no reasoning, and the chat template adds an empty "
    "one; log reasoning_content, or set chat_template_kwargs as the server does, for example "
    "chat_template_kwargs.enable_thinking=false",
    "template_adds_text": "the chat template adds words to the answer; use another template",
    "template_rewrites_prompt": "the chat template writes the prompt in another way once an "
    "answer follows, so no token is certainly the answer's; log token_ids, or use another template",
    "template_marks_elsewhere": "the {% generation %} blocks of the chat template leave out some "
    "of the answer; mend the template",
    "content_not_text": "it has an image, audio or another part that is no text, or calls of no "
    "known shape",
    "special_token_inside": "its text spells a special token, which would be trained as one",
    "no_embedding": "it spells a token that the tokenizer knows and the model has no embedding for",
    "empty_completion": "the answer is empty",
    "loss_mask_does_not_fit": "its loss mask is not for the tokens that are trained",
    "empty_loss_mask": "its loss mask leaves nothing to train",
    "no_label": "a completion has no label, or one that is not finite",
    "too_long": "the longest answer and the last turn of the prompt exceed max_length; raise it",
    "same_tokens": "two of its answers are the same tokens",
    "no_mismatch": "a lone thumb, and none on another prompt to compare it to",
}

_PLAIN = frozenset({"too_long", "no_mismatch", "same_tokens"})
"""Reasons that say all by their names, and that no message is at fault for."""


def explained(objections: Mapping[str, Objection], model: str) -> list[str]:
    """Say of each reason that the messages gave what it means, and where.

    Args:
        objections: those to some examples, by the examples' ids.
        model: the name of the base model, whose chat template it is.
    """
    lines: dict[str, str] = {}
    for example_id, (reason, message) in objections.items():
        where = "" if message is None else f", message {message}"
        where = ", its answer" if message == -1 else where
        if reason not in lines and reason not in _PLAIN:
            first = f"example {example_id}{where}"
            lines[reason] = f"{reason}: {LEFT_OUT[reason]} (model {model!r}, first in {first})"
    return list(lines.values())
