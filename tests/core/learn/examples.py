"""Examples for the learning tests: pairs, groups and lone thumbs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agentpref.types import Completion, Example, Message, Prompt


def answer(content: str | Message, label: float, **known: Any) -> Completion:
    """An answer of the assistant, as text or as a message."""
    message = {"role": "assistant", "content": content} if isinstance(content, str) else content
    return Completion(message, label, **known)


def make_group(number: int, answers: Mapping[str, float], **changes: Any) -> Example:
    """An example of any number of answers with labels, to question ``number``."""
    fields = {
        "example_id": f"group{number}",
        "namespace": "test",
        "created_at": float(number),
        "prompt": Prompt(f"prompt{number}", ({"role": "user", "content": f"Question {number}?"},)),
        "completions": tuple(answer(text, label) for text, label in answers.items()),
        "origin": "comparison",
    }
    return Example(**{**fields, **changes})


def make_pair(
    number: int, chosen: str | Message, rejected: str | Message, **changes: Any
) -> Example:
    """A chosen and a rejected answer to question ``number``."""
    completions = (answer(chosen, 1.0), answer(rejected, 0.0))
    return make_group(
        number, {}, **{"example_id": f"pair{number}", "completions": completions, **changes}
    )


def make_thumb(number: int, content: str | Message, liked: bool = True, **changes: Any) -> Example:
    """A liked or disliked answer to question ``number``."""
    fields = {"example_id": f"thumb{number}", "origin": "thumb"}
    completions = (answer(content, float(liked)),)
    return make_group(number, {}, **{**fields, "completions": completions, **changes})


def with_completions(example: Example, *changes: Mapping[str, Any]) -> Example:
    """The example with fields of its completions replaced, in order."""
    own = list(example.completions)
    for number, changed in enumerate(changes):
        own[number] = replace(own[number], **changed)
    return replace(example, completions=tuple(own))
