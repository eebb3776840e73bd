"""TRL's formats: every way to write a preference reads as the same record."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import ExchangeError
from agentpref.prefer.formats import PreferenceRecord, llamafactory, openai
from agentpref.prefer.formats.trl import write_preference, write_unpaired
from agentpref.prefer.rowreader import RowReader
from agentpref.record.messages import prompt_of
from agentpref.types import Message, Prompt


def read_row(row: dict[str, Any], format: str | None = None) -> PreferenceRecord:
    return RowReader(format).read(row)


def pair(prompt: Prompt, *answers: Message, tag: str | None = None) -> PreferenceRecord:
    return PreferenceRecord(prompt, answers, (1, 0), tag)


def thumb(prompt: Prompt, answer: Message, liked: bool, tag: str | None = None) -> PreferenceRecord:
    return PreferenceRecord(prompt, (answer,), (int(liked),), tag)


def turn(role: str, content: str | None, **rest: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **rest}


SKY = [turn("user", "What colour is the sky?")]
BLUE, GREEN = turn("assistant", "Blue."), turn("assistant", "Green.")
PREFERRED = pair(prompt_of(SKY), BLUE, GREEN)

WAYS_TO_SAY_IT: dict[str, dict[str, Any]] = {
    "text": {"prompt": "What colour is the sky?", "chosen": "Blue.", "rejected": "Green."},
    "text, prompt implied": {
        "chosen": "What colour is the sky? Blue.",
        "rejected": "What colour is the sky? Green.",
    },
    "messages": {"prompt": SKY, "chosen": [BLUE], "rejected": [GREEN]},
    "messages, prompt implied": {"chosen": [*SKY, BLUE], "rejected": [*SKY, GREEN]},
    "messages that repeat the prompt": {
        "prompt": SKY,
        "chosen": [*SKY, BLUE],
        "rejected": [*SKY, GREEN],
    },
    "messages that repeat a text prompt": {
        "prompt": "What colour is the sky?",
        "chosen": [*SKY, BLUE],
        "rejected": [*SKY, GREEN],
    },
    "text answers to messages": {"prompt": SKY, "chosen": "Blue.", "rejected": "Green."},
    "nulls and other columns": {
        "prompt": SKY,
        "chosen": [BLUE],
        "rejected": [GREEN],
        "tools": None,
        "tag": None,
        "score_chosen": 9.5,
    },
}


@pytest.mark.parametrize("row", WAYS_TO_SAY_IT.values(), ids=WAYS_TO_SAY_IT)
def test_every_way_to_write_a_preference_reads_as_the_same_record(row: dict[str, Any]) -> None:
    assert read_row(row) == PREFERRED


@pytest.mark.parametrize("prompt", ["What colour is the sky?", SKY])
@pytest.mark.parametrize("completion", ["Blue.", [BLUE]])
@pytest.mark.parametrize("label", [True, 1])
def test_every_way_to_write_a_thumb_reads_as_the_same_record(
    prompt: Any, completion: Any, label: Any
) -> None:
    row = {"prompt": prompt, "completion": completion, "label": label}
    assert read_row(row) == thumb(prompt_of(SKY), BLUE, True)


def test_turns_that_both_sides_share_are_part_of_the_prompt() -> None:
    shared = [turn("assistant", "Day or night?"), turn("user", "Day.")]
    row = {"prompt": SKY, "chosen": [*shared, BLUE], "rejected": [*shared, GREEN]}
    assert read_row(row) == pair(prompt_of([*SKY, *shared]), BLUE, GREEN)


def test_a_text_prompt_beside_whole_conversations_adds_nothing_to_them() -> None:
    briefed = [turn("system", "Be brief."), *SKY]
    row = {
        "prompt": "What colour is the sky?",
        "chosen": [*briefed, BLUE],
        "rejected": [*briefed, GREEN],
    }
    assert read_row(row) == pair(prompt_of(briefed), BLUE, GREEN)


def test_an_implied_prompt_ends_between_words() -> None:
    row = read_row({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert row.prompt.messages == (turn("user", "The sky is"),)
    assert row.completions[1]["content"] == "black."


def test_tools_are_offered_with_the_prompt_in_either_form() -> None:
    tool = {"type": "function", "function": {"name": "look_up"}}
    answers = {"prompt": SKY, "chosen": [BLUE], "rejected": [GREEN]}
    as_list = read_row({**answers, "tools": [tool]})
    as_text = read_row({**answers, "tools": '[{"type":"function","function":{"name":"look_up"}}]'})
    assert as_list == as_text
    assert as_list.prompt == prompt_of(SKY, [tool])


def test_an_answer_may_be_a_tool_call() -> None:
    call = turn("assistant", None, tool_calls=[{"id": "1", "function": {"name": "look_up"}}])
    row = read_row({"prompt": SKY, "chosen": [call], "rejected": [BLUE]})
    assert row.completions[0] == call


FILLED_UP = {"name": None, "tool_calls": [], "tool_call_id": None, "refusal": None}


def test_null_fields_and_empty_tool_calls_of_messages_are_as_if_absent() -> None:
    row = {
        "prompt": [SKY[0] | FILLED_UP],
        "chosen": [BLUE | FILLED_UP],
        "rejected": [GREEN | FILLED_UP],
    }
    assert read_row(row) == PREFERRED


def test_nulls_in_a_call_are_as_if_absent_but_not_in_its_arguments() -> None:
    function = {"name": "look_up", "arguments": {"of": None}}
    full = {"id": None, "index": None, "function": {**function, "strict": None}}
    row = {"prompt": SKY, "chosen": [turn("assistant", None, tool_calls=[full])], "rejected": "No."}
    called = read_row(row).completions[0]
    assert called == turn("assistant", None, tool_calls=[{"function": function}])


def test_reasoning_is_kept() -> None:
    thought = BLUE | {"reasoning_content": "Rayleigh."}
    row = {"prompt": SKY, "chosen": [thought], "rejected": [GREEN]}
    assert read_row(row).completions[0] == thought


class TestTheQuestionIsNeitherLostNorDoubled:
    """What a row's prompt, and the turns that both answers share, make together."""

    ASK, WHEN = turn("user", "What colour is the sky?"), turn("user", "At noon.")
    BACK, BRIEF = turn("assistant", "When?"), turn("system", "Be brief.")
    TEXT = "What colour is the sky?"

    @pytest.mark.parametrize(
        ("prompt", "shared", "made"),
        [
            # a text, before turns that begin with the assistant or a system prompt
            (TEXT, [BACK, WHEN], [ASK, BACK, WHEN]),
            (TEXT, [BRIEF], [BRIEF, ASK]),
            (TEXT, [BRIEF, BACK, WHEN], [BRIEF, ASK, BACK, WHEN]),
            # the answers repeat it
            (TEXT, [ASK, BACK, WHEN], [ASK, BACK, WHEN]),
            (TEXT + "\n", [BRIEF, ASK], [BRIEF, turn("user", TEXT + "\n")]),
            ("At noon.", [ASK, BACK, WHEN], [ASK, BACK, WHEN]),
            ("Be brief.", [BRIEF, ASK], [BRIEF, ASK]),
            (TEXT, [turn("user", [{"type": "text", "text": TEXT}])], [ASK]),
            ([ASK], [ASK | {"name": None}], [ASK]),
            ([ASK], [turn("user", TEXT + " ")], [ASK]),
            ([ASK], [BRIEF, ASK, BACK, WHEN], [BRIEF, ASK, BACK, WHEN]),
            ([BRIEF, ASK], [ASK, BACK, WHEN], [BRIEF, ASK, BACK, WHEN]),
            ([BRIEF, ASK, BACK, WHEN], [WHEN], [BRIEF, ASK, BACK, WHEN]),
            # the answers go on
            ([ASK], [BACK, WHEN], [ASK, BACK, WHEN]),
            ([ASK, BACK], [WHEN], [ASK, BACK, WHEN]),
            ("", [ASK], [ASK]),
            ([], [ASK], [ASK]),
        ],
    )
    def test_joined(self, prompt: Any, shared: list[Any], made: list[Any]) -> None:
        row = {"prompt": prompt, "chosen": [*shared, BLUE], "rejected": [*shared, GREEN]}
        assert read_row(row) == pair(prompt_of(made), BLUE, GREEN)
        row = {"prompt": prompt, "completion": [*shared, BLUE], "label": True}
        assert read_row(row) == thumb(prompt_of(made), BLUE, True)

    @pytest.mark.parametrize(
        ("prompt", "shared"),
        [("Be brief.", [ASK]), ("At noon.", [BRIEF, ASK]), ([WHEN], [BRIEF, ASK])],
    )
    def test_refused_where_it_would_have_to_be_guessed(
        self, prompt: Any, shared: list[Any]
    ) -> None:
        row = {"prompt": prompt, "chosen": [*shared, BLUE], "rejected": [*shared, GREEN]}
        with pytest.raises(ExchangeError, match="the answers begin with other messages than"):
            read_row(row)

    def test_shared_turns_may_differ_in_blanks_and_nulls(self) -> None:
        row = {
            "chosen": [self.ASK | {"name": None}, BLUE],
            "rejected": [turn("user", self.TEXT + " "), GREEN],
        }
        assert read_row(row) == PREFERRED


