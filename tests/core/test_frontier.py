"""How far a reward model can be followed is seen, told, and kept for the KL budget."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentpref
from agentpref.config import GateSettings, UpdateConfig
from agentpref.errors import ConfigError, EvaluationError, RewardError
from agentpref.evaluation import overoptimisation
from agentpref.evaluation.frontier import Read as FeaturesRead
from agentpref.evaluation.frontier import Seen, at_best_of, frontier, seen_by
from agentpref.evaluation.overoptimisation import measure_frontier
from agentpref.home import Home
from agentpref.judging import Asking
from agentpref.prove import kl_budget
from agentpref.record.log import Log
from agentpref.reward import Shelf, fit_reward, kl_of_best, open_reward
from agentpref.reward.judge import RewardJudge
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref.testing.judges import FakeJudge, drawn
from agentpref.types import BASE

AUTO = UpdateConfig(gate=GateSettings(kl_budget="auto"))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=7).filter(
        lambda rows: len({score for score, _ in rows}) == len(rows)
    ),
    st.data(),
)
def test_the_best_of_n_is_the_mean_over_all_ways_to_draw_n(rows: Any, data: Any) -> None:
    n = data.draw(st.integers(1, len(rows)))
    score, value = (np.array(one, dtype=float) for one in zip(*rows, strict=True))
    by_hand = fmean(max(some)[1] for some in combinations(rows, n))
    assert at_best_of(n, score, value) == pytest.approx(by_hand)


def planted(turns: bool, prompts: int = 30, samples: int = 16) -> list[tuple[Any, Any]]:
    """A proxy that likes later answers, and a gold score that does, or only up to the middle."""
    source, found = np.random.default_rng(0), ([], [])
    for _ in range(prompts):
        place = np.arange(samples) + source.normal(0, 0.1, samples)
        proxy = place / samples
        gold = np.clip(1 - np.abs(place - 8) / 8 if turns else proxy, 0, 1)
        found[0].append(Seen(place, proxy, {"rev-1": 0.7}))
        found[1].append(Seen(gold, gold, {"rev-1": 0.6}))
    return [found]


def test_where_gold_falls_while_the_proxy_rises_it_turns_and_says_how_far_to_go() -> None:
    found = frontier(planted(turns=True), [20.0] * 30, {"rev-1": 0.02})
    proxies = [one.proxy for one in found.points if one.n]
    assert proxies == sorted(proxies)
    assert found.turns
    assert found.best_n in (2, 4)
    assert found.kl_budget == pytest.approx(kl_of_best(found.best_n) / 20)
    assert [one.n for one in found.points] == [1, 2, 4, 8, 16, None]
    assert found.points[-1].kl == pytest.approx(0.4)
    assert found.points[-1].proxy == pytest.approx(0.7)
    assert found.points[-1].gold == pytest.approx(0.6)


def test_where_both_rise_nothing_turns() -> None:
    found = frontier(planted(turns=False), [20.0] * 30, {})
    assert (found.best_n, found.turns, found.kl_budget) == (16, False, None)


SUBJECTS = ("tea", "rain", "chess", "bread", "snow", "maps")


def asked(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What about {SUBJECTS[number % 6]} {number}?"}]


def told(number: int, words: int) -> str:
    return f"The number is {number}" + " and so on" * words + "."


@pytest.fixture(scope="module")
def liking_short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which people prefer the shorter of two answers, with a reward model."""
    place = tmp_path_factory.mktemp("frontier") / "home"
    with Log(place) as log:
        for number in range(120):
            short, long = (log.record(asked(number), told(number, words), tags=["chat"])
                           for words in (1 + number % 3, 6 + number % 4))  # fmt: skip
            log.compare(short, long, winner="a", user_id="ana")
    fit_reward(place, model="tiny")
    return place


