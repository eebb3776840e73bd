"""The loop draws, judges, learns and stops by itself; updates are scripted here, and quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import agentpref
from agentpref.config import UpdateConfig
from agentpref.errors import ConfigError, JudgeError, UncalibratedJudge
from agentpref.home import Home
from agentpref.judging import Asking
from agentpref.online import OnlineReport, loop, run_online
from agentpref.prefer.examples import is_held_out
from agentpref.prefer.judges.hearing import Limits
from agentpref.prove.retention import PEOPLE
from agentpref.record.log import Log
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.registry import Registry
from agentpref.testing import FakeBackend, FakeJudge, write_adapter
from agentpref.types import UpdateReport, Winner

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}


def answer(revision: str, request: GenerationRequest) -> str:
    """Later revisions say less; drawn answers differ by their seed."""
    words = 12 if revision == "base" else max(1, 10 - 2 * int(revision[4:10]))
    seed = request.seed or 0  # answers that are drawn have one
    draw = " well" * (seed % 5) + " gladly" * 4 * (seed % 2)
    return f"{request.messages[-1]['content'][:12]}{' so' * words}{draw}."


@pytest.fixture
def home(tmp_path: Path) -> Home:
    with Log(tmp_path / "home") as log:
        for number in range(120):
            log.record([{"role": "user", "content": f"{number} is what?"}], f"It is {number}.")
    return Home.open(tmp_path / "home")


@pytest.fixture
def updates(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Scripts the verdicts of updates; the last one is repeated. The calls are kept."""
    calls: list[dict[str, Any]] = []
    script = ["promoted"]

    def update(place: Any, **given: Any) -> UpdateReport:
        calls.append(given)
        verdict: Any = script.pop(0) if len(script) > 1 else script[0]
        registry, revision = Registry(home), None
        if verdict == "promoted":
            folder = write_adapter(tmp_path / f"adapter-{len(calls)}", seed=len(calls))
            made = registry.publish(folder, parent=None, model=IDENTITY, training={})
            revision = made.revision_id
            registry.promote(revision)
        checks = [{"name": "KL budget", "passed": True, "value": kl * len(calls)}]
        return UpdateReport(
            f"u{len(calls)}", "default", "tiny", 0.0, verdict, None, revision, checks=checks,
            attempts=[{"attempt": 1, "failed": failures}],
        )  # fmt: skip

    kl, failures = 0.01, list[str]()
    monkeypatch.setattr(loop, "update", update)

    def make(*verdicts: str, spent: float = 0.01, failed: Any = ()) -> list[dict[str, Any]]:
        nonlocal kl
        kl, failures[:] = spent, failed
        script[:] = verdicts
        return calls

    return make


RULE = FakeJudge(source="code")


def run(home: Home, judge: Any = RULE, **given: Any) -> OnlineReport:
    given = {"rounds": 4, "prompts": 8, "probes": 10, "offline": False} | given
    return run_online(home.path, model="tiny", judge=judge, backend=FakeBackend(answer), **given)


def test_all_rounds_are_done_while_it_gets_better(home: Home, updates: Any) -> None:
    updates("promoted")

    def graded(question: str, a: str, b: str) -> Winner:
        """Shorter is better, but a base's answer is beaten only by much shorter ones."""
        if abs(len(a) - len(b)) < 12 + int(question.split()[0]) % 24:
            return "tie"
        return "a" if len(a) < len(b) else "b"

    done = run(home, FakeJudge(graded, source="code"), rounds=3)
    assert done.ended in ("rounds", "no_rise")
    assert [one.verdict for one in done.rounds] == ["promoted"] * len(done.rounds)
    assert done.live.startswith("rev-00000")


def test_answers_are_drawn_from_what_serves_and_judged(home: Home, updates: Any) -> None:
    updates("promoted")
    done = run(home, rounds=2, samples=3)
    drawn = [one for one in home.runs() if one.metadata.get("online")]
    assert {one.revision for one in drawn if one.metadata["online"] == 1} == {"base"}
    assert {one.revision for one in drawn if one.metadata["online"] == 2} == {
        done.rounds[0].revision
    }
    assert len(drawn) == sum(one.sampled for one in done.rounds) == 2 * (8 + 2) * 3
    assert all(one.logprobs for one in drawn)
    judged = [row for row in home.comparisons() if row.source == "code"]
    assert len(judged) == 2 * sum(one.decided + one.ties for one in done.rounds) > 0


