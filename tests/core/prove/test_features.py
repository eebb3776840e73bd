"""Features are read off a text: its length, its form, and what is wrong with it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentpref.prove import features as feature_module
from agentpref.prove.features import (
    features,
    gathered,
    is_blank,
    is_broken_off,
    is_canned,
    is_degenerate,
    most_common,
    opening,
    set_phrases,
)

CALL = '<tool_call>\n{"name": "lamp", "arguments": {"state": "on"}}\n</tool_call>'
BROKEN_CALL = '<tool_call>\n{"name": "lamp", "arguments": {"state": \n</tool_call>'
STORY = (
    "Once there was a small fox who lived beside the river. Every morning it went down to the "
    "water, and every evening it came back with a fish. One day the river was gone."
)


def read(text, **options):
    return features(text, tokens=len(text.split()) + 1, **options)


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u200b", "...", "—", "?!"])
def test_an_answer_without_a_letter_a_digit_or_a_symbol_is_blank(text):
    assert is_blank(text)
    assert read(text)["blank"] == 1.0


@pytest.mark.parametrize("text", ["a", "7", "👍", "はい", "=)", "€"])
def test_anything_that_says_something_is_not_blank(text):
    assert not is_blank(text)


@pytest.mark.parametrize(
    "text",
    [
        "Yes " * 24,
        "Yes.\n" * 12,
        "It opens at nine. " * 12,
        "It opens at nine. It opens at nine.",
        "I think that the the the the the the the the the the",
        "哈" * 12,
        "1. Use a fan in the room.\n2. Use a fan in the room.\n3. Use a fan in the room.\n",
        "No No No No No No",
        "no, no, no, no, no",
        "Yes\nYes\nYes\nYes\nYes",
        "нет нет нет нет нет",
        "नहीं नहीं नहीं नहीं नहीं",
    ],
)
def test_an_answer_that_says_the_same_over_and_over_is_degenerate(text):
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Yes",
        "no, no, no",
        "Ha ha ha ha!",
        "It is very, very, very good.",
        "Thank you, thank you, thank you!",
        "New York, New York",
        "1 1 2 3 5 8",
        "0 0 0 0 0 0",
        "- Yes\n- Yes\n- Yes\n- Yes\n- Yes\n- Yes",
        "1. no\n2. no\n3. no\n4. no\n5. no",
        "哈哈哈哈哈哈",
        "加油加油加油",
        "はい、はい、はい",
        "👍 👍 👍 👍 👍 👍",
        STORY,
        "- 200 g of flour\n- 200 g of sugar\n- 200 g of butter\n- 4 eggs",
        "To be or not to be, that is the question.",
        "Row, row, row your boat, gently down the stream.",
        "Monday: 9 to 5. Tuesday: 9 to 5. Wednesday: 9 to 1. Sunday: closed.",
    ],
)
def test_an_answer_that_repeats_some_words_is_not(text):
    assert not is_degenerate(text)


passages = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6)


@given(passages, passages, st.integers(1, 8), passages)
@example(list("ab"), list("abcd"), 2, [])
@example(["b"], ["a"], 5, ["b"])
@example(["b"], ["a"], 4, ["b"])
def test_repetition_is_found_whatever_its_period_and_wherever_it_stands(
    before, passage, times, after
):
    """By the definition: some stretch repeats what stands one period before it."""
    words = [*before, *passage * times, *after]
    size = len(words)
    runs = [*zip(words, words[1:], words[2:], strict=False)]
    if size < 8:
        expected = any(len({*words[at : at + 5]}) == 1 for at in range(size - 4))
    elif len(set(runs)) / len(runs) > 0.75:
        expected = False
    else:
        expected = size >= 40 and len(set(runs)) / len(runs) < 0.3
        for period in range(1, size):
            for start in range(size - period):
                end = start + period
                while end < size and words[end] == words[end - period]:
                    end += 1
                thrice = end - start >= 3 * period and end - start >= max(8, size / 2)
                twice = period >= 4 and start == 0 and end == size == 2 * period
                expected = expected or thrice or twice
    assert is_degenerate(" ".join(words)) == expected


def test_a_long_answer_is_read_by_few_periods(monkeypatch):
    """By every period, 15,000 words would take minutes."""
    read, periods = feature_module._longest_run, list[int]()
    monkeypatch.setattr(
        feature_module, "_longest_run", lambda words, n: periods.append(n) or read(words, n)
    )
    words = [word for n in range(2_500) for word in (f"w{n}", f"x{n}", f"v{n}")]
    is_degenerate(" ".join([*words, "and", *words]))
    assert 0 < len(periods) < 5


@pytest.mark.parametrize(
    "text",
    ["The shop is open because the", "We have apples, pears and", "Bring flour, eggs, milk,"],
)
def test_an_answer_that_stops_where_no_sentence_can_end_is_broken_off(text):
    assert is_broken_off(text)


@pytest.mark.parametrize(
    "text", ["", "Yes", "the", "It opens at nine", "what is it for?", STORY, "See 'The Who'", CALL]
)
def test_an_answer_without_a_full_stop_is_not_broken_off(text):
    assert not is_broken_off(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Certainly! The shop opens at nine.", "certainly"),
        ("Sure, here it is.", "sure"),
        ("I am sorry to hear that you wait.", "i am sorry"),
        ("Yes", None),
        ("Yes.", None),
        ("", None),
    ],
)
def test_an_opening_is_the_first_clause_or_three_words(text, expected):
    assert opening(text) == expected


def test_a_set_phrase_opens_a_tenth_of_the_answers():
    answers = [f"Certainly! It is number {n}." for n in range(4)]
    answers += [f"The {n}th one of all is here." for n in range(36)]
    assert set_phrases(answers) == {"certainly"}
    assert set_phrases([*answers, *(f"{n} is more than that." for n in range(10))]) == frozenset()
    phrases = set_phrases(answers)
    assert read("Certainly! At ten.", phrases=phrases)["set phrase at the beginning"] == 1.0
    assert "set phrase at the beginning" not in read("At ten, I think.", phrases=phrases)


def test_form_is_counted():
    text = "## Cake\n\nYou need:\n- flour\n- 4 eggs\n1. Mix!\n```\nbake()\n```\nReady?"
    found = read(text)
    assert (found["list items"], found["headings"], found["code blocks"]) == (3, 1, 1)
    assert (found["questions"], found["exclamation marks"], found["digits"]) == (1, 1, 2)
    assert found["lines"] == 9
    assert found["sentence mark at the end"] == 1.0
    assert "refusal" not in found


@pytest.mark.parametrize(
    ("text", "call", "valid"), [(CALL, 1.0, 1.0), (BROKEN_CALL, 1.0, 0.0), ("Lamp on.", 0.0, 0.0)]
)
def test_tool_calls_are_there_and_valid(text, call, valid):
    found = read(text)
    assert (found.get("tool call", 0.0), found.get("valid tool call", 0.0)) == (call, valid)


@pytest.mark.parametrize(
    ("text", "json"), [('{"a": 1}', 1.0), ("[1]", 1.0), ("1", 0.0), ("{", 0.0)]
)
def test_json_is_an_object_or_a_list(text, json):
    assert read(text).get("JSON", 0.0) == json


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I can’t do this.",
        "As an AI, I have no opinion.",
        "Das kann ich leider nicht sagen: es tut mir leid.",
        "Lo siento, no puedo ayudar.",
        "抱歉! 我无法回答",
    ],
)
def test_refusals_are_known_in_several_languages(text):
    assert read(text)["refusal"] == 1.0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The shop is open on all days of the week.", "written in English"),
        (
            "Das Geschäft ist an allen Tagen der Woche und auch im Winter offen.",
            "written in German",
        ),
        ("Le magasin est ouvert tous les jours de la semaine et des fêtes.", "written in French"),
        ("Магазин открыт каждый день", "Cyrillic letters"),
        ("店は毎日開いています", "CJK letters"),
    ],
)
def test_language_and_script_are_told(text, name):
    assert read(text)[name] > 0


def test_yes_and_no_are_told_by_the_first_word():
    assert read("Yes, it is.")["yes at the beginning"] == 1.0
    assert read("Nein!")["no at the beginning"] == 1.0
    assert "yes at the beginning" not in read("Yesterday, yes.")


def test_one_text_for_most_prompts_is_canned():
    canned = ["We will get back to you soon."] * 30 + ["No idea.", "At nine."]
    share, words = most_common(canned)
    assert (round(share, 2), words) == (0.94, 7)
    assert is_canned(share, words, usual=0.1)
    assert not is_canned(share, words, usual=0.9), "they were one text before"
    assert most_common([]) == (0.0, 0)


def test_answers_that_became_the_most_common_one_are_counted_against_those_that_were_it():
    assert gathered(["yes", "No", "no", "?"], ["no", "yes", " NO", "No "]) == (2, 1)
    assert gathered([], []) == (0, 0)


def test_labels_may_be_the_same_for_most_prompts_but_not_for_no_reason():
    assert not is_canned(1.0, 1, usual=0.1, wanted=0.8), "four in five chosen answers are that one"
    assert is_canned(1.0, 1, usual=0.1, wanted=0.5), "half of the chosen ones are another"
    assert is_canned(1.0, 1, usual=0.1, wanted=1.0), "a wish for one word whatever is asked"
    assert not is_canned(0.6, 1, usual=0.1, wanted=0.5), "yes and no are no canned answers"
