"""Only the tokens of the last answer are trained, whatever the messages and the template say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentpref.learn.encode import encode
from agentpref.models.base import find_base
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import encode_prompt
from agentpref.types import Example, Message, Prompt
from tests.core.learn.examples import make_pair

END = "<|im_end|>"
HEADER = "<|im_start|>assistant\n"
TEMPLATE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}BEFORE{% generation %}{{ m.content }}INSIDE{% endgeneration %}AFTER
{%- else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def template(*, before: str = "", inside: str = "", after: str = "") -> str:
    marked = TEMPLATE.replace("BEFORE", before).replace("INSIDE", inside)
    return marked.replace("AFTER", after)


MARKED = template(inside=END)


def without_marks(chat_template: str) -> str:
    return re.sub(r"\{% (end)?generation %\}", "", chat_template)


UNMARKED = without_marks(MARKED)


def load(folder: Path, chat_template: str | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def marked(random_base: Path) -> Any:
    return load(random_base, MARKED)


@pytest.fixture(scope="module")
def unmarked(random_base: Path) -> Any:
    return load(random_base, UNMARKED)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load(find_base("tiny"))


def says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def pair_of(messages: list[Message], chosen: str, rejected: str) -> Example:
    return make_pair(0, chosen, rejected, prompt=Prompt("", tuple(messages)))


def trained(tokenizer: Any, pair: Example) -> tuple[str, str, str]:
    """What stands in the prompt and in the two completions, as text."""
    found = encode([pair], ChatTemplate(tokenizer), max_length=4096)
    assert not found.left_out
    (row,) = found.rows
    assert row.prompt == encode_prompt(pair.prompt, ChatTemplate(tokenizer))
    prompt, chosen, rejected = (tokenizer.decode(list(i)) for i in (row.prompt, *row.completions))
    return prompt, chosen, rejected


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
spelling = st.sampled_from([END, "<|im_start|>", HEADER, f"{END}\n{HEADER}", "<|pad|>", "{{ x }}"])
anything = st.lists(words | spelling, max_size=4).map("".join)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), anything), max_size=4)
conversations = st.builds(
    lambda system, between, last: [
        *([] if system is None else [says("system", system)]),
        *(says(role, text) for role, text in between),
        says("user", last),
    ],
    st.none() | anything,
    turns,
    anything,
)


@given(messages=conversations, chosen=words, rejected=words)
def test_only_the_answers_are_trained_whatever_the_prompt_says(
    marked: Any, unmarked: Any, tiny: Any, messages: Any, chosen: str, rejected: str
) -> None:
    if chosen == rejected:
        return
    for tokenizer in (marked, unmarked, tiny):
        prompt, *answers = trained(tokenizer, pair_of(messages, chosen, rejected))
        assert answers == [chosen + END, rejected + END]
        assert prompt.endswith(HEADER)


@given(messages=conversations, chosen=words, rejected=words)
def test_templates_with_and_without_marks_give_the_same_tokens(
    marked: Any, unmarked: Any, messages: Any, chosen: str, rejected: str
) -> None:
    pair = pair_of(messages, chosen, rejected)
    by_marks = encode([pair], ChatTemplate(marked), max_length=4096)
    assert by_marks == encode([pair], ChatTemplate(unmarked), max_length=4096)


@given(messages=conversations, answer=words.filter(lambda text: text[:1].strip()))
def test_the_trained_tokens_are_those_of_transformers_assistant_mask(
    marked: Any, messages: Any, answer: str
) -> None:
    """``apply_chat_template`` masks nothing of an answer that begins with white space."""
    pair = pair_of(messages, answer, "")
    (row,) = encode([pair], ChatTemplate(marked), max_length=4096).rows
    out = marked.apply_chat_template(
        [*messages, pair.completions[0].message],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = out["input_ids"], out["assistant_masks"]
    last = len(mask) - 1 - mask[::-1].index(1)
    first = last - mask[last::-1].index(0) + 1
    assert tuple(ids[first : last + 1]) == row.completions[0]
    assert tuple(ids[:first]) == row.prompt


def test_earlier_turns_tool_calls_and_results_are_in_the_prompt(tiny: Any) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    messages = [
        says("user", "Hello"),
        says("assistant", "Hi, who are you?"),
        says("user", "Look."),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        says("tool", "It is blue."),
    ]
    prompt, chosen, rejected = trained(tiny, pair_of(messages, "Blue.", "Red."))
    assert (chosen, rejected) == (f"Blue.{END}", f"Red.{END}")
    assert all(text in prompt for text in ("who are you?", '"look"', "It is blue."))


@pytest.mark.parametrize("after", [END, f" {END}"])
def test_the_end_of_the_turn_is_trained_where_the_marked_block_ends_before_it(
    random_base: Path, after: str
) -> None:
    tokenizer = load(random_base, template(after=after))
    _, *answers = trained(tokenizer, pair_of([says("user", "Hi")], "Yes ", " no"))
    assert answers == [f"Yes {after}", f" no{after}"]


@pytest.mark.parametrize("words", [{"before": "Well: "}, {"after": f"So.{END}"}])
def test_a_template_that_adds_words_to_the_answer_is_counted(
    random_base: Path, words: dict[str, str]
) -> None:
    tokenizer = load(random_base, template(**{"inside": END, **words}))
    found = encode(
        [pair_of([says("user", "Hi")], "Yes", "No")], ChatTemplate(tokenizer), max_length=64
    )
    assert (found.rows, found.left_out) == ([], {"template_adds_text": 1})


def test_a_template_that_marks_only_other_answers_is_counted(random_base: Path) -> None:
    tokenizer = load(random_base, MARKED.replace("m.role == 'assistant'", "m.content == 'x'"))
    found = encode(
        [pair_of([says("user", "Hi")], "Yes", "No")], ChatTemplate(tokenizer), max_length=64
    )
    assert found.left_out == {"template_marks_elsewhere": 1}


def test_adjacent_marked_blocks_are_one_answer(random_base: Path) -> None:
    halves = template(inside="{% endgeneration %}{% generation %}" + END)
    _, *answers = trained(load(random_base, halves), pair_of([says("user", "Hi")], "Yes", "No"))
    assert answers == [f"Yes{END}", f"No{END}"]


def test_nothing_after_an_end_of_turn_is_trained_where_it_is_not_the_end_of_text(
    random_base: Path,
) -> None:
    """Gemma's turns end with a special token that its tokenizer does not call the end."""
    tokenizer = load(random_base, UNMARKED)
    tokenizer.eos_token = "<|pad|>"
    _, *answers = trained(tokenizer, pair_of([says("user", "Hi")], "Yes", "No"))
    assert answers == [f"Yes{END}", f"No{END}"]


