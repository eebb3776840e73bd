"""The nights after: what people decided stands, a night can be repeated, each leaves a trace.

Real updates of a small random model. One module-wide home has a promoted revision.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

import agentpref
from agentpref.errors import (
    ConfigError,
    ModelNotFound,
    RevisionError,
    UpdateInterrupted,
    UpdateRunning,
)
from agentpref.home import Home
from agentpref.prefer.examples import is_held_out
from agentpref.record.database import connect, exclusive
from agentpref.record.journal import find, last_trained, listed
from agentpref.serve.registry import Registry
from tests.core.test_interrupted_updates import signal_at
from tests.core.test_pipeline import (
    CONFIG,
    NO,
    YES,
    Reached,
    learn,
    no_training,
    stop_at,
    teach,
    teach_about_friends,
)

NUMBERS = 32
OTHER = replace(CONFIG, seed=1)
STRICT = replace(CONFIG, gate=replace(CONFIG.gate, kl_budget=1e-9))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A home with pairs, and nothing trained."""
    home = tmp_path_factory.mktemp("taught") / "home"
    teach(home, range(NUMBERS))
    return home


@pytest.fixture(scope="module")
def promoted(taught, tmp_path_factory, random_base):
    """The same after one update: the home, and the revision that is live."""
    home = shutil.copytree(taught, tmp_path_factory.mktemp("promoted") / "home")
    report = learn(home, random_base)
    assert report.verdict == "promoted"
    return home, report.revision


@pytest.fixture
def fresh(taught, tmp_path):
    return shutil.copytree(taught, tmp_path / "home")


@pytest.fixture
def home(promoted, tmp_path):
    return shutil.copytree(promoted[0], tmp_path / "home")


@pytest.fixture
def registry(home):
    return Registry(home)


def nights(home):
    """The verdicts of all updates, the newest first, and how often each ended so."""
    with closing(connect(Home.open(home), readonly=True)) as connection:
        return [(entry.verdict, entry.times) for entry in listed(connection)]


def held_out_questions():
    """Numbers of questions that are held out, and were not asked."""
    for number in range(1000, 2000):
        asked = [{"role": "user", "content": f"Is {number} a number?"}]
        if is_held_out(asked, CONFIG.held_out):
            yield number


# Decisions of people


@pytest.mark.guarantee("decisions")
def test_what_was_rolled_back_does_not_come_back_the_next_night(
    promoted, home, registry, random_base
):
    """It was promoted again, under a new number."""
    registry.rollback()
    report = learn(home, random_base, progress=no_training)
    assert report.verdict == "nothing_new"
    assert f"learned by {promoted[1]}, which was rolled back" in report.notes[-1]
    assert f"`agentpref adapters promote {promoted[1]}` makes it live again" in report.notes[-1]
    assert (registry.live(), len(registry.list())) == (None, 1)
    assert learn(home, random_base, progress=no_training).update_id == report.update_id


def test_the_same_weights_are_published_when_asked_for_and_only_people_promote_them(
    promoted, home, registry, random_base
):
    registry.rollback()
    registry.hold()
    report = learn(home, random_base, again=True)
    assert report.verdict == "passed"
    assert f"it has the weights of {promoted[1]}, which was rolled back" in report.notes[-1]
    promote = f"`agentpref adapters promote {report.revision}` makes it live"
    assert f"`agentpref adapters hold --end`, then {promote}" in report.notes[-1]
    assert registry.live() is None
    registry.lift()
    registry.promote(report.revision)
    assert learn(home, random_base, progress=no_training).notes == []
    assert learn(home, random_base, again=True).notes[-1].startswith("--again finds nothing")


def test_the_same_weights_are_no_canary_either_where_only_held_out_pairs_came(
    promoted, home, registry, random_base
):
    registry.rollback()
    teach(home, [next(held_out_questions())])
    report = learn(home, random_base, canary=0.1)
    assert report.verdict == "passed"
    assert f"it has the weights of {promoted[1]}" in report.notes[-1]
    assert registry.state().canary is None