def test_probes_are_held_out_and_never_drawn(home: Home, updates: Any) -> None:
    updates("promoted")
    backend = FakeBackend(answer)
    run_online(home.path, model="tiny", judge=RULE, backend=backend, rounds=2, prompts=8,
               probes=10, offline=False)  # fmt: skip
    share = UpdateConfig().held_out
    drawn = {one.prompt.id for one in home.runs() if one.metadata.get("online")}
    held_out = [one for one in home.runs() if is_held_out(one.prompt.messages, share)]
    sides = {one.prompt.id for one in held_out}
    assert len(drawn & sides) == 4  # two a round, which prove
    assert len(drawn - sides) == 16
    assert len(sides - drawn) >= 10


def test_it_ends_where_the_win_rate_no_longer_rises(home: Home, updates: Any) -> None:
    updates("promoted")
    done = run(home)  # the rule prefers live to the base in all answers from the first round on
    assert (done.ended, len(done.rounds)) == ("no_rise", 2)
    assert done.because == "the judged win rate no longer rises: 1.00, now 1.00"


def test_it_ends_where_two_rounds_bring_nothing(home: Home, updates: Any) -> None:
    updates("refused")
    done = run(home)
    assert (done.ended, len(done.rounds), done.live) == ("nothing_promoted", 2, "base")


@pytest.mark.parametrize("offline", [True, False])
def test_it_ends_where_an_update_loses_what_people_said(
    home: Home, updates: Any, offline: bool
) -> None:
    failure = f"{PEOPLE}: .80 -> .40 on 40 held-out prompts"
    updates("refused", failed=[failure])
    done = run(home, offline=offline)
    assert (done.ended, done.because, done.live) == ("people_disagree", failure, "base")
    assert len(done.rounds) == (0 if offline else 1)
    assert "agentpref judge calibrate fakejudge" in done.notes[-1]


def test_it_ends_where_the_kl_budget_is_spent(home: Home, updates: Any) -> None:
    updates("promoted", spent=0.15)
    done = run(home)
    assert (done.ended, len(done.rounds)) == ("kl_budget", 1)
    assert done.because == "KL from the base is 0.150 of 0.15 nats a token"


def test_it_ends_where_the_judge_has_spent_its_limit(home: Home, updates: Any) -> None:
    updates("promoted")
    done = run(home, asking=Asking(4, Limits(seconds=0)))
    assert (done.ended, done.because) == ("judge_spent", "0 s are over")


def test_it_ends_where_the_time_is_over(home: Home, updates: Any) -> None:
    calls = updates("promoted", "refused", "promoted")
    done = run(home, max_minutes=1e-9)
    assert (done.ended, len(done.rounds)) == ("time", 1)
    assert calls[0]["config"].max_minutes == 0.5


def magic(question: str, a: str, b: str) -> Winner:
    """Prefers what says "so" more often: what the revisions unlearn."""
    counts = [text.count(" so") for text in (a, b)]
    return "tie" if counts[0] == counts[1] else "a" if counts[0] < counts[1] else "b"


def longer(question: str, a: str, b: str) -> Winner:
    return "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b"


CHECK = FakeJudge(longer, source="code", name="check")


def test_a_judge_does_not_check_itself(home: Home, updates: Any) -> None:
    with pytest.raises(ConfigError, match="check is 'fakejudge', which is the judge"):
        run(home, check=FakeJudge(source="code"))


def test_a_second_judge_that_says_the_opposite_ends_it_and_rolls_back(
    home: Home, updates: Any
) -> None:
    updates("promoted")
    done = run(home, FakeJudge(magic, source="code"), check=CHECK)
    assert (done.ended, len(done.rounds), done.live) == ("judges_disagree", 1, "base")
    assert done.rolled_back == done.rounds[0].revision
    assert "say the opposite of one another in 10 of 10 answers" in done.because
    assert "is a rule, whose verdicts go on to train" in done.notes[-1]


