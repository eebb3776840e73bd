"""An update beside answers that nobody judged: they anchor it, prove it, and are accounted for."""

from __future__ import annotations

import shutil
import signal
from contextlib import closing
from dataclasses import replace

import pytest

import agentpref
from agentpref.config import AnchorSettings
from agentpref.errors import UpdateInterrupted
from agentpref.home import Home
from agentpref.models.base import load_base
from agentpref.models.continuation import greedy
from agentpref.models.decoding import Decoding
from agentpref.models.tokenizer import encode_prompt
from agentpref.prefer.lineage import lineage
from agentpref.prove.ordinary import NAME
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget, forget_run
from agentpref.record.updates import Updates
from agentpref.types import Prompt
from tests.core.test_interrupted_updates import adapter, signal_at
from tests.core.test_pipeline import CONFIG as FREE
from tests.core.test_pipeline import learn, teach

CONFIG = replace(FREE, gate=replace(FREE.gate, ordinary_loss=1e3))
"""So small a model forgets fast; one test says what then becomes of it."""

WITHOUT = replace(CONFIG, anchor=AnchorSettings(size=0))
WISHES = ("book a table", "play some jazz", "turn off the lamp", "write to Anna", "add milk")
USER = "who wishes"


def wish(home, number):
    with agentpref.Log(home) as log:
        asked = [{"role": "user", "content": f"Please {WISHES[number % 5]} at {number} o'clock"}]
        return log.record(asked, f"Done, {number}.", user_id=USER)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A home with 40 pairs: the place, and nothing ordinary."""
    home = tmp_path_factory.mktemp("taught") / "home"
    teach(home, range(40))
    return home


@pytest.fixture(scope="module")
def anchored(taught, tmp_path_factory, random_base):
    """The same with 30 wishes, after an update: the place, the report, and the runs."""
    home = shutil.copytree(taught, tmp_path_factory.mktemp("anchored") / "home")
    runs = [wish(home, number) for number in range(30)]
    return home, learn(home, random_base, CONFIG), runs


@pytest.fixture
def home(anchored, tmp_path):
    return shutil.copytree(anchored[0], tmp_path / "home")


def roles(home, update_id):
    query = """SELECT source, role FROM update_pair JOIN pair_source USING (pair_id)
        WHERE update_id = ?"""
    with closing(connect(Home.open(home), readonly=True)) as connection:
        return dict(connection.execute(query, (update_id,)).fetchall())


def test_the_report_and_the_ledger_say_what_each_was_used_for(anchored):
    home, report, runs = anchored
    assert report.verdict == "promoted"
    counts = report.counts
    assert counts["anchored"] + counts["anchored_held_out"] == 30
    assert counts["anchored_left_out"] == 0
    assert 5 < counts["anchored_held_out"] < 20
    found = roles(home, report.update_id)
    used = [found[run] for run in runs]
    assert used.count("anchor") == counts["anchored"]
    assert used.count("anchor_held_out") == counts["anchored_held_out"]
    assert report.training["first_nll"] is not None


def test_none_of_them_counts_as_learned_and_the_next_night_has_nothing_new(anchored, random_base):
    home, report, _ = anchored
    with closing(connect(Home.open(home), readonly=True)) as connection:
        learned = Updates(connection).learned_by(report.revision)
    assert len(learned) == report.counts["trained"] + report.counts["new_evaluated"]
    assert learn(home, random_base, CONFIG).verdict == "nothing_new"


def test_the_gate_measures_held_out_ones(anchored):
    _, report, _ = anchored
    names = [check["name"] for check in report.checks]
    assert NAME in names
    assert f"{NAME}, written" in names
    measured = next(check for check in report.checks if check["name"] == NAME)
    assert measured["message"].startswith(f"{report.counts['anchored_held_out']} answers")


def own_answers(random_base, asked):
    """What the base itself answers, as tokens and as text."""
    base = load_base(str(random_base))
    prompts = [encode_prompt(Prompt("", tuple(messages)), base.template) for messages in asked]
    decoding = Decoding.of(base)
    found = greedy(base.model, prompts, decoding, limit=8).tokens
    return [(ids, decoding.text(ids)) for ids in found]


def test_damage_to_ordinary_answers_is_refused_and_the_anchor_lessens_it(tmp_path, random_base):
    home = tmp_path / "home"
    teach(home, range(40))
    asked = [[{"role": "user", "content": f"Please {WISHES[n % 5]} at {n}"}] for n in range(30)]
    with agentpref.Log(home) as log:
        for messages, (ids, text) in zip(asked, own_answers(random_base, asked), strict=True):
            log.record(messages, text, token_ids=ids)
    fallen = {}
    for anchor in (AnchorSettings(weight=0.0), AnchorSettings(weight=3.0)):
        report = learn(home, random_base, replace(FREE, anchor=anchor))
        assert report.verdict == "refused"
        assert any(reason.startswith(f"{NAME}:") for reason in report.reasons)
        fallen[anchor.weight] = next(c["value"] for c in report.checks if c["name"] == NAME)
    assert fallen[3.0] < fallen[0.0]


def test_without_ordinary_answers_an_update_gives_the_same_bytes(taught, tmp_path, random_base):
    """Whether nothing was logged beside what is judged, or the anchor is turned off."""
    alone, off = (shutil.copytree(taught, tmp_path / name) for name in ("alone", "off"))
    for number in range(30):
        wish(off, number)
    reports = [learn(alone, random_base, CONFIG), learn(off, random_base, WITHOUT)]
    assert adapter(alone, reports[0]) == adapter(off, reports[1])
    for report in reports:
        assert not any(name.startswith("anchored") for name in report.counts)
        assert NAME not in {check["name"] for check in report.checks}


def test_forgetting_whose_answer_it_was_taints_what_was_trained_on_it(anchored, home, tmp_path):
    _, report, runs = anchored
    used = roles(home, report.update_id)
    trained, held_out = (
        next(run for run in runs if used[run] == role) for role in ("anchor", "anchor_held_out")
    )
    other = shutil.copytree(home, tmp_path / "other")
    with closing(connect(Home.open(home))) as connection:
        told = lineage(connection, trained, held_out=CONFIG.held_out)
    assert [use.trained for use in told.uses] == [True]
    assert told.learned == [report.revision]
    assert forget_run(home, held_out).revisions == ()
    assert forget_run(home, trained).revisions == (report.revision,)
    assert forget(other, USER).revisions == (report.revision,)


def test_an_interrupted_update_goes_on_with_the_same_ones(taught, tmp_path, random_base):
    ended = shutil.copytree(taught, tmp_path / "ended")
    runs = [wish(ended, number) for number in range(30)]
    whole = shutil.copytree(ended, tmp_path / "whole")
    expected = learn(whole, random_base, CONFIG)
    with pytest.raises(UpdateInterrupted):
        learn(ended, random_base, CONFIG, progress=signal_at("train", 4, signal.SIGINT))
    for number in range(30, 60):
        wish(ended, number)
    report = learn(ended, random_base, CONFIG)
    assert report.training["resumed_at"] == 4
    assert adapter(ended, report) == adapter(whole, expected)
    assert report.counts["anchored"] == expected.counts["anchored"]
    used = roles(ended, report.update_id)
    assert {source for source, role in used.items() if role == "anchor"} <= set(runs)


def test_an_update_starts_over_if_one_was_judged_since(taught, tmp_path, random_base):
    home = shutil.copytree(taught, tmp_path / "home")
    runs = [wish(home, number) for number in range(30)]
    with pytest.raises(UpdateInterrupted):
        learn(home, random_base, CONFIG, progress=signal_at("train", 4, signal.SIGINT))
    with agentpref.Log(home) as log:
        for run in runs:
            log.thumbs(run, up=False)
    report = learn(home, random_base, CONFIG)
    assert report.training["resumed_at"] == 0
    assert "no longer there" in report.notes[0]
    assert "anchored" not in report.counts
