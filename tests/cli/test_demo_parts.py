"""The parts of the demo, on real logs and real training; the whole demo takes minutes."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest

from agentpref.config import UpdateConfig
from agentpref.errors import NotAHome, ServingError
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.prove.metrics import RMatrix
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter
from agentpref.types import UpdateReport
from agentpref_cli.demo import printing
from agentpref_cli.demo.story import MODEL, App, Arms, outcome, settings, summary, tell
from agentpref_cli.demo.users import (
    Question,
    Reply,
    Round,
    give_feedback,
    shuffled_round,
    three_rounds,
)

ROUNDS = three_rounds(seed=0)


@pytest.mark.parametrize("asked", [*ROUNDS, shuffled_round(seed=0)], ids=lambda asked: asked.tag)
def test_a_round_has_enough_questions_to_train_and_to_hold_out(asked):
    sides = Counter(question.held_out for question in asked.questions)
    assert sides[True] >= settings(seed=0).gate.cross_fit_below
    assert sides[False] >= 80
    assert len({question.text for question in asked.questions}) == len(asked.questions)
    assert all(question.liked != question.disliked for question in asked.questions)


def test_a_shuffled_round_flips_about_half_of_the_labels():
    clean = {q.text: q.liked for q in three_rounds(seed=0)[0].questions}
    assert clean == {q.text: q.liked for q in three_rounds(seed=0)[0].questions}
    spoiled = shuffled_round(seed=0)
    yes = sum(question.liked == "Yes" for question in spoiled.questions)
    assert 0.35 < yes / len(spoiled.questions) < 0.65


def test_the_feedback_on_every_reply_makes_one_pair_that_prefers_the_liked_answer(tmp_path):
    questions = ROUNDS[0].questions[:30]
    with Log(tmp_path) as log:
        for number, question in enumerate(questions):
            text = question.liked if number % 2 else question.disliked
            asked = [{"role": "user", "content": question.text}]
            run_id = log.record(asked, text, tags=["round"])
            give_feedback(log, "round", question, Reply(run_id, text, "base"), number)
    with closing(connect(Home.open(tmp_path))) as connection:
        found = read_examples(Store(connection), "default", held_out=UpdateConfig().held_out)
    liked = {question.text: question.liked for question in questions}
    assert len(found.pairs) == len(questions)
    assert {pair.origin for pair in found.pairs} == {"correction", "comparison", "thumbs"}
    for pair in found.pairs:
        assert pair.completions[0].message["content"] == liked[pair.prompt.messages[0]["content"]]


def test_the_agents_replies_come_from_the_live_revision_and_are_logged(tmp_path):
    with Log(tmp_path) as log:
        app = App(log, Router(Registry(tmp_path), FakeBackend(lambda *_: "Yes")))
        answers = app.ask(["one?", "two?"], tag="round")
    assert [(answer.text, answer.revision) for answer in answers] == [("Yes", "base")] * 2
    with closing(connect(Home.open(tmp_path))) as connection:
        logged = {run.run_id: run for run in Store(connection).runs("default")}
    assert {answer.run_id for answer in answers} <= logged.keys()
    assert logged[answers[0].run_id].tag == "round"


def test_a_folder_that_is_not_empty_is_refused_and_stays_as_it_is(tmp_path):
    Home.create(tmp_path)
    with pytest.raises(NotAHome, match="a new folder of its own"):
        tell(tmp_path, 0, lambda stage, done, total: None, lambda *told: None)
    assert not (tmp_path / "naive").exists()


def test_a_refused_first_update_has_the_accuracy_of_the_base_model(tmp_path):
    questions = ROUNDS[0].questions[:6]
    with Log(tmp_path) as log:
        for number, question in enumerate(questions):
            asked = [{"role": "user", "content": question.text}]
            run_id = log.record(asked, question.disliked, tags=["round"])
            give_feedback(log, "round", question, Reply(run_id, question.disliked, "base"), number)
    with closing(connect(Home.open(tmp_path))) as connection:
        pairs = read_examples(Store(connection), "default", held_out=0.2).pairs
        arms = Arms(settings(0), connection, lambda stage, done, total: None)
        assert arms.r_matrix([None], {"round": pairs}).rows == ((0.5,), (0.5,))


def test_a_swap_counts_what_each_revision_answered_while_requests_are_in_flight(tmp_path):
    with Log(tmp_path / "home") as log:
        registry = Registry(tmp_path / "home")
        app = App(log, Router(registry, FakeBackend(lambda *_: "Yes")))
        folder = write_adapter(tmp_path / "adapter")
        made = registry.publish(folder, parent=None, model={"name": "tiny"}, training={})
        registry.promote(made.revision_id)
        answered = app.swap([f"{n}?" for n in range(60)])
    assert answered.keys() == {"base", made.revision_id}
    assert answered["base"] >= 20 <= answered[made.revision_id]
    assert answered.total() == 80


def test_a_swap_counts_failed_requests(tmp_path):
    def broken(*_: object) -> str:
        raise ServingError("out of memory")

    with Log(tmp_path) as log:
        app = App(log, Router(Registry(tmp_path), FakeBackend(broken)))
        assert app.swap(["one?", "two?"]) == {"failed": 4}


REPORT = replace(
    UpdateReport("u", "default", MODEL, 0.0, "promoted", None, "rev-1"),
    accuracy={"style": {"pairs": 9, "before": 0.5, "after": 0.9}},
    counts={"new": 9, "new_held_out": 5},
    checks=[
        {"name": "new preferences", "passed": True, "message": ".50 -> .90"},
        {"name": "KL budget", "passed": False, "message": "too far"},
    ],
)
QUESTIONS = (Question("a?", "Yes", "No"), Question("b?", "No", "Yes"))
STYLE = Round("style", "a style", QUESTIONS)
OUTCOME = outcome(
    STYLE,
    REPORT,
    [(QUESTIONS[0], Reply("1", "No", "base")), (QUESTIONS[1], Reply("2", "No", "base"))],
    [Reply("3", "Yes", "rev-1"), Reply("4", "No", "rev-1")],
    {"base": 3, "failed": 1},
    seed=0,
)
MATRIX = RMatrix(("a", "b"), ((0.5, 0.5), (0.9, 0.4), (0.8, 0.9)))


def test_the_json_has_the_keys_that_scripts_rely_on():
    told = summary([OUTCOME], MATRIX, MATRIX, replace(REPORT, verdict="refused"), 1.01)
    (update,) = told["updates"]
    assert (update["stratum"], update["verdict"]) == ("style", "promoted")
    assert (update["accuracy_before"], update["accuracy_after"]) == (0.5, 0.9)
    assert (update["liked_before"], update["liked_after"]) == (0.5, 1.0)
    assert update["swap"] == {"base": 3, "failed": 1}
    assert {row["question"]: row for row in update["shown"]} == {
        "a?": {"question": "a?", "liked": "Yes", "before": "No", "after": "Yes"},
        "b?": {"question": "b?", "liked": "No", "before": "No", "after": "No"},
    }
    assert told["bwt"] == pytest.approx(-0.1)
    assert told["naive_forgetting"] == pytest.approx(0.1)
    assert (told["bad_update_verdict"], told["seconds"]) == ("refused", 1.0)
    assert told["bad_update_reasons"] == ["KL budget: too far"]
    assert told["r_matrix"]["rows"] == told["naive_r_matrix"]["rows"] == MATRIX.rows


def test_an_update_is_printed_with_its_verdict_its_swap_and_answers_whatever_became_of_them(capsys):
    printing.show_update(2, STYLE, REPORT, OUTCOME)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:9] == [
        "",
        "Update 2: a style (style)",
        "  2 answers logged -> 9 new pairs, 5 held out; 0 older pairs replayed",
        "  promoted: rev-1",
        "    new preferences: .50 -> .90",
        "    KL budget: too far",
        "  requests during the swap: 3 by base; 1 failed",
        "  answers as users like them, to 2 questions it never trained on: 50% -> 100%",
        "  2 of them, drawn at random:",
    ]
    shown = lines.index("    a?")
    assert lines[shown : shown + 4] == [
        "    a?",
        "      users like: Yes",
        "      before:     No",
        "      after:      Yes",
    ]
    assert "    b?" in lines, "an answer that did not change is shown, too"


def test_what_is_shown_depends_on_the_seed_and_not_on_the_answers():
    questions = tuple(Question(f"{n}?", "Yes", "No") for n in range(20))
    asked = Round("style", "a style", questions)

    def drawn(seed: int, text: str) -> list[str]:
        before = [(question, Reply("1", "No", "base")) for question in questions]
        after = [Reply("2", text, "rev-1") for _ in questions]
        return [row["question"] for row in outcome(asked, REPORT, before, after, {}, seed)["shown"]]

    assert drawn(0, "Yes") == drawn(0, "No")
    assert drawn(0, "Yes") != drawn(1, "Yes")


def test_both_arms_and_the_bad_update_are_printed_at_the_end(capsys):
    printing.show_end(summary([OUTCOME], MATRIX, MATRIX, replace(REPORT, verdict="refused"), 61.2))
    shown = capsys.readouterr().out
    assert "\ta\tb\nbefore any update\t0.50\t0.50\nafter update 1\t0.90\t0.40\n" in shown
    assert "  refused; what served before still serves\n    KL budget: too far\n" in shown
    assert shown.endswith("BWT -0.100 | naive forgetting F 0.100 | bad update refused | 61 s\n")
