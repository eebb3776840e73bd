"""What a candidate writes: harm refuses, what is asked for does not, and the rest is bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentpref.models.tool_calls import has_broken_call, parse_rate
from agentpref.prove.asked import Asked, Odd
from agentpref.prove.behaviour import told
from agentpref.prove.evidence import Evidence, Generations, Sampled
from agentpref.prove.features import features, is_blank, is_broken_off, is_degenerate, most_common
from agentpref.prove.gate import judge
from agentpref.prove.metrics import distinct_n
from tests.core.prove.test_gate import GOOD, failed, named

PROBES = 32
LONG = (
    "Well, the {} opens at nine in the morning on most days of the week, and it closes again at "
    "six in the evening. If you come on day {} there may be a queue, so that I would go early."
)
SHORT = "The {} opens at nine on day {}."
PLACES = ("shop", "bank", "museum", "library", "bakery", "station", "garden", "pool")


def written(*texts, cut=()):
    """Statistics of texts, whose tokens are their words; those that ``cut`` numbers do not end."""
    words = [(*text.split(), "<end>") for text in texts]
    common, common_words = most_common(texts)
    return Generations(
        distinct_2=distinct_n(words),
        mean_length=sum(map(len, words)) / len(words),
        empty=sum(map(is_blank, texts)),
        endless=len(cut),
        repeated=sum(map(is_degenerate, texts)),
        broken=sum(is_broken_off(t) for n, t in enumerate(texts) if n not in cut),
        tool_parse=parse_rate(texts),
        broken_calls=sum(map(has_broken_call, texts)),
        common=common,
        common_words=common_words,
        answers=tuple(features(t, tokens=len(w)) for t, w in zip(texts, words, strict=True)),
        texts=texts,
    )


def texts(form, number=PROBES):
    return [form.format(PLACES[n % 8], n) for n in range(number)]


def wish(feature, direction, chosen, rejected):
    return Asked(feature, direction, chosen, rejected, 100, 1e-9)


SHORTER = wish("words", -1, 8.0, 38.0)
LONGER = wish("words", 1, 38.0, 8.0)


def evidence(live, candidate, *asked, **changes) -> Evidence:
    sides = [written(*side) for side in (live, candidate)]
    return replace(GOOD, live=sides[0], candidate=sides[1], asked=asked, fresh=len(live), **changes)


def test_shorter_answers_pass_where_they_are_asked_for_however_short():
    verdict = judge(evidence(texts(LONG), texts(SHORT), SHORTER))
    assert verdict.verdict == "passed"
    assert "shorter answers are asked for" in named(verdict, "length ratio").message
    assert "fewer words (" in named(verdict, "written").message


@pytest.mark.guarantee("proof")
def test_a_policy_that_only_shortens_where_nobody_asked_is_refused():
    alike = {"chosen": written(*texts(LONG)), "rejected": written(*texts(LONG))}
    for changes in ({}, alike):
        verdict = judge(evidence(texts(LONG), texts(SHORT), **changes))
        assert failed(verdict) == ["length ratio"]
        assert "nobody asked for it" in verdict.reasons[0]
    assert failed(judge(evidence(texts(LONG), texts(SHORT), LONGER)))[0] == "length ratio"


def test_longer_answers_pass_where_they_are_asked_for():
    chosen = {"chosen": written(*texts(LONG))}
    assert judge(evidence(texts(SHORT), texts(LONG), LONGER, **chosen)).verdict == "passed"
    assert "length ratio" in failed(judge(evidence(texts(SHORT), texts(LONG))))


def test_yes_and_no_pass_where_people_chose_between_them():
    """The answers lose variety and length, toward what was chosen on the same prompts."""
    labels = ["Yes" if n % 3 else "No" for n in range(PROBES)]
    other = ["No" if n % 3 else "Yes" for n in range(PROBES)]
    live = [f"{label}, I would say so of number {n}" for n, label in enumerate(other)]
    found = evidence(live, labels)
    assert "distinct-2" in failed(judge(found))
    found = replace(found, chosen=written(*labels), rejected=written(*other))
    assert judge(found).verdict == "passed"
    assert "(chosen answers have" in named(judge(found), "distinct-2").message


def test_a_label_that_is_gone_from_a_few_answers_is_chance():
    """Variety of 32 labels is 3 / 32 or 2 / 32; canned answers are looked for by themselves."""
    live = ["Billing" if n % 2 else "Delivery" for n in range(PROBES - 1)]
    found = evidence([*live, "Returns"], [*live, "Billing"])
    assert judge(found).verdict == "passed"
    found = evidence([*live, "Returns"], ["Billing"] * PROBES)
    assert failed(judge(found)) == ["canned answers"]
    likes = written(*["Billing"] * PROBES)
    assert judge(replace(found, chosen=likes)).verdict == "passed", "what else it answers is unsaid"
    both = replace(found, chosen=likes, rejected=written(*[*live, "Returns"]))
    assert failed(judge(both)) == ["canned answers"]


def test_variety_may_fall_as_far_as_that_of_the_chosen_answers():
    live = texts("I see: the {} is open on day {}")
    chosen = texts("Certainly! The place is open as ever {} {}")
    again = [f"{text}, and number {n}: {text[7:]}, too" for n, text in enumerate(live)]
    plain = replace(written(*again), distinct_2=0.9 * 0.99 * written(*live).distinct_2)
    found = replace(evidence(live, live, LONGER), candidate=plain)
    assert failed(judge(found)) == ["distinct-2"]
    assert judge(replace(found, chosen=written(*chosen))).verdict == "passed"


def test_variety_that_falls_is_no_harm_where_no_answer_repeats_itself_and_none_becomes_another():
    """Lists and set forms have less of it, too."""
    live = texts("I see: the {} is open on day {}")
    plain = replace(written(*live), distinct_2=0.5 * written(*live).distinct_2)
    check = named(judge(replace(evidence(live, live), candidate=plain)), "distinct-2")
    assert check.passed
    assert check.message.endswith("; 0 answers repeat more of themselves, 0 less")
    alike = [*live[:16], *live[:1] * 16]
    assert "distinct-2" in failed(judge(replace(evidence(live, alike))))


HARM = {
    "empty generations": "",
    "empty generations ": " ",
    "repeated answers": "Yes " * 24,
    "repeated answers ": "It opens at nine. " * 12,
    "broken-off answers": "{} It opens at nine on day {} because the",
    "canned answers": "Thank you for your question, we will get back to you.",
    "canned answers ": "Banana",
}


@pytest.mark.guarantee("proof")
@pytest.mark.parametrize("name", HARM)
def test_harm_is_refused_however_well_it_ranks_and_whatever_the_pairs_ask_for(name):
    bad, rng = HARM[name], range(PROBES)
    answers = [bad.format(PLACES[n % 8], n) for n in rng]
    side = written(*answers)
    asked = [
        wish(feature, sign, *((2.0, 1.0) if sign > 0 else (1.0, 2.0)))
        for feature in ("words", "tokens")
        for sign in (1, -1)
    ]
    chosen = {"chosen": side, "rejected": written(*texts(SHORT))}
    verdict = judge(evidence(texts(SHORT), answers, *asked, **chosen))
    assert verdict.verdict == "refused"
    assert name.strip() in failed(verdict)


def test_pairs_that_mostly_wish_for_harm_are_refused_before_it_is_written():
    found = evidence(texts(SHORT), texts(SHORT), odd=(Odd(20, 40, "20 of 40 are blank"),))
    assert failed(judge(found)) == ["wishes"]
    assert judge(replace(found, odd=(Odd(19, 40, "19 of 40"),))).verdict == "passed"


@pytest.mark.parametrize("name", ["repeated answers", "broken-off answers"])
def test_as_much_harm_as_live_does_is_no_fault_of_the_candidate(name):
    """And of a few answers more, chance is the reason as likely as any."""
    bad = HARM[name].format("", "")
    live = [*texts(SHORT)[:22], *[f"{n} {bad}" for n in range(10)]]
    more = [*texts(SHORT)[:18], *[f"{n} {bad}" for n in range(14)]]
    assert named(judge(evidence(live, more)), name).passed
    more = [*texts(SHORT)[:12], *[f"{n} {bad}" for n in range(20)]]
    assert not named(judge(evidence(live, more)), name).passed
    few = [*texts(SHORT)[:30], *[f"{n} {bad}" for n in range(2)]]
    assert named(judge(evidence(texts(SHORT), few)), name).passed


def test_endless_answers_may_be_a_few_more_where_longer_ones_are_asked_for():
    live, long = written(*texts(SHORT)), texts(LONG)
    for cut, asked, passed in ((2, [LONGER], True), (3, [LONGER], False), (1, [], False)):
        found = evidence(texts(SHORT), long, *asked)
        found = replace(found, live=live, candidate=written(*long, cut=range(cut)))
        assert named(judge(found), "endless generations").passed is passed


def test_endless_answers_may_be_a_few_more_where_chosen_ones_are_longer_than_lives():
    """Lists were asked for, of nobody's length, while live had learned to answer briefly."""
    live, long = written(*texts(SHORT)), texts(LONG)
    for chosen, passed in ((texts(LONG), True), (texts(SHORT), False)):
        found = evidence(texts(SHORT), long, chosen=written(*chosen))
        found = replace(found, live=live, candidate=written(*long, cut=range(2)))
        assert named(judge(found), "endless generations").passed is passed


