"""The arguments and the clock of a chat template, and requests that it would distort."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from agentpref.errors import ConfigError, TemplateRefused
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import ExampleTokenizer, encode_prompt
from agentpref.types import Prompt
from tests.core.models.families import ASKED, IMAGE, SHAPES, TOOL, says, text, tokenizer_of

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