class TestSystemColumns:
    ROW: ClassVar = {"prompt": "What colour is the sky?", "chosen": "Blue.", "rejected": "Green."}
    BRIEF = turn("system", "Be brief.")

    @pytest.mark.parametrize("key", ["system", "system_prompt"])
    def test_a_system_prompt_goes_before_the_prompt(self, key: str) -> None:
        assert read_row({**self.ROW, key: "Be brief."}).prompt == prompt_of([self.BRIEF, *SKY])
        row = {"prompt": "What colour is the sky?", "completion": "Blue.", "label": 1}
        assert read_row({**row, key: "Be brief."}).prompt == prompt_of([self.BRIEF, *SKY])

    @pytest.mark.parametrize("system", [None, "", " ", float("nan")])
    def test_an_empty_system_prompt_is_none(self, system: Any) -> None:
        assert read_row({**self.ROW, "system": system}) == PREFERRED

    def test_a_system_prompt_that_the_prompt_has_is_not_doubled(self) -> None:
        row = {**self.ROW, "prompt": [self.BRIEF, *SKY], "system": "Be brief.\n"}
        assert read_row(row).prompt == prompt_of([self.BRIEF, *SKY])

    def test_two_system_prompts_are_refused(self) -> None:
        row = {**self.ROW, "prompt": [self.BRIEF, *SKY], "system": "Be polite."}
        with pytest.raises(
            ExchangeError, match=r"'system' is a str of 10 characters.* keep one of them"
        ):
            read_row(row)


