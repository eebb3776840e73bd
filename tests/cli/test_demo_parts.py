"""The parts of the demo, on real logs and real training; the whole demo takes minutes."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import pytest

from agentpref.config import UpdateConfig
from agentpref.errors import NotAHome, ServingError
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter
from agentpref_cli.demo.story import App, Arms, Story, Updated, settings, tell
from agentpref_cli.demo.users import Reply, give_feedback, shuffled_round, three_rounds

ROUNDS = three_rounds(seed=0)


@pytest.mark.parametrize("asked", [*ROUNDS, shuffled_round(seed=0)], ids=lambda asked: asked.tag)
def test_a_round_has_enough_questions_to_train_and_to_hold_out(asked):
    sides = Counter(question.held_out for question in asked.questions)
    assert sides[True] >= settings(seed=0).gate.min_pairs
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
        tell(tmp_path, 0, lambda stage, done, total: None, lambda number, updated: None)
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


def test_the_json_has_the_keys_that_scripts_rely_on():
    from dataclasses import replace

    from agentpref.pipeline import UpdateReport
    from agentpref.prove.metrics import RMatrix

    report = UpdateReport("u", "default", "tiny", 0.0, "promoted", None)
    report = replace(report, accuracy={"style": {"pairs": 9, "before": 0.5, "after": 0.9}})
    updated = Updated("style", "a style", report, 9, 0.1, 0.9, [], {"base": 3})
    matrix = RMatrix(("a", "b"), ((0.5, 0.5), (0.9, 0.4), (0.8, 0.9)))
    told = Story((updated,), matrix, matrix, replace(report, verdict="refused"), 1.0).to_mapping()
    assert told["updates"][0]["stratum"] == "style"
    assert told["updates"][0]["verdict"] == "promoted"
    assert (told["updates"][0]["accuracy_before"], told["updates"][0]["accuracy_after"]) == (
        0.5,
        0.9,
    )
    assert told["bwt"] == pytest.approx(-0.1)
    assert told["naive_forgetting"] == pytest.approx(0.1)
    assert (told["bad_update_verdict"], told["seconds"]) == ("refused", 1.0)