def oddly(question: str, a: str, b: str) -> Winner:
    """Prefers what says "gladly", which makes an answer longer."""
    counts = [text.count("gladly") for text in (a, b)]
    return "tie" if counts[0] == counts[1] else "a" if counts[0] > counts[1] else "b"


def test_judges_who_part_on_a_rounds_pairs_teach_nothing(home: Home, updates: Any) -> None:
    calls = updates("promoted")
    check = FakeJudge(source="code", name="check")  # the shorter answer is better
    done = run(home, FakeJudge(oddly, source="code"), check=check, prompts=24)
    assert (done.ended, calls, done.live) == ("judges_disagree", [], "base")
    assert done.rounds[0].verdict == "not_learned"
    assert "gladly" in done.rounds[0].words
    assert "rewards the words: gladly" in done.because


def test_a_second_judge_who_agrees_changes_nothing(home: Home, updates: Any) -> None:
    updates("promoted")
    check = FakeJudge(source="code", name="check", noise=0.1)
    assert run(home, check=check).ended == "no_rise"


def test_what_a_deceived_judge_said_trains_nothing_any_more(home: Home, updates: Any) -> None:
    updates("promoted")
    runs = [*home.runs()]
    with Log(home.path) as log:
        for number, one in enumerate(runs[:30]):
            other = log.record(one.prompt.messages, f"It is {number}, so so so.")
            log.compare(one.run_id, other, winner="a", user_id="ana")
    judge = FakeJudge(magic)
    agentpref_calibrate(home, judge)
    before = sum(one.origin == "judge" for one in home.pairs())
    done = run(home, judge, check=CHECK)
    assert done.ended == "judges_disagree"
    assert "trains nothing any more" in done.notes[-1]
    assert before == sum(one.origin == "judge" for one in home.pairs()) == 0


def agentpref_calibrate(home: Home, judge: FakeJudge) -> None:
    from agentpref.judging import calibrate_judge

    assert calibrate_judge(home, judge).trusted


def test_it_learns_first_from_what_is_logged(home: Home, updates: Any) -> None:
    calls = updates("nothing_new", "promoted")
    done = run(home, offline=True, rounds=1)
    assert (done.offline, len(calls), done.rounds[0].verdict) == ("nothing_new", 2, "promoted")


def test_each_round_is_told_as_it_ends(home: Home, updates: Any) -> None:
    updates("refused")
    heard: list[int] = []
    run(home, heard=lambda one: heard.append(one.number))
    assert heard == [1, 2]


def test_a_judge_that_nobody_calibrated_is_refused_before_anything(
    home: Home, updates: Any
) -> None:
    calls = updates("promoted")
    with pytest.raises(UncalibratedJudge):
        run(home, FakeJudge())
    assert calls == []


def test_without_prompts_the_cure_is_named(tmp_path: Path, updates: Any) -> None:
    with Log(tmp_path / "empty"):
        pass
    with pytest.raises(JudgeError, match="log what the app is asked first"):
        run(Home.open(tmp_path / "empty"))


@pytest.mark.parametrize(("name", "value"), [("rounds", 0), ("samples", 1), ("prompts", 0)])
def test_a_number_out_of_range_is_refused(home: Home, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}, but must be"):
        run(home, **{name: value})


def test_reinforcement_gets_prompts_a_reward_and_what_serves(
    home: Home, updates: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    updates("promoted")
    seen: dict[str, Any] = {}

    def train(folder: Path, start: Path | None, prompts: Sequence[Any], reward: Any) -> Path:
        seen.update(start=start, prompts=prompts)
        seen["rewards"] = reward(prompts[0], ["x", "x x x", "x x"])
        return write_adapter(folder / "made")

    def adopt(place: Any, made: Path, **given: Any) -> UpdateReport:
        seen["adopted"] = made.name
        return UpdateReport("u", "default", "tiny", 0.0, "refused", None)

    monkeypatch.setattr(loop, "adopt", adopt)
    done = run(home, train=train, rounds=1)
    assert (seen["start"], seen["adopted"], len(seen["prompts"])) == (None, "made", 8)
    assert seen["rewards"] == [1.0, 0.0, 0.5]
    assert done.rounds[0].verdict == "refused"
    assert agentpref.Registry(home.path).live() is None