class TestTranscripts:
    """Rows of HH-RLHF and of what was made of it."""

    FIRST = "\n\nHuman: Is the sky blue?\n\nAssistant: When?\n\nHuman: At noon.\n\nAssistant:"
    ASKED = (
        turn("user", "Is the sky blue?"), turn("assistant", "When?"), turn("user", "At noon.")
    )  # fmt: skip
    READ = pair(prompt_of(ASKED), BLUE, GREEN)

    def test_two_transcripts_become_messages(self) -> None:
        row = {"chosen": self.FIRST + " Blue.", "rejected": self.FIRST + " Green."}
        assert read_row(row) == self.READ

    def test_a_prompt_that_is_a_transcript_becomes_messages(self) -> None:
        row = {"prompt": self.FIRST, "chosen": "Blue.", "rejected": "Green."}
        assert read_row(row) == self.READ
        row = {"prompt": self.FIRST, "completion": "Blue.", "label": False}
        assert read_row(row) == thumb(prompt_of(self.ASKED), BLUE, False)

    def test_a_question_beside_transcripts_is_not_doubled(self) -> None:
        sides = {"chosen": self.FIRST + " Blue.", "rejected": self.FIRST + " Green."}
        for prompt in ("Is the sky blue?", self.FIRST):
            assert read_row({"prompt": prompt, **sides}) == self.READ

    def test_transcripts_that_differ_in_an_earlier_turn_are_refused(self) -> None:
        other = self.FIRST.replace("When?", "Where?")
        row = {"chosen": self.FIRST + " Blue.", "rejected": other + " Green."}
        with pytest.raises(ExchangeError, match="differ before their last message"):
            read_row(row)

    def test_a_transcript_that_ends_with_the_human_is_refused(self) -> None:
        cut = self.FIRST.removesuffix("\n\nAssistant:")
        row = {"chosen": cut, "rejected": self.FIRST + " Green."}
        with pytest.raises(ExchangeError, match="'chosen' is a transcript that ends with 'Human:'"):
            read_row(row)

    def test_a_prompt_that_only_begins_like_a_transcript_stays_text(self) -> None:
        text = "Human: hi\n\nAssistant: hello\n\nContinue this dialogue."
        row = {"prompt": text, "chosen": "Blue.", "rejected": "Green."}
        assert read_row(row).prompt == prompt_of([turn("user", text)])


