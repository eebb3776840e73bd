"""The streams end to end on next to nothing: a row a night, none twice, and a report of them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest

import agentpref
from agentpref.home import Home
from agentpref.learn.learner import Learner
from benchmarks.streams import __main__ as command
from benchmarks.streams import altered, arms, life, measure, promises, subjects, table
from benchmarks.streams.arms import ARMS
from benchmarks.streams.catalogue import COINS, Sizes, trait_night
from benchmarks.streams.life import Life, Plan
from benchmarks.streams.rows import Rows

pytestmark = pytest.mark.slow

SIZES = ["--new", "6", "--proving", "3", "--measured", "4"]


@pytest.fixture
def run(random_base, tmp_path, monkeypatch, capsys):
    """Call the command on a small subject; give its last line and its rows."""
    subject = subjects.subject_of("a real one")
    small = replace(subject, max_tokens=6, probes=subject.probes[:2], general=subject.general[:2])
    monkeypatch.setattr(measure, "subject_of", lambda model: small)
    monkeypatch.setattr(life, "ORDINARY", 2)
    monkeypatch.setattr(command.os, "nice", lambda more: None)
    places = {"rows": "rows.jsonl", "out": "docs", "work": "work"}
    fixed = [
        part for name, place in places.items() for part in (f"--{name}", str(tmp_path / place))
    ]

    def call(*arguments):
        given = ["--model", str(random_base), *SIZES, *fixed, *arguments]
        monkeypatch.setattr(sys, "argv", ["streams", *given])
        command.main()
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        return last, list(Rows(tmp_path / "rows.jsonl"))

    return call


def test_two_nights_of_two_arms_end_with_a_row_each_and_are_not_lived_again(
    run, tmp_path, monkeypatch
):
    asked = ["--streams", "S2", "--arms", "naive,full", "--nights", "2", "--set", "epochs=7"]
    last, rows = run(*asked)
    assert [(row["arm"], row["night"]) for row in rows] == [
        ("frozen", 0), ("naive", 1), ("naive", 2), ("full", 1), ("full", 2),
    ]  # fmt: skip
    frozen, *learned = rows
    assert frozen["ranking"] == [0.5] * 4
    for row in rows:
        assert len(row["ranking"]) == len(row["behaviour"]) == len(row["columns"]) == 4
        assert row["settings"] == {"epochs": 7}
        assert all(map(math.isfinite, (row["kl"], row["perplexity"], row["capability"])))
    assert [row["verdict"] for row in learned[:2]] == ["promoted", "promoted"]
    assert learned[1]["kl"] > 0 == frozen["kl"]
    assert learned[1]["counts"]["replayed"] == 0
    assert [len(row["inside"]) for row in learned[:2]] == [0, 1], "looked at where there is an old"
    assert {row["verdict"] for row in learned[2:]} <= {"refused", "insufficient", "promoted"}
    page = (tmp_path / "docs" / "streams.md").read_text()
    assert "| `naive` | 1 |" in page
    assert "| `full` | 1 |" in page
    assert last["figures"]

    monkeypatch.setattr(life, "learn", lambda *_, **__: pytest.fail("was lived already"))
    assert run(*asked)[1] == rows


def test_a_life_that_was_ended_goes_on_with_the_home_that_its_last_night_left(
    tmp_path, monkeypatch
):
    meter = SimpleNamespace(
        base="abc",
        subject=subjects.subject_of("a real one"),
        samples=dict,
        measure=lambda revision, nights: measured([0.5] * len(nights)),
    )
    plan = Plan("some/model", "S2", "forward", 0, "naive", Sizes(6, 3, 4), {})
    seen: list[list[str]] = []

    def learn(arm, home, model, nights, config, *, watch):
        (home / nights[-1].name).touch()
        seen.append(sorted(path.name for path in home.iterdir() if path.name in names))
        if len(nights) == 3 and len(seen) == 3:
            raise KeyboardInterrupt
        return arms.Learned("promoted")

    def go_on(most=None, is_late=lambda: False):
        rows = Rows(tmp_path / "rows.jsonl")
        lived = Life(plan, meter, rows, tmp_path / "work")
        names.update(night.name for night in lived.nights)
        return lived.go_on(most, is_late)

    names: set[str] = set()
    monkeypatch.setattr(life, "learn", learn)
    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert go_on(is_late=lambda: True) is False
    assert go_on() is True
    assert [len(known) for known in seen] == [1, 2, 3, 3, 4], "the night that was cut is lived anew"
    assert [row["night"] for row in Rows(tmp_path / "rows.jsonl")] == [1, 2, 3, 4]
    assert not any((tmp_path / "work" / "homes").iterdir()), "nothing is left behind"
    seen.clear()
    assert go_on() is True
    assert seen == []


def test_rows_without_the_home_that_they_left_are_told(tmp_path, monkeypatch):
    plan = Plan("some/model", "S2", "forward", 0, "naive", Sizes(6, 3, 4), {})
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append(plan.key("abc") | {"night": 1})
    meter = SimpleNamespace(base="abc", subject=None, samples=dict)
    with pytest.raises(FileNotFoundError, match="night-1 is gone, and night 2 goes on from it"):
        Life(plan, meter, rows, tmp_path / "work").go_on(None, lambda: False)


@pytest.mark.parametrize(("arm", "replayed", "trained"), [("replay-20", 1, 6), ("joint", 0, 12)])
def test_an_arm_replays_its_share_and_a_joint_one_trains_on_all_nights(
    random_base, tmp_path, arm, replayed, trained
):
    nights = [trait_night(trait, "", Sizes(6, 3, 4), 0) for trait in ("openness", "risk-averse")]
    found = None
    for number in (1, 2):
        home = tmp_path / (f"home-{number}" if ARMS[arm].joint else "home")
        Home.create(home)
        config = {"seed": 0, "learning_rate": 0.01}
        found = arms.learn(ARMS[arm], home, str(random_base), nights[:number], config)
    assert found.verdict == "promoted"
    assert (found.counts["replayed"], found.counts["trained"]) == (replayed, trained)
    assert agentpref.Registry(home).live().parent is None or not ARMS[arm].joint


def test_matched_steps_and_joint_training_take_their_epochs_from_the_size_of_a_night():
    def epochs(arm, new, night, **config):
        return arms._epochs(ARMS[arm], new, night, config, model)

    model = "tiny"
    assert epochs("matched", 100, 1) == {"epochs": 10}
    assert epochs("joint", 200, 5) == {"epochs": 5}
    model = "SmolLM2"
    assert epochs("matched", 100, 1) == {"epochs": 4}
    assert epochs("matched", 600, 2) == {"epochs": 4}
    assert epochs("joint", 600, 5) == {"epochs": 2}
    assert epochs("joint", 300, 5, epochs=1) == {"epochs": 1}
    assert epochs("full", 300, 5) == {}


def test_the_previous_adapter_stands_for_the_base_within_the_block_alone(monkeypatch):
    asked = []

    class Fake(Learner):
        def __init__(self):
            pass

        def score(self, policy, rows):
            asked.append(policy)

    monkeypatch.setattr(Learner, "fit", lambda self, rows, **_: self.score("base", rows))
    with altered.previous_as_reference():
        Fake().fit([], new=0)
    Fake().fit([], new=0)
    assert asked == ["live", "base"]


def row(arm, night, ranking, *, seed=0, stream="S2", **more):
    fixed = {"model": "tiny", "base": "abcdef", "order": "forward", "sizes": [1], "settings": {}}
    spent = {"seconds": 1.0, "cpu": 1.0, "commit": "c", "verdict": "promoted", "inside": []}
    own = {"arm": arm, "night": night, "seed": seed, "stream": stream, "columns": ["a", "b"]}
    return fixed | measured(ranking, night) | spent | own | more


def measured(ranking, night=1):
    scores = {"ranking": ranking, "behaviour": ranking, "words": [10.0] * len(ranking)}
    return scores | {"kl": 0.1 * night, "perplexity": 2.0, "capability": 0.5}


def rows_of(stream="S2", full=(0.9, 0.9), seed=0):
    more = {"stream": stream, "seed": seed}
    return [
        row("frozen", 0, [0.5, 0.5], **more),
        row("naive", 1, [0.9, 0.5], **more),
        row("naive", 2, [0.7, 0.9], **more),
        row("full", 1, [0.9, 0.5], **more),
        row("full", 2, list(full), inside=[0.6], **more),
        row("joint", 1, [0.9, 0.5], **more),
        row("joint", 2, [0.9, 0.9], cpu=4.0, **more),
    ]


def test_the_promises_are_told_from_the_rows_and_a_miss_is_told_as_one():
    found = {target.name.partition(" (")[0]: target for target in promises.targets(rows_of())}
    assert found["S2 naive forgets"].value == pytest.approx(0.2)
    assert found["S2 forgetting cut"].value == pytest.approx(1.0)
    assert found["S2 recovery"].value == pytest.approx(1.0)
    assert found["S2 last night by joint's"].value == 0.25
    assert all(target.holds for target in found.values() if "R²" not in target.name)
    missed = {
        target.name.partition(" (")[0]: target
        for target in promises.targets(rows_of(full=(0.7, 0.8)))
    }
    assert not missed["S2 forgetting cut"].holds
    assert not missed["S2 new stratum less naive's"].holds
    assert not missed["S2 recovery"].holds


def test_noise_and_thumbs_are_compared_with_the_clean_stream():
    rows = [*rows_of("S1"), *rows_of("S4", full=(0.9, 0.8)), *rows_of("S5", full=(0.9, 0.6))]
    found = {target.name.partition(" (")[0]: target for target in promises.targets(rows)}
    assert found["S4 less S1"].value == pytest.approx(-0.05)
    assert found["S5 by S1"].value == pytest.approx(0.75 / 0.9)


def test_a_cell_has_the_interval_of_its_mean_over_seeds():
    from scipy import stats

    rows = [r for seed, last in zip(count(), (0.9, 0.8, 0.85), strict=False)
            for r in rows_of(full=(0.9, last), seed=seed)]  # fmt: skip
    page = table.document(rows, [], [])
    accs = [0.9, 0.85, 0.875]
    low, high = stats.t.interval(0.95, 2, loc=0.875, scale=stats.sem(accs))
    assert f"| `full` | 3 | 0.875 [{low:.3f}, {high:.3f}] |" in page
    assert "| `full` | 0.900 / +0.000 | 0.850 / +0.000 | 0.875 / +0.000 |" in page


def test_recovery_is_of_the_means_over_lives_and_there_is_none_where_joint_is_no_better():
    rows = [*rows_of(full=(0.9, 0.9)), *rows_of(full=(0.8, 0.9), seed=1)]
    (_, found), *_ = table.lives_of(rows).items()
    assert table.recovered(found, "full") == pytest.approx((0.875 - 0.8) / (0.9 - 0.8))
    spoiled = [r | {"ranking": [0.5, 0.5]} if r["arm"] == "joint" else r for r in rows]
    (_, found), *_ = table.lives_of(spoiled).items()
    assert table.recovered(found, "full") is None
    assert "S2 recovery" not in {t.name.partition(" (")[0] for t in promises.targets(spoiled)}


def test_a_night_costs_a_third_of_joint_training_once_that_has_grown_to_it():
    def lives(arm, spent):
        rows = [
            row("frozen", 0, [0.5, 0.5]),
            *(row(arm, n, [0.9, 0.9], cpu=cpu) for n, cpu in spent),
        ]
        return {(0, "forward"): table.Lived(rows)}

    joint = lives("joint", [(1, 5.0), (2, 10.0), (3, 15.0)])
    steady = {"full": lives("full", [(1, 9.0), (2, 20.0), (3, 20.0)]), "joint": joint}
    assert table.a_third_from(steady, "full") == 12
    growing = {"full": lives("full", [(1, 5.0), (2, 8.0), (3, 11.0)]), "joint": joint}
    assert table.a_third_from(growing, "full") is None


def test_twenty_nights_are_to_promote_or_know_the_good_ones_and_never_coins():
    nights = [("openness", "promoted"), (COINS[0], "promoted"), ("risk", "nothing_to_gain"),
              ("more", "refused"), (COINS[1], "insufficient")]  # fmt: skip
    ranking = [0.5] * len(nights)
    rows = [
        row("full", n, ranking, stream="S7", name=name, verdict=verdict, columns=[*"abcde"])
        for n, (name, verdict) in enumerate(nights, 1)
    ]
    base = row("frozen", 0, ranking, stream="S7", columns=[*"abcde"])
    found = {t.name.partition(" (")[0]: t for t in promises.targets([base, *rows])}
    assert found["S7 good nights promoted or known"].value == pytest.approx(2 / 3)
    assert found["S7 coin nights promoted"].value == 0.5
    assert found["S7 KL at the end"].value == pytest.approx(0.5)


def test_the_dip_is_against_what_the_night_before_had():
    (_, arms_found), *_ = table.lives_of(rows_of()).items()
    (lived,) = arms_found["full"].values()
    assert lived.dip == pytest.approx(0.6 - 0.9)


def test_plots_are_drawn_and_equal_rows_give_equal_files(tmp_path):
    plots = pytest.importorskip("benchmarks.streams.plots", exc_type=ImportError)
    files = [plots.draw(rows_of(), tmp_path / name) for name in "ab"]
    assert [file.name for file in files[0]] == ["accuracy.svg", "forgetting.svg", "matrices.svg"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_what_is_unknown_is_told(run, capsys):
    with pytest.raises(SystemExit):
        run("--arms", "naive,fulll")
    assert "'fulll' is none of naive-previous, naive" in capsys.readouterr().err
    with pytest.raises(agentpref.AgentprefError, match="learning_rat"):
        run("--set", "learning_rat=1")


def test_a_real_model_must_write_shorter_where_shorter_is_liked():
    names = ["1 shorter than the base", "2 a bullet list"]
    rows = [
        r | {"model": "smol", "columns": names, "words": [6.0 if r["night"] else 10.0, 20.0]}
        for r in rows_of("S3-tagged")
    ]
    found = {target.name.partition(" (")[0]: target for target in promises.targets(rows)}
    assert found["S3-tagged words where shorter is liked, by base's"].value == 0.6
    assert found["S3-tagged answers shorter than base's"].value == 0.9
    assert found["S3-tagged kept of what was gained in writing"].value == pytest.approx(1.0)
