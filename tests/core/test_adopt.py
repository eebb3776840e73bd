"""Adapters that were trained elsewhere: real ones, judged by the gate of a real home."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import closing
from dataclasses import replace

import pytest
from adapter_damage import (
    FIRST_A,
    WEIGHTS,
    files,
    linked_folder,
    one_number,
    only_a_pickle,
    put,
    saved,
    settings,
    tensors,
)
from safetensors.torch import load_file, save_file

import agentpref
from agentpref.errors import (
    ConfigError,
    InvalidAdapter,
    NotAHome,
    RevisionError,
    UpdateInterrupted,
    UpdateRunning,
)
from agentpref.home import Home
from agentpref.learn.process import Interrupts
from agentpref.record.database import connect, exclusive
from agentpref.record.updates import Updates
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_published
from tests.core.test_pipeline import CONFIG, NO, YES, learn, teach


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """A home with 60 pairs that like "yes" better, and nothing trained."""
    home = tmp_path_factory.mktemp("untaught") / "home"
    teach(home, range(100, 160))
    return home


@pytest.fixture(scope="module")
def good(tmp_path_factory, random_base):
    """An adapter that says yes, trained by an update in another home on other prompts."""
    other = tmp_path_factory.mktemp("other") / "home"
    teach(other, range(40))
    report = learn(other, random_base)
    return other / "adapters" / report.revision


@pytest.fixture(scope="module")
def bad(tmp_path_factory, random_base):
    """An adapter that says no."""
    other = tmp_path_factory.mktemp("bad") / "home"
    teach(other, range(40), chosen=NO, rejected=YES)
    return other / "adapters" / learn(other, random_base).revision


@pytest.fixture
def home(untaught, tmp_path):
    return shutil.copytree(untaught, tmp_path / "home")


def adopt(home, folder, base, config=CONFIG, **options):
    return agentpref.adopt(home, folder, model=str(base), config=config, checks={}, **options)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def roles(home, report):
    query = "SELECT role, count(*) FROM update_pair WHERE update_id = ? GROUP BY role"
    with closing(connect(Home.open(home), readonly=True)) as connection:
        return dict(connection.execute(query, (report.update_id,)).fetchall())


def learned(home, revision):
    with closing(connect(Home.open(home), readonly=True)) as connection:
        return Updates(connection).learned_by(revision)


def nothing_published(home):
    return Registry(home).list() == [] and Registry(home).live() is None


# What passes


def test_a_better_adapter_is_promoted_by_the_gate_of_an_update(home, good, random_base):
    before = contents(good)
    report = adopt(home, good, random_base)
    assert report.verdict == "promoted", report.reasons
    assert contents(good) == before
    live = Registry(home).live()
    assert live.revision_id == report.revision
    assert report.accuracy["untagged"]["after"] > report.accuracy["untagged"]["before"]
    assert {"new preferences", "KL budget", "finite"} <= {check["name"] for check in report.checks}
    assert (
        check_published(live).tensors().keys()
        == load_file(good / "adapter_model.safetensors").keys()
    )
    assert len(Home.open(home).answers(report.update_id)) == 10


def test_its_manifest_says_where_it_is_from_and_what_it_was_proven_on(home, good, random_base):
    report = adopt(home, good, random_base)
    manifest = Registry(home).live().manifest
    digest = json.loads((good / "manifest.json").read_bytes())["files"]["adapter_model.safetensors"]
    assert manifest["training"]["adopted"] == {"folder": good.name, "sha256": digest}
    assert manifest["training"]["start"] == "adopted"
    assert manifest["watermark"] == {"update_id": report.update_id, "pairs": 0, "thumbs": 0}
    assert (report.counts["trained"], report.counts["new_evaluated"]) == (
        0,
        report.counts["new_held_out"],
    )
    assert report.counts["waiting"] == report.counts["new"]
    (stored,) = Home.open(home).updates()
    assert stored.training["adopted"]["sha256"] == digest


def test_the_ledger_does_not_claim_that_it_learned_what_it_was_not_trained_on(
    home, good, random_base
):
    report = adopt(home, good, random_base)
    counts = report.counts
    assert roles(home, report) == {"held_out": counts["new_held_out"], "waiting": counts["new"]}
    assert len(learned(home, report.revision)) == counts["new_held_out"]
    after = learn(home, random_base)
    assert (after.counts["new"], after.counts["old_held_out"]) == (
        counts["new"],
        counts["new_held_out"],
    )
    assert after.verdict in ("nothing_new", "nothing_to_gain"), "it is right about them already"


def test_it_is_rolled_back_like_any_other_and_not_made_live_again_by_itself(
    home, good, random_base
):
    first = adopt(home, good, random_base)
    assert Registry(home).rollback().live is None
    again = adopt(home, good, random_base)
    assert again.verdict == "passed"
    assert any(
        f"it has the weights of {first.revision}, which was rolled back" in note
        for note in again.notes
    )
    assert Registry(home).live() is None


def test_another_adapter_than_one_that_was_rolled_back_is_promoted(
    home, good, random_base, tmp_path
):
    adopt(home, good, random_base)
    Registry(home).rollback()
    other = copied(good, tmp_path / "other")
    save_file(scaled(other, 0.99), other / WEIGHTS, metadata={"format": "pt"})
    assert adopt(home, other, random_base).verdict == "promoted"


def test_no_promote_and_a_canary_do_as_in_an_update(home, good, random_base):
    report = adopt(home, good, random_base, promote=False)
    assert report.verdict == "passed"
    assert Registry(home).live() is None
    report = adopt(home, good, random_base, canary=0.2)
    assert Registry(home).state().canary == report.revision


def test_an_adapter_of_another_shape_than_lives_is_compared_with_live(
    home, good, bad, random_base, tmp_path
):
    first = adopt(home, good, random_base)
    small = tmp_path / "small"
    saved(target_modules=["q_proj", "up_proj"])(random_base, small)
    report = adopt(home, small, random_base)
    assert report.parent == first.revision
    assert report.verdict == "refused"
    assert any(note.startswith("no new example is held out") for note in report.notes)
    assert any("retention" in reason for reason in report.reasons)
    assert Registry(home).live().revision_id == first.revision


def test_what_live_has_learned_proves_where_nothing_new_is_held_out(home, good, random_base):
    weak = replace(CONFIG, learning_rate=2e-4, epochs=1)
    weak = replace(weak, gate=replace(CONFIG.gate, confidence=1 - 1e-15))
    first = learn(home, random_base, weak)
    assert first.verdict == "insufficient"
    Registry(home).promote(first.revision)
    report = adopt(home, good, random_base)
    assert report.counts["new_held_out"] == 0
    assert report.verdict == "promoted", report.reasons
    assert report.gain["look"] >= 1


def test_the_training_side_proves_where_nothing_of_the_home_was_seen(home, good, random_base):
    little = replace(CONFIG, held_out=0.05)
    short = adopt(home, good, random_base, little)
    assert short.verdict == "insufficient"
    report = adopt(home, good, random_base, little, unseen=True)
    assert report.verdict == "promoted", report.reasons
    assert report.counts["new_evaluated"] == short.counts["new"] + short.counts["new_held_out"]
    assert learned(home, report.revision).isdisjoint(learned(home, None))
    assert len(learned(home, report.revision)) == short.counts["new_held_out"]


def test_a_limit_of_time_is_kept_and_what_does_not_fit_proves_nothing(home, good, random_base):
    report = adopt(home, good, random_base, replace(CONFIG, max_minutes=1.0))
    assert report.verdict == "promoted"
    short = adopt(home, good, random_base, replace(CONFIG, max_minutes=1e-4))
    assert short.counts["new_evaluated"] + short.counts.get("old_evaluated", 0) < 40


# What is refused


def test_a_worse_adapter_is_refused_and_its_examples_stay_new(home, bad, good, random_base):
    report = adopt(home, bad, random_base)
    assert report.verdict == "refused"
    assert report.revision is None
    assert nothing_published(home)
    assert set(roles(home, report)) == {"waiting"}
    assert report.set_aside == []
    trained = learn(home, random_base)
    assert trained.verdict == "promoted", "an update learns from all of them"
    assert trained.counts["trained"] == report.counts["new"]


def test_every_adoption_is_a_look_that_a_later_proof_pays_for(home, bad, good, random_base):
    looks = [adopt(home, each, random_base).gain["look"] for each in (bad, bad, good)]
    assert looks == [1, 2, 3]


def test_one_beyond_the_kl_budget_is_refused(home, good, random_base):
    strict = replace(CONFIG, gate=replace(CONFIG.gate, kl_budget=1e-9))
    report = adopt(home, good, random_base, strict)
    assert report.verdict == "refused"
    assert any(reason.startswith("KL budget: ") for reason in report.reasons)
    assert nothing_published(home)


def test_a_check_of_the_users_refuses(home, good, random_base):
    checks = {"says no": lambda answer: answer([{"role": "user", "content": "Yes?"}]) == NO}
    report = agentpref.adopt(home, good, model=str(random_base), config=CONFIG, checks=checks)
    assert [reason.split(":")[0] for reason in report.reasons] == ["check says no"]


REFUSED = {
    "nan": (tensors(put(FIRST_A, one_number(float("nan")))), r"q_proj\.lora_A.* not finite"),
    "infinity": (tensors(put(FIRST_A, one_number(float("inf")))), r"q_proj\.lora_A.* not finite"),
    "pickle": (
        files(only_a_pickle("adapter_model.bin")),
        r"adapter_model\.bin is a pickle.*safe_serialization=True",
    ),
    "rank": (settings(r=4), r"r is 4, but must be one of \[8, 16"),
    "dora": (saved(use_dora=True), r"use_dora is True, but must be off"),
    "bias": (saved(bias="all"), r"bias is 'all', but must be none"),
    "modules_to_save": (saved(modules_to_save=["lm_head"]), r"modules_to_save is .*must be off"),
    "head": (saved(target_modules=["q_proj", "lm_head"]), r"lm_head"),
    "embeddings": (
        saved(target_modules=["q_proj", "embed_tokens"]),
        r"embed_tokens|lora_embedding",
    ),
    "linked": (files(linked_folder), r"is not a folder"),
    "regular expression": (settings(target_modules=".*_proj"), r"a list of module names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_or_unsafe_adapter_is_refused_before_any_work(
    home, random_base, tmp_path, name, monkeypatch
):
    make, named = REFUSED[name]
    folder = tmp_path / "given"
    make(random_base, folder)
    monkeypatch.setattr("agentpref.models.base.load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InvalidAdapter, match=named):
        adopt(home, folder, random_base)
    assert nothing_published(home)
    assert [*Home.open(home).updates()] == []


def test_an_adapter_of_another_base_is_refused_with_the_base_that_it_names(
    home, good, narrow_base, random_base, tmp_path
):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = tmp_path / "wide"
    config = LlamaConfig.from_pretrained(random_base, intermediate_size=160)
    LlamaForCausalLM(config).save_pretrained(wide)
    folder = tmp_path / "given"
    saved()(wide, folder)
    with pytest.raises(InvalidAdapter, match=r"up_proj adapts a layer of .*names? '.*wide' as its"):
        adopt(home, folder, random_base)
    assert nothing_published(home)
    with pytest.raises(InvalidAdapter, match="does not fit the language model of"):
        adopt(home, good, narrow_base)


def test_the_reference_that_trl_leaves_is_ignored_and_alone_it_is_refused(
    home, good, random_base, tmp_path
):
    folder = copied(good, tmp_path / "given")
    copied(good, folder / "ref")
    (folder / "adapter_model.bin").write_bytes(b"never read")
    report = adopt(home, folder, random_base)
    assert report.verdict == "promoted"
    (note,) = (note for note in report.notes if note.startswith("ignored beside the adapter: "))
    assert "ref/" in note
    assert "adapter_model.bin" in note
    only = tmp_path / "only"
    copied(good, only / "ref")
    with pytest.raises(InvalidAdapter, match="holds nothing but ref/"):
        adopt(home, only, random_base)


def test_a_revision_of_the_home_is_promoted_and_not_adopted(home, good, random_base):
    report = adopt(home, good, random_base)
    with pytest.raises(ConfigError, match="`agentpref adapters promote`"):
        adopt(home, home / "adapters" / report.revision, random_base)


def test_a_folder_that_is_none_and_a_home_that_is_none(home, good, random_base, tmp_path):
    with pytest.raises(InvalidAdapter, match="is not a folder"):
        adopt(home, tmp_path / "missing", random_base)
    with pytest.raises(NotAHome):
        adopt(tmp_path / "nowhere", good, random_base)


def test_without_anything_held_out_it_is_not_published(tmp_path, good, random_base):
    Home.create(tmp_path / "home")
    report = adopt(tmp_path / "home", good, random_base)
    assert report.verdict == "nothing_new"
    assert any("no judgements that could prove an adapter" in note for note in report.notes)
    assert nothing_published(tmp_path / "home")
    teach(tmp_path / "home", range(3))
    few = replace(CONFIG, held_out=1e-9)
    report = adopt(tmp_path / "home", good, random_base, few)
    assert any("--unseen" in note for note in report.notes)


# Forgetting


def test_runs_that_it_was_trained_on_taint_it_when_they_are_forgotten(
    home, good, random_base, tmp_path
):
    with agentpref.Log(home) as log:
        run = log.record([{"role": "user", "content": "Where do I live?"}], "There.", user_id="ana")
    report = adopt(home, good, random_base, trained_on=[run])
    assert report.verdict == "promoted"
    assert roles(home, report)["anchor"] == 1
    assert learned(home, report.revision).isdisjoint({run})
    with agentpref.Log(home) as log:
        forgotten = log.forget(user_id="ana")
    assert forgotten.revisions == (report.revision,)
    Registry(home).rollback()
    other = copied(good, tmp_path / "other")
    save_file(scaled(other, 0.99), other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RevisionError, match="1 of the 1 runs"):
        adopt(home, other, random_base, trained_on=[run])


def test_weights_that_are_tainted_are_not_adopted_again(home, good, random_base, tmp_path):
    with agentpref.Log(home) as log:
        run = log.record([{"role": "user", "content": "Where do I live?"}], "There.", user_id="ana")
    report = adopt(home, good, random_base, trained_on=[run])
    Registry(home).rollback()
    with agentpref.Log(home) as log:
        log.forget(user_id="ana")
    with pytest.raises(RevisionError, match=f"has the weights of {report.revision}, which was tra"):
        adopt(home, good, random_base)


def test_what_was_only_asked_about_taints_nothing(home, good, random_base):
    with agentpref.Log(home) as log:
        for number in range(200, 220):
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            a, b = (log.record(asked, each, user_id="ana") for each in (YES, NO))
            log.compare(a, b, winner="a", user_id="ana")
    report = adopt(home, good, random_base)
    assert report.verdict == "promoted"
    with agentpref.Log(home) as log:
        forgotten = log.forget(user_id="ana")
    assert forgotten.revisions == ()
    words = [
        one.prompt.messages[-1]["content"] for one in Home.open(home).answers(report.update_id)
    ]
    assert not any(f"Is {number} a" in text for text in words for number in range(200, 220))


# Crashes and neighbours


@pytest.mark.parametrize("stage", ["load model", "score base", "score candidate"])
def test_an_error_at_any_stage_leaves_the_home_as_it_was(home, good, random_base, stage):
    def fail(now, done, total):
        if now == stage:
            raise RuntimeError("the machine stopped")

    with pytest.raises(RuntimeError, match="the machine stopped"):
        adopt(home, good, random_base, progress=fail)
    assert nothing_published(home)
    assert list(home.glob("candidate*")) == []
    assert adopt(home, good, random_base).verdict == "promoted"


def test_a_signal_ends_it_and_nothing_is_changed(home, good, random_base):
    interrupts = Interrupts()
    with pytest.raises(UpdateInterrupted, match="the same command starts over") as caught:
        adopt(
            home,
            good,
            random_base,
            interrupts=interrupts,
            progress=lambda stage, *_: stage == "score base" and interrupts.ask(signal.SIGINT),
        )
    assert caught.value.signum == signal.SIGINT
    assert nothing_published(home)


def test_an_update_that_runs_is_not_disturbed(home, good, random_base):
    with exclusive(Home.open(home)), pytest.raises(UpdateRunning):
        adopt(home, good, random_base)


def copied(folder, to):
    shutil.copytree(folder, to)
    (to / "manifest.json").unlink()
    return to


def scaled(folder, by):
    return {name: by * tensor for name, tensor in load_file(folder / WEIGHTS).items()}