def test_what_people_replaced_by_the_base_is_trained_again_and_does_not_come_back(
    promoted, home, registry, random_base
):
    registry.promote("base")
    report = learn(home, random_base)
    assert report.verdict == "passed"
    words = f"it has the weights of {promoted[1]}, which was replaced by an older one"
    assert words in report.notes[-1]
    assert registry.live() is None
    assert learn(home, random_base, progress=no_training).verdict == "nothing_new"


@pytest.mark.guarantee("decisions")
def test_a_quarantined_revision_comes_back_under_no_other_number(
    promoted, home, registry, random_base
):
    registry.rollback()
    registry.promote(promoted[1])
    registry.promote("base")
    registry.quarantine(promoted[1], "it answers in Latin")
    report = learn(home, random_base, progress=no_training)
    assert "is in quarantine (it answers in Latin)" in report.notes[-1]
    registry.release(promoted[1])
    with pytest.raises(Reached):
        learn(home, random_base, progress=stop_at("train"))


def test_other_settings_and_new_pairs_run_again_after_a_rollback(home, registry, random_base):
    registry.rollback()
    gate = replace(CONFIG, gate=replace(CONFIG.gate, flip_rate=0.2), max_minutes=60.0)
    assert learn(home, random_base, gate, progress=no_training).verdict == "nothing_new"
    report = learn(home, random_base, OTHER)
    assert report.verdict == "promoted"
    registry.rollback()
    teach(home, range(500, 520))
    with pytest.raises(Reached):
        learn(home, random_base, progress=stop_at("train"))


@pytest.mark.guarantee("decisions")
def test_a_held_namespace_is_trained_proved_published_and_not_served(fresh, random_base):
    registry = Registry(fresh)
    registry.hold("the auditors are here")
    report = learn(fresh, random_base)
    assert report.verdict == "passed"
    assert "held (the auditors are here): nothing is promoted until `" in report.notes[0]
    lift = "`agentpref adapters hold --end`, then `agentpref adapters promote"
    assert f"{lift} {report.revision}` makes it live" in report.notes[-1]
    assert (registry.live(), len(registry.list())) == (None, 1)
    with pytest.raises(RevisionError, match="hold --end"):
        registry.promote(report.revision)
    registry.lift()
    assert registry.promote(report.revision).live == report.revision


@pytest.mark.guarantee("decisions")
def test_a_hold_that_begins_while_an_update_runs_is_respected(fresh, random_base):
    def holds(ask):
        Registry(fresh).hold()
        return True

    report = learn(fresh, random_base, checks={"holds": holds})
    assert report.verdict == "passed"
    assert "the namespace is held" in report.notes[-1]
    assert Registry(fresh).live() is None


def test_what_passes_is_only_published_or_a_canary_if_that_is_wished(fresh, random_base):
    registry = Registry(fresh)
    report = learn(fresh, random_base, promote=False)
    assert (report.verdict, registry.state().generation) == ("passed", 0)
    assert "it was not to be promoted" in report.notes[-1]
    nothing = learn(fresh, random_base, progress=no_training)
    assert nothing.verdict == "nothing_new", "what is wished is no setting of the training"
    assert f"`agentpref adapters promote {report.revision}` makes it live" in nothing.notes[-1]
    second = learn(fresh, random_base, canary=0.25, again=True)
    assert second.verdict == "passed"
    assert (registry.state().canary, registry.state().weight) == (second.revision, 0.25)
    assert "it was made the canary, for 25% of the threads; " in second.notes[-1]
    registry.promote(second.revision)
    assert learn(fresh, random_base, progress=no_training).notes == []


@pytest.mark.parametrize("wishes", [{"canary": 0.0}, {"canary": 1.5}, {"promote": False}])
def test_a_canary_that_cannot_be_is_refused_before_anything(fresh, random_base, wishes):
    with pytest.raises(ConfigError, match="share above 0 and at most 1"):
        learn(fresh, random_base, **{"canary": 0.1, **wishes})
    assert nights(fresh) == []


