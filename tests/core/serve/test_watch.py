"""A router that follows what another process makes live. No test asserts how soon."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentpref.errors import ConfigError
from agentpref.home import Home
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.registry import Registry, ServingState
from agentpref.serve.router import Router
from agentpref.serve.watch import Watcher
from agentpref.testing import FakeBackend, write_adapter

ASK = GenerationRequest(messages=({"role": "user", "content": "hi"},))
OFTEN = 0.005
PROMOTE = """
import sys
from agentpref.serve.registry import Registry

Registry(sys.argv[1]).promote(sys.argv[2])
"""


class Watched(Registry):
    """Counts how often it was asked what is live."""

    looks = 0

    def state(self) -> ServingState:
        self.looks += 1
        return super().state()


class Clock:
    """Stands still unless it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry(tmp_path: Path) -> Watched:
    return Watched(Home.create(tmp_path / "home"))


@pytest.fixture
def names(registry: Watched, tmp_path: Path) -> list[str]:
    return [
        registry.publish(
            write_adapter(tmp_path / str(seed), seed=seed), parent=None, model={}, training={}
        ).revision_id
        for seed in range(3)
    ]


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def router(registry: Watched, backend: FakeBackend) -> Iterator[Router]:
    with Router(registry, backend) as router:
        yield router


def until(holds: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if holds():
            return
        threading.Event().wait(0.001)
    pytest.fail("it did not come about within a minute")


def look_again(registry: Watched, times: int = 5) -> None:
    """Wait until the watcher has looked a few times more."""
    after = registry.looks + times
    until(lambda: registry.looks >= after)


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "agentpref-watch"]


@pytest.mark.guarantee("serving")
def test_a_watched_router_serves_what_another_process_promotes(
    router: Router, registry: Watched, names: list[str]
) -> None:
    Watcher(router, OFTEN)
    for name in names:
        command = [sys.executable, "-c", PROMOTE, str(registry.home.path), name]
        subprocess.run(command, check=True, timeout=60)
        until(lambda name=name: router.generate(ASK).revision == name)  # type: ignore[misc]


def test_the_engine_is_not_called_while_the_registry_does_not_change(
    router: Router, registry: Watched, backend: FakeBackend
) -> None:
    Watcher(router, OFTEN)
    look_again(registry)
    assert backend.calls == []


def test_a_failed_swap_is_logged_once_and_tried_again_after_growing_waits(
    router: Router,
    registry: Watched,
    backend: FakeBackend,
    names: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    router.activate(names[0])
    backend.fail_load.add(names[1])
    clock = Clock()
    Watcher(router, OFTEN, clock=clock)
    registry.promote(names[1])
    wait = OFTEN
    for tries in range(1, 5):
        until(lambda: backend.calls.count(("load", names[1])) == tries)  # noqa: B023
        look_again(registry)
        clock.now += 0.9 * wait
        look_again(registry)
        assert backend.calls.count(("load", names[1])) == tries, "it is too soon to try again"
        clock.now += 0.2 * wait
        wait *= 2
        assert router.generate(ASK).revision == names[0]
    until(lambda: backend.calls.count(("load", names[1])) == 5)
    look_again(registry)
    [told] = [record for record in caplog.records if record.name == "agentpref.serve.watch"]
    assert names[1] in told.message
    assert f"{names[0]} still serves" in told.message
    backend.fail_load.clear()
    clock.now += 60
    until(lambda: router.generate(ASK).revision == names[1])


def test_live_is_followed_while_its_canary_is_tried_again(
    router: Router,
    registry: Watched,
    backend: FakeBackend,
    names: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend.fail_load.add(names[1])
    clock = Clock()
    registry.promote(names[0])
    registry.canary(names[1], 1.0)
    Watcher(router, OFTEN, clock=clock)
    until(lambda: router.generate(ASK).revision == names[0])
    until(lambda: names[1] in caplog.text)
    look_again(registry)
    assert backend.calls.count(("load", names[1])) == 1, "it is too soon to try again"
    assert router.generate(ASK, thread_id="thread").revision == names[0]
    backend.fail_load.clear()
    clock.now += 60
    until(lambda: router.generate(ASK, thread_id="thread").revision == names[1])


def test_a_wait_is_half_a_minute_at_most(
    router: Router, registry: Watched, backend: FakeBackend, names: list[str]
) -> None:
    clock = Clock()
    backend.fail_load.add(names[0])
    registry.promote(names[0])
    Watcher(router, OFTEN, clock=clock)
    for tries in range(1, 20):
        until(lambda: backend.calls.count(("load", names[0])) == tries)  # noqa: B023
        look_again(registry)
        clock.now += 30


def test_a_newer_generation_does_not_wait_for_the_one_that_failed(
    router: Router,
    registry: Watched,
    backend: FakeBackend,
    names: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend.fail_load |= {names[0], names[1]}
    Watcher(router, OFTEN, clock=Clock())
    for count, name in enumerate(names[:2], start=1):
        registry.promote(name)
        until(lambda: len(caplog.records) == count)  # noqa: B023
    registry.promote(names[2])
    until(lambda: router.generate(ASK).revision == names[2])


def test_watching_goes_on_after_the_home_could_not_be_read(
    router: Router,
    registry: Watched,
    names: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = registry.home.database.with_suffix(".away")
    registry.promote(names[0])
    registry.home.database.rename(away)
    clock = Clock()
    Watcher(router, OFTEN, clock=clock)
    until(lambda: bool(caplog.records))
    look_again(registry)
    assert len(caplog.records) == 1
    away.rename(registry.home.database)
    clock.now += 60
    until(lambda: router.generate(ASK).revision == names[0])


def test_watching_goes_on_after_an_unexpected_error(
    router: Router,
    registry: Watched,
    backend: FakeBackend,
    names: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("device-side assert")

    Watcher(router, OFTEN, clock=Clock())
    with monkeypatch.context() as patched:
        patched.setattr(backend, "load", broken)
        registry.promote(names[0])
        until(lambda: "device-side assert" in caplog.text)
    registry.promote(names[1])
    until(lambda: router.generate(ASK).revision == names[1])


def test_closing_the_router_ends_its_watcher(router: Router) -> None:
    before = watchers()
    Watcher(router, OFTEN)
    assert len(watchers()) == len(before) + 1
    router.close()
    assert watchers() == before


def test_a_watcher_ends_with_a_backend_that_was_closed(
    router: Router, registry: Watched, backend: FakeBackend, names: list[str]
) -> None:
    before = watchers()
    Watcher(router, OFTEN)
    backend.close()
    registry.promote(names[0])
    until(lambda: watchers() == before)


@pytest.mark.parametrize("every", [0.0, -1.0, float("nan")])
def test_a_watcher_needs_a_time_above_zero_between_two_reads(router: Router, every: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Watcher(router, every)


def test_a_watcher_can_be_closed_twice_and_from_its_own_thread(
    router: Router, registry: Watched, names: list[str]
) -> None:
    watcher = Watcher(router, OFTEN)
    router.at_close(watcher.close)
    watcher.close()
    watcher.close()
    registry.promote(names[0])
    router.close()
    assert router.serving.live is None


@pytest.fixture(autouse=True)
def _warnings_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "agentpref")
