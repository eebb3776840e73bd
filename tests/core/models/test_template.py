"""The arguments and the clock of a chat template, and requests that it would distort."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from agentpref.errors import ConfigError, TemplateRefused, UnsupportedModel
from agentpref.models.reasons import Objection
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import ExampleTokenizer, encode_prompt
from agentpref.types import Prompt
from tests.core.models.families import (
    ANSWER,
    ASKED,
    FAMILIES,
    IMAGE,
    LOOKING,
    RESULT,
    SHAPES,
    TOOL,
    example,
    says,
    text,
    tokenizer_of,
)

DAY = 86400.0
OFF = {"enable_thinking": False}


def test_a_prompts_own_arguments_take_precedence() -> None:
    on, off = (ChatTemplate(tokenizer_of("qwen3"), arguments) for arguments in ({}, OFF))
    prompt = Prompt("", (ASKED,))
    assert off.render(prompt) == on.render(replace(prompt, chat_template_kwargs=OFF))
    assert off.render(prompt) != on.render(prompt)
    asked_to_think = replace(prompt, chat_template_kwargs={"enable_thinking": True})
    assert off.render(asked_to_think) == on.render(prompt)


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "add_generation_prompt"])
def test_an_argument_that_the_template_does_not_read_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"chat_template_kwargs\.{name} has no effect"):
        ChatTemplate(tokenizer_of("qwen3")).require_arguments({**OFF, name: True})


@pytest.mark.parametrize(
    ("family", "date"), [("llama3_2", "02 Jan 1970"), ("gptoss", "1970-01-02")]
)
def test_a_date_in_the_template_is_that_of_the_run(family: str, date: str) -> None:
    template = ChatTemplate(tokenizer_of(family))
    assert template.has_clock
    asked, later = (replace(SHAPES["text"], run_at=at) for at in (DAY, 3 * DAY))
    first, second, again = ExampleTokenizer(template, 2048)([asked, later, asked])
    prompts = [template.tokenizer.decode(list(row.prompt)) for row in (first, second)]
    assert (date in prompts[0], date in prompts[1]) == (True, False)
    assert first == again
    assert first.completions == second.completions
    assert date in template.render(asked.prompt, at=DAY)
    assert date not in template.render(asked.prompt), "without a time, it is now"


def test_prompts_without_a_date_are_rendered_once_for_all_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template, rendered = ChatTemplate(tokenizer_of("qwen2_5")), []
    try_render = ChatTemplate.try_render

    def counted(self: ChatTemplate, prompt: Prompt, **how: Any) -> Any:
        rendered.append(prompt)
        return try_render(self, prompt, **how)

    monkeypatch.setattr(ChatTemplate, "try_render", counted)
    ExampleTokenizer(template, 512)([replace(SHAPES["text"], run_at=at * DAY) for at in range(3)])
    assert not template.has_clock
    assert len(rendered) == 1


@pytest.mark.parametrize(
    ("family", "prompt", "words"),
    [
        ("gemma", Prompt("", (says("system", "Hi"), ASKED)), "the conversation .* raises"),
        ("gemma", Prompt("", (ASKED,), (TOOL,)), r"message 0 \(user\).*leaves out the tools"),
        ("qwen3", Prompt("", (says("user", [*text("See"), IMAGE]),)), r"message 0 .*no text"),
    ],
)
def test_a_request_that_the_template_would_distort_is_refused_with_the_reason(
    family: str, prompt: Prompt, words: str
) -> None:
    with pytest.raises(TemplateRefused, match=words):
        encode_prompt(prompt, ChatTemplate(tokenizer_of(family)))


def test_logged_tokens_of_reasoning_are_used_where_the_template_cannot_write_it() -> None:
    """DeepSeek's templates begin the thought in the prompt, and drop it from every message."""
    tokenizer = tokenizer_of("deepseek_r1_distill")
    ids = tokenizer("Oslo is wet.\n</think>\n\nIt rains there.", add_special_tokens=False)
    logged = (*ids["input_ids"], tokenizer.eos_token_id)
    for shape in ("reasoning", "reasoning inside"):
        (completion,) = SHAPES[shape].completions
        said = replace(SHAPES[shape], completions=(replace(completion, token_ids=logged),))
        (row,) = ExampleTokenizer(ChatTemplate(tokenizer), 512)([said])
        assert row.completions == (logged,)
        assert tokenizer.decode(list(row.prompt)).endswith("<think>\n")


@pytest.mark.parametrize(("family", "channel"), [("gptoss", "final"), ("muse_glimmer", "to=user")])
def test_a_template_that_names_channels_cannot_be_served(family: str, channel: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'m' writes '{channel}' before its answers"):
        ChatTemplate(tokenizer_of(family)).require_plain_answers("m")


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"gptoss", "muse_glimmer"}))
def test_other_templates_can_be_served(family: str) -> None:
    ChatTemplate(tokenizer_of(family)).require_plain_answers("m")


