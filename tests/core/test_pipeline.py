"""One update, end to end: real log, real model, real training, real registry.

The preference taught here is one that a random model learns in seconds: say yes, never no.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

import agentpref
from agentpref.config import GateSettings, KLSettings, LossSettings, ReplaySettings, UpdateConfig
from agentpref.errors import ConfigError, InvalidAdapter, NotAHome, UpdateRunning, WrongBase
from agentpref.home import Home
from agentpref.learn.learner import Learner
from agentpref.record.database import connect
from agentpref.record.messages import prompt_of, run_row
from agentpref.record.spill import Spill
from agentpref.record.updates import Updates
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_published
from agentpref.types import Feedback, Run

YES, NO = "yes", "no, never"
ANSWER = {"role": "assistant", "content": YES}

CONFIG = UpdateConfig(
    held_out=0.4,
    precision="float32",  # so that every processor comes to the same
    batch_size=8,
    learning_rate=1e-2,
    epochs=3,
    kl=KLSettings(weight=0.0),
    loss=LossSettings(beta=1.0, nll=1.0),
    replay=ReplaySettings(minimum=16),
    gate=GateSettings(
        cross_fit_below=0, kl_budget=1e3, distinct_floor=0.0, length_ratio=(1e-3, 1e3)
    ),
)


@pytest.fixture(scope="module")
def first_update(tmp_path_factory, random_base):
    """A home with 40 pairs on 40 prompts, and nothing trained."""
    home = tmp_path_factory.mktemp("first_update") / "home"
    teach(home, range(40))
    return home


@pytest.fixture(scope="module")
def trained(tmp_path_factory, first_update, random_base):
    """The same home after its first update: the path, and the report."""
    home = shutil.copytree(first_update, tmp_path_factory.mktemp("trained") / "home")
    stages = []
    report = learn(home, random_base, progress=lambda stage, *_: stages.append(stage))
    return home, report, stages


@pytest.fixture
def fresh(first_update, tmp_path):
    """A copy of the home in which nothing was trained yet."""
    return shutil.copytree(first_update, tmp_path / "home")


@pytest.fixture
def home(trained, tmp_path):
    """A copy of the home after its first update."""
    return shutil.copytree(trained[0], tmp_path / "home")


def teach(home, numbers, chosen=YES, rejected=NO, question="Is {} a number?"):
    """Log two answers to each question, and that the first was liked better."""
    with agentpref.Log(home) as log:
        for number in numbers:
            asked = [{"role": "user", "content": question.format(number)}]
            log.compare(log.record(asked, chosen), log.record(asked, rejected), winner="a")


def teach_about_friends(home):
    """Log a preference that the first update says nothing of."""
    teach(home, range(80), chosen="a friend", rejected="an enemy", question="Who is {}?")


def learn(home, base, config=CONFIG, **options):
    return agentpref.update(home, model=str(base), config=config, **{"checks": {}, **options})


def no_training(stage, done, total):
    pytest.fail(f"there was nothing to do, but it came to {stage!r}")


def revisions(home):
    """Ids of the published revisions; the folders on disk are exactly theirs."""
    names = [revision.revision_id for revision in Registry(home).list()]
    assert sorted(folder.name for folder in (home / "adapters").iterdir()) == sorted(names)
    return names


def ledger(home, read):
    with closing(connect(Home.open(home), readonly=True)) as connection:
        return read(connection)


def passed(report, name):
    return next(check["passed"] for check in report.checks if check["name"] == name)


# The first update


def test_a_candidate_that_learned_is_promoted(trained):
    home, report, _ = trained
    assert report.verdict == "promoted"
    assert report.reasons == []
    assert report.parent is None
    assert report.revision == Registry(home).live().revision_id
    assert revisions(home) == [report.revision]
    assert report.accuracy["untagged"]["after"] > report.accuracy["untagged"]["before"]
    check_published(Registry(home).live())


def test_new_pairs_are_counted_by_side(trained):
    counts = trained[1].counts
    assert counts["new"] + counts["new_held_out"] == 40
    assert counts["new_held_out"] >= 5
    assert (counts["old"], counts["old_held_out"], counts["replayed"]) == (0, 0, 0)


def test_the_report_says_what_was_asked_for_and_the_home_shows_answers(trained):
    home, report, _ = trained
    wishes = {one["feature"]: one["direction"] for one in report.behaviour["asked"]}
    assert wishes["words"] == -1
    moved = {one["feature"]: one["moved"] for one in report.behaviour["moves"]}
    assert moved["words"] is True
    assert report.behaviour["first_token"]["accuracy"][1] == 1.0
    answers = Home.open(home).answers(report.update_id)
    assert len(answers) == 10
    assert {one.after for one in answers} == {YES}
    assert all(one.prompt.messages[-1]["content"].endswith(" a number?") for one in answers)
    (stored,) = Home.open(home).updates()
    assert stored.behaviour == json.loads(json.dumps(report.behaviour))


@pytest.mark.guarantee("proof")
def test_a_wish_for_blank_answers_is_named_before_it_is_trained_and_refused_however_well_it_ranks(
    tmp_path, random_base, caplog
):
    home, stages = tmp_path / "home", list[str]()
    Home.create(home)
    teach(home, range(40), chosen=" ")
    with caplog.at_level("WARNING", "agentpref"):
        caplog.handler.emit = lambda record: stages.append(record.getMessage())
        report = learn(home, random_base, progress=lambda stage, done, total: stages.append(stage))
    (warned,) = (stage for stage in stages if stage.startswith("40 of 40 chosen answers are blank"))
    assert stages.index(warned) < stages.index("train")
    assert report.accuracy["untagged"]["after"] > 0.9
    assert report.verdict == "refused"
    assert any(reason.startswith("empty generations: ") for reason in report.reasons)
    assert any(note.startswith("40 of 40 chosen answers are blank: ") for note in report.notes)


def test_a_scorer_that_proves_a_loss_refuses(fresh, random_base):
    report = learn(fresh, random_base, scorers={"long": lambda messages, answer: len(answer)})
    assert report.verdict == "refused"
    assert [reason.split(":")[0] for reason in report.reasons] == ["scorer long"]
    (scorer,) = report.behaviour["scorers"]
    assert scorer["candidate"] < scorer["live"]


def test_progress_reports_every_stage_in_order(trained):
    stages = list(dict.fromkeys(trained[2]))
    assert stages == ["load model", "score base", "train", "score candidate"]


def test_no_row_is_scored_twice_under_a_policy(home, random_base, monkeypatch):
    """The pass for KL gives the candidate's scores, which are live's in the next update."""
    scored = {"base": [], "live": [], "candidate": []}
    diverged = []
    compute, divergences = Learner._compute, Learner.divergences

    def computed(learner, policy, rows, **options):
        scored[policy] += [row.example.example_id for row in rows]
        return compute(learner, policy, rows, **options)

    def counted(learner, rows):
        diverged.extend(row.example.example_id for row in rows)
        return divergences(learner, rows)

    monkeypatch.setattr(Learner, "_compute", computed)
    monkeypatch.setattr(Learner, "divergences", counted)
    monkeypatch.setattr("agentpref.prove.evaluate.KL_ROWS", 5)
    teach_about_friends(home)
    config = replace(CONFIG, replay=replace(CONFIG.replay, hard_share=0.0))
    counts = learn(home, random_base, config).counts
    assert len(diverged) == 5
    scored["candidate"] += diverged
    assert {policy: len(rows) for policy, rows in scored.items()} == {
        "base": counts["new"] + counts["new_held_out"],
        "live": counts["new"] + counts["new_held_out"],  # asked whether people changed their minds
        "candidate": counts["new_held_out"] + counts["old_evaluated"],
    }
    assert all(len(set(rows)) == len(rows) for rows in scored.values())
    assert counts["old_evaluated"] > 5, "some were scored apart from the pass for KL"


def test_the_report_is_stored_as_it_was_returned(trained):
    home, report, _ = trained
    kept = ledger(home, lambda c: Updates(c).report("default"))
    assert kept == report.to_mapping()
    assert kept["training"]["steps"] == 3 * math.ceil(report.counts["new"] / 8)


def test_the_manifest_names_what_the_revision_was_made_of(trained, random_base):
    home, report, _ = trained
    manifest = Registry(home).live().manifest
    assert manifest["parent"] is None
    assert manifest["base"]["name"] == str(random_base)
    assert manifest["training"]["config"]["learning_rate"] == CONFIG.learning_rate
    assert manifest["watermark"]["update_id"] == report.update_id


def test_nothing_else_is_left_in_the_home(trained):
    found = {path.name for path in trained[0].iterdir() if not path.name.startswith("agentpref.db")}
    assert found == {"adapters", "reports", "update.lock", "user.keys"}


@pytest.mark.guarantee("learning")
def test_the_same_inputs_and_seed_give_the_same_bytes(trained, fresh, random_base):
    home, report, _ = trained
    again = learn(fresh, random_base)
    assert again.revision == report.revision
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        files = [place / "adapters" / report.revision / name for place in (home, fresh)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_with_too_few_held_out_pairs_a_revision_is_published_but_does_not_serve(fresh, random_base):
    config = replace(CONFIG, gate=replace(CONFIG.gate, confidence=1 - 1e-15, canary=0.0))
    report = learn(fresh, random_base, config)
    assert report.verdict == "insufficient"
    assert not passed(report, "new preferences")
    assert revisions(fresh) == [report.revision]
    assert Registry(fresh).state().generation == 0
    again = learn(fresh, random_base, config, progress=no_training)
    assert again.verdict == "nothing_new"


def test_a_failing_user_check_refuses_the_candidate(fresh, random_base):
    answers = []

    def polite(ask):
        answers.append(ask([{"role": "user", "content": "Is 7 a number?"}]))
        return False, "it did not say please"

    report = learn(fresh, random_base, checks={"polite": polite, "calm": lambda ask: True})
    assert report.verdict == "refused"
    assert report.reasons == ["check polite: it did not say please"]
    assert passed(report, "check calm")
    assert answers == [YES], "the check speaks with the candidate"
    assert (report.revision, revisions(fresh), Registry(fresh).live()) == (None, [], None)


def test_a_broken_installed_check_is_reported_before_any_work(
    fresh, random_base, tmp_path, monkeypatch
):
    package = tmp_path / "polite-1.0.dist-info"
    package.mkdir()
    package.joinpath("METADATA").write_text("Name: polite\nVersion: 1.0\n")
    package.joinpath("entry_points.txt").write_text("[agentpref.checks]\npolite = polite_gone:ok")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'polite' of agentpref\.checks cannot be loaded"):
        learn(fresh, random_base, checks=None, progress=no_training)


@pytest.mark.guarantee("learning")
def test_every_row_of_the_log_is_accounted_for(fresh, random_base):
    with agentpref.Log(fresh) as log:
        asked = [{"role": "user", "content": "Is the sea a number?"}]
        runs = [log.record(asked, text) for text in (YES, NO, "perhaps")]
        log.compare(runs[0], runs[2], winner="tie")
        log.feedback(runs[0], key="thumbs", score=1)
        log.feedback(runs[1], key="latency", score=0.3, source="code")
    teach(fresh, range(200, 204), chosen="word " * 600)
    report = learn(fresh, random_base)
    rows = ledger(
        fresh,
        lambda c: c.execute(
            "SELECT (SELECT count(*) FROM comparison) + (SELECT count(*) FROM feedback)"
        ).fetchone()[0],
    )
    kinds = ("new", "old", "new_held_out", "old_held_out")
    pairs = sum(report.counts[kind] for kind in kinds)
    thumbs = sum(report.counts[f"{kind}_thumbs"] for kind in kinds)
    unencoded = {why: report.left_out.pop(why) for why in ("too_long", "no_mismatch")}
    assert unencoded == {"too_long": 4, "no_mismatch": 1}
    assert report.left_out["undeclared_key"] == 1, "a latency is no preference"
    assert (rows, pairs, thumbs) == (47, 44, 1)
    assert pairs + thumbs + sum(report.left_out.values()) == rows


def test_pairs_that_cannot_be_encoded_are_reported_and_tried_once(tmp_path, random_base):
    teach(tmp_path / "home", range(6), chosen="word " * 600)
    report = learn(tmp_path / "home", random_base)
    assert report.verdict == "nothing_usable"
    assert report.left_out == {"too_long": report.counts["new"]}
    assert revisions(tmp_path / "home") == []
    again = learn(tmp_path / "home", random_base, progress=no_training)
    assert (again.verdict, again.left_out) == ("nothing_new", report.left_out)


def test_an_empty_home_has_nothing_to_learn(tmp_path, random_base):
    Home.create(tmp_path / "home")
    report = learn(tmp_path / "home", random_base, progress=no_training)
    assert (report.verdict, sum(report.counts.values())) == ("nothing_new", 0)
    with pytest.raises(NotAHome):
        learn(tmp_path / "nowhere", random_base)


def test_feedback_in_the_spill_is_learned_too(tmp_path, random_base):
    home = Home.create(tmp_path / "home")
    connect(home).close()  # a home has its tables before it has a spill
    run = Run("r", "default", 1.0, prompt_of([{"role": "user", "content": "?"}]), ANSWER)
    Spill(home).append([run_row(run), Feedback("f", "r", 2.0, "thumbs", 1.0)])
    config = replace(CONFIG, held_out=0.999)
    report = learn(home.path, random_base, config, progress=no_training)
    assert report.counts["new_held_out_thumbs"] == 1
    assert not home.spill.exists()


# The updates after


def test_a_second_update_without_new_feedback_trains_nothing(trained, home, random_base):
    report = learn(home, random_base, progress=no_training)
    assert report.verdict == "nothing_new"
    assert report.parent == trained[1].revision
    assert report.counts["old"] == trained[1].counts["new"]
    assert revisions(home) == [trained[1].revision]


def test_new_pairs_start_from_live_and_old_ones_are_replayed(trained, home, random_base):
    teach_about_friends(home)
    report = learn(home, random_base)
    first = trained[1]
    assert report.verdict == "promoted", report.reasons
    assert report.parent == first.revision
    assert Registry(home).live().manifest["parent"] == first.revision
    assert report.counts["old"] == first.counts["new"]
    assert 16 <= report.counts["replayed"] <= report.counts["old"]
    rows = report.counts["new"] + report.counts["replayed"]
    assert report.training["steps"] == 3 * math.ceil(rows / 8)
    assert any(check["name"].startswith("retention of") for check in report.checks)
    roles = ledger(
        home,
        lambda c: dict(
            c.execute(
                "SELECT role, count(*) FROM update_pair WHERE update_id = ? GROUP BY role",
                (report.update_id,),
            ).fetchall()
        ),
    )
    assert roles == {
        "new": report.counts["new"],
        "held_out": report.counts["new_held_out"],
        "replay": report.counts["replayed"],
    }


def test_a_candidate_starts_as_live(trained, home, random_base):
    from safetensors.torch import load_file

    teach_about_friends(home)
    still = replace(CONFIG, learning_rate=1e-12)
    report = learn(home, random_base, still)
    assert report.verdict == "insufficient"
    candidate, live = (
        load_file(home / "adapters" / name / "adapter_model.safetensors")
        for name in (report.revision, trained[1].revision)
    )
    assert candidate.keys() == live.keys()
    assert all((candidate[name] - live[name]).abs().max() < 1e-9 for name in live)


def test_labels_thrown_by_a_coin_are_refused_once_and_not_tried_again(trained, home, random_base):
    before = Registry(home).state()
    for first, chosen, rejected in ((100, YES, NO), (101, NO, YES)):
        teach(home, range(first, first + 60, 2), chosen, rejected)
    config = replace(CONFIG, replay=ReplaySettings(minimum=0))
    report = learn(home, random_base, config)
    assert report.verdict == "refused"
    assert report.revision is None
    assert Registry(home).state() == before
    assert revisions(home) == [trained[1].revision]
    again = learn(home, random_base, config, progress=no_training)
    assert again.verdict == "nothing_new"
    assert f"60 examples are set aside since update {report.update_id}" in again.notes[-1]
    for changed in (CONFIG, replace(config, gate=replace(config.gate, flip_rate=0.2))):
        with pytest.raises(Reached):  # as the report advised, or as the operator thought best
            learn(home, random_base, changed, progress=stop_at("train"))
    teach(home, [200, 201, 202, 203, 204])
    with pytest.raises(Reached):
        learn(home, random_base, config, progress=stop_at("train"))


def test_old_pairs_that_cannot_be_encoded_do_not_stop_an_update(fresh, random_base):
    """What was too long on one update is old on the next, and still too long."""
    teach(fresh, range(300, 320), chosen="word " * 600)
    assert learn(fresh, random_base).left_out == {"too_long": 20}
    teach_about_friends(fresh)
    gate = replace(CONFIG.gate, retention_margin=1.5)  # what is retained is another test's matter
    config = replace(CONFIG, replay=ReplaySettings(minimum=40), gate=gate)
    report = learn(fresh, random_base, config)
    assert report.verdict == "promoted", report.reasons
    assert report.left_out == {"too_long": 20}


def flip_signs(tensors):
    return {name: -tensor for name, tensor in tensors.items()}


def zeros(tensors):
    return {name: tensor * 0 for name, tensor in tensors.items()}


def not_finite(tensors):
    return {name: tensor * float("nan") for name, tensor in tensors.items()}


@pytest.mark.guarantee("serving")
@pytest.mark.parametrize("edited", [flip_signs, zeros, not_finite])
def test_a_live_revision_that_was_edited_is_refused_before_any_training(home, random_base, edited):
    teach_about_friends(home)
    file = Registry(home).live().path / "adapter_model.safetensors"
    file.chmod(0o644)
    save_file(edited(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(InvalidAdapter, match=r"adapter_model.*is not the file.*or roll back"):
        learn(home, random_base, progress=stop_at("load model", "score base", "train"))


def test_another_base_is_refused_before_any_training(home, random_base, tmp_path):
    other = shutil.copytree(random_base, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    teach(home, range(100, 104))
    with pytest.raises(WrongBase, match="use a new namespace"):
        learn(home, other, progress=stop_at("score base", "train"))


def test_namespaces_learn_separately(home, random_base):
    with agentpref.Log(home, namespace="other") as log:
        log.record([{"role": "user", "content": "Hello!"}], "Hi!")
    report = learn(home, random_base, namespace="other", progress=no_training)
    assert (report.verdict, report.parent) == ("nothing_new", None)


def test_a_live_revision_that_changed_meanwhile_is_left_alone(trained, home, random_base):
    teach_about_friends(home)

    def rolls_back(ask):
        Registry(home).rollback()
        return True

    report = learn(home, random_base, checks={"meanwhile": rolls_back})
    assert report.verdict == "passed"
    assert (
        f"{report.revision} passed and was not made live: somebody changed what" in report.notes[-1]
    )
    assert f"`agentpref adapters promote {report.revision}` makes it live" in report.notes[-1]
    assert ledger(home, lambda c: Updates(c).report("default")) == report.to_mapping()
    assert Registry(home).live() is None
    with pytest.raises(Reached):
        learn(home, random_base, progress=stop_at("train"))


# Updates that are not alone, or do not end


class Reached(Exception):
    """Ends an update from outside, as Ctrl-C would."""


@pytest.mark.parametrize(
    "write",
    [
        "agentpref.learn.cache.LogpCache.rename",
        "agentpref.serve.publishing.Publication.promote",
        "agentpref.record.updates.Updates.add",
    ],
)
def test_an_outcome_is_written_all_or_nothing(fresh, random_base, monkeypatch, write):
    def ends(*_):
        raise Reached

    with monkeypatch.context() as patch:
        patch.setattr(write, ends)
        with pytest.raises(Reached):
            learn(fresh, random_base)
    assert Registry(fresh).list() == []
    assert Registry(fresh).state().generation == 0
    assert ledger(fresh, lambda c: c.execute("SELECT count(*) FROM updates").fetchone()) == (0,)
    report = learn(fresh, random_base)
    assert report.verdict == "promoted"
    assert revisions(fresh) == [report.revision], "the folder without a row is gone"


def stop_at(*stages):
    def stop(stage, done, total):
        if stage in stages:
            raise Reached(stage)

    return stop


def test_an_update_that_ends_early_leaves_nothing_behind(fresh, random_base):
    (fresh / ".candidate-dead").mkdir()
    with pytest.raises(Reached):
        learn(fresh, random_base, progress=stop_at("score candidate"))
    assert revisions(fresh) == []
    assert not (fresh / ".candidate-dead").exists(), "nor what a killed update had left"
    assert ledger(fresh, lambda c: c.execute("SELECT count(*) FROM updates").fetchone()) == (0,)
    with pytest.raises(Reached):
        learn(fresh, random_base, progress=stop_at("train"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft's, of GPT-2
def test_prompts_that_nearly_fill_the_models_positions_are_learned_and_evaluated(
    tmp_path, narrow_base
):
    """GPT-2 has no position for the tokens of an answer that goes on beyond the last one."""
    home = tmp_path / "home"
    teach(home, range(24), question="Is {} a number? " + "tide " * 60)
    report = learn(home, narrow_base, replace(CONFIG, epochs=1))
    held_out = report.counts["new_held_out"]
    assert (report.counts["new"] + held_out, report.left_out) == (24, {})
    assert report.notes[0] == "max_length is 128 instead of 1024: the model has 128 positions"
    told = " ".join(report.notes)
    assert "24 of 24 prompts leave no room for an answer of 64 tokens" in told, "trained ones too"
    assert passed(report, "finite")


def test_an_update_that_finds_the_home_locked_says_so_and_ends(fresh, random_base):
    caught = []

    def second():
        try:
            learn(fresh, random_base, progress=no_training)
        except UpdateRunning as error:
            caught.append(error)

    def meanwhile(stage, done, total):
        if stage == "train" and done == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    assert learn(fresh, random_base, progress=meanwhile).verdict == "promoted"
    (error,) = caught
    assert str(fresh) in str(error)


ENDLESS = """
import sys
from dataclasses import replace
import agentpref
home, base = sys.argv[1:]
def tell(stage, done, total):
    if stage == "train":
        print(done, flush=True)
agentpref.update(home, model=base, config=agentpref.UpdateConfig(epochs=100_000), checks={},
                 progress=tell)
"""


def test_after_a_kill_while_training_the_next_update_works(trained, fresh, random_base):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(fresh), str(random_base)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(UpdateRunning):
            learn(fresh, random_base)
        process.send_signal(signal.SIGKILL)
    with agentpref.Log(fresh) as log:
        assert log.verify() == []
    assert revisions(fresh) == []
    report = learn(fresh, random_base)
    assert report.verdict == "promoted"
    assert report.revision == trained[1].revision, "as if nothing had happened"
