"""One update tries more than once; what is refused is set aside; people may change their minds.

Real updates of a small random model, which learns in seconds what it is to say.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

import agentpref
from agentpref import attempt, retry
from agentpref.budget import Budget
from agentpref.home import Home
from agentpref.prefer.examples import is_held_out
from agentpref.prove import gate
from agentpref.record import asides
from agentpref.record.database import connect
from agentpref.record.updates import Updates
from agentpref.retry import IMITATION, AtFault
from tests.core.test_interrupted_updates import states
from tests.core.test_pipeline import CONFIG as LOOSE
from tests.core.test_pipeline import NO, YES, learn, no_training
from tests.core.test_pipeline_accounts import require_sums

pytestmark = pytest.mark.slow

CONFIG = replace(LOOSE, gate=replace(LOOSE.gate, retention_margin=0.5))
"""What so small a model forgets differs from processor to processor, but a half is a loss."""

STRICT = replace(CONFIG, gate=replace(CONFIG.gate, retention_margin=0.0, flip_rate=0.0))
"""Whatever is lost of what was learned is a loss."""


def say(home, numbers, chosen=YES, rejected=NO, tag="numbers", user=None, ask="Is {} a number?"):
    """Log that one answer was liked better than another, for each of some questions."""
    runs = []
    with agentpref.Log(home) as log:
        for number in numbers:
            asked = [{"role": "user", "content": ask.format(number)}]
            pair = [
                log.record(asked, text, tags=[tag], user_id=user) for text in (chosen, rejected)
            ]
            log.compare(*pair, winner="a", user_id=user)
            runs.append(pair)
    return runs


def mislead(home, start=100, tag="numbers"):
    """Log 60 labels that teach what is wrong: half of the prompts, which train, say the opposite
    of the others, which are held out. Return the numbers that are asked about, side by side.
    """
    sides = {False: [], True: []}
    for number in range(start, start + 400):
        asked = [{"role": "user", "content": f"Is {number} a number?"}]
        sides[is_held_out(asked, CONFIG.held_out)].append(number)
    trained, held_out = (sides[side][:30] for side in (False, True))
    say(home, trained, NO, YES, tag)
    say(home, held_out, tag=tag)
    return trained, held_out


def toss(home, numbers):
    """Log labels that a coin threw."""
    coin = random.Random(0)
    for number in numbers:
        say(home, [number], *coin.sample([YES, NO], 2))


def befriend(home, numbers=range(60)):
    """Log what live would not say, so that there is much to gain."""
    say(home, numbers, "an enemy", "a friend", "friends", ask="Who is {}?")


@pytest.fixture(scope="module")
def promoted(tmp_path_factory, random_base):
    """A home whose live revision says yes."""
    home = tmp_path_factory.mktemp("attempts") / "home"
    say(home, range(40))
    assert learn(home, random_base, CONFIG).verdict == "promoted"
    return home


@pytest.fixture
def home(promoted, tmp_path):
    return shutil.copytree(promoted, tmp_path / "home")


def roles(home, update_id):
    with closing(connect(Home.open(home), readonly=True)) as connection:
        query = "SELECT role, count(*) FROM update_pair WHERE update_id = ? GROUP BY role"
        return dict(connection.execute(query, (update_id,)).fetchall())


# Set aside


@pytest.mark.guarantee("learning")
def test_after_a_refused_night_the_next_good_one_is_promoted_without_its_labels(home, random_base):
    mislead(home)
    bad = learn(home, random_base, CONFIG)
    assert bad.verdict == "refused", bad.reasons
    assert any("no gain but a loss: check the labels" in reason for reason in bad.reasons)
    assert roles(home, bad.update_id)["set_aside"] == 60
    assert "new" not in roles(home, bad.update_id)
    (told,) = bad.set_aside
    assert (told["update_id"], told["examples"]) == (bad.update_id, 60)
    befriend(home)
    good = learn(home, random_base, CONFIG)
    assert good.verdict == "promoted", good.reasons
    assert good.counts["trained"] + good.counts["new_evaluated"] == 60
    assert good.counts["still_set_aside"] == 60
    assert good.set_aside == [told]
    assert any("60 examples are set aside since update" in note for note in good.notes)
    require_sums(good)
    nothing = learn(home, random_base, CONFIG, progress=no_training)
    assert (nothing.verdict, nothing.set_aside) == ("nothing_new", [told])
    again = learn(home, random_base, CONFIG, again=True)
    assert again.counts["new"] + again.counts["new_held_out"] == 60
    require_sums(again)


def test_a_newer_judgement_that_agrees_brings_an_example_back(home, random_base):
    _, held_out = mislead(home)
    assert learn(home, random_base, CONFIG).verdict == "refused"
    with agentpref.Log(home) as log:
        asked = [{"role": "user", "content": f"Is {held_out[0]} a number?"}]
        runs = [log.record(asked, text, tags=["numbers"], user_id="b") for text in (YES, NO)]
        log.compare(*runs, winner="a", user_id="b")
    befriend(home)
    report = learn(home, random_base, CONFIG)
    assert report.counts["new"] + report.counts["new_held_out"] == 61
    assert report.counts["still_set_aside"] == 59


def test_other_settings_but_not_another_seed_bring_everything_back(home, random_base):
    mislead(home)
    assert learn(home, random_base, CONFIG).verdict == "refused"
    befriend(home, range(4))
    other = shutil.copytree(home, home.with_name("other"))
    same = replace(CONFIG, seed=1, max_minutes=9.0, gate=replace(CONFIG.gate, canary=0.0))
    report = learn(home, random_base, same)
    assert report.counts["still_set_aside"] == 60, "no reason to try again"
    report = learn(other, random_base, replace(CONFIG, learning_rate=1e-3))
    assert report.counts["new"] + report.counts["new_held_out"] == 64


# More attempts than one


def test_what_fails_is_left_out_and_the_rest_is_promoted(home, random_base):
    mislead(home)
    befriend(home)
    strict = replace(CONFIG, gate=replace(CONFIG.gate, retention_margin=0.0, flip_rate=0.0))
    report = learn(home, random_base, strict)
    first, second = report.attempts
    assert report.verdict == "promoted", (report.reasons, report.attempts)
    assert first["verdict"] == "refused"
    assert "once more without tag numbers" in first["next"]
    assert (second["verdict"], second["start"]) == ("passed", "live")
    assert report.counts["set_aside"] == 60
    assert report.counts["trained"] + report.counts["new_evaluated"] == 60
    assert roles(home, report.update_id)["set_aside"] == 60
    assert [told["tags"] for told in report.set_aside] == [{"numbers": 60}]
    require_sums(report)


def test_what_is_ranked_and_not_written_is_imitated_and_then_trained_longer(
    home, random_base, monkeypatch
):
    judge, judged = gate.judge, []

    def not_written_at_first(*evidence, **seed):
        result = judge(*evidence, **seed)
        judged.append(result)
        checks = [
            replace(one, passed=one.passed and (one.name != "written" or len(judged) > 2))
            for one in result.checks
        ]
        verdict = result.verdict if len(judged) > 2 else "refused"
        return replace(result, verdict=verdict, checks=tuple(checks))

    monkeypatch.setattr(gate, "judge", not_written_at_first)
    befriend(home)
    report = learn(home, random_base, CONFIG)
    first, second, third = report.attempts
    assert report.verdict == "promoted", (report.reasons, report.attempts)
    assert [one["imitation"] for one in report.attempts] == [0.0, IMITATION, IMITATION]
    assert [one["longer"] for one in report.attempts] == [1, 1, 3]
    assert first["steps"] == second["steps"] == third["steps"] / 3
    assert "hardly written, so it imitates the chosen answers" in first["next"]
    assert "hardly written, so it trains 3 times as long" in second["next"]
    assert report.training["imitation"] == IMITATION


def finds_no_gain_in(monkeypatch, tag):
    """Whatever so small a model learns, a candidate shows no gain in a tag beside others."""

    def idle(new, available, was_tried, *, confidence):
        fresh = (*available.new, *available.new_held_out)
        found = frozenset(one.example_id for one in fresh if one.tag == tag)
        is_all = len(found) == len(fresh)
        return AtFault((f"tag {tag} (no gain)",), found, 2) if found and not is_all else None

    monkeypatch.setattr(attempt, "idle", idle)
    monkeypatch.setattr(retry, "idle", idle)


def test_what_shows_no_gain_and_keeps_a_night_from_being_proven_is_left_out(
    home, random_base, monkeypatch
):
    judge = gate.judge

    def too_little_at_first(evidence, *options, **seed):
        result = judge(evidence, *options, **seed)
        return replace(result, verdict="insufficient") if not evidence.looks else result

    monkeypatch.setattr(gate, "judge", too_little_at_first)
    finds_no_gain_in(monkeypatch, "numbers")
    toss(home, range(100, 160))
    befriend(home)
    report = learn(home, random_base, CONFIG)
    first, second = report.attempts
    assert report.verdict == "promoted", (report.reasons, report.attempts)
    assert (first["verdict"], second["verdict"]) == ("insufficient", "passed")
    assert "once more without tag numbers" in first["next"]
    assert report.gain["look"] == 1 + 2, "either tag might have been left out"
    assert report.counts["set_aside"] == 60
    assert report.counts["trained"] + report.counts["new_evaluated"] == 60
    require_sums(report)


def test_what_shows_no_gain_waits_for_the_next_update_where_the_rest_is_refused(
    home, random_base, monkeypatch
):
    judge = gate.judge

    def too_little_and_then_bad(evidence, *options, **seed):
        verdict = "refused" if evidence.looks else "insufficient"
        return replace(judge(evidence, *options, **seed), verdict=verdict)

    monkeypatch.setattr(gate, "judge", too_little_and_then_bad)
    finds_no_gain_in(monkeypatch, "numbers")
    toss(home, range(100, 160))
    befriend(home)
    report = learn(home, random_base, CONFIG)
    assert [one["verdict"] for one in report.attempts] == ["insufficient", "refused"]
    assert [one["tags"] for one in report.set_aside] == [{"friends": 60}]
    assert report.counts["waiting"] == 60
    require_sums(report)
    monkeypatch.undo()
    later = learn(home, random_base, CONFIG)
    assert later.counts["new"] + later.counts["new_held_out"] == 60
    assert later.counts["trained"], "they are tried by themselves"


def test_what_a_promoted_candidate_shows_no_gain_in_is_set_aside_and_not_learned(
    home, random_base, monkeypatch
):
    toss(home, range(100, 160))
    befriend(home)
    finds_no_gain_in(monkeypatch, "numbers")
    report = learn(home, random_base, CONFIG)
    assert report.verdict == "promoted", (report.reasons, report.attempts)
    require_sums(report)
    (told,) = report.set_aside
    assert (told["examples"], told["tags"]) == (60, {"numbers": 60})
    assert told["why"] == "trained with the rest, tag numbers (no gain)"
    used = roles(home, report.update_id)
    assert used["trained_aside"] + used["set_aside"] == 60
    with closing(connect(Home.open(home), readonly=True)) as connection:
        updates = Updates(connection)
        learned, trained = (of(report.revision) for of in (updates.learned_by, updates.trained_by))
        aside = asides.set_aside(connection, "default")[0].examples
        said = asides.sources(connection, trained & aside).values()
        assert all(updates.revisions_trained_on(own) == [report.revision] for own in said)
        assert asides.number_aside(connection, "default") == 60
    assert not learned & aside
    assert len(trained & aside) == used["trained_aside"], "its weights have seen them"
    say(home, range(500, 540), "an enemy", "a friend", "more", ask="What is {}?")
    monkeypatch.undo()
    later = learn(home, random_base, CONFIG)
    assert not any("are taken in again" in note for note in later.notes), later.notes
    assert later.counts["still_set_aside"] == 60
    assert (
        later.counts["old"]
        == report.counts["old"] + report.counts["trained"] - (used["trained_aside"])
    )


def test_labels_that_proved_nothing_stay_new_and_are_tried_with_the_next_night(home, random_base):
    toss(home, range(100, 160))
    night = learn(home, random_base, CONFIG)
    assert night.verdict == "insufficient", night.reasons
    assert "set_aside" not in roles(home, night.update_id)
    befriend(home, range(100))
    report = learn(home, random_base, CONFIG)
    assert report.attempts[0]["trained"] == report.counts["new"]
    assert report.counts["new"] + report.counts["new_held_out"] == 160
    assert report.verdict == "promoted", (report.reasons, report.attempts)


@pytest.mark.guarantee("learning")
@pytest.mark.parametrize(("tag", "culprit"), [("numbers", "tag numbers"), ("friends", "what an")])
def test_bad_labels_that_stayed_new_do_not_keep_the_next_night_from_being_promoted(
    home, random_base, tag, culprit
):
    """In a tag of their own they are found by it, and else by having been tried before."""
    mislead(home, tag=tag)
    loose = replace(CONFIG.gate, retention_margin=1.0, confidence=1 - 1e-15)
    night = learn(home, random_base, replace(CONFIG, gate=loose))
    assert night.verdict == "insufficient", night.reasons
    befriend(home)
    report = learn(home, random_base, CONFIG)
    first, second = report.attempts
    assert report.verdict == "promoted", (report.reasons, report.attempts)
    assert f"once more without {culprit}" in first["next"]
    assert (first["verdict"], second["start"]) == ("refused", "live")
    assert report.counts["set_aside"] == 60
    assert report.counts["trained"] + report.counts["new_evaluated"] == 60
    require_sums(report)


@pytest.fixture(scope="module")
def spent(promoted, tmp_path_factory, random_base):
    """A home with much to learn, and settings whose KL budget only a refit keeps."""
    home = shutil.copytree(promoted, tmp_path_factory.mktemp("spent") / "home")
    befriend(home)
    trial = shutil.copytree(home, tmp_path_factory.mktemp("trial") / "home")
    tiny = replace(CONFIG, gate=replace(CONFIG.gate, kl_budget=1e-9))
    report = learn(trial, random_base, tiny)
    assert [one["start"] for one in report.attempts] == ["live", "base"]
    return home, tiny, report


def test_where_the_kl_budget_is_spent_base_is_refitted_on_everything(spent):
    _, _, report = spent
    assert report.verdict == "refused"
    assert report.training["start"] == "base"
    assert report.counts["replayed"] == report.counts["old"]
    assert "base is refitted on everything that still counts" in report.attempts[0]["next"]
    assert any(note.startswith("attempt 1, from live, failed (KL") for note in report.notes)


def test_a_refit_replays_at_most_as_much_as_is_set(spent, tmp_path, random_base):
    home = shutil.copytree(spent[0], tmp_path / "home")
    few = replace(spent[1], replay=replace(CONFIG.replay, refit=5))
    assert learn(home, random_base, few).counts["replayed"] == 5


def test_an_attempt_that_there_is_no_time_for_is_not_made(
    spent, tmp_path, random_base, monkeypatch
):
    home = shutil.copytree(spent[0], tmp_path / "home")
    judged, judge, left = [], gate.judge, Budget.left

    def judges(*arguments, **options):
        judged.append(True)
        return judge(*arguments, **options)

    monkeypatch.setattr(gate, "judge", judges)
    monkeypatch.setattr(Budget, "left", lambda budget: 0.001 if judged else left(budget))
    report = learn(home, random_base, replace(spent[1], max_minutes=60))
    assert (report.verdict, len(report.attempts)) == ("refused", 1)
    assert "max_minutes leaves no time for another attempt" in report.attempts[0]["next"]
    assert any("max_minutes leaves no time for another attempt" in note for note in report.notes)


KILLED = """
import os, signal, sys
import agentpref
from agentpref.learn import checkpoint
from tests.core.test_attempts import CONFIG
from dataclasses import replace
home, base, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpoint.Checkpoint.due = lambda self: True
steps = 0
def tell(stage, done, total):
    global steps
    steps += stage == "train"
    if stage == "train" and steps == stop:
        os.kill(os.getpid(), signal.SIGKILL)
