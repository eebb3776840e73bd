"""The router over a real registry and the public fake backend."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import pytest

from agentpref.errors import (
    BackendClosed,
    GenerationConflict,
    GenerationFailed,
    InvalidAdapter,
    RevisionError,
    ServingError,
    SwapFailed,
    UnknownRevision,
)
from agentpref.home import Home
from agentpref.serve import router as module
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.folders import WEIGHTS_FILE
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter
from agentpref.types import BASE

ASK = GenerationRequest(messages=({"role": "user", "content": "hi"},))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def names(registry: Registry, tmp_path: Path) -> list[str]:
    return [
        registry.publish(
            write_adapter(tmp_path / str(seed), seed=seed), parent=None, model={}, training={}
        ).revision_id
        for seed in range(4)
    ]


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def router(registry: Registry, backend: FakeBackend) -> Router:
    return Router(registry, backend)


def served_by(router: Router, thread_id: str | None = None) -> str:
    reply = router.generate(ASK, thread_id=thread_id)
    assert reply.message["content"] == f"{reply.revision} heard: hi"
    return reply.revision


def test_a_new_home_is_served_by_the_base(router: Router) -> None:
    assert served_by(router) == BASE


def test_a_router_serves_what_the_registry_says_when_it_is_made(
    registry: Registry, names: list[str]
) -> None:
    registry.promote(names[0])
    registry.canary(names[1], 1.0)
    router = Router(registry, FakeBackend())
    assert served_by(router) == names[0]
    assert served_by(router, "thread") == names[1]


@pytest.mark.guarantee("serving")
def test_after_activate_new_requests_use_the_new_revision(
    router: Router, registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    for name in names:
        router.activate(name)
        assert served_by(router) == name
        assert registry.state() == router.serving
    steps = [call for call, name in backend.calls if name == names[0]]
    assert steps == ["validate", "load", "probe", "generate", "unload"]


@pytest.mark.guarantee("serving")
def test_a_lease_keeps_its_revision_through_swaps(
    router: Router, backend: FakeBackend, names: list[str]
) -> None:
    router.activate(names[0])
    lease = router.acquire()
    for name in names[1:]:
        router.activate(name)
    assert lease.revision == names[0]
    assert backend.generate(lease.revision, ASK).revision == names[0]
    assert names[0] in backend.list_loaded()
    lease.release()
    assert names[0] not in backend.list_loaded()


def test_a_lease_counts_once_however_often_it_is_released(
    router: Router, backend: FakeBackend, names: list[str]
) -> None:
    router.activate(names[0])
    first, second = router.acquire(), router.acquire()
    for name in names[1:]:
        router.activate(name)
    first.release()
    first.release()
    assert names[0] in backend.list_loaded(), "the second lease still holds it"
    second.release()
    assert names[0] not in backend.list_loaded()


def test_the_last_live_stays_loaded_and_rollback_needs_no_load(
    router: Router, backend: FakeBackend, names: list[str]
) -> None:
    router.activate(names[0])
    router.activate(names[1])
    assert set(backend.list_loaded()) == {names[0], names[1]}
    before = list(backend.calls)
    assert router.rollback().live == names[0]
    assert [call for call, _ in backend.calls[len(before) :]] == []
    assert served_by(router) == names[0]
    assert router.rollback().live is None
    assert served_by(router) == BASE
    with pytest.raises(RevisionError, match="nothing to roll back"):
        router.rollback()


class Slow(FakeBackend):
    """Blocks the probe of one revision."""

    slow = ""

    def __init__(self, **settings: int) -> None:
        super().__init__(**settings)
        self.probing, self.released = threading.Event(), threading.Event()

    def probe(self, revision_id: str) -> Reply:
        if revision_id == self.slow:
            self.probing.set()
            self.released.wait()
        return super().probe(revision_id)


@pytest.fixture
def held_up(registry: Registry, names: list[str]) -> Iterator[tuple[Router, Slow]]:
    """A router that serves the second revision, with the first one for a rollback."""
    backend = Slow()
    router = Router(registry, backend)
    router.activate(names[0])
    router.activate(names[1])
    backend.slow = names[2]
    yield router, backend
    backend.released.set()


def test_a_rollback_does_not_wait_for_a_revision_that_is_being_made_ready(
    held_up: tuple[Router, Slow], registry: Registry, names: list[str]
) -> None:
    router, backend = held_up
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(router.activate, names[2])
        backend.probing.wait()
        assert router.rollback().live == names[0]
        assert served_by(router) == names[0]
        assert not swap.done()
        backend.released.set()
        assert swap.result().live == names[2], "whoever names no generation comes after it"
    assert router.serving == registry.state()
    assert set(backend.list_loaded()) == {names[0], names[2]}


def test_a_swap_with_an_expected_generation_is_refused_when_a_rollback_overtook_it(
    held_up: tuple[Router, Slow], registry: Registry, names: list[str]
) -> None:
    router, backend = held_up
    generation = registry.state().generation
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(router.activate, names[2], expected_generation=generation)
        backend.probing.wait()
        router.rollback()
        backend.released.set()
        assert isinstance(swap.exception(), GenerationConflict)
    assert served_by(router) == names[0]
    assert set(backend.list_loaded()) == {names[0], names[1]}


@pytest.mark.parametrize("as_canary", [False, True])
def test_a_sync_that_a_rollback_overtook_does_not_undo_it(
    held_up: tuple[Router, Slow], registry: Registry, names: list[str], as_canary: bool
) -> None:
    router, backend = held_up
    if as_canary:
        registry.canary(names[2], 1.0)
    else:
        registry.promote(names[2])
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(router.sync)
        backend.probing.wait()
        state = router.rollback()
        backend.released.set()
        assert swap.result() == state == router.serving == registry.state()
    assert served_by(router) == served_by(router, "thread") == state.live
    assert names[2] not in backend.list_loaded()


def test_rollbacks_and_swaps_of_many_threads_change_the_route_as_they_change_the_registry(
    router: Router, registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    """And no request meets a revision that is not loaded, which the fake would refuse."""
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            served_by(router, "thread")

    def swap(name: str) -> None:
        for turn in range(20):
            with suppress(GenerationConflict):
                router.canary(name, 0.5) if turn % 4 == 0 else router.activate(name)

    def back() -> None:
        for _ in range(40):
            with suppress(RevisionError, GenerationConflict):
                router.rollback()

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        changing = [pool.submit(swap, name) for name in names] + [pool.submit(back)]
        try:
            for changer in changing:
                changer.result()
        finally:
            done.set()
        for asker in asking:
            asker.result()
    assert router.serving == registry.state()
    assert served_by(router) == (registry.state().live or BASE)
    assert len(backend.list_loaded()) <= 3


def test_a_rollback_loads_a_revision_that_this_process_never_loaded(
    registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    registry.promote(names[0])
    registry.promote(names[1])
    router = Router(registry, backend)
    assert backend.list_loaded() == (names[1],)
    backend.fail_load.add(names[0])
    for _ in range(2):  # the second try must not take the failed one for a loaded one
        with pytest.raises(SwapFailed):
            router.rollback()
        assert served_by(router) == names[1]
        assert backend.list_loaded() == (names[1],)
    backend.fail_load.clear()
    router.rollback()
    assert served_by(router) == names[0]


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_rollback_passes_over_a_damaged_revision_and_puts_it_in_quarantine(
    registry: Registry, backend: FakeBackend, names: list[str], caplog, is_loaded: bool
) -> None:
    if is_loaded:
        router = Router(registry, backend)
        for name in names[:3]:
            router.activate(name)
    else:
        for name in names[:3]:
            registry.promote(name)
        router = Router(registry, backend)
    corrupt(registry, names[1], backend)
    assert router.rollback().live == registry.state().live == names[0]
    assert served_by(router) == names[0]
    assert WEIGHTS_FILE in str(registry.get(names[1]).quarantine_reason)
    assert f"{names[1]} is passed over and in quarantine now" in caplog.text


def test_a_rollback_goes_on_when_the_engine_finds_the_revision_broken(
    registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    for name in names[:3]:
        registry.promote(name)
    router = Router(registry, backend)
    backend.fail_probe.add(names[1])
    assert router.rollback().live == names[0]
    assert registry.get(names[1]).quarantine_reason


def corrupt(registry: Registry, name: str, backend: FakeBackend) -> type[Exception]:
    file = registry.get(name).path / WEIGHTS_FILE
    file.chmod(0o644)
    file.write_bytes(b"!" + file.read_bytes()[1:])
    return InvalidAdapter


def fail_load(registry: Registry, name: str, backend: FakeBackend) -> type[Exception]:
    backend.fail_load.add(name)
    return SwapFailed


def fail_probe(registry: Registry, name: str, backend: FakeBackend) -> type[Exception]:
    backend.fail_probe.add(name)
    return SwapFailed


def quarantine(registry: Registry, name: str, backend: FakeBackend) -> type[Exception]:
    registry.quarantine(name, "it answers in Latin")
    return RevisionError


def be_overtaken(registry: Registry, name: str, backend: FakeBackend) -> type[Exception]:
    registry.canary(None, 0)
    return GenerationConflict


@pytest.mark.guarantee("serving")
@pytest.mark.parametrize("break_it", [corrupt, fail_load, fail_probe, be_overtaken])
def test_a_swap_that_fails_at_any_step_leaves_the_old_one_serving(
    router: Router,
    registry: Registry,
    backend: FakeBackend,
    names: list[str],
    break_it: Callable[[Registry, str, FakeBackend], type[Exception]],
) -> None:
    old, new = names[:2]
    generation = router.activate(old).generation
    error = break_it(registry, new, backend)
    with pytest.raises(error):
        router.activate(new, expected_generation=generation)
    assert served_by(router) == old
    assert registry.live() == registry.get(old)
    assert backend.list_loaded() == (old,), "what failed does not stay loaded"


def test_a_failed_swap_names_the_cause_and_what_still_serves(
    router: Router, backend: FakeBackend, names: list[str]
) -> None:
    backend.fail_probe.add(names[0])
    with pytest.raises(SwapFailed, match=f"{names[0]} .*the base model still serves") as failure:
        router.activate(names[0])
    assert isinstance(failure.value.__cause__, SwapFailed)


def test_a_failed_canary_and_a_failed_sync_change_nothing(
    router: Router, registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    router.activate(names[0])
    backend.fail_load.add(names[1])
    with pytest.raises(SwapFailed):
        router.canary(names[1], 0.5)
    registry.promote(names[1])
    with pytest.raises(SwapFailed):
        router.sync()
    assert served_by(router, "thread") == names[0]
    backend.fail_load.clear()
    assert router.sync().live == names[1]
    assert served_by(router) == names[1]


def test_rollback_leaves_a_live_revision_that_cannot_be_loaded_here(
    router: Router, registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    router.activate(names[0])
    backend.fail_load.add(names[1])
    registry.promote(names[1])
    assert router.rollback().live == names[0]


def test_the_base_can_be_activated(
    router: Router, registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    router.activate(names[0])
    assert router.activate(BASE).live is None
    assert served_by(router) == BASE
    assert registry.live() is None
    before = len(backend.calls)
    assert router.rollback().live == names[0]
    assert backend.calls[before:] == []


def test_an_unknown_revision_is_refused(router: Router) -> None:
    with pytest.raises(UnknownRevision):
        router.activate("rev-000009-0123456789ab")
    assert served_by(router) == BASE


def test_sync_follows_another_process_and_does_nothing_else(
    router: Router, registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    Registry(registry.home).promote(names[0])
    assert served_by(router) == BASE, "until it syncs"
    router.sync()
    assert served_by(router) == names[0]
    calls = len(backend.calls)
    router.sync()
    assert len(backend.calls) == calls


def test_a_canary_takes_its_share_of_threads_and_keeps_them(
    router: Router, names: list[str]
) -> None:
    router.activate(names[0])
    router.canary(names[1], 0.2)
    threads = [f"thread-{number}" for number in range(2000)]
    tried = {thread for thread in threads if served_by(router, thread) == names[1]}
    assert 0.17 < len(tried) / len(threads) < 0.23
    assert {thread for thread in threads if served_by(router, thread) == names[1]} == tried
    router.canary(names[1], 0.4)
    wider = {thread for thread in threads if served_by(router, thread) == names[1]}
    assert tried < wider, "a growing canary keeps the threads it had"
    assert served_by(router) == names[0], "a request of no thread is served by live"
    router.canary(None, 0)
    assert {served_by(router, thread) for thread in threads[:50]} == {names[0]}


def test_a_weight_of_one_takes_every_thread(router: Router, names: list[str]) -> None:
    router.canary(names[0], 1.0)
    assert {served_by(router, str(n)) for n in range(100)} == {names[0]}
    assert served_by(router, "\ud800") == names[0]


def test_a_canary_brings_the_live_revision_of_another_process_with_it(
    router: Router, registry: Registry, names: list[str]
) -> None:
    registry.promote(names[0])
    router.canary(names[1], 1.0)
    assert served_by(router) == names[0]
    assert served_by(router, "thread") == names[1]


def test_streaming_is_bound_to_one_revision(router: Router, names: list[str]) -> None:
    router.activate(names[0])
    stream = router.stream(ASK)
    pieces: list[str | Reply] = [next(stream)]
    router.activate(names[1])
    router.activate(names[2])
    pieces += stream
    reply = pieces.pop()
    assert isinstance(reply, Reply)
    assert reply.revision == names[0]
    assert "".join(map(str, pieces)) == reply.message["content"]


def test_a_stream_that_is_closed_early_releases_its_revision(
    router: Router, backend: FakeBackend, names: list[str]
) -> None:
    router.activate(names[0])
    stream = router.stream(ASK)
    next(stream)
    router.activate(names[1])
    router.activate(names[2])
    assert names[0] in backend.list_loaded()
    stream.close()  # type: ignore[attr-defined]
    assert names[0] not in backend.list_loaded()


def test_an_error_reaches_the_caller_and_releases_the_lease(
    router: Router, backend: FakeBackend, names: list[str]
) -> None:
    router.activate(names[0])
    backend.fail_generate.add(names[0])
    with pytest.raises(GenerationFailed):
        router.generate(ASK)
    with pytest.raises(GenerationFailed):
        list(router.stream(ASK))
    router.activate(names[1])
    router.activate(names[2])
    assert names[0] not in backend.list_loaded()


def test_a_full_engine_unloads_what_is_kept_for_a_rollback(
    registry: Registry, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentpref.serve.router.DRAIN_SECONDS", 0.05)
    backend = FakeBackend(max_loaded=2)
    router = Router(registry, backend)
    for name in names:
        router.activate(name)
        assert served_by(router) == name
    router.rollback()
    with router.acquire() as lease:
        router.activate(names[0])
        with pytest.raises(SwapFailed, match="does not fit"):
            router.activate(names[1])
        assert backend.generate(lease.revision, ASK).revision == names[2]
    router.activate(names[1])
    assert served_by(router) == names[1]


def test_a_sync_makes_room_for_a_live_revision_and_a_canary(
    registry: Registry, names: list[str]
) -> None:
    backend = FakeBackend(max_loaded=3)
    router = Router(registry, backend)
    router.activate(names[0])
    router.activate(names[1])
    registry.promote(names[2])
    registry.canary(names[3], 1.0)
    router.sync()
    assert served_by(router) == names[2]
    assert served_by(router, "thread") == names[3]


def test_a_swap_waits_for_requests_whose_revision_is_in_the_way(
    registry: Registry, names: list[str]
) -> None:
    backend = FakeBackend(max_loaded=2)
    router = Router(registry, backend)
    router.activate(names[0])
    lease = router.acquire()
    router.activate(names[1])
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(router.activate, names[2])
        assert not wait([swap], timeout=0.2).done, "there is no room yet"
        assert served_by(router) == names[1]
        lease.release()
        assert swap.result(10).live == names[2]
    assert set(backend.list_loaded()) == {names[1], names[2]}


def test_a_swap_fails_when_requests_do_not_end_in_time(
    registry: Registry, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentpref.serve.router.DRAIN_SECONDS", 0.05)
    router = Router(registry, FakeBackend(max_loaded=2))
    router.activate(names[0])
    with router.acquire():
        router.activate(names[1])
        with pytest.raises(SwapFailed, match="does not fit"):
            router.activate(names[2])
    assert served_by(router) == names[1]


def test_what_is_kept_for_a_rollback_stays_when_the_swap_needs_it(
    registry: Registry, names: list[str]
) -> None:
    backend = FakeBackend(max_loaded=2)
    router = Router(registry, backend)
    router.activate(names[0])
    router.activate(names[1])
    registry.rollback()
    registry.canary(names[2], 1.0)
    router.sync()
    assert served_by(router) == names[0]
    assert served_by(router, "thread") == names[2]
    assert backend.calls.count(("load", names[0])) == 1
    assert ("unload", names[1]) in backend.calls, "which is what served in between"


@pytest.mark.parametrize("break_it", [corrupt, fail_load, fail_probe, quarantine])
def test_live_serves_all_threads_when_the_canary_cannot_be_loaded(
    registry: Registry,
    names: list[str],
    break_it: Callable[[Registry, str, FakeBackend], type[Exception]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened, following = FakeBackend(), FakeBackend()
    follower = Router(registry, following)
    registry.promote(names[0])
    registry.canary(names[1], 1.0)
    error, _ = (break_it(registry, names[1], backend) for backend in (opened, following))
    router = Router(registry, opened)
    assert "canary" in caplog.text
    with pytest.raises((error, RevisionError)):  # which is in quarantine by now
        follower.sync()
    for one, backend in ((router, opened), (follower, following)):
        assert served_by(one) == served_by(one, "thread") == names[0]
        assert backend.list_loaded() == (names[0],)
        assert one.serving == registry.state()._replace(canary=None, weight=0.0)


def test_the_next_sync_serves_a_canary_that_can_be_loaded_again(
    router: Router, registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    backend.fail_load.add(names[1])
    registry.canary(names[1], 1.0)
    with pytest.raises(SwapFailed, match="the base model still serves"):
        router.sync()
    backend.fail_load.clear()
    assert router.sync() == registry.state()
    assert served_by(router, "thread") == names[1]


def test_a_canary_keeps_its_threads_when_its_share_grows(
    router: Router, registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    router.canary(names[0], 0.5)
    [tried, *_] = [t for t in map(str, range(99)) if served_by(router, t) == names[0]]
    registry.canary(names[0], 1.0)
    backend.fail_load.add(names[0])
    router.sync()
    assert served_by(router, tried) == names[0]
    assert backend.calls.count(("load", names[0])) == 1


def test_a_live_revision_in_quarantine_is_not_opened_and_the_cures_work(
    registry: Registry, names: list[str]
) -> None:
    registry.promote(names[0])
    registry.promote(names[1])
    serving = Router(registry, FakeBackend())
    registry.quarantine(names[1], "it answers in Latin")
    with pytest.raises(RevisionError, match="`agentpref adapters rollback`"):
        Router(registry, FakeBackend())
    registry.canary(names[0], 1.0)
    assert serving.sync().live == names[1], "what serves already goes on"
    registry.rollback()
    assert served_by(Router(registry, FakeBackend())) == names[0]


class StickyBackend(FakeBackend):
    """Refuses to unload while ``stuck``."""

    stuck = True

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        if self.stuck:
            raise ServingError("stuck")
        super().unload(revision_id, places)


def test_a_failed_unload_is_logged_and_tried_again(
    registry: Registry, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    backend = StickyBackend()
    router = Router(registry, backend)
    for name in names[:3]:
        router.activate(name)
        assert served_by(router) == name
    assert f"{names[0]} could not be unloaded" in caplog.text
    assert names[0] in backend.list_loaded()
    backend.stuck = False
    served_by(router)
    assert names[0] not in backend.list_loaded()


def test_a_failed_revision_that_stays_loaded_is_probed_again(
    registry: Registry, names: list[str]
) -> None:
    class Silent(StickyBackend):
        def probe(self, revision_id: str) -> Reply:
            raise SwapFailed("no answer")

    router = Router(registry, Silent())
    for _ in range(2):
        with pytest.raises(SwapFailed):
            router.activate(names[0])
    assert served_by(router) == BASE


def test_requests_in_flight_keep_their_revision_loaded(
    registry: Registry, names: list[str]
) -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    router = Router(registry, backend)
    router.activate(names[0])
    with ThreadPoolExecutor(4) as pool:
        early = [pool.submit(router.generate, ASK) for _ in range(4)]
        while Counter(backend.calls)["generate", names[0]] < 4:
            threading.Event().wait(0.001)
        for name in names[1:]:
            router.activate(name)
        assert names[0] in backend.list_loaded()
        gate.set()
        assert {reply.result().revision for reply in early} == {names[0]}
    assert names[0] not in backend.list_loaded()


def test_a_closed_router_refuses_requests_and_closes_what_belongs_to_it(
    registry: Registry, backend: FakeBackend, names: list[str]
) -> None:
    ended: list[str] = []
    with Router(registry, backend) as router:
        router.at_close(lambda: ended.append("first"))
        router.at_close(lambda: ended.append("second"))
        router.activate(names[0])
        lease = router.acquire()
        assert ended == []
    router.close()
    assert ended == ["second", "first"]
    lease.release()
    for call in (router.acquire, router.sync, router.rollback, lambda: router.generate(ASK)):
        with pytest.raises(BackendClosed, match="open another"):
            call()
    assert backend.generate(names[0], ASK).revision == names[0], "the backend is its owner's"


FORKED = """
import os, signal, sys
from agentpref.errors import BackendClosed
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.serve.watch import Watcher
from agentpref.testing import FakeBackend

