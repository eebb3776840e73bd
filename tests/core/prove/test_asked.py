"""What pairs ask for is tested exactly: random labels ask for nothing."""

from __future__ import annotations

import random
from itertools import zip_longest

import pytest

from agentpref.prove.asked import JudgedAnswers, asked, odd_by_tag, odd_wishes
from agentpref.prove.features import features
from agentpref.prove.signs import sign_test

RARELY = 0.07
TRIALS = 100
WORDS = ("stone", "river", "lamp", "garden", "winter", "seven")


def read(text):
    return features(text, tokens=len(text.split()) + 1)


def pair(n, chosen, rejected, prompt=None):
    return JudgedAnswers(prompt or f"p{n}", read(chosen), read(rejected))


def wishes(judged):
    return {one.feature: one.direction for one in asked(judged)}


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def test_shorter_answers_are_asked_for_where_the_chosen_ones_are_shorter():
    rng = random.Random(0)
    judged = [
        pair(n, sentence(rng, rng.randint(5, 20)), sentence(rng, rng.randint(15, 40)))
        for n in range(40)
    ]
    found = {one.feature: one for one in asked(judged)}
    assert found["words"].direction == found["tokens"].direction == -1
    assert found["words"].chosen < found["words"].rejected
    assert found["words"].size == found["words"].rejected - found["words"].chosen
    assert found["words"].p < 1e-4


@pytest.mark.parametrize(
    ("chosen", "rejected", "name", "direction"),
    [
        ("- stone\n- river {}", "stone, river {}", "list items", 1),
        ("It is stone {}.", "Sure! It is stone {}!", "exclamation marks", -1),
        ('{{"answer": {}}}', "answer {}", "JSON", 1),
        ("Yes, stone {}.", "No, stone {}.", "yes at the beginning", 1),
        ("Stein {} ist der Mann und das Boot", "the stone {} is of wood", "written in German", 1),
    ],
)  # fmt: skip
def test_formats_and_languages_are_asked_for(chosen, rejected, name, direction):
    judged = [pair(n, chosen.format(n), rejected.format(n)) for n in range(20)]
    assert wishes(judged)[name] == direction


def test_few_prompts_ask_for_nothing_however_many_pairs_they_have():
    many = [pair(n, "short", "a much longer answer", prompt=f"p{n % 4}") for n in range(400)]
    assert asked(many) == ()
    assert asked([]) == ()


@pytest.mark.guarantee("proof", f"at most {RARELY:.0%} of {TRIALS} sets of 30 random labels")
def test_random_labels_rarely_ask_for_anything():
    rng, found = random.Random(5), 0
    for _ in range(TRIALS):
        judged = []
        for n in range(30):
            sides = [
                sentence(rng, rng.randint(3, 40)) + rng.choice([".", "!", "?", ""]) for _ in "ab"
            ]
            judged.append(pair(n, *sides))
        found += bool(asked(judged))
    assert found / TRIALS <= RARELY


def test_a_difference_too_small_to_mean_anything_is_no_wish():
    judged = [pair(n, "word " * 99, "word " * 100) for n in range(200)]
    assert "words" not in wishes(judged)


def test_harm_is_never_asked_for():
    judged = [pair(n, "Yes " * 24, f"It is {n}, I think.") for n in range(40)]
    assert {"repeats itself", "repeated runs of four words"}.isdisjoint(wishes(judged))
    assert wishes(judged)["words"] == 1
    assert "blank" not in wishes([pair(n, " ", f"It is {n}.") for n in range(40)])


def test_lone_thumbs_ask_by_what_was_liked_and_what_was_not():
    rng = random.Random(1)
    liked = [JudgedAnswers(f"p{n}", read(sentence(rng, 4 + n % 5)), None) for n in range(20)]
    disliked = [JudgedAnswers(f"q{n}", None, read(sentence(rng, 20 + n % 5))) for n in range(20)]
    assert wishes([*liked, *disliked])["words"] == -1
    assert asked(liked) == (), "likes alone compare nothing"


def test_thumbs_that_want_the_opposite_of_the_pairs_cancel_them():
    pairs = [pair(n, "short", "a much longer answer " * 3) for n in range(40)]
    liked = [JudgedAnswers(f"a{n}", read("a much longer answer " * 3), None) for n in range(40)]
    disliked = [JudgedAnswers(f"b{n}", None, read("short")) for n in range(40)]
    assert wishes(pairs)["words"] == -1
    assert "words" not in wishes([*pairs, *liked, *disliked])


def test_the_sign_test_is_exact():
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(5, 0, one_sided=True) == pytest.approx(1 / 32)
    assert sign_test(0, 0) == 1.0


def odd(chosen, rejected):
    return [one.message for one in odd_wishes([*zip_longest(chosen, rejected)])]


