"""A judge is measured by what people said, is trusted where it is right, and nowhere else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentpref.errors import JudgeError, UncalibratedJudge
from agentpref.home import Home
from agentpref.judging import Asking, calibrate_judge, judge_runs, open_judge
from agentpref.judging.gold import gold_of_home
from agentpref.prefer.judges import rubric
from agentpref.prefer.judges.hearing import Limits, Spending
from agentpref.record.database import connect
from agentpref.record.judges import Judges
from agentpref.record.log import Log
from agentpref.testing import FakeJudge

Fake = Callable[..., FakeJudge]


def test_a_judge_that_is_right_is_trusted_in_the_tags_that_have_gold(
    home: Home, fake: Fake
) -> None:
    found = calibrate_judge(home, "brief")
    assert (found.trusted, found.untrusted) == ({"brief": 0.05}, {})
    assert (found.calibration.pooled.n, found.calibration.pooled.right) == (30, 30)


def test_the_measured_noise_is_that_of_the_judge(home: Home, fake: Fake) -> None:
    fake(noise=0.25)
    found = calibrate_judge(home, "brief")
    one = found.calibration.strata["brief"]
    assert found.trusted["brief"] == pytest.approx((one.wrong + 0.5) / 31)
    assert one.accuracy is not None
    assert one.accuracy.low < 0.75 < one.accuracy.high


def test_a_judge_that_follows_the_position_is_trusted_nowhere(home: Home, fake: Fake) -> None:
    fake(position=1.0)
    found = calibrate_judge(home, "brief")
    assert found.trusted == {}
    assert found.untrusted["brief"] == "it decided nothing: all its verdicts were ties"
    assert found.calibration.pooled.position_bias is not None
    assert found.calibration.pooled.position_bias.value == 0.5


def test_a_judge_that_is_no_better_than_a_coin_is_told_so(home: Home, fake: Fake) -> None:
    fake(noise=0.5)
    assert "not shown to be better than a coin" in calibrate_judge(home, "brief").untrusted["brief"]


def test_calibrating_again_asks_nothing_again(home: Home, fake: Fake) -> None:
    judge = fake()
    calibrate_judge(home, "brief")
    again = calibrate_judge(home, "brief")
    assert len(judge.asked) == 60
    assert (again.spending.asked, again.spending.known) == (0, 60)


def test_a_rubric_that_was_changed_is_another_judge(home: Home, fake: Fake) -> None:
    judge = fake()
    calibrate_judge(home, "brief")
    file = home.judges / "brief.md"
    file.write_text(file.read_text().replace("be brief", "be kind"))
    calibrate_judge(home, "brief")
    assert len(judge.asked) == 120


def test_a_limit_measures_by_what_was_answered_and_says_so(home: Home, fake: Fake) -> None:
    fake()
    asking = Asking(1, Limits(seconds=0))
    with pytest.raises(JudgeError, match=r"answered none of 30 questions \(0 s are over\)"):
        calibrate_judge(home, "brief", asking=asking)


def test_a_limit_of_cost_needs_a_price(home: Home, fake: Fake) -> None:
    rubric.write(home, "free", "---\nengine: fake\nprinciples: [be brief]\n---\n")
    with pytest.raises(JudgeError, match="a limit of cost needs the price"):
        calibrate_judge(home, "free", asking=Asking(1, Limits(cost=1.0)))


def test_gold_may_be_a_file_and_then_counts_under_its_tag(
    home: Home, fake: Fake, tmp_path: Path
) -> None:
    file = tmp_path / "gold.jsonl"
    rows = [{"prompt": f"Q{n}?", "chosen": "No.", "rejected": "No, I fear."} for n in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert calibrate_judge(home, "brief", gold=file, tag="other").trusted == {"other": 0.05}


def test_without_gold_the_cure_is_named(tmp_path: Path) -> None:
    with Log(tmp_path / "home") as log:
        log.record([{"role": "user", "content": "Hi"}], "Hello")
    with pytest.raises(JudgeError, match=r"no comparison by people stands .* \(--gold FILE\)"):
        calibrate_judge(tmp_path / "home", "brief")


def test_an_apps_own_judge_is_measured_by_what_it_logged(home: Home, fake: Fake) -> None:
    _judge_as_an_app(home, "my-gpt", wrong=3)
    found = calibrate_judge(home, "my-gpt")
    assert found.trusted["brief"] == pytest.approx(3.5 / 31)
    assert "nothing was asked" in found.notes[0]
    assert len([one for one in Home.open(home.path).pairs() if one.origin == "judge"]) == 30


def _judge_as_an_app(home: Home, name: str, wrong: int) -> None:
    """Log verdicts on all answers of the tag "brief", of which the first few are wrong."""
    runs: dict[str, list[Any]] = {}
    for run in home.runs():
        if run.tag == "brief":
            runs.setdefault(run.prompt.id, []).append(run)
    with Log(home.path) as log:
        for number, (short, long) in enumerate(runs.values()):
            winner: Any = "b" if number < wrong else "a"
            log.compare(short.run_id, long.run_id, winner=winner, source="model", user_id=name)


def test_a_name_that_is_no_judge_says_what_there_is(home: Home, fake: Fake) -> None:
    with pytest.raises(JudgeError, match=r"no judge 'strict' .* there are: brief"):
        calibrate_judge(home, "strict")


def test_people_who_disagree_are_told(home: Home, fake: Fake) -> None:
    source = random.Random(0)
    runs: dict[str, list[Any]] = {}
    for run in home.runs():
        runs.setdefault(run.prompt.id, []).append(run)
    with Log(home.path) as log:
        for short, long in [*runs.values()][:20]:
            for name in ("x", "y"):
                winner: Any = source.choice(["a", "b"])
                log.compare(short.run_id, long.run_id, winner=winner, user_id=name)
    people = calibrate_judge(home, "brief").people
    assert people["pairs"] >= 20
    assert people["agreement"] < 0.9
    assert people["alpha"] < 0.7


def test_a_panel_is_fitted_on_gold_and_calibrated_on_what_it_was_not_fitted_on(
    home: Home, fake: Fake
) -> None:
    for name in ("one", "two"):
        text = f"---\nengine: fake\nprinciples: [be {name}]\n---\n"
        rubric.write(home, name, text)
    rubric.write(home, "both", "---\nengine: panel\nmembers: [one, two]\n---\n")
    found = calibrate_judge(home, "both")
    assert set(found.weights) == {"one", "two"}
    assert found.trusted == {"brief": 0.05}


def test_a_panel_in_a_panel_is_refused(home: Home, fake: Fake) -> None:
    rubric.write(home, "inner", "---\nengine: panel\nmembers: [brief, outer]\n---\n")
    rubric.write(home, "outer", "---\nengine: panel\nmembers: [brief, inner]\n---\n")
    with pytest.raises(JudgeError, match="has the panel 'inner' in it"):
        calibrate_judge(home, "outer")


def test_people_who_contradict_one_another_are_no_gold(tmp_path: Path) -> None:
    with Log(tmp_path / "home") as log:
        runs = [log.record([{"role": "user", "content": "Hi"}], text) for text in ("a", "b")]
        for name, winner in (("ana", "a"), ("bob", "b")):
            log.compare(*runs, winner=winner, user_id=name)  # type: ignore[arg-type]
    with pytest.raises(JudgeError, match="or they contradict one another"):
        calibrate_judge(tmp_path / "home", FakeJudge())


def test_another_calibration_keeps_what_is_known_of_other_tags(
    home: Home, fake: Fake, tmp_path: Path
) -> None:
    calibrate_judge(home, "brief")
    file = tmp_path / "gold.jsonl"
    rows = [{"prompt": f"Q{n}?", "chosen": "No.", "rejected": "No, I fear."} for n in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = calibrate_judge(home, "brief", gold=file, tag="other")
    assert found.trusted == {"brief": 0.05, "other": 0.05}
    assert "as measured before in brief" in found.notes
    fake(noise=1.0)
    file.write_text(file.read_text().replace("Q", "R"))
    assert set(calibrate_judge(home, "brief", gold=file, tag="other").trusted) == {"brief"}


def test_an_apps_own_judge_is_measured_on_all_that_it_judged(home: Home, fake: Fake) -> None:
    _judge_as_an_app(home, "my-gpt", wrong=0)
    assert calibrate_judge(home, "my-gpt", limit=3).calibration.pooled.n == 30


def test_what_was_taken_back_counts_for_nothing(home: Home, fake: Fake) -> None:
    _judge_as_an_app(home, "my-gpt", wrong=0)
    rows = [row for row in home.comparisons() if row.source == "model"]
    with Log(home.path) as log:
        for row in rows:
            log.retract(row.run_a, "comparison", source="model", user_id="my-gpt")
    with pytest.raises(JudgeError, match="nothing that a model said as the user 'my-gpt'"):
        calibrate_judge(home, "my-gpt")


def test_a_judge_that_was_deceived_is_not_trusted_again_unchanged(home: Home, fake: Fake) -> None:
    calibrate_judge(home, "brief")
    with closing(connect(home)) as connection:
        judge = open_judge(home, connection, "brief", "default")
        report = {"calibration": None, "weights": {}, "gold": "", "distrusted": True}
        Judges(connection).calibrate("default", judge.voter, {}, report)
    for ask in (calibrate_judge, judge_runs):
        with pytest.raises(UncalibratedJudge, match="saw 'brief' being deceived"):
            ask(home, "brief")
    file = home.judges / "brief.md"
    file.write_text(file.read_text().replace("be brief", "be kind"))
    assert calibrate_judge(home, "brief").trusted


ELSE = ({"role": "user", "content": "And else?"},)


def test_a_part_of_a_panels_members_is_not_the_panel(home: Home, fake: Fake) -> None:
    for name in ("one", "two"):
        rubric.write(home, name, f"---\nengine: fake\nprinciples: [be {name}]\n---\n")
    rubric.write(home, "both", "---\nengine: panel\nmembers: [one, two]\n---\n")
    calibrate_judge(home, "both")
    with closing(connect(home)) as connection:
        judge = open_judge(home, connection, "both", "default")
        new = [one.case._replace(question=one.case.question._replace(prompt=ELSE))
               for one in gold_of_home(connection, "default")]  # fmt: skip
        one, two = judge.members
        assert len(dict(one.hear(new, Spending()))) == len(new)
        assert dict(judge.recall(new)) == {}
        assert len(dict(two.hear(new, Spending()))) == len(new) == len(dict(judge.recall(new)))
