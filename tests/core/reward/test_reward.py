"""A reward model is fitted on what people said, proven, kept, and gone after a removal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentpref.config import UpdateConfig
from agentpref.errors import (
    ConfigError,
    RewardError,
    UnknownNamespace,
    UnknownRun,
    UnknownUser,
    WrongBase,
)
from agentpref.home import Home
from agentpref.learn.answer_reader import _Row
from agentpref.learn.features import FeatureReader
from agentpref.models.base import load_base
from agentpref.record.deletion.forget import forget, forget_run
from agentpref.record.deletion.removal import expire
from agentpref.record.log import Log
from agentpref.reward import RewardFollower, Shelf, fit_reward, kl_of_best, open_reward
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.testing.judges import drawn

SUBJECTS = ("tea", "rain", "chess", "bread", "snow", "maps")


def asked(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What about {SUBJECTS[number % 6]} {number}?"}]


def answers(number: int) -> tuple[str, str]:
    return f"Just {number}.", f"Well, that is a long story about the number {number}, you see."


def fill(place: Path, count: int = 120, *, coin: bool = False) -> Home:
    with Log(place) as log:
        for number in range(count):
            short, long = (log.record(asked(number), text, tags=["chat"]) for text in
                           answers(number))  # fmt: skip
            winner = "b" if coin and drawn(0, str(number)) < 0.5 else "a"
            log.compare(short, long, winner=winner, user_id=f"person {number % 3}")
    return Home.open(place)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home in which the shorter answer is preferred, with a reward model."""
    place = fill(tmp_path_factory.mktemp("reward") / "home")
    fit_reward(place, model="tiny")
    return place


def test_what_people_preferred_scores_higher(home: Home) -> None:
    reward = open_reward(home)
    short, long = reward.score(asked(500), list(answers(500)))
    assert short.mean > long.mean
    assert short.mean == pytest.approx(-long.mean, abs=1e-4)  # around their mean
    assert short.lower < short.mean


def test_it_is_proven_on_prompts_that_it_has_not_seen(home: Home) -> None:
    about = Shelf(home, "default").read().about
    assert about["pairs"] + about["quality"]["pairs"] == 120
    assert about["quality"]["right"] == about["quality"]["pairs"] > 10
    assert about["quality"]["shown"]
    assert about["quality"]["strata"]["chat"]["accuracy"] == 1.0
    assert about["quality"]["shorter"]["value"] == 1.0
    assert about["quality"]["longer"] is None


def test_what_is_known_is_not_computed_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    real = FeatureReader._compute

    def counted(self: FeatureReader, rows: Any) -> Any:
        computed.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(FeatureReader, "_compute", counted)
    before = Shelf(home, "default").read()
    report = fit_reward(home, model="tiny")
    assert sum(computed) == 0
    assert report.before is not None
    assert report.before.right == report.quality.right
    again = Shelf(home, "default").read()
    assert all(np.array_equal(before.arrays[name], again.arrays[name]) for name in before.arrays)


def test_coin_labels_are_not_kept(tmp_path: Path) -> None:
    place = fill(tmp_path / "coin", coin=True)
    report = fit_reward(place, model="tiny")
    assert (report.verdict, report.name) == ("insufficient", None)
    assert "which a coin may be" in report.notes[0]
    with pytest.raises(RewardError, match="has no reward model"):
        open_reward(place)


