"""What a judge is asked, and what is read from its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import NoVerdict
from agentpref.prefer.judges.asking import RubricJudge, Said, Token, messages_for, read_verdict
from agentpref.prefer.judges.rubric import Rubric, parse
from agentpref.prefer.judges.verdicts import Question, Verdict, opinion
from agentpref.types import Message


def rubric(*lines: str) -> Rubric:
    return parse("t", "\n".join(("---", "model: m", "principles: [be brief]", *lines, "---", "")))


def question(a: str = "Paris.", b: str = "It is Paris, as you may know.") -> Question:
    asked = ({"role": "system", "content": "Help."}, {"role": "user", "content": "Capital?"})
    return Question(asked, {"role": "assistant", "content": a}, {"role": "assistant", "content": b})


class Scripted:
    """An engine that says what a script says, and keeps what it was asked."""

    def __init__(self, *script: str | Said) -> None:
        self.script, self.asked, self.samples = [*script], list[Sequence[Message]](), list[int]()

    def ask(self, messages: Sequence[Message], *, sample: int) -> Said:
        self.asked.append(messages)
        self.samples.append(sample)
        said = self.script.pop(0)
        return said if isinstance(said, Said) else Said(said, 10, 2)


def judged(engine: Scripted, *lines: str) -> Verdict:
    asked = question()
    (verdict,) = RubricJudge(rubric(*lines), engine).judge([asked.prompt], [(asked.a, asked.b)])
    return verdict


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("Principle: be brief\nReason: shorter\nVerdict: A", "a"),
        ("verdict: b", "b"),
        ("VERDICT: Tie.", "tie"),
        ("```\nVerdict: A\n```\nHope this helps!", "a"),
        ('{"principle": "x", "reason": "y", "verdict": "B"}', "b"),
        ("**Verdict:** **B**", "b"),
        ("Verdict: answer A", "a"),
        ("Verdict: Answer B is better", "b"),
        ("My verdict is: A", "a"),
        ("A", "a"),
        ("[[B]]", "b"),
        ("Answer A is better.", "a"),
        ("Verdict: A, B or tie\nVerdict: B", "b"),
        ("Verdict: a tie", "tie"),
        ("Verdict: A draw.", "tie"),
        ("Verdict: both are equal", None),
        ("Verdict: A and B are equal", None),
        ("Verdict: A/B", None),
        ("Verdict: A or B", None),
        ("Verdict: A is wrong, so B", None),
        ("Verdict: A is not better", None),
        ('{"verdict": "A", "reason": "it says why"}', "a"),
        ("Sure! I think...\n\nReason: A is bad.\nVerdict - B", "b"),
    ],
)
def test_a_verdict_is_read_through_chatter_fences_and_wrong_case(text: str, winner: str) -> None:
    found = read_verdict(Said(text))
    assert (None if found is None else found.winner) == winner


@pytest.mark.parametrize(
    "text",
    ["", "   ", "I cannot decide.", "Verdict:", "Verdict: C", "Verdict: A\nVerdict: B", "Both!",
     "A good answer names its sources.", "Verdict: About as good"],
)  # fmt: skip
def test_silence_and_two_verdicts_are_no_verdict(text: str) -> None:
    assert read_verdict(Said(text)) is None


@given(st.text())
def test_no_text_makes_reading_fail(text: str) -> None:
    read_verdict(Said(text))


def test_the_principle_and_the_reason_are_kept() -> None:
    found = read_verdict(Said("Principle: *be brief*\nReason: It says\nless.\nVerdict: A"))
    assert found == Verdict("a", None, "be brief", "It says less.")


def test_a_tie_is_no_verdict_on_a_scale_of_two() -> None:
    assert read_verdict(Said("Verdict: tie"), ties=False) is None


def test_confidence_is_read_from_the_distribution_of_the_verdicts_token() -> None:
    top = {"A": -0.1, " B": -2.3, "tie": -5.0, "Hm": -4.0}
    said = Said("Verdict: A", tokens=[Token("Ver", {}), Token("dict: ", {}), Token("A", top)])
    found = read_verdict(said)
    assert found is not None
    assert found.confidence == pytest.approx(0.9048 / (0.9048 + 0.1003 + 0.0067), abs=1e-3)


def test_what_is_no_verdict_is_asked_again_and_all_tokens_count() -> None:
    engine = Scripted("Well.", "Hm.", "Verdict: A")
    assert judged(engine) == Verdict("a", None, None, "", 30, 6)
    assert "That is no verdict." in engine.asked[1][-1]["content"]
    assert len({*engine.samples}) == 3  # else the engine would say the same again


def test_a_judge_that_stays_silent_is_told_with_the_cure() -> None:
    with pytest.raises(
        NoVerdict, match=r"gave no verdict in 4 answers; the last began 'c.'; use a"
    ):
        judged(Scripted("Well.", "Hm.", "Er.", "c."))


def test_of_several_samples_the_majority_counts_with_its_share() -> None:
    engine = Scripted("Verdict: A", "Verdict: B", "Verdict: A")
    found = judged(engine, "samples: 3", "temperature: .7")
    assert (found.winner, found.confidence, found.prompt_tokens) == ("a", pytest.approx(2 / 3), 30)
    assert len({*engine.samples}) == 3


def test_samples_that_are_as_many_are_a_tie() -> None:
    engine = Scripted("Verdict: A", "Verdict: B")
    assert judged(engine, "samples: 2", "temperature: .7").winner == "tie"


def test_a_verdict_below_min_confidence_is_a_tie() -> None:
    script = ("Verdict: A", "Verdict: B", "Verdict: A")
    sure = judged(Scripted(*script), "samples: 3", "temperature: .7", "min_confidence: .6")
    unsure = judged(Scripted(*script), "samples: 3", "temperature: .7", "min_confidence: .7")
    assert (sure.winner, unsure.winner) == ("a", "tie")


class TestMessages:
    def test_request_and_answers_stand_between_tags_that_no_answer_can_know(self) -> None:
        shown = messages_for(rubric(), question())[-1]["content"]
        mark = shown.partition("<request ")[2].partition(">")[0]
        assert len(mark) == 12
        assert f"<answer-A {mark}>\nParis.\n</answer-A {mark}>" in shown
        assert "system: Help.\n\nuser: Capital?" in shown

    def test_both_orders_have_the_same_principles_and_number(self) -> None:
        many = parse("t", "---\nmodel: m\nprinciples: [p, q, r, s]\ndraw: 1\n---\n")
        first, second = (messages_for(many, one) for one in (question(), question().swap()))
        assert first[0] == second[0]
        assert first[1] != second[1]

    def test_examples_are_shown_with_their_verdicts(self) -> None:
        example = "{prompt: 'Sum?', a: '4', b: '5', winner: a, why: It is right.}"
        shown = messages_for(rubric(f"examples: [{example}]"), question())
        assert [m["role"] for m in shown] == ["system", "user", "assistant", "user"]
        assert shown[2]["content"] == "Reason: It is right.\nVerdict: A"

    def test_tool_calls_and_parts_of_a_message_are_judged(self) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
        a: Message = {"role": "assistant", "content": None, "tool_calls": [call]}
        parts: Any = [{"type": "text", "text": "See:"}, {"type": "image_url", "image_url": {}}]
        b: Message = {"role": "assistant", "content": parts}
        shown = messages_for(rubric(), question()._replace(a=a, b=b))[-1]["content"]
        assert '"name":"add"' in shown
        assert "See:\n[image_url]" in shown

    @pytest.mark.parametrize(("scale", "asked"), [(2, "A or B"), (3, "A, B or tie")])
    def test_the_scale_says_which_verdicts_there_are(self, scale: int, asked: str) -> None:
        assert (
            f"Verdict: {asked}" in messages_for(rubric(f"scale: {scale}"), question())[0]["content"]
        )


WINNERS = st.sampled_from(["a", "b", "tie"])


@given(WINNERS, WINNERS)
def test_an_opinion_does_not_depend_on_which_order_comes_first(one: Any, other: Any) -> None:
    found = opinion(Verdict(one), Verdict(other))
    swapped = opinion(Verdict(other), Verdict(one))
    assert Verdict(found.winner).swap().winner == swapped.winner
    assert found.follows == swapped.follows
    if found.follows is not None:
        assert found.winner == "tie"