def drawing(registry: Any, names: Any) -> Any:
    """Answers of one to ten words, by the seed; nothing serves beside."""
    assert list(names) == []

    def answer(revision: str, request: GenerationRequest) -> Reply:
        assert revision == BASE
        assert request.temperature == 0.8
        number = int("".join(filter(str.isdigit, str(request.messages[-1]["content"]))))
        words = 1 + int(10 * drawn(number, str(request.seed)))
        text = told(number, words)
        tokens = (1,) * (5 + words)
        return Reply(BASE, {"role": "assistant", "content": text}, tokens, (0.0,) * len(tokens),
                     "stop")  # fmt: skip

    return answer


def neither_short_nor_long(question: str, a: str, b: str) -> Any:
    """Six words more are best: what people never said, since they never saw anything shorter."""
    away = [abs(text.count("so on") - 6) for text in (a, b)]
    return "tie" if away[0] == away[1] else "a" if away[0] < away[1] else "b"


def test_a_judge_sees_what_people_did_not_say_and_the_budget_goes_by_it(
    liking_short: Path,
) -> None:
    judge = FakeJudge(neither_short_nor_long, source="code")
    found = measure_frontier(liking_short, answer=drawing, judge=judge, prompts=20)
    assert found.gold == "fakejudge"
    assert found.spending.asked > 0
    assert found.turns
    assert found.best_n < 16
    assert found.points[0].gold == pytest.approx(0.5)
    proxies = [one.proxy for one in found.points]
    assert proxies == sorted(proxies)
    home = Home.open(liking_short)
    assert found.kl_budget is not None
    settled = kl_budget.settled(AUTO, home, "default").gate
    assert settled.budget == min(found.kl_budget, GateSettings().budget)


def test_an_update_goes_by_what_was_found(tmp_path: Path) -> None:
    with Log(tmp_path) as log:
        log.record(asked(1), "One.")
    home = Home.open(tmp_path)
    home.rewards_of("default").mkdir(parents=True)
    for measured, settled in ((0.07, 0.07), (0.9, 0.15), (None, 0.15)):
        (home.rewards_of("default") / "reward-000007-aaaaaaaaaaaa.safetensors").touch()
        found = {"reward": "reward-000007-aaaaaaaaaaaa", "kl_budget": measured}
        assert kl_budget.keep(home, "default", found)
        done = agentpref.update(tmp_path, model="tiny", config=AUTO)
        assert done.config["gate"]["kl_budget"] == settled
    for odd in (True, -1.0, 0.0, "x"):
        assert kl_budget.keep(home, "default", {**found, "kl_budget": odd})
        with pytest.raises(ConfigError, match="is not what was written"):
            kl_budget.settled(AUTO, home, "default")


def test_what_was_measured_with_an_older_reward_model_is_not_kept(liking_short: Path) -> None:
    def fitting_meanwhile(registry: Any, names: Any) -> Any:
        fit_reward(liking_short, model="tiny", config=UpdateConfig(seed=1))
        return drawing(registry, names)

    found = measure_frontier(liking_short, answer=fitting_meanwhile, prompts=4, samples=2)
    newest = Shelf(Home.open(liking_short), "default").names()[-1]
    assert found.reward != newest
    assert "no longer the newest" in found.notes[-1]
    older = {"reward": "reward-000000-aaaaaaaaaaaa", "kl_budget": None}
    assert not kl_budget.keep(Home.open(liking_short), "default", older)


def test_of_few_prompts_no_fall_is_proven() -> None:
    found = frontier(planted(turns=True, prompts=12), [20.0] * 12, {})
    assert (found.turns, found.best_n, found.kl_budget) == (False, 16, None)