def test_an_interrupted_update_resumes_whatever_is_wished_of_its_end(fresh, random_base):
    with pytest.raises(UpdateInterrupted):
        learn(fresh, random_base, progress=signal_at("train", 2))
    report = learn(fresh, random_base, promote=False)
    assert (report.verdict, report.training["resumed_at"]) == ("passed", 2)


# Repeated nights


def test_a_refused_night_is_repeated_when_asked_for(fresh, random_base):
    report = learn(fresh, random_base, STRICT)
    assert report.verdict == "refused"
    nothing = learn(fresh, random_base, STRICT, progress=no_training)
    assert nothing.verdict == "nothing_new"
    assert f"{NUMBERS} examples are set aside since update {report.update_id}" in nothing.notes[-1]
    assert "or `agentpref update --again`" in nothing.notes[-1]
    with pytest.raises(Reached):
        learn(fresh, random_base, STRICT, again=True, progress=stop_at("train"))


def test_a_candidate_whose_training_was_cut_short_is_told_of_the_limit(fresh, random_base):
    """It was refused, with the advice to train longer."""
    # One step at a rate that teaches nothing proves no gain, and cannot please the check.
    short = replace(CONFIG, max_minutes=1e-6, learning_rate=1e-12)
    report = learn(fresh, random_base, short, checks={"polite": lambda ask: False})
    assert (report.verdict, report.training["stopped"]) == ("cut_short", "time")
    words = " ".join([*report.reasons, *report.notes])
    assert "train longer" not in words
    assert "raise max_minutes" in words
    assert (report.revision, Registry(fresh).list()) == (None, [])


# Every attempt leaves a trace


@pytest.mark.guarantee("decisions")
def test_nights_that_come_to_nothing_are_listed(promoted, home, random_base, tmp_path):
    for _ in range(3):
        learn(home, random_base, progress=no_training)
    teach(home, range(600, 640))
    with pytest.raises(ModelNotFound):
        learn(home, tmp_path / "nowhere")
    with exclusive(Home.open(home)), pytest.raises(UpdateRunning):
        learn(home, random_base)
    with pytest.raises(UpdateInterrupted):
        learn(home, random_base, progress=signal_at("load model", 1))
    with pytest.raises(Reached):
        learn(home, random_base, progress=stop_at("score base"))
    ends = ["failed", "interrupted", "busy", "failed", "nothing_new", "promoted"]
    assert nights(home) == [(end, 3 if end == "nothing_new" else 1) for end in ends]
    with closing(connect(Home.open(home), readonly=True)) as connection:
        newest, *_, third, first = listed(connection)
        assert newest.report["notes"][0].startswith("Reached in test_pipeline.py, line ")
        assert newest.report["model"] == str(random_base)
        assert third.report["counts"]["old"] > 0
        assert find(connection, promoted[1]) == first


KILLED = """
import os, signal, sys
import agentpref
from tests.core.test_pipeline import CONFIG
def tell(stage, done, total):
    if stage == "train":
        os.kill(os.getpid(), signal.SIGKILL)
agentpref.update(sys.argv[1], model=sys.argv[2], config=CONFIG, checks={}, progress=tell)
"""