def test_harm_in_sampled_answers_is_refused_too():
    good, bad = written(*texts(SHORT, 16)), written(*["Yes " * 24] * 16)
    fine = evidence(texts(SHORT), texts(SHORT), sampled=Sampled(good, good, 0.7))
    assert judge(fine).verdict == "passed"
    verdict = judge(replace(fine, sampled=Sampled(good, bad, 0.7)))
    assert failed(verdict) == ["repeated answers"]
    assert "0 of 32 answers, live 0; 16 of 16 sampled ones, live 0, at most 2" in verdict.reasons[0]


def test_canned_answers_are_no_fault_where_live_gave_them_already():
    same = ["We will get back to you soon."] * PROBES
    assert named(judge(evidence(same, same)), "canned answers").passed


@pytest.mark.parametrize(("others", "by_chance"), [(3, True), (4, True), (5, False)])
def test_one_label_for_all_prompts_is_chance_where_a_few_answers_became_it(others, by_chance):
    live = ["No"] * (12 - others) + ["Yes"] * others
    sides = {"chosen": written(*["Yes", "No"] * 6), "rejected": written(*["No", "Yes"] * 6)}
    assert named(judge(evidence(live, ["No"] * 12, **sides)), "canned answers").passed == by_chance


CALL = '<tool_call>\n{{"name": "open", "arguments": {{"place": "{} {}"}}}}\n</tool_call>'
RUSSIAN = "Открыто всегда, заходите {} {}"


