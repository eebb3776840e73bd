from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from agentpref.errors import ConfigError, TemplateRefused
from agentpref.models.base import find_base, load_tokenizer
from agentpref.models.grammar import MAX_GRAMMAR, AnswerGrammars, CallForm
from agentpref.models.template import ChatTemplate
from agentpref.models.tool_calls import assistant_message
from agentpref.types import Prompt

ASKED = ({"role": "user", "content": "What is the tide?"},)
QWEN = (
    "{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{%- for call in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}"
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


SEARCH, SHOUT = tool("search", query={"type": "string"}), tool("shout", times={"type": "integer"})
ANSWER = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"tide": {"enum": ["low", "high"]}, "hours": {"type": "array"}},
            "required": ["tide"],
        },
    },
}


@cache
def tiny() -> ChatTemplate:
    return ChatTemplate(load_tokenizer("tiny", find_base("tiny")))


@cache
def vocabulary() -> Any:
    return from_tokenizer(tiny().tokenizer)


def templated(text: str) -> ChatTemplate:
    tokenizer = load_tokenizer("tiny", find_base("tiny"))
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


def write(choice: str = "auto", response_format: Any = None, *tools: Any) -> str | None:
    return AnswerGrammars(tiny()).write(Prompt("", ASKED, tools), choice, response_format)


def takes(grammar: str | None, text: str) -> bool:
    """Whether an answer may be this text, and end there."""
    assert grammar is not None
    matcher = LLMatcher(vocabulary(), grammar)
    ids = tiny().tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(matcher.consume_tokens(ids)) and bool(matcher.is_accepting())


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_an_answer_is_free_unless_something_is_asked_of_it() -> None:
    assert write() is None
    assert write("auto", None, SEARCH) is None
    assert write("none", {"type": "text"}, SEARCH) is None


def test_any_tool_asks_for_calls_of_tools_that_are_offered_and_for_nothing_else() -> None:
    for choice in ("any", "required"):
        grammar = write(choice, None, SEARCH, SHOUT)
        one, other = call("search", '{"query": "low é"}'), call("shout", '{"times": 2}')
        assert takes(grammar, one)
        assert takes(grammar, one + other + one)
        assert not takes(grammar, "")
        assert not takes(grammar, "It is low.")
        assert not takes(grammar, "Yes. " + one)
        assert not takes(grammar, call("delete", "{}"))
        assert not takes(grammar, call("shout", '{"times": "two"}'))
        assert not takes(grammar, call("shout", '{"times": 2, "loud": true}'))
        assert not takes(grammar, call("search", "{}"))


def test_the_name_of_a_tool_asks_for_one_call_of_it() -> None:
    grammar = write("shout", None, SEARCH, SHOUT)
    assert takes(grammar, call("shout", '{"times": 2}'))
    assert not takes(grammar, call("shout", '{"times": 2}') * 2)
    assert not takes(grammar, call("search", '{"query": "low"}'))


def test_a_tool_without_parameters_takes_no_arguments() -> None:
    for function in ({"name": "now"}, {"name": "now", "parameters": {"type": "object"}}):
        grammar = write("now", None, {"type": "function", "function": function})
        assert takes(grammar, call("now", "{}"))
        assert not takes(grammar, call("now", '{"at": 1}'))


def test_a_json_schema_asks_for_json_of_it_with_little_white_space() -> None:
    grammar = write("auto", ANSWER)
    assert takes(grammar, '{"tide": "low"}')
    assert takes(grammar, '{"tide":"low","hours":[3,9]}')
    assert takes(grammar, '{\n  "tide": "low",\n  "hours": [3]\n}')
    assert not takes(grammar, '{\n\n\n"tide": "low"}')
    assert not takes(grammar, '{"tide": "ebb"}')
    assert not takes(grammar, '{"tide": "low", "else": 1}')
    assert not takes(grammar, 'Here: {"tide": "low"}')


def test_a_json_object_may_have_any_content() -> None:
    grammar = write("auto", {"type": "json_object"})
    assert takes(grammar, '{"a": [1, {"b": null}]}')
    assert takes(grammar, "{}")
    assert not takes(grammar, "[1]")


