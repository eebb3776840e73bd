"""Tool calls and absent contents are encoded in the shape that templates expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from agentpref.learn.encode import encode
from agentpref.models.base import find_base
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import encode_prompt
from agentpref.models.tool_calls import assistant_message
from agentpref.types import Prompt
from tests.core.learn.examples import make_pair

TINY = (find_base("tiny") / "chat_template.jinja").read_text(encoding="utf-8")

# The part of Qwen 2.5's template that renders turns, as it is.
QWEN = """\
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) \
or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# How templates without tool calls write a turn.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"tiny": TINY, "qwen": QWEN, "plain": PLAIN}
ASKED: dict[str, Any] = {"role": "user", "content": "Look at the sea."}


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest, random_base: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


with_calls = pytest.mark.parametrize("tokenizer", ["tiny", "qwen"], indirect=True)
with_any = pytest.mark.parametrize("tokenizer", TEMPLATES, indirect=True)


def completion(tokenizer: Any, chosen: dict[str, Any]) -> str:
    """The text that would be trained as the better answer."""
    pair = make_pair(0, chosen, "No.", prompt=Prompt("", (ASKED,)))
    found = encode([pair], ChatTemplate(tokenizer), max_length=512)
    assert not found.left_out
    (row,) = found.rows
    return tokenizer.decode(list(row.completions[0]))


def calling(arguments: Any, content: str | None = None) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


@with_calls
@pytest.mark.parametrize("arguments", ['{"at":"sea","n":[1,2.0]}', {"at": "sea", "n": [1, 2.0]}])
def test_arguments_are_encoded_as_a_json_object(tokenizer: Any, arguments: Any) -> None:
    assert completion(tokenizer, calling(arguments)) == (
        '<tool_call>\n{"name": "look", "arguments": {"at": "sea", "n": [1, 2.0]}}\n</tool_call>'
        "<|im_end|>"
    )


@with_calls
def test_a_parsed_tool_call_is_rendered_as_the_model_wrote_it(tokenizer: Any) -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {"b": "Zoë \\"1\\"", "a": {}}}\n</tool_call>'
    for text in (call, f"Let me see.\n{call}"):
        assert completion(tokenizer, assistant_message(text)) == text + "<|im_end|>"


@pytest.mark.parametrize("tokenizer", ["qwen"], indirect=True)
@pytest.mark.parametrize("arguments", ['{"at": ', "[1]"])
def test_arguments_that_are_not_an_object_stay_text(tokenizer: Any, arguments: str) -> None:
    assert f'"arguments": {json.dumps(arguments)}}}' in completion(tokenizer, calling(arguments))


@with_any
@pytest.mark.parametrize("silence", [{"content": None}, {}])
def test_an_absent_content_is_rendered_as_empty_text(tokenizer: Any, silence: Any) -> None:
    silent = {"role": "assistant", **silence}
    assert completion(tokenizer, silent) == "<|im_end|>"
    asked = tokenizer.decode(
        list(encode_prompt(Prompt("", (ASKED, silent, ASKED)), ChatTemplate(tokenizer)))
    )
    assert "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\n" in asked


@with_calls
def test_rendering_does_not_change_the_message(tokenizer: Any) -> None:
    message = calling('{"at": "sea"}')
    completion(tokenizer, message)
    assert message == calling('{"at": "sea"}')