def test_halves_of_what_people_said_choose_and_score_in_turn(liking_short: Path) -> None:
    told_of: list[str] = []
    found = measure_frontier(
        liking_short,
        answer=drawing,
        prompts=10,
        samples=8,
        asking=Asking(progress=lambda stage, done, total: told_of.append(stage)),
    )
    assert (found.gold, found.prompts, found.samples, found.turns) == ("cross-fitted", 10, 8, False)
    assert found.points[-1].gold > 0.7
    assert found.best_n == 8
    assert {"answers", "features", "fit"} <= {*told_of}
    home = Home.open(liking_short)
    assert kl_budget.settled(AUTO, home, "default").gate.budget == GateSettings().budget


def test_nothing_is_known_once_the_reward_model_is_another_one(liking_short: Path) -> None:
    home = Home.open(liking_short)
    measure_frontier(liking_short, answer=drawing, prompts=4, samples=2)
    kl_budget.settled(AUTO, home, "default")
    fit_reward(liking_short, model="tiny")
    with pytest.raises(ConfigError, match="run `agentpref reward frontier`"):
        agentpref.update(liking_short, model="tiny", config=AUTO)
    kl_budget.path_of(home, "default").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not what was written"):
        kl_budget.settled(AUTO, home, "default")


def test_what_cannot_be_measured_is_refused_in_words(
    liking_short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="samples is 1, but must be from 2 to 256"):
        measure_frontier(liking_short, answer=drawing, samples=1)
    with pytest.raises(ConfigError, match="prompts is 1, but must be 2 or more"):
        measure_frontier(liking_short, answer=drawing, prompts=1)
    itself = RewardJudge(open_reward(liking_short))
    with pytest.raises(ConfigError, match="the reward model cannot judge itself"):
        measure_frontier(liking_short, answer=drawing, judge=itself)
    with Log(tmp_path / "bare") as log:
        log.record(asked(1), "One.")
    with pytest.raises(RewardError, match="has no reward model"):
        measure_frontier(tmp_path / "bare", answer=drawing)
    monkeypatch.setattr("agentpref.evaluation.overoptimisation.sample", lambda *_: [])
    with pytest.raises(EvaluationError, match="fewer than two prompts are held out"):
        measure_frontier(liking_short, answer=drawing)


def test_what_serves_stands_beside_at_its_distance(
    liking_short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(Home.open(liking_short))
    folder = write_adapter(tmp_path / "adapter")
    name = registry.publish(folder, parent=None, model={"name": "tiny"}, training={}).revision_id

    def answering(asked_of: Registry, names: Any) -> Any:
        assert list(names) == [name]
        base = drawing(asked_of, [])

        def answer(revision: str, request: GenerationRequest) -> Reply:
            if revision == BASE:
                return base(revision, request)
            message = {"role": "assistant", "content": told(1, 1)}  # as short as the base can
            return Reply(name, message, (1,), (0.0,), "stop")

        return answer

    monkeypatch.setattr(overoptimisation, "_kls", lambda *_: {name: 0.05})
    judge = FakeJudge(neither_short_nor_long, source="code")
    for scorer in (None, judge):
        found = measure_frontier(
            liking_short, answer=answering, revisions=[name], judge=scorer, prompts=6, samples=8
        )
        point = found.points[-1]
        assert (point.policy, point.n) == (name, None)
        assert point.kl == pytest.approx(0.05 * found.tokens)
        assert point.proxy > 0.6
        assert (point.gold < 0.5) is (scorer is judge)


def test_a_revision_is_seen_beside_the_base(liking_short: Path) -> None:
    heads = open_reward(liking_short).heads
    source = np.random.default_rng(0)
    at, base = source.normal(size=heads.at.shape[1]), source.normal(size=(5, heads.said.shape[1]))
    seen = seen_by(heads, FeaturesRead(at, base, {"like": base[:2], "same": base}))
    assert seen.better.mean() == pytest.approx(0.5)
    best = int(heads.rewards(at, base).mean(1).argmax())
    assert seen.better[best] == seen.better.max()
    assert seen.others["same"] == pytest.approx(0.5)
    assert set(seen.others) == {"like", "same"}