def test_with_tools_and_a_schema_an_answer_is_calls_or_json() -> None:
    grammar = write("auto", ANSWER, SEARCH)
    assert takes(grammar, '{"tide": "low"}')
    assert takes(grammar, call("search", '{"query": "low"}'))
    assert not takes(grammar, "low")
    assert not takes(write("any", ANSWER, SEARCH), '{"tide": "low"}')


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum"),
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"enum": []}, "anyOf is empty"),
        ({"$ref": "https://example.org/schema.json"}, "example.org"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a'"),
        ({"type": "number", "minimum": float("nan")}, "no JSON"),
        ({"const": {1, 2}}, "no JSON"),
    ],
)
def test_a_schema_that_nothing_fulfils_is_refused_with_the_reason(schema: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        write("auto", {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    with pytest.raises(ConfigError, match=r"cannot be enforced|no JSON"):
        write("any", None, tool("search", query=schema))


def test_schemas_are_bounded_in_size_and_depth() -> None:
    long = {"enum": ["x" * MAX_GRAMMAR]}
    with pytest.raises(ConfigError, match="characters, but must have at most"):
        write("any", None, tool("search", query=long))
    deep: dict[str, Any] = {}
    for _ in range(5_000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ConfigError):
        write("any", None, tool("search", query=deep))


@pytest.mark.parametrize("name", ['say "hi"', "ünïcode", "a\\b", "::=", "x" * 200])
def test_a_name_is_written_as_json_writes_it(name: str) -> None:
    grammar = write(name, None, tool(name))
    text = call(json.dumps(name, ensure_ascii=False)[1:-1], "{}")
    assert takes(grammar, text)
    assert assistant_message(text)["tool_calls"][0]["function"]["name"] == name


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20), st.integers())
def test_what_the_template_writes_for_a_call_is_an_answer_under_its_grammar(
    query: str, times: int
) -> None:
    arguments = {"query": query, "times": times}
    offered = (tool("search", query={"type": "string"}, times={"type": "integer"}),)
    function = {"name": "search", "arguments": arguments}
    answer = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    prompt = Prompt("", ASKED, offered)
    written = tiny().try_complete(prompt, tiny().render(prompt), {**answer, "content": ""})
    if isinstance(written, str):  # not where the text spells a special token
        text = written.partition("<|im_end|>")[0]
        assert takes(write("any", None, *offered), text)


def test_the_form_of_a_call_is_the_templates_own() -> None:
    assert CallForm.of(tiny(), {}).between == ""
    assert CallForm.of(templated(QWEN), {}) == (
        "",
        '<tool_call>\n{"name": "',
        '", "arguments": ',
        "}\n</tool_call>",
        "\n",
        (", ", ": "),
    )
    compact = QWEN.replace("arguments | tojson", "arguments | tojson(separators=(',', ':'))")
    assert CallForm.of(templated(compact), {}).separators == (",", ":")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (QWEN.replace("for tool in tools or []", "for tool in []"), "leaves out the tools"),
        (QWEN.replace("for call in m.tool_calls or []", "for call in []"), "takes no part"),
        (QWEN.replace("tool_call>", "function>"), "a form that is not read here"),
        (QWEN.replace("<tool_call>", "<|im_start|>"), "tool_choice='auto'"),
    ],
)
def test_a_template_whose_calls_cannot_be_read_back_is_refused(template: str, why: str) -> None:
    grammars = AnswerGrammars(templated(template))
    with pytest.raises(TemplateRefused, match=why):
        grammars.write(Prompt("", ASKED, (SEARCH,)), "any", None)
    assert grammars.write(Prompt("", ASKED), "auto", ANSWER) is not None


def test_a_template_that_opens_a_thought_is_refused() -> None:
    grammars = AnswerGrammars(
        templated(QWEN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    )
    with pytest.raises(TemplateRefused, match="opens each answer with <think>"):
        grammars.write(Prompt("", ASKED), "auto", ANSWER)
