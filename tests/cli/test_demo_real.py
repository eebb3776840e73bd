"""The demo on a real model: its people and its story, on the bundled model and a few questions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentpref.config import UpdateConfig
from agentpref.errors import NotAHome, ServingError
from agentpref.home import Home
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter
from agentpref.types import UpdateReport
from agentpref_cli.demo import printing, real_people, real_story
from agentpref_cli.demo.real_people import LISTS, SHORTER, Answer, Asked, questions
from agentpref_cli.demo.real_story import NIGHTS, follow, outcome, summary, tell

LONG, SHORT = Answer("one two three four"), Answer("one two")
STEPS = Answer("Do this:\n1. first\n2. second")


def silent(stage: str, done: int, total: int) -> None:
    """Nobody is told of the steps."""


@pytest.mark.parametrize("night", NIGHTS, ids=lambda night: night.tag)
def test_every_night_has_distinct_questions_with_answers_on_both_sides(night) -> None:
    asked = questions(night.tag)
    assert len({one.question for one in asked}) == len(asked) >= 100
    assert all(len(one.answers) >= 2 and all(a.text.strip() for a in one.answers) for one in asked)
    assert sum(one.is_held_out(UpdateConfig().held_out) for one in asked) >= 20
    rows = list(night.comparisons())
    assert len(rows) >= 90
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_the_shorter_answer_is_preferred_and_one_that_was_cut_off_is_the_longer() -> None:
    assert SHORTER.score(SHORT) > SHORTER.score(LONG)
    assert SHORTER.score(LONG) > SHORTER.score(Answer("one", whole=False))


def test_a_list_has_two_items_on_lines_of_their_own() -> None:
    texts = ("- a\n- b", "So:\n\n 1) a\n 2) b", "* a\n* b")
    assert all(Answer(text).is_list for text in texts)
    assert not any(Answer(text).is_list for text in ("- a", "1. a 2. b", "a\nb", "-a\n-b", ""))
    assert LISTS.score(STEPS) > LISTS.score(LONG)


def test_a_list_is_compared_with_the_prose_that_is_most_like_it_in_length() -> None:
    """Else the second night would say again what the first one taught: that shorter is better."""
    cut = Answer(STEPS.text, whole=False)
    assert LISTS.compare([cut, LONG, STEPS, SHORT]) == (STEPS, LONG)
    assert LISTS.compare([cut, LONG, SHORT]) is None
    assert LISTS.compare([cut, STEPS]) is None


def test_answers_that_the_rule_ranks_alike_are_not_compared(monkeypatch) -> None:
    asked = [Asked("long or short?", (LONG, SHORT)), Asked("alike?", (SHORT, SHORT))]
    monkeypatch.setattr(real_people, "questions", lambda tag: asked)
    (row,) = SHORTER.comparisons()
    assert row["chosen"] == [{"role": "assistant", "content": SHORT.text}]
    assert row["rejected"] == [{"role": "assistant", "content": LONG.text}]


def test_a_win_rate_counts_answers_that_are_alike_half() -> None:
    assert SHORTER.win_rate([LONG, LONG, SHORT], [SHORT, LONG, LONG]) == 0.5
    assert SHORTER.win_rate([LONG, LONG], [SHORT, LONG]) == 0.75


def test_a_summary_counts_words_and_what_went_wrong() -> None:
    assert summary([STEPS, Answer(" ", whole=False)]) == {
        "words": 3.0,
        "lists": 1,
        "cut_off": 1,
        "empty": 1,
    }


REPORT = replace(
    UpdateReport("u", "default", "smollm2", 0.0, "promoted", None, "rev-1"),
    accuracy={"facts": {"pairs": 9, "before": 0.5, "after": 0.75}},
    counts={"new": 90, "new_held_out": 20, "replayed": 0},
    checks=[{"name": "new preferences", "passed": True, "message": ".50 -> .75"}],
)
ASKED = [Asked(f"{n}?", (LONG, SHORT)) for n in range(10)]


def told(after: list[Answer], seed: int = 0, report: UpdateReport = REPORT) -> dict:
    before, asked = {"facts": [LONG] * 10}, {"facts": ASKED, "old": ASKED}
    now = {"facts": after, "old": [SHORT] * 10}
    swap = {"base": 2, "rev-1": 3}
    return outcome(SHORTER, report, asked, before, now, {"old": [LONG] * 10}, swap, seed)


def test_an_outcome_measures_what_is_written_and_what_was_kept() -> None:
    found = told([SHORT] * 10)
    assert (found["accuracy_before"], found["accuracy_after"]) == (0.5, 0.75)
    assert (found["before"]["words"], found["after"]["words"]) == (4, 2)
    assert found["win_rate"] == 1.0
    assert (found["kept"]["old"]["left"]["words"], found["kept"]["old"]["now"]["words"]) == (4, 2)


def test_the_questions_that_are_shown_depend_on_the_seed_and_not_on_the_answers() -> None:
    def drawn(**given: object) -> list[str]:
        return [row["question"] for row in told(**given)["shown"]]  # type: ignore[arg-type]

    assert drawn(after=[SHORT] * 10) == drawn(after=[LONG] * 10)
    assert drawn(after=[SHORT] * 10) != drawn(after=[SHORT] * 10, seed=1)


def test_a_night_is_printed_with_the_verdict_the_measures_and_whole_lines_of_answers(
    capsys,
) -> None:
    printing.show_night(1, SHORTER, REPORT, told([SHORT] * 10))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:6] == [
        "Night 1: people prefer the shorter of two answers (facts)",
        "  110 comparisons of the model's own answers: 90 to learn from, 20 held out; 0 older ones "
        "replayed",
        "  promoted: rev-1",
        "    new preferences: .50 -> .75",
        "  requests during the swap: 2 by base, 3 by rev-1; 0 failed",
    ]
    assert "    words of an answer, mean      4 -> 2" in lines
    assert "  3 of the 10, drawn at random (seed 0):" in lines
    assert lines.count("      before, 4 words: one two three four") == 3
    assert lines.count("      after, 2 words: one two") == 3


def test_a_night_that_proved_nothing_has_no_accuracy_and_is_told(capsys) -> None:
    night = told([LONG] * 10, report=replace(REPORT, accuracy={}, verdict="insufficient"))
    printing.show_real_end({"model": "a/folder", "nights": [night], "seconds": 12.3})
    shown = capsys.readouterr().out
    assert "facts: insufficient, accuracy - -> -, win rate 50% | 12 s" in shown


def test_requests_beside_a_swap_are_counted_by_revision_and_failures_too(tmp_path) -> None:
    Home.create(tmp_path / "home")
    registry = Registry(tmp_path / "home")
    router = Router(registry, FakeBackend(lambda *_: "Yes"))
    folder = write_adapter(tmp_path / "adapter")
    made = registry.publish(folder, parent=None, model={"name": "tiny"}, training={})
    registry.promote(made.revision_id)
    answered = follow(router, ASKED)
    assert answered["base"] >= 1
    assert answered[made.revision_id] >= real_story.AFTER_SWAP
    assert answered.total() == real_story.BESIDE_SWAP + real_story.AFTER_SWAP

    def broken(*_: object) -> str:
        raise ServingError("out of memory")

    Home.create(tmp_path / "other")
    assert set(follow(Router(Registry(tmp_path / "other"), FakeBackend(broken)), ASKED)) == {
        "failed"
    }


def test_a_folder_that_is_not_empty_is_refused(tmp_path) -> None:
    Home.create(tmp_path)
    with pytest.raises(NotAHome, match="a new folder of its own"):
        tell(tmp_path, "tiny", UpdateConfig(), silent, lambda *told: None)


def test_both_nights_run_from_the_first_question_to_the_last(tmp_path, monkeypatch) -> None:
    def few(tag: str) -> list[Asked]:  # with short answers, so that the gate's probes are short
        found = [
            Asked(
                one.question, (Answer("- So\n- it"), Answer("So it is" + ", it is" * (2 + n % 9)))
            )
            for n, one in enumerate(questions(tag))
        ]
        held_out = [one for one in found if one.is_held_out(0.2)][:3]
        return held_out + [one for one in found if not one.is_held_out(0.2)][:12]

    for module in (real_people, real_story):
        monkeypatch.setattr(module, "questions", few)
    monkeypatch.setattr(real_story, "MAX_TOKENS", 12)
    heard: list[str] = []
    found = tell(
        tmp_path / "home",
        "tiny",
        UpdateConfig(epochs=1, precision="float32"),
        silent,
        lambda number, night, report, outcome: heard.append(f"{night.tag} {report.verdict}"),
    )
    assert [night["stratum"] for night in found["nights"]] == ["facts", "advice"]
    assert heard == [f"{night['stratum']} {night['verdict']}" for night in found["nights"]]
    assert found["nights"][0]["kept"] == {}
    assert found["nights"][1]["kept"].keys() == {"facts"}
    assert all(0 < len(night["shown"]) <= 3 for night in found["nights"])
