"""Updates from few judgements: trained prompts give evidence, and every look is paid for."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace

import pytest

from agentpref.config import GateSettings
from agentpref.record.database import connect
from agentpref.serve import trials
from agentpref.serve.registry import Registry
from agentpref.serve.regression import Finding, Rate, withdraw
from tests.core.test_interrupted_updates import adapter, interrupt
from tests.core.test_pipeline import CONFIG, NO, YES, learn, revisions, teach

FEW = replace(
    CONFIG,
    held_out=0.1,
    gate=GateSettings(kl_budget=1e3, distinct_floor=0.0, length_ratio=(1e-3, 1e3)),
)
ALONE = replace(FEW, gate=replace(FEW.gate, cross_fit_below=0))
STRICT = replace(ALONE, held_out=0.2, gate=replace(ALONE.gate, confidence=1 - 1e-6))
"""With more held out, and with more than that asked for."""


@pytest.fixture(scope="module")
def few(tmp_path_factory, random_base):
    """A home with 40 pairs, of which four are held out: too few to prove anything."""
    home = tmp_path_factory.mktemp("few") / "home"
    teach(home, range(40))
    return home


@pytest.fixture
def home(few, tmp_path):
    return shutil.copytree(few, tmp_path / "home")


@pytest.fixture(scope="module")
def alone(few, tmp_path_factory, random_base):
    """The report of an update whose trained prompts give no evidence, and its adapter's bytes."""
    home = shutil.copytree(few, tmp_path_factory.mktemp("alone") / "home")
    report = learn(home, random_base, ALONE)
    return report, adapter(home, report)


def test_few_held_out_prompts_alone_prove_nothing(alone):
    report, _ = alone
    assert report.verdict == "insufficient"
    held_out = report.counts["new_evaluated"]
    assert (report.gain["prompts"], report.gain["cross_fitted"]) == (held_out, 0)
    assert (report.gain["look"], report.gain["look_counts"]) == (0, False)


def trial_of(home):
    """The trial that runs, and whether there is a veto against another one."""
    registry = Registry(home)
    with closing(connect(registry.home, readonly=True)) as connection:
        return trials.read(connection, registry.state())


def test_what_is_likely_and_not_proven_is_tried_as_the_canary_of_a_few_threads(home, random_base):
    registry = Registry(home)
    report = learn(home, random_base, STRICT)
    assert (report.verdict, report.gain["likely"]) == ("insufficient", True)
    state = registry.state()
    assert (state.live, state.canary, state.weight) == (None, report.revision, 0.1)
    chance = f"a likely gain, 1 in {2 ** report.gain['better']} by chance"
    assert report.notes[-1] == (
        f"{report.revision} was not made live ({chance}, is not proven): it was made the canary, "
        "for 10% of the threads, where people's thumbs decide; `agentpref adapters promote "
        f"{report.revision}` makes it live"
    )
    assert registry.history()[-1].reason == chance
    teach(home, range(40, 44))
    second = learn(home, random_base, STRICT)
    assert (second.verdict, registry.state()) == ("insufficient", state), "thumbs need their time"
    assert f": {report.revision} is the canary; " in second.notes[-1]


def test_a_trial_ends_when_its_gain_is_no_longer_likely(home, random_base):
    report = learn(home, random_base, STRICT)
    teach(home, range(40, 100), chosen=NO, rejected=YES)
    second = learn(home, random_base, STRICT)
    assert not second.gain["likely"]
    assert trial_of(home) == (None, False), "another one may begin when there is more evidence"
    assert Registry(home).state().canary is None
    assert f"{report.revision}, which was on trial as the canary, was ended" in second.notes[-1]


@pytest.mark.parametrize("by", ["people", "thumbs"])
def test_after_people_or_thumbs_ended_a_canary_it_takes_a_proof_or_a_word(home, random_base, by):
    registry = Registry(home)
    report = learn(home, random_base, STRICT)
    if by == "people":
        registry.canary(None, 0.0)
    else:
        rates = Rate(0, 40), Rate(40, 40)
        withdraw(
            registry,
            Finding("default", "canary", report.revision, "base", 0.0, *rates, 1e3, 0, "worse", 9),
            registry.state(),
        )
    assert trial_of(home) == (None, True)
    teach(home, range(40, 44))
    second = learn(home, random_base, STRICT)
    assert (second.verdict, second.gain["likely"]) == ("insufficient", True)
    assert registry.state().canary is None
    assert "a canary was ended since live was made live, so it takes a proof" in second.notes[-1]
    registry.promote(second.revision)
    assert trial_of(home) == (None, False)


@pytest.mark.parametrize(
    ("share", "wishes"), [(0.0, {}), (0.1, {"promote": False}), (0.1, {"held": True})]
)
def test_nothing_likely_is_a_canary_where_people_want_none(home, random_base, share, wishes):
    if wishes.pop("held", False):
        Registry(home).hold()
    config = replace(STRICT, gate=replace(STRICT.gate, canary=share))
    report = learn(home, random_base, config, **wishes)
    assert (report.verdict, report.gain["likely"]) == ("insufficient", True)
    assert Registry(home).state().canary is None


@pytest.mark.guarantee("proof")
def test_with_the_trained_ones_they_do_and_the_candidate_is_the_same_to_the_bit(
    home, alone, random_base
):
    stages = []
    report = learn(home, random_base, FEW, progress=lambda stage, *_: stages.append(stage))
    assert report.verdict == "promoted"
    assert report.gain["cross_fitted"] > report.counts["trained"] / 2
    assert report.gain["chance"] <= report.gain["needed"] == pytest.approx(0.95 * 0.0125)
    assert stages.index("cross-fit: train") > stages.index("train")
    assert adapter(home, report) == alone[1]
    assert report.training["steps"] == alone[0].training["steps"]


def test_an_update_that_is_interrupted_there_resumes_after_its_training(home, alone, random_base):
    planned = alone[0].training["planned_steps"]
    said = interrupt(home, random_base, "cross-fit: train", 1, FEW)
    assert (
        said == f"interrupted; the next `agentpref update` resumes at step {planned} of {planned}"
    )
    assert revisions(home) == []
    report = learn(home, random_base, FEW)
    assert (report.verdict, report.training["resumed_at"]) == ("promoted", planned)
    assert adapter(home, report) == alone[1]


@pytest.mark.guarantee("proof")
def test_every_look_at_what_live_has_not_learned_asks_for_more(tmp_path, random_base):
    home = tmp_path / "home"
    refused = replace(CONFIG, gate=replace(CONFIG.gate, kl_budget=1e-9))
    needed = []
    for night, config in enumerate([refused, refused, CONFIG, CONFIG]):
        teach(home, range(20 * night, 20 * night + 20))
        report = learn(home, random_base, config)
        needed.append(1 / report.gain["needed"])
        if night == 2:
            assert report.verdict == "promoted"
    ranking = [each / 0.95 for each in (40, 120, 240, 40)]
    assert needed == pytest.approx(ranking), "a new live revision begins anew"
    assert report.gain["look"] == 1
