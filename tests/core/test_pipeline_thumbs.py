"""Lone thumbs in an update: trained beside pairs, replayed, proved, resumed and forgotten."""

from __future__ import annotations

import math
import os
import shutil
import signal
from contextlib import closing
from dataclasses import replace

import pytest

import agentpref
from agentpref.config import (
    GateSettings,
    KLSettings,
    LossSettings,
    ReplaySettings,
    ThumbSettings,
    UpdateConfig,
)
from agentpref.errors import UpdateInterrupted
from agentpref.home import Home
from agentpref.prefer.examples import is_held_out
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget
from agentpref.serve.registry import Registry

YES, NO = "yes", "no, never"
USER = "user-of-one-thumb"
CONFIG = UpdateConfig(
    held_out=0.4,
    batch_size=8,
    learning_rate=1e-2,
    epochs=3,
    kl=KLSettings(weight=0.0),
    loss=LossSettings(beta=1.0, nll=1.0),
    replay=ReplaySettings(minimum=16),
    gate=GateSettings(
        cross_fit_below=0,
        min_stratum=5,
        kl_budget=1e3,
        distinct_floor=0.0,
        length_ratio=(1e-3, 1e3),
    ),
)


def thumb(home, numbers, ask="Is {} a number?", liked=YES, disliked=NO, **options):
    """Log one answer to each question, and a thumb on it: up and down by turns."""
    with agentpref.Log(home) as log:
        for number in numbers:
            up = number % 2 == 0
            asked = [{"role": "user", "content": ask.format(number)}]
            run = log.record(asked, liked if up else disliked, **options)
            log.feedback(run, key="thumbs", score=up, user_id=options.get("user_id"))


def compare(home, numbers, ask="Who is {}?", chosen="an enemy", rejected="a friend"):
    """Log pairs of another tag than the thumbs': what they want contradicts none of those."""
    with agentpref.Log(home) as log:
        for number in numbers:
            asked = [{"role": "user", "content": ask.format(number)}]
            runs = [log.record(asked, text, tags=["people"]) for text in (chosen, rejected)]
            log.compare(*runs, winner="a")


def learn(home, base, config=CONFIG, **options):
    return agentpref.update(home, model=str(base), config=config, **{"checks": {}, **options})


def a_number(held_out):
    """A number beyond those asked about, whose question is on one side of the split."""
    asked = {n: [{"role": "user", "content": f"Is {n} a number?"}] for n in range(1000, 1100)}
    return next(n for n in asked if is_held_out(asked[n], CONFIG.held_out) is held_out)


def nothing_to_do(stage, done, total):
    pytest.fail(f"there was nothing to do, but it came to {stage!r}")


def roles(home, update_id):
    query = "SELECT role, count(*) FROM update_pair WHERE update_id = ? GROUP BY role"
    with closing(connect(Home.open(home), readonly=True)) as connection:
        return dict(connection.execute(query, (update_id,)).fetchall())


