"""A calibrated judge compares what nobody compared, once, and what it says trains where it may."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from agentpref.errors import ConfigError, JudgeError, NoVerdict, UncalibratedJudge
from agentpref.home import Home
from agentpref.judging import Asking, calibrate_judge, judge_runs
from agentpref.prefer.judges.hearing import Limits
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.testing import FakeJudge

Fake = Callable[..., FakeJudge]


def origins(home: Home) -> Counter[str]:
    return Counter(one.origin for one in home.pairs())


def test_a_judge_compares_what_nobody_compared_where_it_is_trusted(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    done = judge_runs(home, "brief", recheck=0)
    assert (done.questions, done.asked, done.decided) == (50, 30, 30)
    assert done.untrusted == {"other": 20}
    assert done.principles == {"the rule": 30}
    assert origins(home) == {"comparison": 30, "judge": 30}
    rows = [row for row in home.comparisons() if row.source == "model"]
    assert len(rows) == 60
    assert {row.comment for row in rows} == {"the rule: by the rule"}
    with closing(connect(home)) as connection:
        assert examine(connection).problems == []


def test_running_again_asks_and_writes_nothing(home: Home, fake: Fake) -> None:
    judge = fake()
    calibrate_judge(home, "brief")
    judge_runs(home, "brief", recheck=0)
    asked = len(judge.asked)
    done = judge_runs(home, "brief", recheck=0)
    assert (done.asked, len(judge.asked), origins(home)["judge"]) == (0, asked, 30)


def test_what_was_asked_and_not_written_is_written_without_a_call(home: Home, fake: Fake) -> None:
    """As after a crash between the judge's answer and the log."""
    judge = fake()
    calibrate_judge(home, "brief")
    judge_runs(home, "brief", recheck=0)
    asked = len(judge.asked)
    with closing(connect(home)) as connection:
        connection.execute("DELETE FROM comparison WHERE source = 'model'")
    assert judge_runs(home, "brief", recheck=0).decided == 30
    assert len(judge.asked) == asked


def test_verdicts_that_follow_the_position_make_no_pair_and_are_counted(
    home: Home, fake: Fake
) -> None:
    fake(position=0.4)
    calibrate_judge(home, "brief")
    done = judge_runs(home, "brief", recheck=0)
    assert 0 < done.position == done.ties < 30
    assert origins(home)["judge"] == done.decided == 30 - done.ties


def test_winners_that_speak_to_their_judge_are_counted(home: Home) -> None:
    class Steered(FakeJudge):
        """Prefers the shorter answer, also where that is beside the point."""

        controls = True

    done = judge_runs(home, Steered(source="code", prefers=lambda q, a, b: "a" if len(a) < len(b)
                                    and not q.startswith("W") else "b"))  # fmt: skip
    assert done.decided + done.ties == done.asked == 50
    assert 0 < done.steered <= done.asked


def test_a_judge_that_nobody_calibrated_is_not_asked(home: Home, fake: Fake) -> None:
    judge = fake()
    with pytest.raises(UncalibratedJudge, match=r"run `agentpref judge calibrate brief` first"):
        judge_runs(home, "brief")
    assert judge.asked == []


def test_a_judge_that_is_no_better_than_a_coin_is_not_asked(home: Home, fake: Fake) -> None:
    fake(noise=0.5)
    calibrate_judge(home, "brief")
    with pytest.raises(UncalibratedJudge, match="not shown to be better than a coin"):
        judge_runs(home, "brief")


def test_a_rule_needs_no_calibration_and_is_trusted_everywhere(home: Home, fake: Fake) -> None:
    fake(source="code")
    done = judge_runs(home, "brief")
    assert (done.decided, dict(done.untrusted)) == (50, {})
    assert origins(home)["judge"] == 50


def test_a_judge_that_became_worse_is_refused_before_it_says_anything(
    home: Home, fake: Fake
) -> None:
    calibrate_judge(home, "brief")
    fake(noise=1.0)
    with pytest.raises(UncalibratedJudge, match="has changed since it was calibrated"):
        judge_runs(home, "brief")
    assert origins(home) == {"comparison": 30}