def test_a_model_that_is_proven_worse_does_not_replace_the_one_before(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = fill(tmp_path / "home")
    first = fit_reward(place, model="tiny")
    real = fit_reward.__globals__["fitted"].fit

    def worse(judged: Any, **given: Any) -> Any:
        made = real(judged, **given)
        rng = np.random.default_rng(0)
        return type(made)(
            made.space, made.at, made.said, rng.normal(size=made.alphas.shape), made.thresholds,
            1.0, 0.0, 1.0,
        )  # fmt: skip

    monkeypatch.setattr("agentpref.reward.fitting.fitted.fit", worse)
    monkeypatch.setattr("agentpref.reward.quality.Quality.shown", True)
    report = fit_reward(place, model="tiny")
    assert report.verdict == "refused"
    assert f"a proven loss, so {first.name} stays" in report.notes[0]
    assert Shelf(place, "default").names() == [first.name]


@pytest.mark.parametrize("how", ["forget", "expire"])
def test_a_removal_deletes_it_and_the_next_fit_has_not_seen_what_is_gone(
    tmp_path: Path, how: str
) -> None:
    place = fill(tmp_path / "home", 60)
    fit_reward(place, model="tiny")
    reward = open_reward(place)
    if how == "forget":
        forget(place, user_id="person 1")
    else:
        expire(place, older_than=1e-6, force=True)
    assert not place.rewards.exists()
    with pytest.raises(RewardError, match="was deleted"):
        reward.score(asked(1), ["a", "b"])
    if how == "forget":
        report = fit_reward(place, model="tiny")
        assert report.pairs + report.quality.pairs == 40
    else:
        with pytest.raises((RewardError, UnknownNamespace)):
            fit_reward(place, model="tiny")


def test_a_removal_of_nothing_keeps_it(home: Home) -> None:
    forget(home, user_id="nobody")
    with pytest.raises(UnknownUser):
        forget(home, user_id="a stranger", missing_ok=False)
    with pytest.raises(UnknownRun):
        forget_run(home, "01a22bc7-7645-7497-b786-72ea88ef8828")
    forget(home, user_id="person 1", dry_run=True)
    assert open_reward(home).name


def test_an_expiry_of_nothing_keeps_it(home: Home) -> None:
    expire(home, older_than=86_400)
    assert open_reward(home).name


def test_an_edited_file_is_refused(tmp_path: Path, home: Home) -> None:
    shelf = Shelf(home, "default")
    kept = shelf.read()
    content = kept.path.read_bytes()
    try:
        kept.path.write_bytes(content + b" ")
        with pytest.raises(RewardError, match="is not the file that was written"):
            shelf.read()
    finally:
        kept.path.write_bytes(content)
    with pytest.raises(RewardError, match="no reward model 'x'; there are: reward-00000"):
        shelf.read("x")


def test_it_is_of_its_base(home: Home, random_base: Path) -> None:
    with pytest.raises(WrongBase, match="was fitted on 'tiny'"):
        open_reward(home, model=str(random_base))


@pytest.mark.parametrize("heads", [0, 1, 33])
def test_a_number_of_heads_out_of_range_is_refused(home: Home, heads: int) -> None:
    with pytest.raises(ConfigError, match=f"heads is {heads}, but must be from 2 to 32"):
        fit_reward(home, model="tiny", heads=heads)


def test_nothing_to_fit_it_on_is_said(tmp_path: Path) -> None:
    with Log(tmp_path / "home") as log:
        log.record(asked(1), "Yes.")
    with pytest.raises(RewardError, match="log comparisons first"):
        fit_reward(tmp_path / "home", model="tiny")


def test_thumbs_train_it_unless_they_are_turned_off(tmp_path: Path) -> None:
    with Log(tmp_path / "home") as log:
        for number in range(60):
            short, long = answers(number)
            run = log.record(asked(number), short if number % 2 else long)
            log.thumbs(run, up=bool(number % 2))
    report = fit_reward(tmp_path / "home", model="tiny")
    assert report.verdict == "insufficient"  # no pair is held out
    assert report.thumbs > 30
    off = UpdateConfig.from_mapping({"thumbs": {"weight": 0}})
    with pytest.raises(RewardError, match="nothing in namespace"):
        fit_reward(tmp_path / "home", model="tiny", config=off)


def test_best_of_is_chosen_by_the_newest_model(home: Home) -> None:
    follower = RewardFollower(home)
    request = GenerationRequest(tuple(asked(300)))
    replies = [
        Reply("base", {"role": "assistant", "content": text}, (), (), "stop")
        for text in answers(300)
    ]
    scores = follower.rank(request, replies)
    assert scores[0] > scores[1]
    fit_reward(home, model="tiny")
    assert follower.rank(request, replies)[0] > scores[1]
    assert follower._opened is not None
    assert follower._opened.name == Shelf(home, "default").names()[-1]


def test_an_answer_that_cannot_be_read_is_never_the_best(home: Home) -> None:
    request = GenerationRequest(tuple(asked(300)))
    texts = ["word " * 5_000, *answers(300)]
    replies = [
        Reply("base", {"role": "assistant", "content": text}, (), (), "stop") for text in texts
    ]
    scores = RewardFollower(home).rank(request, replies)
    assert scores[0] == -math.inf
    assert scores[1] > scores[2] > -math.inf
    with pytest.raises(RewardError, match="cannot be read under 'tiny': too_long"):
        RewardFollower(home).rank(request, replies[:1])


def test_a_large_home_is_sampled(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentpref.reward.fitting.MOST", 50)
    report = fit_reward(home, model="tiny")
    assert (report.pairs, report.quality.pairs) == (50, 25)
    assert "of 120 examples, as equally of each stratum as possible" in report.notes[0]


def test_ties_alone_are_named(tmp_path: Path) -> None:
    with Log(tmp_path / "home") as log:
        for number in range(10):
            runs = [log.record(asked(number), text) for text in answers(number)]
            log.compare(*runs, winner="tie")
    with pytest.raises(RewardError, match=r"\(there: 10 tie\)"):
        fit_reward(tmp_path / "home", model="tiny")


def test_it_scores_for_the_gate_as_it_compares(home: Home) -> None:
    reward = open_reward(home)
    texts = answers(500)
    short, long = reward.score(asked(500), list(texts))
    one, other = (reward.scorer(asked(500), text) for text in texts)
    assert one - other == pytest.approx(short.mean - long.mean, abs=1e-2)


def test_a_base_is_read_in_the_precision_of_the_fit(tmp_path: Path) -> None:
    place = fill(tmp_path / "home")
    config = UpdateConfig.from_mapping({"precision": "bfloat16"})
    assert fit_reward(place, model="tiny", config=config).verdict == "kept"
    assert open_reward(place).base.precision == "bfloat16"


def test_only_some_models_are_kept(home: Home) -> None:
    for _ in range(6):
        fit_reward(home, model="tiny")
    assert len(Shelf(home, "default").names()) == 5


def test_a_report_is_plain_values(home: Home) -> None:
    report = fit_reward(home, model="tiny").to_mapping()
    assert json.loads(json.dumps(report))["quality"]["strata"]["chat"]["pairs"] > 10


def test_features_are_the_states_of_the_last_layer() -> None:
    base = load_base("tiny")
    row = _Row((5, 6, 7, 8), ((9, 10, 11), (12, 13)), (None, None))
    (found,) = FeatureReader(base).read([row])
    with torch.no_grad():
        states = [
            base.model.base_model(torch.tensor([[*row.prompt, *ids]])).last_hidden_state[0]
            for ids in row.completions
        ]
    width = states[0].shape[1]
    assert found.prompt == pytest.approx(states[0][:3].mean(0).numpy(), abs=0.02)
    for own, ids, state in zip(found.answers, row.completions, states, strict=True):
        read = state[3 : 3 + len(ids)]
        assert own[:width] == pytest.approx(read[-1].numpy(), abs=0.02)
        assert own[width:-1] == pytest.approx(read.mean(0).numpy(), abs=0.02)
        assert own[-1] == pytest.approx(np.log1p(len(ids)), abs=1e-3)


def test_the_distance_of_the_best_of_n_is_said() -> None:
    assert [round(kl_of_best(n), 3) for n in (1, 2, 8)] == [0.0, 0.193, 1.204]
    with pytest.raises(ConfigError, match="n is 0"):
        kl_of_best(0)