def adapter(home, report):
    return (home / "adapters" / report.revision / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def taught(tmp_path_factory, random_base):
    """A home with 60 lone thumbs and not one pair, after its first update; and the report."""
    home = tmp_path_factory.mktemp("taught") / "home"
    thumb(home, range(59))
    thumb(home, [a_number(held_out=False)], user_id=USER)
    return home, learn(home, random_base)


@pytest.fixture
def home(taught, tmp_path):
    return shutil.copytree(taught[0], tmp_path / "home")


@pytest.fixture(scope="module")
def mixed_home(taught, tmp_path_factory):
    """The home with new pairs and new thumbs, beside the old thumbs."""
    home = shutil.copytree(taught[0], tmp_path_factory.mktemp("mixed") / "home")
    compare(home, range(40))
    thumb(home, range(20), "What is {}?", "nothing at all", "a thing", tags=["things"])
    return home


@pytest.fixture(scope="module")
def mixed(mixed_home, tmp_path_factory, random_base):
    """What the mixed update comes to."""
    home = shutil.copytree(mixed_home, tmp_path_factory.mktemp("mixed_whole") / "home")
    return home, learn(home, random_base)


def test_a_namespace_with_thumbs_only_learns_and_is_promoted(taught):
    home, report = taught
    assert report.verdict == "promoted", report.reasons
    assert Registry(home).live().revision_id == report.revision
    assert (report.accuracy["untagged"]["before"], report.left_out) == (0.5, {})
    assert report.accuracy["untagged"]["after"] > 0.9
    counts = report.counts
    assert counts["new_thumbs"] + counts["new_held_out_thumbs"] == 60
    assert 5 <= counts["evaluated_thumbs"] <= counts["new_held_out_thumbs"]
    assert counts["evaluated_thumbs"] % 2 == 0, "as many likes as dislikes"
    assert counts["new"] == counts["new_held_out"] == 0
    assert report.training["steps"] == 3 * math.ceil(counts["new_thumbs"] / 8)
    assert Registry(home).live().manifest["watermark"]["thumbs"] == counts["new_thumbs"]


def test_an_example_is_new_only_once(taught, home, random_base):
    report = learn(home, random_base, progress=nothing_to_do)
    assert report.verdict == "nothing_new"
    assert report.counts["old_thumbs"] == taught[1].counts["new_thumbs"]
    assert report.counts["new_thumbs"] == 0


def test_pairs_and_thumbs_train_in_one_run_and_old_thumbs_are_replayed(taught, mixed):
    home, report = mixed
    counts = report.counts
    assert report.verdict == "promoted", report.reasons
    assert report.parent == taught[1].revision
    assert counts["new"] + counts["new_held_out"] == 40
    assert counts["new_thumbs"] + counts["new_held_out_thumbs"] == 20
    assert counts["replayed_thumbs"] == 16
    assert counts["replayed"] == 0, "there is no old pair"
    assert counts["old_evaluated_thumbs"] == taught[1].counts["new_held_out_thumbs"]
    rows = counts["new"] + counts["new_thumbs"] + counts["replayed_thumbs"]
    assert report.training["steps"] == 3 * math.ceil(rows / 8)
    assert roles(home, report.update_id) == {
        "new": counts["new"] + counts["new_thumbs"],
        "held_out": counts["new_held_out"] + counts["new_held_out_thumbs"],
        "replay": 16,
    }
    retained = [c["name"] for c in report.checks if c["name"].startswith("retention of default")]
    assert retained
    assert all(name.startswith("retention of default/untagged/thumb/") for name in retained)


def test_old_pairs_are_replayed_beside_new_thumbs_alone(mixed, tmp_path, random_base):
    home = shutil.copytree(mixed[0], tmp_path / "home")
    thumb(home, range(100, 120))
    report = learn(home, random_base)
    assert report.counts["new"] == 0
    assert report.counts["replayed"] == report.counts["replayed_thumbs"] == 16


def test_an_interrupted_update_of_pairs_and_thumbs_ends_with_the_same_bytes(
    mixed_home, mixed, tmp_path, random_base
):
    home = shutil.copytree(mixed_home, tmp_path / "home")

    def interrupt(stage, done, total):
        if (stage, done) == ("train", 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(UpdateInterrupted):
        learn(home, random_base, progress=interrupt)
    (state,) = (home / "training").iterdir()
    assert b"nothing at all" not in state.read_bytes()
    compare(home, range(100, 103))
    thumb(home, range(200, 205))
    report = learn(home, random_base)
    assert report.training["resumed_at"] == 2
    later = {"new_held_out": 3, "new_thumbs": 5}
    counts = {name: n + later.get(name, 0) for name, n in mixed[1].counts.items()}
    assert report.counts == {**counts, "waiting": 3, "waiting_thumbs": 5}
    assert adapter(home, report) == adapter(*mixed)


def test_forgetting_who_gave_a_thumb_finds_the_revision_that_saw_it(taught, home, random_base):
    before = learn(home, random_base, progress=nothing_to_do).counts
    forgotten = forget(home, USER)
    assert forgotten.feedback == 1
    assert forgotten.revisions == (taught[1].revision,)
    Registry(home).rollback()
    after = learn(home, random_base, replace(CONFIG, epochs=1)).counts
    assert after["new_thumbs"] == before["old_thumbs"] - 1, "and all but that one are new again"


def test_forgetting_somebody_whose_thumb_was_held_out_taints_nothing(tmp_path, random_base):
    home = tmp_path / "home"
    thumb(home, range(12))
    thumb(home, [a_number(held_out=True)], user_id=USER)
    report = learn(home, random_base)
    assert report.revision is not None, report.reasons
    assert forget(home, USER).revisions == ()


def test_thumbs_that_are_turned_off_are_counted_and_not_trained(tmp_path, random_base):
    home = tmp_path / "home"
    thumb(home, range(12))
    off = replace(CONFIG, thumbs=ThumbSettings(weight=0.0))
    report = learn(home, random_base, off, progress=nothing_to_do)
    assert (report.verdict, report.left_out) == ("nothing_new", {"thumbs_turned_off": 12})
    compare(home, range(12))
    report = learn(home, random_base, replace(off, epochs=1))
    assert (report.counts["new_thumbs"], report.counts["replayed_thumbs"]) == (0, 0)
    assert sum(roles(home, report.update_id).values()) == 12


def test_likes_without_dislikes_are_no_evidence(tmp_path, random_base):
    home = tmp_path / "home"
    thumb(home, range(0, 40, 2))
    thumb(home, range(40, 80, 2), liked="another")  # which the others are compared with
    report = learn(home, random_base)
    assert report.verdict == "insufficient"
    assert report.counts["evaluated_thumbs"] == 0
    assert not report.accuracy
    assert any("new held-out thumbs count as evidence" in note for note in report.notes)


def test_a_single_new_thumb_is_compared_with_an_old_one(home, random_base):
    thumb(home, [100])
    report = learn(home, random_base, replace(CONFIG, held_out=0.01))
    assert (report.left_out, report.counts["new_thumbs"]) == ({}, 1)


def test_shortened_and_retokenized_rows_are_counted(tmp_path, random_base):
    home = tmp_path / "home"
    thumb(home, range(8), "word " * 40 + "{}?")
    with agentpref.Log(home) as log:
        for number in range(8):
            earlier = {"role": "user", "content": "word " * 300}
            said = {"role": "assistant", "content": YES}
            asked = [earlier, said, {"role": "user", "content": f"And {number}?"}]
            run = log.record(asked, YES, token_ids=[10**6])
            log.feedback(run, key="thumbs", score=1)
    report = learn(home, random_base, replace(CONFIG, max_length=256, epochs=1))
    assert report.shortened == {"prompt_shortened": 8}
    assert report.retokenized == {"foreign_token_ids": 8}
