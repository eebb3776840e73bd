"""Renders a conversation with a model's chat template, and shortens a long one.

Messages come in OpenAI's shape and are passed to the template in the shape that templates expect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from agentpref.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HEAD = frozenset({"system", "developer"})


class Rendered(NamedTuple):
    """A conversation as text, and the spans that the template marks as the assistant's.

    Spans are ``(start, end)`` in characters, in order; ``None`` where the template marks none.
    """

    text: str
    spans: Sequence[tuple[int, int]] | None = None


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Write a prompt as text, up to where the assistant begins.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
        TypeError: it joins something that is not text to text.
    """
    text = tokenizer.apply_chat_template(
        _conversation(prompt), tools=_tools(prompt), tokenize=False, add_generation_prompt=True
    )
    return str(text)


def render_or_none(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str | None:
    """Write a prompt as :func:`render` does; ``None`` where the template refuses it."""
    return _unless_refused(lambda: render(tokenizer, prompt))


def render_with_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Message
) -> Rendered | None:
    """Write a prompt and a completion as text; ``None`` where the template refuses them.

    The spans come from the function that ``apply_chat_template`` renders with, in characters. The
    token mask that the latter makes of them is lost where a token begins with white space.
    """
    return _unless_refused(lambda: _render_both(tokenizer, prompt, completion))


def _render_both(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Message
) -> Rendered:
    turns, tools = _conversation(prompt, completion), _tools(prompt)
    template = tokenizer.get_chat_template(tools=tools)
    if not _GENERATION.search(template):
        return Rendered(str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)))
    from transformers.utils.chat_template_utils import render_jinja_template

    named: dict[str, Any] = {**tokenizer.special_tokens_map}
    rendered: Any = render_jinja_template(
        conversations=[turns],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **named,
    )
    ((text,), (spans,)) = rendered
    return Rendered(text, spans)


def _unless_refused(write: Callable[[], T]) -> T | None:
    """The text; ``None`` where the template raises on the conversation."""
    from jinja2 import TemplateError

    try:
        return write()
    except (TemplateError, TypeError):
        return None


def shorter(prompt: Prompt) -> list[Prompt]:
    """The same prompt without its oldest turn, without its two oldest, and so on to its last one.

    A turn is what a user said and everything that followed, tool calls and their results included,
    so no result is left without its call. Messages before the first turn are dropped with it; a
    system message stays.
    """
    messages = prompt.messages
    head = next((i for i, m in enumerate(messages) if m["role"] not in _HEAD), len(messages))
    starts = [i for i in range(head, len(messages)) if _begins_turn(messages, i)]
    return [replace(prompt, messages=(*messages[:head], *messages[i:])) for i in starts if i > head]


def _conversation(prompt: Prompt, *answers: Message) -> list[dict[str, Any]]:
    return [_turn(message) for message in (*prompt.messages, *answers)]


def _tools(prompt: Prompt) -> Any:
    return [dict(tool) for tool in prompt.tools] or None


def _begins_turn(messages: Sequence[Message], at: int) -> bool:
    by_user = messages[at]["role"] == "user"
    return by_user and (at == 0 or messages[at - 1]["role"] != "user")


def _turn(message: Message) -> dict[str, Any]:
    """A message in the shape of chat templates, which differs from OpenAI's in two points.

    Templates join the content to other text, so an assistant's ``None`` raises or becomes "None".
    They write arguments with ``tojson``, which would quote JSON text a second time.
    """
    turn = dict(message)
    if turn["role"] == "assistant" and turn.get("content") is None:
        turn["content"] = ""
    if isinstance(turn.get("tool_calls"), (list, tuple)):
        turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
    return turn


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": _arguments(function["arguments"])}}


def _arguments(text: str) -> dict[str, Any] | str:
    """Parse arguments; text that is not a JSON object stays as the model wrote it."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text