config = replace(CONFIG, gate=replace(CONFIG.gate, kl_budget=1e-9))
agentpref.update(home, model=base, config=config, checks={}, progress=tell)
"""


@pytest.mark.guarantee("learning")
def test_an_update_killed_in_its_second_attempt_goes_on_with_it(spent, tmp_path, random_base):
    home, config, whole = shutil.copytree(spent[0], tmp_path / "home"), *spent[1:]
    stop = str(whole.attempts[0]["steps"] + 2)
    command = [sys.executable, "-c", KILLED, str(home), str(random_base), stop]
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": _path()})
    assert done.returncode == -signal.SIGKILL
    (found,) = states(home)
    assert (found.about["plan"]["attempt"], found.about["plan"]["start"]) == (2, "base")
    say(home, range(500, 504))
    report = learn(home, random_base, config)
    assert report.training["resumed_at"] == found.state.step == 2
    assert report.update_id == found.about["update_id"]
    assert report.accuracy == whole.accuracy
    timed = ("seconds",)
    for mine, theirs in zip(report.attempts, whole.attempts, strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {
            k: v for k, v in theirs.items() if k not in timed
        }
    assert report.counts["waiting"] == 4
    require_sums(report)


def _path():
    return os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])


# Preferences that change


@pytest.mark.guarantee("learning")
def test_a_preference_that_changed_wins_and_may_change_back(home, random_base):
    # Trained for longer, the model tells the prompts of both nights apart, and nothing contradicts.
    short = replace(STRICT, epochs=4)
    say(home, range(100, 160), NO, YES)
    turned = learn(home, random_base, short)
    assert turned.verdict == "promoted", turned.reasons
    assert [one["attempt"] for one in turned.attempts] == [1, 2], "what stood in the way yields"
    (told,) = turned.changed
    assert (told["tag"], told["state"], told["aged_out"]) == ("numbers", "changed", 40)
    assert turned.counts["aged_out"] == 40
    assert turned.counts["replayed"] == turned.counts["old_evaluated"] == 0
    assert any("contradict 40 older ones, which were left out" in note for note in turned.notes)
    require_sums(turned)
    say(home, range(200, 260))
    back = learn(home, random_base, short)
    assert back.verdict == "promoted", back.reasons
    assert (back.changed[0]["aged_out"], back.changed[0]["restored"]) == (60, 40)
    assert back.counts["replayed"] > 0
    with closing(connect(Home.open(home), readonly=True)) as connection:
        assert len(asides.aged_out(connection, back.revision)) == 60
    require_sums(back)


def test_too_few_contradictions_change_nothing_and_stay_new(home, random_base):
    say(home, range(100, 104), NO, YES)
    report = learn(home, random_base, STRICT)
    assert (report.verdict, report.changed[0]["state"]) == ("insufficient", "undecided"), (
        report.reasons
    )
    assert "set_aside" not in roles(home, report.update_id)
    say(home, range(104, 160), NO, YES)
    report = learn(home, random_base, STRICT)
    assert (report.verdict, report.changed[0]["state"]) == ("promoted", "changed")


def test_old_evidence_does_not_yield_to_a_candidate_that_passes_with_it(home, random_base):
    """So a new topic that looks like a change of mind costs nothing of what was learned."""
    lenient = replace(CONFIG, gate=replace(CONFIG.gate, retention_margin=1.0))
    say(home, range(100, 240), NO, YES)
    report = learn(home, random_base, lenient)
    assert report.verdict == "promoted", report.reasons
    assert len(report.attempts) == 1
    assert report.changed == []
    assert "aged_out" not in report.counts
    assert report.counts["replayed"] > 0


def test_other_users_do_not_speak_for_those_who_were_learned_from(tmp_path, random_base):
    home = tmp_path / "home"
    say(home, range(40), user="a")
    assert learn(home, random_base, CONFIG).verdict == "promoted"
    say(home, range(100, 160), NO, YES, user="b")
    assert learn(home, random_base, CONFIG).changed == []


def test_contradictions_that_were_set_aside_count_once_there_are_enough(home, random_base):
    say(home, range(100, 112), NO, YES)
    refused = replace(CONFIG, gate=replace(CONFIG.gate, kl_budget=1e-9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agentpref.prove.drift.CLEAR", 1.1)  # as if people disagreed by a little
        assert learn(home, random_base, refused).verdict == "refused"
    say(home, range(120, 124), NO, YES)
    report = learn(home, random_base, refused)
    assert report.changed[0]["back"] == 12
    assert report.counts["new"] + report.counts["new_held_out"] == 16