@pytest.mark.parametrize(
    ("before", "after", "name", "asked"),
    [
        (CALL, SHORT, "tool call 1.00 -> .00", ("tool call", -1)),
        (SHORT, "I'm sorry, I can't say for the {} {}.", "refusal .00 -> 1.00", ("refusal", 1)),
        (SHORT, RUSSIAN, "Cyrillic letters .00 -> ", ("Cyrillic letters", 1)),
    ],
)
def test_language_tool_calls_and_refusals_change_only_where_people_ask(before, after, name, asked):
    change = named(judge(evidence(texts(before), texts(after))), "unasked change")
    assert not change.passed
    assert name in change.message
    chosen = {"chosen": written(*texts(after))}
    assert named(judge(evidence(texts(before), texts(after), **chosen)), "unasked change").passed
    wanted = wish(*asked, *((1.0, 0.0) if asked[1] > 0 else (0.0, 1.0)))
    found = named(judge(evidence(texts(before), texts(after), wanted)), "unasked change").message
    assert name not in found


CUT = CALL.replace("}}}}", "")


@pytest.mark.guarantee("proof")
def test_broken_tool_calls_are_harm_where_live_wrote_none_and_whatever_the_pairs_ask_for():
    """All answers were broken, and "nothing to compare: live wrote no tool call" passed."""
    asked = [wish("tool call", 1, 1.0, 0.0), wish("tokens", 1, 40.0, 8.0)]
    bad = evidence(texts(SHORT), texts(CUT), *asked, chosen=written(*texts(CUT)))
    check = named(judge(bad), "tool-call JSON")
    assert not check.passed
    assert "live wrote no tool call; 32 answers have one whose JSON does not parse" in check.message
    whole = evidence(texts(SHORT), texts(CALL), *asked, chosen=written(*texts(CALL)))
    assert named(judge(whole), "tool-call JSON").passed
    for broken, passed in ((2, True), (3, False)):
        some = [*texts(CUT, broken), *texts(CALL)[broken:]]
        found = evidence(texts(SHORT), some, *asked)
        assert named(judge(found), "tool-call JSON").passed is passed
    both = evidence(texts(CUT), texts(CUT))
    assert named(judge(both), "tool-call JSON").passed, "live's own fault"