@pytest.mark.parametrize("key", ["image", "images", "videos", "audio"])
def test_a_row_with_pictures_or_sounds_is_refused(key: str) -> None:
    row = {"prompt": SKY, "chosen": [BLUE], "rejected": [GREEN]}
    reader = RowReader()
    assert reader.read({**row, key: []}) == PREFERRED
    assert not reader.ignored
    with pytest.raises(ExchangeError, match=f"the row has '{key}', and agentpref would train"):
        read_row({**row, key: [{"path": "sky.png"}]})


@pytest.mark.parametrize("label", [np.bool_(True), np.int64(1), Decimal("1"), Decimal("1.0"), 1.0])
def test_a_label_of_numpy_and_a_decimal_are_labels(label: Any) -> None:
    row = {"prompt": SKY, "completion": [BLUE], "label": label}
    assert read_row(row) == thumb(prompt_of(SKY), BLUE, True)
    assert PreferenceRecord(prompt_of(SKY), (BLUE,), (label,)).labels == (1.0,)


def test_a_row_that_fits_both_formats_is_a_preference_unless_the_format_is_named() -> None:
    both = {**WAYS_TO_SAY_IT["messages"], "completion": [GREEN], "label": False}
    assert read_row(both) == PREFERRED
    assert read_row(both, "unpaired") == thumb(prompt_of(SKY), GREEN, False)


BAD_ROWS = {
    "the row has the keys 'prompt', 'chosen' and lacks 'rejected'; write 'prompt', 'chosen', "
    "'rejected' in every row of the preference format": {"prompt": "a", "chosen": "b"},
    "lacks 'label'; write 'prompt', 'completion', 'label' in every row of the unpaired": {
        "prompt": "a",
        "completion": "b",
    },
    "lacks 'chosen'": {"prompt": "a", "chosen": None, "rejected": "b"},
    "the row has the keys none": {},
    "'chosen' is 7; write text, or a list": {"prompt": "a", "chosen": 7, "rejected": "b"},
    "'rejected' is []; write text": {"prompt": "a", "chosen": "b", "rejected": []},
    "are not two answers after one beginning": {"chosen": "yes", "rejected": "no"},
    "'chosen' and 'rejected' are not two": {"chosen": "The sky", "rejected": "The sky"},
    "the row has no prompt": {"chosen": [BLUE], "rejected": [GREEN]},
    "differ before their last message": {
        "chosen": [*SKY, BLUE],
        "rejected": [turn("user", "And the sea?"), GREEN],
    },
    "the output has role 'user'": {"prompt": SKY, "chosen": SKY, "rejected": [BLUE]},
    "message 0 has role a str of 5 characters": {
        "prompt": [turn("human", "hi")],
        "chosen": "a",
        "rejected": "b",
    },
    "'label' is a str of 4 characters; write true": {
        "prompt": "a",
        "completion": "b",
        "label": "good",
    },
    "no 'prompt' but a 'question'; rename it": {
        "question": "What is above?",
        "chosen": "The sky is above.",
        "rejected": "The sky is below.",
    },
    "'tools' is 7; write a list of tools": {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "tools": 7,
    },
    "'tools' is not JSON": {"prompt": "a", "chosen": "b", "rejected": "c", "tools": "look_up"},
    "tool 0 is a str": {"prompt": "a", "chosen": "b", "rejected": "c", "tools": ["look_up"]},
}


