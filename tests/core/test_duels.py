"""A judge compares what revisions answer; errors of the judge and lengths are taken out again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import agentpref
from agentpref.errors import EvaluationError
from agentpref.evaluation.duels import Duels, judge_revisions
from agentpref.home import Home
from agentpref.judging import calibrate_judge
from agentpref.record.log import Log
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.registry import Registry
from agentpref.testing import FakeBackend, FakeJudge, write_adapter

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}


def answer(revision: str, request: GenerationRequest) -> str:
    """The second revision says less than the first, and that less than the base."""
    words = {"base": 9}.get(revision, 9 - 3 * int(revision[4:10] if revision != "base" else 0))
    return f"{request.messages[-1]['content']}{' so' * words}."


@pytest.fixture
def home(tmp_path: Path) -> Home:
    with Log(tmp_path / "home") as log:
        for number in range(150):
            asked = [{"role": "user", "content": f"{number} is what?"}]
            runs = [log.record(asked, text) for text in ("Short.", "Much longer than that.")]
            log.compare(*runs, winner="a", user_id="ana")
    home, registry = Home.open(tmp_path / "home"), Registry(tmp_path / "home")
    for seed in (1, 2):
        folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed)
        made = registry.publish(folder, parent=None, model=IDENTITY, training={})
        registry.promote(made.revision_id)
    return home


def fight(home: Home, judge: Any, *revisions: str, **given: Any) -> Duels:
    def ready(registry: Registry, names: Sequence[str]) -> Any:
        backend = FakeBackend(answer)
        for name in names:
            if name != "base":
                backend.load(registry.get(name))
        return backend.generate

    return judge_revisions(home.path, judge, revisions, answer=ready, **given)


def test_the_revision_whose_answers_are_liked_wins(home: Home) -> None:
    found = fight(home, FakeJudge(source="code"), prompts=20)
    (one,) = found.duels
    assert (one.against, one.wins, one.losses, one.ties) == ("base", found.prompts, 0, 0)
    assert one.rate.raw is not None
    assert (one.rate.raw.value, found.prompts) == (1.0, 20)


def test_three_revisions_fight_one_another_and_are_ranked(home: Home) -> None:
    found = fight(home, FakeJudge(source="code"), "base", "1", "2", prompts=20)
    assert len(found.duels) == 3
    assert [*found.ratings][-1] == "base"
    assert next(iter(found.ratings)).startswith("rev-000002")


def test_a_judge_with_errors_is_corrected_by_what_people_said(home: Home) -> None:
    judge = FakeJudge(noise=0.25)
    calibrate_judge(home, judge)
    (one,) = fight(home, judge).duels
    assert one.rate.raw is not None
    assert one.rate.corrected is not None
    assert one.rate.raw.value < 0.9
    assert one.rate.corrected.high == 1.0
    assert one.rate.corrected.value > one.rate.raw.value


def test_a_judge_that_nobody_calibrated_is_told_and_corrects_nothing(home: Home) -> None:
    found = fight(home, FakeJudge(), prompts=10)
    assert "nobody knows how right fakejudge is" in found.notes[0]
    assert found.duels[0].rate.corrected is None


def test_verdicts_that_follow_the_order_are_ties(home: Home) -> None:
    (one,) = fight(home, FakeJudge(position=1.0, source="code"), prompts=10).duels
    assert (one.wins, one.losses, one.ties, one.position) == (0, 0, 10, 10)


def test_the_same_answers_are_ties_without_a_question(home: Home) -> None:
    judge = FakeJudge(source="code")

    def ready(registry: Registry, names: Sequence[str]) -> Any:
        backend = FakeBackend(lambda revision, request: "The same.")
        for name in names:
            if name != "base":
                backend.load(registry.get(name))
        return backend.generate

    (one,) = judge_revisions(home.path, judge, answer=ready, prompts=10).duels
    assert (one.ties, one.same, judge.asked) == (10, 10, [])


def test_a_second_evaluation_asks_nothing_again(home: Home) -> None:
    judge = FakeJudge(source="code")
    fight(home, judge, prompts=10)
    asked = len(judge.asked)
    again = fight(home, judge, prompts=10)
    assert (len(judge.asked), again.spending.known) == (asked, 20)


def test_a_single_revision_is_refused(home: Home) -> None:
    with pytest.raises(EvaluationError, match="compares two revisions or more"):
        fight(home, FakeJudge(source="code"), "1")


def test_a_tag_is_corrected_by_its_own_gold_alone(home: Home) -> None:
    """A judge that is right about short answers and wrong about the other tag's."""

    class Fickle(FakeJudge):
        def judge(self, prompts: Any, completions: Any) -> Any:
            found = super().judge(prompts, completions)
            return [one.swap() if "hard" in str(prompts) else one for one in found]

    with Log(home.path) as log:
        for number in range(100):
            asked = [{"role": "user", "content": f"{number} is hard?"}]
            runs = [log.record(asked, t, tags=["hard"]) for t in ("Short.", "Much longer.")]
            log.compare(*runs, winner="a", user_id="ana")
    judge = Fickle()
    calibrate_judge(home, judge)
    (easy,) = fight(home, judge, on="untagged").duels
    (hard,) = fight(home, judge, on="hard").duels
    assert easy.rate.corrected is not None
    assert hard.rate.corrected is None
    assert "not shown to be better than a coin" in hard.rate.why


def test_the_base_against_itself_is_told_to_name_another(home: Home) -> None:
    agentpref.Registry(home.path).rollback()
    agentpref.Registry(home.path).rollback()
    with pytest.raises(EvaluationError, match="there is only the base to compare"):
        fight(home, FakeJudge(source="code"), "base", "live")
