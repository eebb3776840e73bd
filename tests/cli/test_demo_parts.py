"""The parts of the demo's story, on real logs and real training; the whole takes minutes."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import pytest

from agentpref.config import UpdateConfig
from agentpref.errors import NotAHome
from agentpref.home import Home
from agentpref.prefer.pairs import read_pairs
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref_cli.demo.app import Answer, App, Traffic
from agentpref_cli.demo.arms import Arms
from agentpref_cli.demo.nights import spoiled_night, three_nights
from agentpref_cli.demo.people import react
from agentpref_cli.demo.story import Narrator, Story, settings, tell

NIGHTS = three_nights(seed=0)


@pytest.mark.parametrize("night", [*NIGHTS, spoiled_night(seed=0)], ids=lambda night: night.tag)
def test_a_night_can_train_and_can_be_judged(night):
    sides = Counter(question.proves for question in night.questions)
    assert sides[True] >= settings(seed=0).gate.min_pairs
    assert sides[False] >= 80
    assert len({question.text for question in night.questions}) == len(night.questions)
    assert all(question.liked != question.disliked for question in night.questions)


def test_a_spoiled_night_flips_about_half_of_the_labels():
    clean = {q.text: q.liked for q in three_nights(seed=0)[0].questions}
    assert clean == {q.text: q.liked for q in three_nights(seed=0)[0].questions}
    spoiled = spoiled_night(seed=0)
    yes = sum(question.liked == "Yes" for question in spoiled.questions)
    assert 0.35 < yes / len(spoiled.questions) < 0.65


def test_people_turn_every_answer_into_one_pair_with_the_right_side_up(tmp_path):
    questions = NIGHTS[0].questions[:30]
    with Log(tmp_path) as log:
        for number, question in enumerate(questions):
            text = question.liked if number % 2 else question.disliked
            asked = [{"role": "user", "content": question.text}]
            run_id = log.record(asked, text, tags=["night"])
            react(log, "night", question, Answer(run_id, text, "base"), number)
    with closing(connect(Home.open(tmp_path))) as connection:
        found = read_pairs(Store(connection), "default", held_out=UpdateConfig().held_out)
    liked = {question.text: question.liked for question in questions}
    assert len(found.pairs) == len(questions)
    assert {pair.origin for pair in found.pairs} == {"correction", "comparison", "thumbs"}
    for pair in found.pairs:
        assert pair.chosen["content"] == liked[pair.prompt.messages[0]["content"]]


def test_the_agent_answers_from_the_live_revision_and_is_logged(tmp_path):
    import agentpref
    from agentpref.testing import FakeBackend

    with Log(tmp_path) as log:
        router = agentpref.Router(agentpref.Registry(tmp_path), FakeBackend(lambda *_: "Yes"))
        app = App(log, router)
        answers = app.ask(["one?", "two?"], tag="night")
        with app.traffic(["three?"]) as traffic:
            traffic.wait_for(3)
    assert [(answer.text, answer.revision) for answer in answers] == [("Yes", "base")] * 2
    assert traffic.answered["base"] >= 3
    with closing(connect(Home.open(tmp_path))) as connection:
        logged = {run.run_id: run for run in Store(connection).runs("default")}
    assert {answer.run_id for answer in answers} <= logged.keys()
    assert logged[answers[0].run_id].tag == "night"


def test_a_home_in_use_is_left_alone(tmp_path):
    Home.create(tmp_path)
    narrator = Narrator(progress=lambda stage, done, total: None)
    with pytest.raises(NotAHome, match="a new folder of its own"):
        tell(tmp_path, 0, narrator)
    assert not (tmp_path / "naive").exists()


def test_a_night_that_never_served_is_a_row_of_coins(tmp_path):
    questions = NIGHTS[0].questions[:6]
    with Log(tmp_path) as log:
        for number, question in enumerate(questions):
            asked = [{"role": "user", "content": question.text}]
            run_id = log.record(asked, question.disliked, tags=["night"])
            react(log, "night", question, Answer(run_id, question.disliked, "base"), number)
    with closing(connect(Home.open(tmp_path))) as connection:
        pairs = read_pairs(Store(connection), "default", held_out=0.2).pairs
        arms = Arms("tiny", settings(0), connection, lambda stage, done, total: None)
        assert arms.r_matrix([None], {"night": pairs}).rows == ((0.5,), (0.5,))


def test_traffic_counts_what_failed():
    traffic = Traffic()
    traffic.count("failed")
    assert traffic.answered == {"failed": 1}


def test_json_has_what_scripts_rely_on():
    from dataclasses import replace

    from agentpref.pipeline import UpdateReport
    from agentpref.prove.metrics import RMatrix
    from agentpref_cli.demo.story import NightResult

    report = UpdateReport("u", "default", "tiny", 0.0, "promoted", None)
    report = replace(report, accuracy={"style": {"pairs": 9, "before": 0.5, "after": 0.9}})
    night = NightResult("style", "a night", report, 9, 0.1, 0.9, (), {"base": 3})
    matrix = RMatrix(("a", "b"), ((0.5, 0.5), (0.9, 0.4), (0.8, 0.9)))
    told = Story((night,), matrix, matrix, replace(report, verdict="refused"), 1.0).to_mapping()
    assert told["nights"][0]["stratum"] == "style"
    assert told["nights"][0]["verdict"] == "promoted"
    assert (told["nights"][0]["accuracy_before"], told["nights"][0]["accuracy_after"]) == (0.5, 0.9)
    assert told["bwt"] == pytest.approx(-0.1)
    assert told["naive_forgetting"] == pytest.approx(0.1)
    assert (told["bad_update_verdict"], told["seconds"]) == ("refused", 1.0)