def test_calibrating_worse_takes_back_what_the_judge_taught(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    judge_runs(home, "brief", recheck=0)
    assert origins(home)["judge"] == 30
    people: dict[str, Any] = {}
    for row in home.comparisons():
        if row.source == "human":
            people[row.comparison_id] = row
    with Log(home.path) as log:  # they change their minds
        for row in people.values():
            log.compare(row.run_a, row.run_b, winner="b", user_id="somebody")
            log.compare(row.run_a, row.run_b, winner="b", user_id="somebody else")
    calibrate_judge(home, "brief")
    assert origins(home)["judge"] == 0


def test_a_limit_ends_it_and_the_next_run_goes_on(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    done = judge_runs(home, "brief", recheck=0, limit=10)
    assert (done.decided, done.waiting) == (10, 20)
    none = judge_runs(home, "brief", recheck=0, asking=Asking(1, Limits(seconds=0)))
    assert none.notes == ["ended: 0 s are over; the same command goes on"]
    assert judge_runs(home, "brief", recheck=0).decided == 20
    assert origins(home)["judge"] == 30


def test_of_many_answers_the_newest_are_compared_with_one_another(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    with Log(home.path) as log:
        for number in range(6):
            asked = [{"role": "user", "content": "Many?"}]
            log.record(asked, "x" * (number + 1), tags=["brief"])
    assert judge_runs(home, "brief", recheck=0, answers=3).decided == 30 + 3
    assert judge_runs(home, "brief", recheck=0, answers=4).decided == 3


def test_answers_that_broke_off_are_not_compared(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    with Log(home.path) as log:
        asked = [{"role": "user", "content": "Broken?"}]
        log.record(asked, "One", tags=["brief"])
        log.record(asked, "Two and", tags=["brief"], metadata={"finish_reason": "incomplete"})
    assert judge_runs(home, "brief", recheck=0).questions == 50


def answer(request: GenerationRequest) -> Reply:
    text = f"Drawn by {request.seed}."
    message = {"role": "assistant", "content": text}
    return Reply("base", message, tuple(map(ord, text)), (-1.0,) * len(text), "stop")


def test_second_answers_are_drawn_recorded_and_compared(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    with Log(home.path) as log:
        for number in range(5):
            log.record([{"role": "user", "content": f"Lonely {number}?"}], "Yes.", tags=["brief"])
    done = judge_runs(home, "brief", recheck=0, sample=2, prompts=3, generate=answer)
    assert (done.sampled, done.asked) == (6, 30 + 3 * 3)
    drawn = [run for run in home.runs() if "sampled_for" in run.metadata]
    assert {run.revision for run in drawn} == {"base"}
    assert all(run.logprobs for run in drawn)
    assert {run.params["temperature"] for run in drawn} == {0.8}


def test_to_sample_without_what_answers_is_refused(home: Home, fake: Fake) -> None:
    with pytest.raises(ConfigError, match="sample is given without generate"):
        judge_runs(home, "brief", sample=1)


def test_a_removal_deletes_what_the_judge_said_of_the_prompt(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    judge_runs(home, "brief", recheck=0)
    with Log(home.path) as log:
        asked = [{"role": "user", "content": "Question 40?"}]
        log.record(asked, "A secret.", user_id="eve", tags=["brief"])
    judge_runs(home, "brief", recheck=0)
    with closing(connect(home)) as connection:
        query = "SELECT count(*) FROM verdict"
        (before,) = connection.execute(query).fetchone()
        with Log(home.path) as log:
            log.forget("eve")
        (after,) = connection.execute(query).fetchone()
        assert before - after == 6  # both orders of all three pairs of answers to that prompt
        assert examine(connection).problems == []


def test_a_judge_that_is_gone_in_the_middle_loses_nothing(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    calls = iter(range(1000))

    class Vanishing(FakeJudge):
        def judge(self, prompts: Any, completions: Any) -> Any:
            if next(calls) >= 20:
                raise JudgeError("connection refused")
            return super().judge(prompts, completions)

    judge = Vanishing()
    fake.__closure__[0].cell_contents.append(judge)  # type: ignore[index, union-attr]
    with pytest.raises(JudgeError, match="calls in a row failed"):
        judge_runs(home, "brief", recheck=0, asking=Asking(concurrency=1))
    assert origins(home)["judge"] == 10
    judge = fake()
    assert judge_runs(home, "brief", recheck=0).decided == 20
    assert len(judge.asked) == 40


def test_every_question_is_asked_waits_or_is_untrusted(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")

    class Refusing(FakeJudge):
        def judge(self, prompts: Any, completions: Any) -> Any:
            if "Question 35?" in prompts[0][0]["content"]:
                raise NoVerdict("too long", why="refused", prompt_tokens=7)
            return super().judge(prompts, completions)

    fake.__closure__[0].cell_contents.append(Refusing())  # type: ignore[index, union-attr]
    done = judge_runs(home, "brief", recheck=0, limit=10)
    assert done.questions == done.asked + done.waiting + done.untrusted.total() == 50
    rest = judge_runs(home, "brief", recheck=0)
    assert (done.asked + rest.asked, rest.waiting) == (29, 1)
    assert rest.spending.failed == {"refused": 2}
    assert rest.spending.prompt_tokens == 14


def test_answers_that_people_compared_are_no_question_when_they_are_logged_again(
    home: Home, fake: Fake
) -> None:
    calibrate_judge(home, "brief")
    with Log(home.path) as log:
        for number in range(30):
            asked = [{"role": "user", "content": f"Question {number}?"}]
            log.record(asked, f"Yes, {number}.", tags=["brief"])
    assert judge_runs(home, "brief", recheck=0).questions == 50


def test_what_people_took_back_is_a_question_again(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    row = next(iter(home.comparisons()))
    with Log(home.path) as log:
        log.retract(row.run_a, "comparison", user_id="person 0")
    assert judge_runs(home, "brief", recheck=0).questions == 51


def test_a_user_who_is_forgotten_meanwhile_does_not_come_back(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    with Log(home.path) as log:
        secret = [{"role": "user", "content": "My secret?"}]
        for text in ("Yes.", "It is safe with me."):
            log.record(secret, text, user_id="eve", tags=["brief"])
        log.record([{"role": "user", "content": "My other?"}], "No.", user_id="eve", tags=["brief"])

    def forget() -> None:
        with Log(home.path) as log:
            log.forget("eve")

    class Forgetting(FakeJudge):
        def judge(self, prompts: Any, completions: Any) -> Any:
            if prompts[0] == tuple(secret):
                forget()
            return super().judge(prompts, completions)

    fake.__closure__[0].cell_contents.append(Forgetting())  # type: ignore[index, union-attr]
    asking = Asking(concurrency=1)
    done = judge_runs(home, "brief", recheck=0, asking=asking)
    assert (done.forgotten, done.decided) == (1, 31)
    with closing(connect(home)) as connection:
        texts = [body for (body,) in connection.execute("SELECT body FROM message")]
        assert not any("My secret" in body or "My other" in body for body in texts)
        query = "SELECT count(*) FROM verdict WHERE prompt NOT IN (SELECT id FROM message)"
        assert connection.execute(query).fetchone() == (0,)
        assert examine(connection).problems == []


def test_an_answer_drawn_for_a_user_who_is_forgotten_meanwhile_is_dropped(
    home: Home, fake: Fake
) -> None:
    calibrate_judge(home, "brief")
    with Log(home.path) as log:
        asked = [{"role": "user", "content": "My secret?"}]
        log.record(asked, "Yes.", user_id="eve", tags=["brief"])

    def slowly(request: GenerationRequest) -> Reply:
        with Log(home.path) as log:
            log.forget("eve")
        return answer(request)

    judge_runs(home, "brief", recheck=0, sample=1, prompts=1, generate=slowly)
    assert not any("My secret" in str(run.prompt.messages) for run in home.runs())


def test_nothing_is_asked_where_there_is_nothing_to_compare(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    judge_runs(home, "brief", recheck=0)
    judge = fake(source="code")
    judge_runs(home, "brief")  # a rule is trusted in the other tag, too
    asked = len(judge.asked)
    assert judge_runs(home, "brief", recheck=10).questions == 0
    assert len(judge.asked) == asked


def test_a_second_run_at_the_same_time_is_refused_and_asks_nothing(home: Home, fake: Fake) -> None:
    judge = fake()
    calibrate_judge(home, "brief")
    asked = len(judge.asked)
    refused = list[str]()

    def at_once(stage: str, done: int, total: int) -> None:
        if not refused:
            with pytest.raises(JudgeError, match="another process runs the judge 'brief'") as why:
                judge_runs(home, "brief", recheck=0)
            refused.append(str(why.value))

    done = judge_runs(home, "brief", recheck=0, asking=Asking(progress=at_once))
    assert refused
    assert done.asked == 30
    assert len(judge.asked) - asked == 60  # both orders, once
    assert judge_runs(home, "brief", recheck=0).asked == 0  # the lock is gone
