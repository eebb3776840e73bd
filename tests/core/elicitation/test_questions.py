"""Questions come from the log, nobody is asked twice, and answers are there at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentpref.elicitation import Queue, open_queue
from agentpref.elicitation.questions import newest_reward
from agentpref.home import Home
from agentpref.prefer.examples import is_held_out
from agentpref.record.deletion.forget import forget
from agentpref.record.log import Log
from agentpref.reward import RewardModel, fit_reward
from agentpref.testing.judges import drawn
from tests.core.reward.test_reward import answers, asked, fill


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home with 40 pairs that nobody compared."""
    with Log(tmp_path / "home") as log:
        for number in range(40):
            for text in answers(number):
                log.record(asked(number), text, tags=["chat"])
    return Home.open(tmp_path / "home")


@pytest.fixture
def queue(home: Home) -> Iterator[Queue]:
    with open_queue(home, person="ana") as opened:
        yield opened


def test_without_a_reward_model_questions_are_drawn_at_random_and_that_is_said(
    queue: Queue,
) -> None:
    assert queue.rule == "random"
    assert "there is no reward model" in queue.notes[0]
    assert len({one.id for one in queue.next(10)}) == 10


def test_an_answer_is_a_comparison_at_once(home: Home, queue: Queue) -> None:
    (question,) = queue.next(1)
    queue.answer(question, "a", "it is shorter")
    (row,) = home.comparisons()
    assert (row.run_a, row.run_b, row.winner, row.comment) == (
        question.first.run_id, question.second.run_id, "a", "it is shorter",
    )  # fmt: skip
    assert row.source == "human"


def test_nobody_is_asked_the_same_twice_over_sessions(home: Home) -> None:
    seen: list[str] = []
    for session in range(4):
        with open_queue(home, person="ana", seed=session) as queue:
            for number, question in enumerate(queue.next(10)):
                seen.append(question.id)
                if number % 2:
                    queue.answer(question, "a")
                else:
                    queue.skip(question)
    assert len(seen) == len({*seen}) == 40
    with open_queue(home, person="ana") as queue:
        assert queue.next(10) == []


def test_what_one_person_skipped_another_is_asked(home: Home, queue: Queue) -> None:
    for question in queue.next(40):
        queue.skip(question)
    with open_queue(home, person="ben") as other:
        assert len(other.next(40)) == 40


def test_some_questions_that_others_have_answered_are_mixed_in_and_tell_how_far_people_agree(
    home: Home, queue: Queue
) -> None:
    known = {one.id: one for one in queue.next(20)}
    for question in known.values():
        queue.answer(question, "a")
    with open_queue(home, person="ben") as other:
        questions = other.next(20)
        first, second, *_ = [one for one in questions if one.repeated]
        same = known[first.id].first.run_id == first.first.run_id
        other.answer(first, "a" if same else "b")
        other.answer(second, "tie")
        assert other.agreed == [True, False]
        assert {one.id for one in questions if not one.repeated}.isdisjoint(known)


def test_only_what_the_owner_answered_is_put_to_others_again(home: Home, queue: Queue) -> None:
    questions = queue.next(20)
    for question in questions:
        queue.answer(question, "a")
    with open_queue(home, person="olga") as owner:
        mine = [one for one in owner.next(20) if not one.repeated][:2]
        for question in mine:
            owner.answer(question, "b")
    with open_queue(home, person="cem", gold="olga") as other:
        again = {one.id for _ in range(5) for one in other.next(20) if one.repeated}
    assert again == {one.id for one in mine}, "and none of ana's"


def test_which_answer_comes_first_is_chance(queue: Queue) -> None:
    shorter_first = [
        len(str(one.first.output["content"])) < len(str(one.second.output["content"]))
        for one in queue.next(40)
    ]
    assert 10 < sum(shorter_first) < 30


def test_both_bad_is_two_thumbs_down_and_can_be_undone(home: Home, queue: Queue) -> None:
    (question,) = queue.next(1)
    queue.both_bad(question)
    thumbs = [row for row in home.feedback() if row.key == "thumbs"]
    assert {row.run_id for row in thumbs} == {question.first.run_id, question.second.run_id}
    queue.undo(question)
    assert queue.answered == 0
    assert [*home.pairs()] == []
    assert question.id in {one.id for one in queue.next(40)}


def test_undoing_a_plain_answer_takes_back_no_thumbs(home: Home, queue: Queue) -> None:
    (question,) = queue.next(1)
    queue.answer(question, "b")
    before = len([*home.feedback()])
    queue.undo(question)
    assert len([*home.feedback()]) == before + 1


def test_an_undone_both_bad_leaves_older_thumbs(home: Home, queue: Queue) -> None:
    (question,) = queue.next(1)
    queue._log.thumbs(question.first.run_id, up=True, user_id="ana")
    queue.both_bad(question)
    queue.undo(question)
    rows = [row for row in home.feedback() if row.run_id == question.first.run_id]
    thumbs = [(row.key, row.score, row.comment) for row in rows if "comparison" not in str(row)]
    assert thumbs == [("thumbs", 1.0, None)]


def test_a_skip_can_be_undone(queue: Queue) -> None:
    (question,) = queue.next(1)
    queue.skip(question)
    queue.undo(question)
    assert (queue.answered, queue.skipped) == (0, 0)
    assert question.id in {one.id for one in queue.next(40)}
    queue.undo(question)  # what was not asked has nothing to undo
    assert queue.answered == 0


def test_an_undone_answer_counts_for_no_agreement(home: Home, queue: Queue) -> None:
    for question in queue.next(20):
        queue.answer(question, "a")
    with open_queue(home, person="ben") as other:
        repeated = next(one for one in other.next(20) if one.repeated)
        other.answer(repeated, "b")
        assert len(other.agreed) == 1
        other.undo(repeated)
        assert other.agreed == []


