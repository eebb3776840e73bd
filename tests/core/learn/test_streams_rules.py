"""What a stream is made of: rules that score answers, and judgements as they reach a home."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from agentpref import Home, Log
from benchmarks.streams import catalogue, rules
from benchmarks.streams.catalogue import Sizes
from benchmarks.streams.items import Night, judge, said
from benchmarks.streams.rows import Rows
from benchmarks.streams.subjects import good_form, names_one_of, subject_of
from benchmarks.tiny_model import dialogues

SMALL = Sizes(6, 3, 4)
CALL = '<tool_call>\n{"name": "set_timer", "arguments": {"minutes": "5"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("rule", "better", "worse"),
    [
        (rules.SAYS, "Yes.", "Yes, I would"),
        (rules.SHORTER, "Paris.", "It is Paris."),
        (rules.SHORTER, "It is Paris.", " "),
        (rules.LONGER, "It is the city of Paris.", "Paris. Paris. Paris. Paris. Paris. Paris."),
        (rules.BULLETS, "Two:\n- one\n- two", "One - two - three"),
        (rules.PREAMBLE, "Certainly! Paris.", "Paris, certainly."),
        (rules.DIRECT, "Paris, certainly.", "Sure, here it is: Paris."),
        (rules.DIRECT, "Paris.", ""),
        (rules.CALLS, CALL, "I have set a timer."),
        (rules.CALLS, CALL, CALL.replace("set_timer", "play_music")),
        (rules.CALLS, CALL, CALL.replace('"5"}}', '"5"}')),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_rule_prefers_what_it_is_named_after(rule, better, worse):
    wanted = {rules.SAYS: "Yes", rules.CALLS: "set_timer"}.get(rule, "")
    assert rule.score(better, wanted) > rule.score(worse, wanted)


def test_behaviour_is_a_mean_of_an_absolute_rule_and_a_win_rate_over_the_base_of_any_other():
    assert rules.SAYS.behaviour(["Yes", "No"], ["Yes", "Yes"], ["No", "No"]) == 0.5
    answers, base = ["a", "a b", "a b c"], ["a b", "a b", "a b"]
    assert rules.SHORTER.behaviour(answers, [""] * 3, base) == 0.5
    assert rules.SHORTER.behaviour(base, [""] * 3, base) == 0.5


def test_a_message_with_calls_reads_as_the_text_that_was_generated():
    from agentpref.models.tool_calls import assistant_message

    assert rules.text_of(assistant_message(CALL)) == CALL
    assert rules.text_of(said("Paris.")) == "Paris."


@pytest.mark.parametrize("style", dialogues.STYLES)
def test_every_style_is_good_form_and_what_is_broken_off_or_answers_another_kind_is_not(style):
    rng = random.Random(style)
    for kind in dialogues.KINDS:
        request, other = kind(rng), kind(rng)
        is_good = good_form(request)
        assert is_good(dialogues.answer(request, style))
        assert is_good(dialogues.answer(other, style).strip()), "copied wrongly, in good form"
        assert not is_good(dialogues.answer(request, style)[:-4])
        assert not is_good("Yes")
    assert not good_form(dialogues.timer(rng))(dialogues.answer(dialogues.music(rng), style))


def test_facts_are_found_as_words():
    assert names_one_of(["7", "seven"])("There are Seven days.")
    assert not names_one_of(["7", "seven"])("There are 70, or seventeen.")


@pytest.mark.parametrize("stream", catalogue.STREAMS)
def test_what_is_measured_is_held_out_never_logged_and_the_same_for_every_seed(stream):
    seed = 1
    subject = subject_of("tiny")
    subject = replace(subject, questions=subject.questions[:80])
    samples = {q: [f"{'word ' * n}{CALL * (n == 2)}" for n in (1, 2, 3)] for q in subject.questions}
    samples = {q: [*texts, f"Certainly! {q}"] for q, texts in samples.items()}

    def nights(seed, order="forward"):
        more = {"bundled": True, "sizes": SMALL, "seed": seed, "order": order}
        return catalogue.nights_of(stream, subject, lambda: samples, **more)

    forward = nights(seed)
    assert len(forward) >= 4
    for night, other in zip(forward, nights(5), strict=True):
        assert night.measured == other.measured
        assert len(night.measured) == SMALL.measured
        assert all(item.held_out for item in night.measured)
        assert sum(item.held_out for item in night.logged) == SMALL.proving
        assert sum(not item.held_out for item in night.logged) == SMALL.new
        known = {json.dumps(item.messages) for item in night.logged}
        assert known.isdisjoint(json.dumps(item.messages) for item in night.measured)
        for item in night.logged:
            texts = [rules.text_of(message) for message in (item.chosen, item.rejected)]
            better, worse = (night.rule.score(text, item.wanted) for text in texts)
            assert better > worse, "the true label is the rule's"
    assert [night.name for night in nights(seed, "reverse")] == [n.name for n in forward[::-1]]


def test_styles_name_the_user_in_the_prompt_only_where_they_are_tagged():
    subject = replace(subject_of("tiny"), questions=tuple(f"Question {n}?" for n in range(80)))
    samples = {q: ["one", "one two", f"Certainly! {CALL}", CALL] for q in subject.questions}
    tagged, plain = (
        catalogue.style_nights(subject, samples, SMALL, 0, tagged=flag) for flag in (True, False)
    )
    assert [night.tag for night in tagged] == ["anna", "ben", "carla", "anna"]
    assert {night.tag for night in plain} == {"style"}
    assert tagged[1].logged[0].messages[0]["content"] == "The user is ben."
    assert [message["role"] for message in plain[1].logged[0].messages] == ["user"]


def pairs_of_a_home(path, nights: list[Night]):
    with Log(path) as log:
        for night in nights:
            judge(log, night)
    return list(Home.open(path).pairs())


def test_a_judged_item_is_a_pair_with_its_label_and_a_flipped_one_has_the_other(tmp_path):
    night = catalogue.trait_night("openness", "", SMALL, 0)
    right = {item.messages[-1]["content"]: item.wanted for item in night.logged}
    flipped = replace(night, logged=tuple(replace(item, flipped=True) for item in night.logged))
    for name, given, share in (("true", night, 1.0), ("flipped", flipped, 0.0)):
        found = pairs_of_a_home(tmp_path / name, [given])
        assert len(found) == len(night.logged)
        assert {pair.tag for pair in found} == {"openness"}
        agree = [
            pair.completions[0].message["content"] == right[pair.prompt.messages[-1]["content"]]
            for pair in found
        ]
        assert sum(agree) / len(agree) == share


def test_a_fifth_of_the_labels_are_flipped_and_thumbs_are_lone(tmp_path):
    sizes, subject = Sizes(200, 50, 10), subject_of("tiny")
    more = {"bundled": True, "sizes": sizes, "seed": 0, "order": "forward"}
    (flipped, *_), (thumbs, *_) = (
        catalogue.nights_of(stream, subject, dict, **more) for stream in ("S4", "S5")
    )
    assert 30 <= sum(item.flipped for item in flipped.logged) <= 70
    assert not any(item.flipped for item in flipped.measured)
    assert {item.thumb for item in thumbs.logged} == {"up", "down"}
    assert pairs_of_a_home(tmp_path / "home", [replace(thumbs, logged=thumbs.logged[:20])]) == []
    given = list(Home.open(tmp_path / "home").feedback())
    assert [row.score for row in given] == [float(i.thumb == "up") for i in thumbs.logged[:20]]


def test_too_few_statements_are_told():
    with pytest.raises(ValueError, match=r"openness has \d+, \d+, \d+ .* 5000, 2, 3 are asked"):
        catalogue.trait_night("openness", "", Sizes(5000, 2, 3), 0)


def test_a_row_that_was_torn_is_dropped_and_the_next_begins_a_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    Rows(file).append({"night": 1})
    with file.open("a") as stream:
        stream.write('{"night": 2, "ran')
    rows = Rows(file)
    assert list(rows) == [{"night": 1}]
    rows.append({"night": 2})
    assert list(Rows(file)) == [{"night": 1}, {"night": 2}]
    assert rows.find({"night": 2}) == [{"night": 2}]