@pytest.mark.parametrize(("complaint", "row"), BAD_ROWS.items(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_with_its_cure(complaint: str, row: dict[str, Any]) -> None:
    with pytest.raises(ExchangeError) as refused:
        read_row(row)
    assert complaint in str(refused.value)


texts = st.text(st.characters(codec="utf-8"))
prompts = st.lists(
    st.builds(turn, st.sampled_from(["system", "user", "assistant"]), texts), min_size=1
)
answers = st.builds(turn, st.just("assistant"), texts)


@given(prompts, answers, answers, st.sampled_from([(), ({"name": "look_up"},)]))
def test_a_written_pair_reads_back_as_the_same_record(
    messages: list[dict[str, Any]], chosen: Any, rejected: Any, tools: tuple[Any, ...]
) -> None:
    prompt = prompt_of(messages, tools)
    told = pair(prompt, chosen, rejected, tag="chat")
    assert read_row(_as_json(write_preference(told))) == told


@given(prompts, answers, st.booleans())
def test_a_written_thumb_reads_back_as_the_same_record(
    messages: list[dict[str, Any]], completion: Any, desirable: bool
) -> None:
    prompt = prompt_of(messages)
    told = thumb(prompt, completion, desirable, tag="chat")
    assert read_row(_as_json(write_unpaired(told))) == told


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}


class TestMessagesAsText:
    """Tables of text hold messages as JSON."""

    def test_a_list_of_messages_in_json_is_messages(self) -> None:
        written = {key: json.dumps(value) for key, value in WAYS_TO_SAY_IT["messages"].items()}
        assert read_row(written) == PREFERRED

    @pytest.mark.parametrize("text", ['[{"colour": "blue"}]', "[{blue}]", '["Blue."]', "[{}]"])
    def test_other_text_stays_text(self, text: str) -> None:
        record = read_row({"prompt": "In JSON?", "chosen": text, "rejected": "No."})
        assert record.completions[0] == turn("assistant", text)


class TestTemplateArguments:
    ROW: ClassVar[dict[str, Any]] = {**WAYS_TO_SAY_IT["text"]}

    def test_arguments_of_the_chat_template_are_kept_and_written_again(self) -> None:
        arguments = {"enable_thinking": False}
        record = read_row({**self.ROW, "chat_template_kwargs": {**arguments, "other": None}})
        assert record.prompt.chat_template_kwargs == arguments
        assert read_row(json.loads(json.dumps(write_preference(record)))) == record

    def test_arguments_that_are_no_object_are_refused(self) -> None:
        with pytest.raises(
            ExchangeError, match=r"'chat_template_kwargs' is a list of 1; write names"
        ):
            read_row({**self.ROW, "chat_template_kwargs": [1]})

    @pytest.mark.parametrize("write", [openai.write, llamafactory.write])
    def test_formats_without_a_place_for_them_refuse_them(self, write: Any) -> None:
        record = read_row({**self.ROW, "chat_template_kwargs": {"enable_thinking": False}})
        with pytest.raises(ExchangeError, match="choose another format, such as 'preference'"):
            write(record)

    def test_redaction_keeps_them(self) -> None:
        record = read_row({**self.ROW, "chat_template_kwargs": {"enable_thinking": False}})
        assert record.redacted(str.upper).prompt.chat_template_kwargs == {"enable_thinking": False}


class TestAPromptThatBothAnswersRepeat:
    def test_it_stands_once_in_text(self) -> None:
        asked = "What colour is the sky?"
        row = {"prompt": asked, "chosen": f"{asked} Blue.", "rejected": f"{asked}\nGreen."}
        assert read_row(row) == PREFERRED

    @pytest.mark.parametrize("rejected", ["Green.", "What colour is the sky?!"])
    def test_an_answer_that_alone_begins_with_it_stays_whole(self, rejected: str) -> None:
        chosen = "What colour is the sky? Blue."
        record = read_row({"prompt": SKY[0]["content"], "chosen": chosen, "rejected": rejected})
        assert [message["content"] for message in record.completions] == [chosen, rejected]