def test_what_several_people_answered_is_asked_once(home: Home, queue: Queue) -> None:
    (question,) = queue.next(1)
    for person in ("ana", "ben", "eve"):
        queue._log.compare(
            question.first.run_id, question.second.run_id, winner="a", user_id=person
        )
    with open_queue(home, person="dora") as other:
        ids = [one.id for one in other.next(40)]
    assert len(ids) == len({*ids})


def test_ties_are_no_wrong_labels(home: Home, queue: Queue) -> None:
    for number, question in enumerate(queue.next(20)):
        queue.answer(question, "a")
        queue._log.compare(
            question.first.run_id, question.second.run_id,
            winner="tie" if number % 3 == 0 else "a", user_id="ben",
        )  # fmt: skip
    with open_queue(home, person="eve") as other:
        assert other.noise == 0.0


@pytest.mark.parametrize("line", [b'{"namespace": "def', b"[1]\n", b'{"namespace":"default"}\n'])
def test_a_damaged_line_is_passed_over_and_later_ones_are_read(
    home: Home, queue: Queue, line: bytes
) -> None:
    first, second = queue.next(2)
    queue.skip(first)
    with open(home.skipped, "ab") as file:
        file.write(line)
    queue.skip(second)
    assert {first.id, second.id}.isdisjoint(one.id for one in queue.next(40))


def test_a_removal_forgets_what_was_skipped(home: Home, queue: Queue) -> None:
    (question,) = queue.next(1)
    queue.skip(question)
    queue._log.thumbs(question.first.run_id, up=True, user_id="ana")
    forget(home, user_id="ana")
    assert not home.skipped.exists()


def test_what_the_gate_lacks_is_asked_first(home: Home) -> None:
    with Log(home.path) as log:
        for number in range(100, 140):
            for text in (*answers(number), "A third one."):
                log.record(asked(number), text, tags=["rare"])
    with open_queue(home, person="ana", rule="evidence") as queue:
        assert (queue.rule, queue.notes) == ("evidence", [])
        many = queue.next(80)
        assert "the gate lacks no more" in queue.notes[0]
        assert all(is_held_out(one.prompt, 0.2) for one in many)
        prompts = [one.first.prompt.id for one in many]
        assert len(prompts) == len({*prompts}) > 8  # one pair of each is enough
        for one in [one for one in many if one.first.tag == "chat"][:2]:
            queue.answer(one, "a")
        left = queue.next(4)
        assert [one.first.tag for one in left] == ["rare", "rare", "chat", "rare"]
        assert {one.id for one in left} <= {one.id for one in many}


def test_people_who_disagree_often_are_asked_at_random(home: Home) -> None:
    with open_queue(home, person="ana") as queue:
        questions = queue.next(40)
        for question in questions:
            queue.answer(question, "a")
    with Log(home.path) as log:
        for number, one in enumerate(questions):
            winner = "b" if drawn(0, str(number)) < 0.35 else "a"
            log.compare(one.first.run_id, one.second.run_id, winner=winner, user_id="ben")
    with open_queue(home, person="eve", reward=_Model()) as queue:  # type: ignore[arg-type]
        assert queue.rule == "random"
        assert queue.noise is not None
        assert queue.noise > 0.1
        assert "which is better then" in queue.notes[0]
    with open_queue(home, person="eve", reward=_Model(), rule="entropy") as queue:  # type: ignore[arg-type]
        assert queue.rule == "entropy"


class _Model:
    """Stands for a reward model that is not asked."""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, RewardModel]:
    place = fill(tmp_path_factory.mktemp("ask") / "home")
    with Log(place.path) as log:
        for number in range(200, 230):
            for text in answers(number):
                log.record(asked(number), text, tags=["chat"])
            log.record(asked(number), "Hm.", tags=["chat"])  # as short as the short one
    fit_reward(place, model="tiny")
    reward = newest_reward(place, "default")
    assert reward is not None
    return place, reward


def test_with_a_reward_model_what_it_knows_least_comes_first(
    fitted: tuple[Home, RewardModel],
) -> None:
    home, reward = fitted
    with open_queue(home, person="eve", reward=reward) as queue:
        assert (queue.rule, queue.notes) == ("entropy", [])
        questions = [one for one in queue.next(10) if one.why == "entropy"]

    def sure(numbers: list[tuple[str, str]]) -> float:
        scores = [reward.score(asked(200), list(pair)) for pair in numbers]
        return sum(abs(a.mean - b.mean) for a, b in scores) / len(scores)

    chosen = sure([(str(q.first.output["content"]), str(q.second.output["content"]))
                   for q in questions])  # fmt: skip
    assert chosen < sure([answers(n) for n in range(200, 230)])


def test_a_pair_that_cannot_be_read_is_left_out_and_counted(
    fitted: tuple[Home, RewardModel],
) -> None:
    home, reward = fitted
    with Log(home.path) as log:
        for text in ("word " * 5_000, "short"):
            log.record(asked(999), text, tags=["chat"])
    with open_queue(home, person="dora", reward=reward) as queue:
        assert len(queue.next(10)) == 10
        assert "cannot be read by the reward model" in queue.notes[0]


def test_a_home_without_a_reward_model_has_none(home: Home) -> None:
    assert newest_reward(home, "default") is None


def test_an_owner_who_compared_nothing_is_said(home: Home) -> None:
    with open_queue(home, person="ana", gold="olga") as queue:
        assert "'olga' has compared nothing here yet, so no question is gold" in queue.notes