@pytest.mark.guarantee("decisions")
def test_the_next_update_says_that_one_was_killed(fresh, random_base):
    command = [sys.executable, "-c", KILLED, str(fresh), str(random_base)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert nights(fresh) == [("running", 1)]
    report = learn(fresh, random_base)
    assert report.verdict == "promoted"
    assert "it did not end by itself: its process was killed (kill -9" in report.notes[0]
    assert nights(fresh) == [("promoted", 1), ("interrupted", 1)]
    with agentpref.Log(fresh) as log:
        assert log.verify() == []


# What serves knows it already


def test_a_night_that_says_what_live_knows_counts_as_learned(promoted, home, registry, random_base):
    """It was refused with "nothing to gain", exit 4, and its judgements were set aside."""
    teach(home, range(100, 160))
    report = learn(home, random_base)
    assert report.verdict == "nothing_to_gain"
    assert report.reasons[0].endswith("already: there is nothing to gain")
    assert report.set_aside == []
    assert registry.live().revision_id == promoted[1]
    assert learn(home, random_base, progress=no_training).verdict == "nothing_new"


def test_what_live_knew_is_replayed_and_proves_retention_in_the_next_update(home, random_base):
    teach(home, range(100, 160))
    assert learn(home, random_base).verdict == "nothing_to_gain"
    teach_about_friends(home)
    later = learn(home, random_base)
    assert later.counts["old"] + later.counts["old_held_out"] == NUMBERS + 60
    assert later.counts["old_evaluated"] > 10


def test_what_live_knew_is_new_again_once_live_was_rolled_back(home, registry, random_base):
    teach(home, range(100, 160))
    assert learn(home, random_base).verdict == "nothing_to_gain"
    registry.rollback()
    assert learn(home, random_base, progress=no_training).verdict == "nothing_new"  # by decision
    again = learn(home, random_base, again=True)
    assert again.counts["new"] + again.counts["new_held_out"] == NUMBERS + 60
    assert again.counts["trained"] > 0


def test_few_judgements_that_live_agrees_with_are_no_proof_that_nothing_is_to_gain(
    home, random_base
):
    teach(home, range(100, 120))
    assert learn(home, random_base).verdict != "nothing_to_gain"


def test_dislikes_alone_are_trained_and_never_called_known(home, random_base):
    """Live was "right about 80 of 80" dislikes of what it writes, and they counted as learned."""
    with agentpref.Log(home) as log:
        for number in range(60):
            asked = [{"role": "user", "content": f"Who is {number}?"}]
            log.thumbs(log.record(asked, f"yes, {number % 7}", tags=["chat"]), up=False)
    report = learn(home, random_base)
    assert report.verdict != "nothing_to_gain"
    assert report.counts["trained_thumbs"] > 0
    assert report.counts["evaluated_thumbs"] == 0


def test_judgements_that_live_is_wrong_about_are_trained_beside_those_it_knows(home, random_base):
    teach(home, range(100, 160))
    teach_about_friends(home)
    assert learn(home, random_base).counts["trained"] > 0


def teach_about_strangers(home, numbers):
    """A preference that nothing can be read off: both answers have the same form."""
    teach(home, numbers, chosen="x", rejected="y", question="Who is {}?")


def test_where_nothing_could_show_in_what_is_written_nothing_is_trained(fresh, random_base):
    teach_about_strangers(fresh, range(80))
    live = learn(fresh, random_base).revision
    teach_about_strangers(fresh, range(100, 180))
    report = learn(fresh, random_base)
    assert (report.verdict, report.training) == ("nothing_to_gain", {})
    assert report.counts["known"] == report.counts["new"] + report.counts["new_held_out"] == 80
    assert (
        f"{live} is right about 80 of 80 new prompts already, so there is nothing to gain; they "
        "count as learned" in report.notes
    )
    with closing(connect(Home.open(fresh), readonly=True)) as connection:
        assert last_trained(connection, "default").revision == live


def test_what_live_is_wrong_about_in_one_tag_is_trained_whatever_it_knows_of_another(
    home, random_base
):
    """Forty in a new tag, which live could not know, were swallowed by three hundred it knew."""
    teach(home, range(100, 400))
    with agentpref.Log(home) as log:
        for number in range(40):
            asked = [{"role": "user", "content": f"Who is {number}?"}]
            chosen, rejected = (log.record(asked, text, tags=["friends"]) for text in ("x", "y"))
            log.compare(chosen, rejected, winner="a")
    report = learn(home, random_base)
    assert report.counts["trained"] > 0
    assert report.verdict != "nothing_to_gain"


# Feedback that nothing can be made of


def contradict(home, numbers):
    """Log, of each question, one comparison and the opposite one, by two people."""
    with agentpref.Log(home) as log:
        for number in numbers:
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            runs = log.record(asked, YES), log.record(asked, NO)
            for user, winner in (("one", "a"), ("other", "b")):
                log.compare(*runs, winner=winner, user_id=user)


def test_new_feedback_of_which_nothing_can_be_trained_is_not_called_nothing_new(
    tmp_path, random_base
):
    """Of 120 comparisons that contradict each other it said "no new feedback", exit 3."""
    home = tmp_path / "home"
    contradict(home, range(30))
    report = learn(home, random_base, progress=no_training)
    assert (report.verdict, report.left_out) == ("nothing_usable", {"contradicted": 60})
    assert learn(home, random_base, progress=no_training).verdict == "nothing_new"
    contradict(home, range(30, 31))
    again = learn(home, random_base, progress=no_training)
    assert (again.verdict, again.left_out) == ("nothing_usable", {"contradicted": 62})


def test_feedback_that_makes_no_example_is_told_beside_what_was_tried_before(fresh, random_base):
    assert learn(fresh, random_base, STRICT).verdict == "refused"
    contradict(fresh, range(900, 903))
    report = learn(fresh, random_base, STRICT, progress=no_training)
    assert (report.verdict, report.left_out["contradicted"]) == ("nothing_usable", 6)
    assert any("are set aside since update" in note for note in report.notes)


def test_ties_words_and_what_was_taken_back_are_nothing_new(home, random_base):
    with agentpref.Log(home) as log:
        asked = [{"role": "user", "content": "Is 950 a number?"}]
        run, other = log.record(asked, YES), log.record(asked, NO)
        log.thumbs(run, up=True)
        log.retract(run)
        log.compare(run, other, winner="tie")
        log.feedback(run, key="latency", score=0.3, source="code")
    report = learn(home, random_base, progress=no_training)
    assert report.verdict == "nothing_new"
    assert {"tie", "undeclared_key", "retracted"} <= {*report.left_out}


def test_a_night_with_held_out_prompts_alone_says_that_they_wait(home, random_base):
    teach(home, [next(held_out_questions())])
    report = learn(home, random_base, progress=no_training)
    assert report.verdict == "nothing_new"
    note = "held out, to prove what later ones train: 1 example waits"
    assert report.notes == [note]


def test_a_thumb_that_was_left_out_is_not_said_to_have_been_tried(fresh, random_base):
    with agentpref.Log(fresh) as log:
        log.thumbs(log.record([{"role": "user", "content": "Is 950 a number?"}], YES), up=True)
    first = learn(fresh, random_base, STRICT)
    assert (first.verdict, first.left_out) == ("refused", {"no_mismatch": 1})
    again = learn(fresh, random_base, STRICT, progress=no_training)
    assert again.verdict == "nothing_new"
    (note,) = [note for note in again.notes if "remain" in note]
    assert note.startswith(
        f"1 example remains that update {first.update_id} (refused) could not use (no mismatch); "
    )


# Prompts of another kind


def test_new_prompts_unlike_all_that_was_learned_are_told_with_a_run_that_shows_it(
    home, random_base
):
    question = "Please write a long poem in Greek that rhymes with banana and {}"
    teach(home, range(200, 260), chosen="x", rejected="y", question=question)
    report = learn(home, random_base)
    found = {one["tag"]: one for one in report.training["shift"]}
    assert found["all"]["alarm"]
    assert found["all"]["unlike"] > 0.9
    (note,) = (note for note in report.notes if note.startswith("shift:"))
    runs = {run.run_id: run for run in Home.open(home).runs(limit=None)}
    for name in found["all"]["farthest"]:
        assert "banana" in runs[name].prompt.messages[0]["content"]
        assert name in note


def test_new_prompts_of_the_same_kind_are_told_as_such(home, random_base):
    teach(home, range(100, 160), chosen="x", rejected="y")
    report = learn(home, random_base)
    assert [one["alarm"] for one in report.training["shift"]] == [False]
    assert not any(note.startswith("shift:") for note in report.notes)