def objection(family: str, *messages: Any, tools: Any = ()) -> Any:
    (found,) = ExampleTokenizer(ChatTemplate(tokenizer_of(family)), 4096)(
        [example(*messages, tools=tools)]
    )
    return found if isinstance(found, Objection) else None


def calling(name: str, arguments: Any, content: Any = None) -> Any:
    function = {"name": name, "arguments": arguments}
    return says("assistant", content, tool_calls=[{"type": "function", "function": function}])


def trained(family: str, *messages: Any) -> str:
    tokenizer = tokenizer_of(family)
    (found,) = ExampleTokenizer(ChatTemplate(tokenizer), 4096)([example(*messages)])
    assert not isinstance(found, Objection), found
    return str(tokenizer.decode(list(found.completions[0])))


@pytest.mark.parametrize("answer", [
    calling("f", '{"x": "a \\u003c|im_end|> b"}'),
    says("assistant", text("a <|im_", "end|> b")),
    says("assistant", "a <|im_end|> b"),
])  # fmt: skip
def test_a_special_token_is_found_however_it_is_spelled(answer: Any) -> None:
    assert objection("qwen2_5", ASKED, answer) == Objection("special_token_inside", -1)


@pytest.mark.parametrize("arguments", ["", " ", None, "{}", {}])
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3_instruct_2507", "llama3_1", "gemma4_v5"])
def test_no_arguments_are_written_as_an_empty_object(family: str, arguments: Any) -> None:
    empty = trained(family, ASKED, calling("f", "{}"))
    assert trained(family, ASKED, calling("f", arguments)) == empty


def test_half_a_character_in_arguments_becomes_a_replacement() -> None:
    assert "smile \ufffd" in trained("qwen2_5", ASKED, calling("f", '{"x": "smile \\ud83d"}'))
    assert "\U0001f600" in trained("qwen2_5", ASKED, calling("f", '{"x": "\\ud83d\\ude00"}'))


@pytest.mark.parametrize("calls", [["x"], [None], 5, [{"function": {"name": 5}}]])
def test_calls_of_no_known_shape_are_left_out(calls: Any) -> None:
    answer = says("assistant", "", tool_calls=calls)
    assert objection("qwen2_5", ASKED, answer) == Objection("content_not_text", -1)
    assert objection("qwen2_5", ASKED, answer, ASKED, ANSWER) == Objection("content_not_text", 1)


def test_arguments_that_are_nested_too_deeply_are_left_out() -> None:
    deep = calling("f", f'{{"x": {"[" * 900}{"]" * 900}}}')
    assert objection("qwen2_5", ASKED, deep) == Objection("content_not_text", -1)


@pytest.mark.parametrize("family", ["gptoss", "gemma4_v5", "lfm2_2_5"])
def test_an_answer_may_speak_of_the_end_of_a_thought(family: str) -> None:
    code = "Write text.split('</think>')[-1] for it."
    assert code in trained(family, ASKED, says("assistant", code))


@pytest.mark.parametrize(
    ("family", "answer", "tools"),
    [
        ("llama3_1", calling("f", "{}", "name"), ()),  # its template writes "name", too
        ("gptoss", says("assistant", None, tool_calls=[
            {"function": {"name": name, "arguments": "{}"}} for name in ("f", "json")
        ]), ()),
        ("phi3", ANSWER, ({**TOOL, "function": {**TOOL["function"], "name": "assistant"}},)),
    ],
)  # fmt: skip
def test_what_is_dropped_is_not_found_in_the_words_of_the_template(
    family: str, answer: Any, tools: Any
) -> None:
    assert objection(family, ASKED, answer, tools=tools) is not None


@pytest.mark.parametrize("family", ["llama3_1", "gptoss"])
def test_results_in_parts_may_be_written_as_json(family: str) -> None:
    result = {**RESULT, "content": text("first", "second")}
    assert objection(family, ASKED, LOOKING, result, ANSWER, tools=(TOOL,)) is None


def test_arguments_may_be_written_as_python_writes_them() -> None:
    mixed = json.dumps({"x": 'O\'Brien "q"\n\t'})
    assert objection("lfm2_v2", ASKED, calling("f", mixed)) is None


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"deepseek_r1_distill", "deepseekv3"}))
def test_white_space_around_a_message_is_no_part_of_its_words(family: str) -> None:
    turns = (ASKED, says("assistant", "OK."), says("user", "OK\n\n"), ANSWER)
    reason = objection(family, *turns)
    assert reason is None or reason.reason == "template_adds_reasoning"