def test_where_more_tokens_and_fewer_words_are_asked_for_the_length_is_bounded_in_tokens():
    """It read "within .00 to inf"."""
    fewer, more = wish("words", -1, 8.0, 38.0), wish("tokens", 1, 40.0, 25.0)
    check = named(judge(evidence(texts(LONG), texts(SHORT), fewer, more)), "length ratio")
    assert not check.passed
    assert "at least .80: longer answers are asked for" in check.message
    fewer, more = replace(more, direction=-1), replace(fewer, direction=1)
    check = named(judge(evidence(texts(SHORT), texts(LONG), fewer, more)), "length ratio")
    assert not check.passed
    assert "at most 1.25: shorter answers are asked for" in check.message


def half_new(answers, chosen, before=None):
    """Evidence of 16 new prompts, all of which get some answers, and of as many old ones."""
    new, old = texts(SHORT, 16), [f"{text} As ever." for text in texts(SHORT, 16)]
    sides = {
        "chosen": written(*chosen, *old),
        "rejected": written(*new, *old),
        "fresh_chosen": 16,
        "fresh_rejected": 16,
    }
    found = evidence([*(before or new), *old], [*answers, *old], **sides)
    return replace(found, fresh=16)


@pytest.mark.guarantee("proof")
def test_one_answer_to_all_new_prompts_is_canned_whatever_is_written_to_the_old_ones():
    """Half of the prompts are old ones, so that it was half of all answers at most."""
    for answer in ("Done.", "We will get back to you as soon as we can."):
        check = named(judge(half_new([answer] * 16, [answer] * 16)), "canned answers")
        assert not check.passed
        assert "is 1.00 of those to 16 new prompts, live's .06" in check.message
    assert named(judge(half_new(texts(SHORT, 16), ["Done."] * 16)), "canned answers").passed
    labels = ["Yes"] * 13 + ["No"] * 3
    leans = half_new(["Yes"] * 16, labels, before=["Yes"] * 8 + ["No"] * 8)
    assert named(judge(leans), "canned answers").passed, "most of the chosen ones are that label"


def test_the_report_has_numbers_and_no_text_of_anybody():
    drawn = Sampled(written(*texts(LONG, 16)), written(*texts(SHORT, 16)), 0.7)
    found = evidence(texts(LONG), texts(SHORT), SHORTER, sampled=drawn)
    values = told(replace(found, chosen=written(*texts(SHORT))))
    assert values["asked"][0]["feature"] == values["moves"][0]["feature"] == "words"
    assert values["moves"][0]["moved"] is True
    assert values["candidate"]["mean_length"] < values["live"]["mean_length"]
    assert values["sampled"]["temperature"] == 0.7
    assert values["new_prompts"] == PROBES
    assert not any(place in str(values) for place in PLACES)
