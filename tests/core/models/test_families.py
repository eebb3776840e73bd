"""What is trained of the messages that people log, under the chat templates of many families.

The table in docs/models.md holds the outcome of every family and shape; tests/docs compares it with
what these families give now. Here are the laws that hold for all of them.
"""

from __future__ import annotations

import re
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.models.reasons import LEFT_OUT, Objection
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import ExampleTokenizer
from tests.core.models.families import (
    FAMILIES,
    MARKED,
    SAID,
    SHAPES,
    TOOL,
    call,
    example,
    outcome,
    says,
    tokenize,
    tokenizer_of,
)

ENDS = {
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "gemma": "<end_of_turn>",
    "gemma4_v5": "<turn|>",
    "gptoss": "<|return|>",
    "llama3_1": "<|eot_id|>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "qwen3": "<|im_end|>",
}


def texts(family: str, shape: str, **arguments: Any) -> tuple[str, str]:
    """The prompt and the completion that are trained, as text."""
    found = tokenize(family, shape, **arguments)
    assert not isinstance(found, Objection), found
    decode = tokenizer_of(family).decode
    return decode(list(found.prompt)), decode(list(found.completions[0]))


@pytest.mark.parametrize("family", ENDS)
def test_an_answer_ends_with_the_token_that_the_template_ends_its_turns_with(family: str) -> None:
    tokenizer = tokenizer_of(family)
    end = ChatTemplate(tokenizer).turn_end
    assert tokenizer.convert_ids_to_tokens(end) == ENDS[family]
    arguments = {"enable_thinking": False} if family == "qwen3" else {}
    _, completion = texts(family, "text", **arguments)
    assert completion.endswith(SAID + ENDS[family]) or family == "cohere2"
    assert completion.endswith(ENDS[family])


def test_answers_without_reasoning_are_trained_as_they_were_asked_for() -> None:
    assert outcome("qwen3", "text") == "template_adds_reasoning"
    prompt, completion = texts("qwen3", "text", enable_thinking=False)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert completion == f"{SAID}<|im_end|>"


@pytest.mark.parametrize("shape", ["reasoning", "reasoning inside"])
def test_reasoning_is_trained_with_the_answer(shape: str) -> None:
    for family, before in (("qwen3", "<think>\n"), ("qwen3_5_think", "")):
        _, completion = texts(family, shape)
        assert completion == f"{before}Oslo is wet.\n</think>\n\n{SAID}<|im_end|>"
    analysis, final = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
    _, completion = texts("gptoss", shape)
    assert completion == f"{analysis}Oslo is wet.<|end|><|start|>assistant{final}{SAID}<|return|>"


@pytest.mark.parametrize(
    ("family", "question"),
    [
        ("qwen3_instruct_2507", "What is\nthe weather?"),  # it takes strings only
        ("llama3_1", "What is\nthe weather?"),
        ("gemma", "What is\nthe weather?"),
        ("qwen2_5_vl", "What isthe weather?"),  # it takes parts, and joins them in its own way
        ("llava_next", "What isthe weather?"),
    ],
)
def test_parts_are_kept_where_the_template_takes_them_and_joined_elsewhere(
    family: str, question: str
) -> None:
    prompt, completion = texts(family, "parts")
    assert question in prompt
    assert "'type'" not in prompt + completion
    assert completion.strip().startswith(SAID)


@pytest.mark.parametrize("family", ["gemma", "llama3", "cohere", "phi3"])
def test_calls_that_a_template_cannot_write_are_left_out(family: str) -> None:
    calling = example(says("user", "Oslo?"), says("assistant", None, tool_calls=[call(1, "Oslo")]))
    (found,) = ExampleTokenizer(ChatTemplate(tokenizer_of(family)), 512)([calling])
    assert found == Objection("template_drops_tool_calls", -1)


@pytest.mark.parametrize(
    ("family", "shape", "reason"),
    [
        ("llama3_1", "call with text", "template_drops_text"),
        ("llama3_1", "two calls", "template_refuses"),
        ("gptoss", "two calls", "template_drops_tool_calls"),
        ("lfm2", "call", "template_drops_tool_calls"),
        ("gemma", "system", "template_refuses"),
        ("gemma", "tools", "template_drops_tools"),
        ("qwen2_5", "reasoning", "template_drops_reasoning"),
        ("qwen3", "image", "content_not_text"),
    ],
)
def test_what_a_template_loses_is_left_out_with_its_reason(
    family: str, shape: str, reason: str
) -> None:
    assert outcome(family, shape) == reason