def test_chosen_answers_that_nobody_can_have_meant_are_counted_without_quoting_them():
    fine = [f"It is {n} o'clock." for n in range(9)]
    (blank,) = odd([" "] * 31 + fine, [f"No {n}." for n in range(40)])
    assert blank.startswith("31 of 40 chosen answers are blank: an app that logs before")
    (same,) = odd(["Yes " * 24, *fine], fine)
    assert same.startswith("1 of 10 chosen answers repeat themselves: ")
    (cut,) = odd(["It is open because the", *fine], fine)
    assert cut.startswith("1 of 10 chosen answers break off within a sentence: ")
    (canned,) = odd(["Secret words."] * 20, [f"No {n}." for n in range(20)])
    assert canned.startswith("20 of 20 chosen answers are one and the same text: ")
    assert "Secret" not in canned
    assert odd(["Yes", "No"] * 20, ["No", "Yes"] * 20) == []
    assert odd(["Yes"] * 40, ["No"] * 40) == [], "labels of an app that has two"
    assert odd(["Yes"] * 34 + ["No"] * 6, [f"It is {n}." for n in range(40)]) == [], "six noes"
    assert odd([], []) == []


def test_chosen_answers_that_are_the_other_one_cut_between_two_words_break_off():
    whole = [
        f"I have set a timer of {n} minutes for the rice, and I will tell you." for n in range(40)
    ]
    cut = [text[: text.index(" for")] for text in whole]
    (told,) = odd(cut, whole)
    assert told.startswith("40 of 40 chosen answers break off within a sentence: ")
    assert odd([f"{text}." for text in cut], whole) == [], "a sentence of its own"
    assert odd([text[: text.index(",")] for text in whole], whole) == [], "some like no full stop"
    assert odd(["Yes"] * 20 + ["No"] * 20, [f"Yes {n}" for n in range(40)]) == []


def test_odd_wishes_rule_where_they_are_half_of_all():
    fine = [f"It is {n} o'clock." for n in range(10)]
    for blank, rules in ((10, True), (9, False)):
        judged = zip_longest([*[" "] * blank, *fine], fine)
        assert [one.rules for one in odd_wishes([*judged])] == [rules]


def test_a_short_answer_is_in_no_other_language_than_a_long_one():
    """Brevity was also "fewer written in English", which no brief model can move."""
    long = "The museum is open from nine to five, and the last tour is at four."
    brief = [pair(n, "Nine to five.", f"{long} {n}") for n in range(40)]
    assert not [name for name in wishes(brief) if name.startswith("written in")]


CALL = '<tool_call>{{"name": "lamp", "arguments": {{"number": {}}}}}</tool_call>'


def test_chosen_calls_whose_json_does_not_parse_are_counted():
    whole = [CALL.format(n) for n in range(20)]
    prose = [f"I would turn lamp {n} on." for n in range(20)]
    cut = [call.replace("}}", "") for call in whole]
    (told,) = odd_wishes([*zip(cut, prose, strict=True)])
    assert told.message.startswith("20 of 20 chosen answers call tools in JSON that does not parse")
    assert told.rules
    assert odd(whole, prose) == []
    other = [f"<tool_call>\n<function=lamp>\n{n}\n</function>\n</tool_call>" for n in range(20)]
    assert odd(other, prose) == [], "some templates have calls in another notation"


def in_tags(**groups):
    return [(tag, pair) for tag, pairs in groups.items() for pair in pairs]


DONE = [("Done.", f"It is number {n}.") for n in range(80)]
HONEST = [("Yes", "No"), ("No", "Yes")] * 50


def test_what_nobody_means_is_seen_in_its_tag_however_much_else_there_is():
    """80 of 180 were less than half, and a candidate of both was blamed on the honest tag."""
    (told,) = odd_by_tag(in_tags(done=DONE, care=HONEST))
    assert (told.rules, told.tags, told.count, told.total) == (True, {"done"}, 80, 80)
    assert told.message.startswith("tag done: 80 of 80 chosen answers are one and the same text")
    blank = in_tags(empty=[(" ", "No")] * 40, care=HONEST)
    assert [one.tags for one in odd_by_tag(blank)] == [{"empty"}]
    (alone,) = odd_by_tag(in_tags(done=DONE))
    assert (alone.tags, alone.message[:8]) == ({"done"}, "80 of 80")


def test_what_does_not_rule_in_any_tag_is_told_of_all_of_them():
    some = [(" ", "No")] * 3 + HONEST[:7]
    (told,) = odd_by_tag(in_tags(a=some, b=some))
    assert (told.rules, told.tags) == (False, frozenset())
    assert told.message.startswith("6 of 20 chosen answers are blank")


def test_tags_of_a_few_answers_are_looked_at_together():
    blank = {f"customer {n}": [(" ", "No")] for n in range(9)}
    (told,) = odd_by_tag(in_tags(care=HONEST, **blank))
    assert told.tags == blank.keys()
    assert told.message.startswith("9 small tags: 9 of 9 chosen answers are blank")
    del blank["customer 8"], blank["customer 7"]
    assert not any(one.rules for one in odd_by_tag(in_tags(care=HONEST, **blank)))