ASK = GenerationRequest(messages=({"role": "user", "content": "hi"},))
backend = FakeBackend()
router = Router(Registry(sys.argv[1]), backend)
router.at_close(backend.close)
Watcher(router, 0.01)
lease = router.acquire()
locks = router._swapping, router._flipping, router._pointers
for lock in locks:
    lock.acquire()  # as another thread may have, just then
child = os.fork()
if not child:
    signal.alarm(30)
    calls = [router.acquire, router.sync, router.rollback, lambda: router.generate(ASK)]
    calls += [lambda: router.activate("base"), lambda: router.canary(None, 0)]
    calls += [lambda: next(router.stream(ASK))]
    told = 0
    for call in calls:
        try:
            call()
        except BackendClosed as error:
            told += "after the fork" in str(error)
    assert router.serving.live is None
    lease.release()
    router.close()
    os._exit(told)
for lock in locks:
    lock.release()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), router.generate(ASK).revision)
lease.release()
router.close()
"""


def test_a_forked_process_is_told_to_open_a_router_of_its_own(registry: Registry) -> None:
    """Half of one would serve what was live at the fork, for ever, and hold it nowhere."""
    command = [sys.executable, "-W", "error", "-c", FORKED, str(registry.home.path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == ["7", BASE]


def test_swaps_and_requests_from_many_threads_at_once(
    router: Router, backend: FakeBackend, registry: Registry, names: list[str]
) -> None:
    """No request fails, none meets an unloaded revision, and none uses what was left behind."""
    done = threading.Event()

    def ask(thread: str) -> set[str]:
        seen = set()
        while not done.is_set():
            seen.add(served_by(router, thread))
        return seen

    def swap(own: list[str]) -> None:
        for turn in range(15):
            router.activate(own[turn % 2])
            if turn % 5 == 0:
                router.canary(own[(turn + 1) % 2], 0.5)

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, f"thread-{n}") for n in range(4)]
        try:
            swapping = [pool.submit(swap, own) for own in (names[:2], names[2:])]
            for swapper in swapping:
                swapper.result()
        except GenerationConflict:
            pytest.fail("swaps of one router wait for each other")
        finally:
            done.set()
        assert set().union(*(asker.result() for asker in asking)) <= {BASE, *names}
    assert router.serving == registry.state()
    assert len(backend.list_loaded()) <= 3, "live, the one before, and a canary"


@pytest.mark.parametrize("loaded", [True, False])
def test_a_rollback_goes_to_no_revision_that_was_put_into_quarantine_after_its_check(
    router: Router,
    registry: Registry,
    backend: FakeBackend,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    loaded: bool,
) -> None:
    """The one before it serves, and it is loaded before a request meets it."""
    for name in names[:3]:
        (router.activate if loaded else registry.promote)(name)
    router.sync()
    real, checks = module.intact_previous, []

    def overtaken(registry: Registry) -> str | None:
        found = real(registry)
        checks.append(found)
        if checks == [names[1]]:
            registry.quarantine(names[1], "it answers in Latin")
        return found

    monkeypatch.setattr(module, "intact_previous", overtaken)
    assert router.rollback().live == names[0] == registry.state().live
    assert served_by(router) == names[0]