@pytest.mark.parametrize("family", ["lfm2_2_5", "llama3_1", "gptoss", "qwen2_5"])
def test_an_empty_list_of_calls_is_no_call(family: str) -> None:
    assert tokenize(family, "empty calls") == tokenize(family, "text")


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "lfm2"])
def test_a_developer_speaks_as_the_system_where_the_template_knows_no_developer(
    family: str,
) -> None:
    assert tokenize(family, "developer") == tokenize(family, "system")


@pytest.mark.parametrize("family", MARKED)
def test_marked_templates_give_the_same_outcomes(family: str) -> None:
    plain = family.removesuffix("_training")
    for shape in ("text", "system", "call"):
        marked = outcome(family, shape)
        assert marked in ("trained", outcome(plain, shape), "template_rewrites_prompt")


# Laws, over all families and any conversation

_numbers = count()
contents = st.text("abc é漢\n\"'{}<>/\\", max_size=12)


def _word() -> str:
    """A word that stands nowhere else."""
    return f"zq{next(_numbers)}x"


@st.composite
def conversations(draw: st.DrawFn) -> Any:
    """A prompt and an answer; every piece that is said has a word of its own."""

    def said() -> str:
        return f"{draw(contents)} {_word()} {draw(contents)}".strip()

    def content() -> Any:
        if draw(st.booleans()):
            return said()
        return [{"type": "text", "text": said()} for _ in range(draw(st.integers(1, 2)))]

    def calling(most: int, content: Any) -> Any:
        calls = [
            {
                "id": f"call0000{number}",
                "type": "function",
                "function": {"name": _word(), "arguments": f'{{"{_word()}": "{_word()}"}}'},
            }
            for number in range(draw(st.integers(0, most)))
        ]
        more = {"tool_calls": calls} if calls or draw(st.booleans()) else {}
        return says("assistant", content, **more)

    head = draw(st.sampled_from([None, "system", "developer"]))
    messages = [] if head is None else [says(head, content())]
    for _ in range(draw(st.integers(0, 2))):
        messages.append(says("user", content()))
        messages.append(calling(1, content()))
        if messages[-1].get("tool_calls"):
            messages.append(says("tool", said(), tool_call_id="call00000", name="f"))
            messages.append(says("assistant", said()))
    messages.append(says("user", content(), **({"name": "al"} if draw(st.booleans()) else {})))
    answer = calling(2, draw(st.sampled_from([None, ""])) if draw(st.booleans()) else content())
    if draw(st.booleans()):
        answer = {**answer, "reasoning_content": said()}
    tools = ({**TOOL, "function": {**TOOL["function"], "name": _word()}},)
    return example(*messages, answer, tools=tools if draw(st.booleans()) else ())


def _words(value: object) -> set[str]:
    return set(re.findall(r"zq\d+x", str(value)))


@pytest.mark.guarantee("learning")
@settings(max_examples=400)
@given(family=st.sampled_from(FAMILIES + MARKED), said=conversations())
def test_every_word_is_trained_in_its_place_or_the_row_is_left_out(family: str, said: Any) -> None:
    tokenizer = tokenizer_of(family)
    (found,) = ExampleTokenizer(ChatTemplate(tokenizer), 1 << 20)([said])
    if isinstance(found, Objection):
        assert found.reason in LEFT_OUT
        return
    prompt = tokenizer.decode(list(found.prompt))
    completion = tokenizer.decode(list(found.completions[0]))
    (answer,) = said.completions
    assert _words(said.prompt.messages) <= _words(prompt)
    assert _words(completion) == _words(answer.message)
    for word in _words(answer.message):
        assert completion.count(word) == 1 or family.startswith("muse")  # it names a call twice
    assert not re.search(r"['\"]type['\"]: ['\"]text", prompt + completion)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_and_shape_raises_an_error(family: str) -> None:
    for shape in SHAPES:
        assert outcome(family, shape) in {"trained", *LEFT_OUT}