def test_a_special_token_before_the_answer_does_not_cut_it(random_base: Path) -> None:
    """Mistral's templates begin a call with one."""
    calling = template(before="<|im_start|>").replace("{{ '\\n' }}", "")
    tokenizer = load(random_base, without_marks(calling))
    _, *answers = trained(tokenizer, pair_of([says("user", "Hi")], "Yes", "No"))
    assert answers == ["<|im_start|>Yes", "<|im_start|>No"]


def test_an_answer_is_tokenized_apart_where_a_token_would_span_the_boundary(
    random_base: Path,
) -> None:
    bare = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if messages[-1].role == 'assistant' "
        "%}<|im_end|>{% endif %}"
    )
    tokenizer = load(random_base, bare)
    prompt, chosen, _ = trained(tokenizer, pair_of([says("user", "The ti")], "de comes", "no"))
    assert (prompt, chosen) == ("The ti", f"de comes{END}")
    joint = tokenizer("The tide comes", add_special_tokens=False)["input_ids"]
    apart = tokenizer("The ti", add_special_tokens=False)["input_ids"]
    assert joint[: len(apart)] != apart


def test_no_start_of_text_is_added_to_an_answer_after_a_prompt(random_base: Path) -> None:
    """Tokenizers such as Llama 2's mark the start of a text, and so of an answer on its own."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer = load(random_base)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace("Q", "always"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}:{% else %}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    found = encode(
        [pair_of([says("user", "Hi")], "yes", "no")], ChatTemplate(tokenizer), max_length=64
    )
    assert tokenizer.decode(list(found.rows[0].completions[0])) == f"yes{END}"
    assert tokenizer.decode(tokenizer("yes", add_special_tokens=False)["input_ids"]) == "Qyes"
