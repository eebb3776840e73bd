"""What is done when people's thumbs prove a revision worse or better, in real homes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from agentpref.config import ThumbSettings, UpdateConfig, WatchSettings
from agentpref.errors import ConfigError, GenerationConflict, RevisionError
from agentpref.home import Home
from agentpref.pipeline import update
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.serve import regression, status
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.decisions import taken_back
from agentpref.serve.registry import Finding, Registry
from agentpref.serve.regression import tell, withdraw
from agentpref.serve.router import Router
from agentpref.serve.watch import Watcher
from agentpref.testing import FakeBackend, write_adapter

Vote = Callable[..., None]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def names(registry: Registry, tmp_path: Path) -> list[str]:
    """Three revisions; none serves."""
    return [
        registry.publish(
            write_adapter(tmp_path / str(seed), seed=seed), parent=None, model={}, training={}
        ).revision_id
        for seed in range(3)
    ]


@pytest.fixture
def vote(registry: Registry) -> Iterator[Vote]:
    """Call ``vote(revision, up=8, down=2)`` for thumbs in threads of their own."""
    threads = count()
    with Log(registry.home.path) as log:

        def call(revision: str, *, up: int = 0, down: int = 0, thread: bool = True) -> None:
            question = [{"role": "user", "content": "hi"}]
            runs = [
                log.record(question, "hello", revision=revision, thread_id=f"t{next(threads)}")
                if thread
                else log.record(question, "hello", revision=revision)
                for n in range(up + down)
            ]
            for n, run in enumerate(runs):
                log.thumbs(run, up=n < up)

        yield call


@pytest.fixture
def bad_canary(registry: Registry, names: list[str], vote: Vote) -> tuple[str, str]:
    """A live revision that people like, and a canary that they do not."""
    live, canary = names[:2]
    registry.promote(live)
    registry.canary(canary, 0.5)
    _mixed(vote, (live, 5, 0), (canary, 0, 5), times=3)
    return live, canary


@pytest.fixture
def bad_live(registry: Registry, names: list[str], vote: Vote) -> tuple[str, str]:
    """A live revision that people like less than the one before it."""
    before, live = names[:2]
    registry.promote(before)
    vote(before, up=30)
    registry.promote(live)
    vote(live, down=8)
    return before, live


def _mixed(vote: Vote, *parts: tuple[str, int, int], times: int) -> None:
    for _ in range(times):
        for revision, up, down in parts:
            vote(revision, up=up, down=down)


def only(found: object) -> Finding:
    (one,) = found  # type: ignore[misc]
    return one  # type: ignore[no-any-return]


def of(registry: Registry, role: str, **options: bool) -> Finding:
    return only([one for one in registry.check_thumbs(**options) if one.role == role])


def until(holds: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if holds():
            return
        threading.Event().wait(0.001)
    pytest.fail("it did not come about within a minute")


# The canary


def test_a_canary_that_is_proven_worse_is_ended_and_quarantined_with_the_thumbs(
    registry: Registry, bad_canary: tuple[str, str]
) -> None:
    live, canary = bad_canary
    found = of(registry, "canary")
    assert (found.verdict, found.action, found.against) == ("worse", "ended", live)
    assert found.message == (
        f"{canary} (canary): thumbs 1.00 -> .00 on 15 votes: the canary is ended"
    )
    assert registry.state()[1:4] == (live, None, 0.0)
    why = "thumbs 1.00 -> .00 on 15 votes: the canary was ended"
    assert registry.get(canary).quarantine_reason == why
    assert (registry.history()[-1].action, registry.history()[-1].reason) == ("canary", why)
    assert of(registry, "live").action is None
    with closing(connect(registry.home, readonly=True)) as connection:
        assert examine(connection).problems == []


def test_a_canary_that_is_proven_better_is_promoted(
    registry: Registry, names: list[str], vote: Vote
) -> None:
    registry.promote(names[0])
    registry.canary(names[1], 0.5)
    _mixed(vote, (names[0], 0, 5), (names[1], 5, 0), times=4)
    found = of(registry, "canary")
    assert (found.verdict, found.action) == ("better", "promoted")
    assert registry.state()[1:4] == (names[1], None, 0.0)
    assert registry.history()[-1].reason == "thumbs .00 -> 1.00 on 20 votes: promoted"
    assert registry.previous() == names[0]


def test_a_canary_is_compared_with_the_base_model_too(
    registry: Registry, names: list[str], vote: Vote
) -> None:
    registry.canary(names[0], 0.5)
    _mixed(vote, ("base", 5, 0), (names[0], 0, 5), times=3)
    assert only(registry.check_thumbs()).against == "base"
    assert registry.state().canary is None


def test_little_evidence_changes_nothing_and_says_how_much_is_needed(
    registry: Registry, names: list[str], vote: Vote
) -> None:
    registry.promote(names[0])
    registry.canary(names[1], 0.1)
    _mixed(vote, (names[0], 4, 1), (names[1], 3, 2), times=2)
    before, found = registry.state(), of(registry, "canary")
    assert registry.state() == before
    assert (found.verdict, found.now, found.before) == ("open", (6, 10), (8, 10))
    assert found.message == (
        f"{names[1]} (canary): thumbs .60 on 10 votes, {names[0]} .80 on 10: nothing is proven; a "
        f"drop of .10 shows after about {found.needed}"
    )
    assert found.needed is not None
    assert 150 < found.needed < 350
    with_half = regression._pairs_needed(found.before, 0.05) / (1 - 0.5)
    assert 300 < with_half < 500, "128 of about 400"


def test_votes_from_before_the_canary_and_without_a_thread_do_not_count_for_it(
    registry: Registry, names: list[str], vote: Vote
) -> None:
    registry.promote(names[0])
    vote(names[0], up=9)
    registry.canary(names[1], 0.5)
    vote(names[0], up=3, thread=False)
    vote(names[0], up=2)
    vote(names[1], down=1)
    found = of(registry, "canary")
    assert (found.before, found.now) == ((2, 2), (0, 1))


def test_another_share_of_the_threads_keeps_the_votes_and_a_new_trial_does_not(
    registry: Registry, names: list[str], vote: Vote
) -> None:
    registry.promote(names[0])
    registry.canary(names[1], 0.1)
    vote(names[1], up=1)
    registry.canary(names[1], 0.5)
    registry.hold("a look")
    registry.lift()
    assert of(registry, "canary").now == (1, 1)
    registry.canary(None, 0)
    registry.canary(names[1], 0.5)
    assert of(registry, "canary").now == (0, 0)


# The live revision


def test_a_live_revision_that_is_proven_worse_is_only_named_unless_asked(
    registry: Registry, bad_live: tuple[str, str]
) -> None:
    before, live = bad_live
    found = only(registry.check_thumbs())
    assert (found.verdict, found.action, found.now, found.before) == (
        "worse",
        None,
        (0, 8),
        (30, 30),
    )
    assert "`agentpref adapters rollback` does it" in found.message
    assert "`agentpref watch --set live=act`" in found.message
    assert registry.state().live == live
    assert registry.watch(live="act") == WatchSettings(live="act")
    found = only(registry.check_thumbs())
    assert (
        found.message
        == f"{live} (live): thumbs 1.00 -> .00 on 8 votes: rolled back; {before} serves"
    )
    assert registry.state().live == before
    assert registry.history()[-1].action == "rollback"
    assert registry.get(live).quarantine_reason == "thumbs 1.00 -> .00 on 8 votes: rolled back"
    with closing(connect(registry.home, readonly=True)) as connection:
        assert [one.revision for one in taken_back(connection, "default")] == [live]


def test_what_people_promote_again_is_judged_by_new_votes_only(
    registry: Registry, bad_live: tuple[str, str], vote: Vote
) -> None:
    _, live = bad_live
    registry.watch(live="act")
    registry.check_thumbs()
    registry.release(live)
    registry.promote(live)
    found = only(registry.check_thumbs())
    assert (found.now, found.action, registry.state().live) == ((0, 0), None, live)
    vote(live, down=12)
    assert only(registry.check_thumbs()).action == "rolled_back", "on new votes"


def test_to_promote_what_serves_again_is_a_word_for_it_too(
    registry: Registry, bad_live: tuple[str, str]
) -> None:
    _, live = bad_live
    registry.promote(live)
    registry.watch(live="act")
    assert only(registry.check_thumbs()).now == (0, 0)
    assert registry.state().live == live


def test_the_base_model_is_compared_with_nothing(registry: Registry, names: list[str]) -> None:
    assert registry.check_thumbs() == []
    registry.promote(names[0])
    registry.promote("base")
    assert registry.check_thumbs() == []


def test_the_first_revision_is_compared_with_the_base_model(
    registry: Registry, names: list[str], vote: Vote
) -> None:
    vote("base", up=30)
    registry.watch(live="act")
    registry.promote(names[0])
    vote(names[0], down=8)
    assert only(registry.check_thumbs()).action == "rolled_back"
    assert registry.live() is None


def test_a_damaged_predecessor_is_passed_over(
    registry: Registry, names: list[str], vote: Vote
) -> None:
    registry.promote(names[0])
    registry.promote(names[1])
    vote(names[1], up=30)
    registry.promote(names[2])
    vote(names[2], down=8)
    registry.watch(live="act")
    with open(registry.get(names[1]).path / "adapter_model.safetensors", "ab") as file:
        file.write(b"x")
    assert only(registry.check_thumbs()).action == "rolled_back"
    assert registry.state().live == names[0]


# People's decisions, and others at the same time


def test_in_a_held_namespace_a_proof_is_told_and_nothing_is_done(
    registry: Registry, bad_canary: tuple[str, str]
) -> None:
    registry.hold("audit")
    before, found = registry.state(), of(registry, "canary")
    assert (found.verdict, found.action, registry.state()) == ("worse", None, before)
    assert "is held" in found.message
    assert "`agentpref adapters canary --end` does it" in found.message


def test_settings_are_kept_in_the_home_and_checked(
    registry: Registry, bad_canary: tuple[str, str]
) -> None:
    assert registry.watch() == WatchSettings()
    generation = registry.state().generation
    registry.watch(canary="report")
    registry.watch(canary="report")
    assert registry.state().generation == generation + 1
    assert Registry(registry.home).watch() == WatchSettings(canary="report")
    assert Registry(registry.home, namespace="other").watch() == WatchSettings()
    found = of(registry, "canary")
    assert (found.verdict, found.action) == ("worse", None)
    assert "`agentpref watch --set canary=act`" in found.message
    with pytest.raises(ConfigError, match=r"watch\.live is 'off'"):
        registry.watch(live="off")
    with pytest.raises(ConfigError, match=r"watch\.marginn"):
        registry.watch(marginn=0.1)


@pytest.mark.parametrize("setting", [{"alpha": 1e-9}, {"margin": 0.5}])
def test_alpha_and_margin_decide_how_much_is_a_proof(
    registry: Registry, names: list[str], vote: Vote, setting: dict[str, float]
) -> None:
    registry.promote(names[0])
    registry.canary(names[1], 0.5)
    _mixed(vote, (names[0], 5, 0), (names[1], 2, 3), times=5)
    assert of(registry, "canary", act=False).verdict == "worse"
    registry.watch(**setting)
    assert of(registry, "canary").verdict == "open"
    assert registry.state().canary == names[1]


def test_not_to_act_changes_nothing(registry: Registry, bad_canary: tuple[str, str]) -> None:
    before = registry.state()
    assert of(registry, "canary", act=False).verdict == "worse"
    assert registry.state() == before


def test_of_two_processes_that_decide_at_once_one_does(
    registry: Registry, bad_canary: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    real = regression.look

    def look(*given: object) -> list[Finding]:
        found = real(*given)  # type: ignore[arg-type]
        both.wait(30)
        return found

    monkeypatch.setattr(regression, "look", look)
    found: list[Finding] = []
    threads = [
        threading.Thread(target=lambda: found.append(of(registry, "canary"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(str(one.action) for one in found) == ["None", "ended"]
    assert any("another process" in one.why_not for one in found)
    assert [entry.action for entry in registry.history()] == ["promote", "canary", "canary"]


@pytest.mark.parametrize("step", ["change", "quarantine"])
def test_what_ends_within_a_withdrawal_leaves_everything_as_it_was(
    registry: Registry,
    bad_live: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    before = registry.state()
    found = only(registry.check_thumbs())
    real = getattr(status, step)

    def end(*given: object) -> None:
        real(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(status, step, end)
    with pytest.raises(KeyboardInterrupt):
        withdraw(registry, found, before)
    monkeypatch.undo()
    assert registry.state() == before
    assert registry.get(found.revision).quarantined_at is None
    withdraw(registry, found, before)
    with pytest.raises(GenerationConflict):
        withdraw(registry, found, before)


def test_a_withdrawal_without_a_predecessor_is_refused(
    registry: Registry, bad_live: tuple[str, str]
) -> None:
    found = only(registry.check_thumbs())
    registry.rollback()
    registry.rollback()
    with pytest.raises(RevisionError, match="nothing to roll back"):
        withdraw(registry, found, registry.state())


# Where it runs


def test_an_update_looks_before_it_begins_and_says_what_was_done(
    registry: Registry, bad_canary: tuple[str, str]
) -> None:
    _, canary = bad_canary
    config = UpdateConfig(thumbs=ThumbSettings(weight=0))  # so that there is nothing to train
    report = update(registry.home.path, model="tiny", config=config, promote=False)
    assert registry.state().canary == canary, "what serves was to stay as it is"
    assert [note for note in report.notes if canary in note and "nothing was to be changed" in note]
    report = update(registry.home.path, model="tiny", config=config)
    assert registry.state().canary is None
    assert report.verdict == "nothing_new"
    assert f"{canary} (canary): thumbs 1.00 -> .00 on 15 votes: the canary is ended" in report.notes
    assert tell(registry) == []


def test_a_rollback_reaches_a_router_that_serves(
    registry: Registry, bad_live: tuple[str, str]
) -> None:
    before, live = bad_live
    registry.watch(live="act")
    ask = GenerationRequest(messages=({"role": "user", "content": "hi"},))
    with Router(registry, FakeBackend()) as router:
        Watcher(router, 0.005)
        assert router.generate(ask).revision == live
        look = "import sys; from agentpref import Registry; Registry(sys.argv[1]).check_thumbs()"
        subprocess.run([sys.executable, "-c", look, registry.home.path], check=True, timeout=60)
        until(lambda: router.generate(ask).revision == before)


def test_a_finding_is_plain_values_for_json(
    registry: Registry, bad_canary: tuple[str, str]
) -> None:
    value = of(registry, "canary", act=False).to_mapping()
    assert value["now"] == {"likes": 0, "votes": 15}
    assert value["message"].startswith(bad_canary[1])
    assert set(value) == {
        "namespace", "role", "revision", "against", "since", "now", "before", "worse", "better",
        "verdict", "needed", "action", "why_not", "message",
    }  # fmt: skip
