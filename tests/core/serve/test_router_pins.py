"""What a router pins, what it unloads, and what it puts into quarantine."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agentpref.errors import InvalidAdapter, NotKept, RevisionError, SwapFailed, WrongBase
from agentpref.home import Home
from agentpref.serve.backend import Capabilities, GenerationRequest, Revision
from agentpref.serve.folders import WEIGHTS_FILE
from agentpref.serve.pins import find_pins
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter

ASK = GenerationRequest(messages=({"role": "user", "content": "hi"},))
SERVER = "http://127.0.0.1:8000"


def publish(registry: Registry, folder: Path, count: int) -> list[str]:
    return [
        registry.publish(
            write_adapter(folder / f"{registry.namespace}-{seed}", seed=seed),
            parent=None,
            model={},
            training={},
        ).revision_id
        for seed in range(count)
    ]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def names(registry: Registry, tmp_path: Path) -> list[str]:
    return publish(registry, tmp_path, 4)


def held(registry: Registry) -> set[str]:
    return {pin.revision_id for pin in find_pins(registry.home.pins) if pin.alive}


class Looking(FakeBackend):
    """Notes what is held while a revision is validated, loaded and unloaded."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self.registry = registry
        self.seen: list[tuple[str, bool]] = []

    def validate(self, revision: Revision) -> None:
        self.seen.append(("validate", revision.revision_id in held(self.registry)))
        super().validate(revision)

    def load(self, revision: Revision) -> None:
        self.seen.append(("load", revision.revision_id in held(self.registry)))
        super().load(revision)

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        self.seen.append(("unload", revision_id in held(self.registry)))
        super().unload(revision_id, places)


def test_a_revision_is_pinned_from_before_it_is_validated_until_after_it_is_unloaded(
    registry: Registry, names: list[str]
) -> None:
    backend = Looking(registry)
    with Router(registry, backend) as router:
        for name in names:
            router.activate(name)
            assert held(registry) == set(backend.list_loaded())
        assert set(backend.seen) == {("validate", True), ("load", True), ("unload", True)}
        assert held(registry) == set(names[-2:])
    assert find_pins(registry.home.pins) == []


def test_a_leased_revision_stays_pinned(registry: Registry, names: list[str]) -> None:
    with Router(registry, FakeBackend()) as router:
        router.activate(names[0])
        lease = router.acquire()
        for name in names[1:]:
            router.activate(name)
        assert names[0] in held(registry)
        lease.release()
        assert names[0] not in held(registry)


def test_requests_are_answered_while_the_home_cannot_be_written(
    registry: Registry,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The end of a request is where what it used is given up."""

    def fail(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with Router(registry, FakeBackend()) as router:
        router.activate(names[0])
        lease = router.acquire()
        for name in names[1:3]:
            router.activate(name)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", fail)
            lease.release()
            assert "Read-only file system" in caplog.text
            assert router.generate(ASK).revision == names[2]
        router.acquire().release()
        assert held(registry) == set(names[1:3])


def test_closing_unpins_what_it_cannot_remove(
    registry: Registry, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    router = Router(registry, FakeBackend())
    router.activate(names[0])
    router.activate(names[1])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fail)
        with pytest.raises(NotKept, match="Read-only file system"):
            router.close()
    assert held(registry) == set()
    assert all(pin.is_stale for pin in find_pins(registry.home.pins))


@pytest.mark.parametrize("step", ["validate", "load", "probe"])
def test_a_failed_swap_leaves_no_pin(
    registry: Registry, names: list[str], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend()

    def fail(*_: object) -> None:
        raise SwapFailed("no")

    with Router(registry, backend) as router:
        router.activate(names[0])
        monkeypatch.setattr(backend, step, fail)
        with pytest.raises(SwapFailed):
            router.activate(names[1])
        assert held(registry) == {names[0]}
        assert backend.list_loaded() == (names[0],)


def test_a_router_that_cannot_be_made_leaves_no_pin(registry: Registry, names: list[str]) -> None:
    registry.promote(names[0])
    with pytest.raises(SwapFailed):
        Router(registry, FakeBackend(fail_load={names[0]}))
    assert find_pins(registry.home.pins) == []


def test_two_routers_of_one_engine_unload_only_what_the_other_does_not_use(
    registry: Registry, names: list[str]
) -> None:
    backend = FakeBackend(place=SERVER)
    with Router(registry, backend) as one, Router(registry, backend) as other:
        one.activate(names[0])
        other.sync()
        for name in names[1:3]:
            one.activate(name)
        assert names[0] in backend.list_loaded()
        assert other.generate(ASK).revision == names[0]
        other.sync()
        other.activate(names[3])
        assert names[0] not in backend.list_loaded()
        assert one.generate(ASK).revision == names[2]


class Fleet(FakeBackend):
    """Serves at two places, and notes from which of them a revision is to go."""

    places = (SERVER, "http://127.0.0.1:8001")

    def __init__(self) -> None:
        super().__init__()
        self.unloaded: list[tuple[str, Sequence[str] | None]] = []

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), places=self.places)

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        self.unloaded.append((revision_id, places))
        super().unload(revision_id)


def test_a_revision_is_pinned_at_every_place_and_unloaded_where_nobody_else_uses_it(
    registry: Registry, names: list[str]
) -> None:
    fleet, second = Fleet(), FakeBackend(place=Fleet.places[1])
    with Router(registry, fleet) as one, Router(registry, second) as other:
        one.activate(names[0])
        places = {pin.place for pin in find_pins(registry.home.pins, names[0])}
        assert places == set(Fleet.places)
        other.sync()
        for name in names[1:3]:
            one.activate(name)
        assert fleet.unloaded == [(names[0], [SERVER])]
        other.sync()
        other.activate(names[3])
        assert names[0] not in second.list_loaded()
    assert find_pins(registry.home.pins, names[0]) == []


def test_routers_of_several_namespaces_share_an_engine(
    registry: Registry, names: list[str], tmp_path: Path
) -> None:
    backend = FakeBackend()
    support = Registry(registry.home, namespace="support")
    others = publish(support, tmp_path, 3)
    with Router(registry, backend) as one, Router(support, backend) as other:
        for mine, theirs in zip(names, others, strict=False):
            one.activate(mine)
            other.activate(theirs)
            assert one.generate(ASK).revision == mine
            assert other.generate(ASK).revision == theirs
        assert set(backend.list_loaded()) == {*names[1:3], *others[1:]}


LEAVE_BEHIND = """
import os, sys
from agentpref.serve.pins import Pins
from agentpref.serve.registry import Registry

registry = Registry(sys.argv[1])
pins = Pins(registry.home.pins, sys.argv[2])
for name in sys.argv[3:]:
    pins.take(name)
os.kill(os.getpid(), 9)
"""


def test_a_new_router_unloads_what_a_killed_router_left(
    registry: Registry, names: list[str], tmp_path: Path
) -> None:
    """On a server that outlived it, and is full; what is of other namespaces stays."""
    foreign = publish(Registry(registry.home, namespace="support"), tmp_path, 1)
    backend = FakeBackend(place=SERVER, max_loaded=4)
    for name in [*names[:3], *foreign]:
        backend.load(Registry(registry.home, namespace=namespace_of(name, foreign)).get(name))
    command = [sys.executable, "-c", LEAVE_BEHIND, str(registry.home.path), SERVER, *names[:3]]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    registry.promote(names[1])
    with Router(registry, backend) as router:
        assert set(backend.list_loaded()) == {names[1], *foreign}
        assert held(registry) == {names[1]}
        router.activate(names[3])
        assert router.generate(ASK).revision == names[3]


def namespace_of(name: str, foreign: list[str]) -> str:
    return "support" if name in foreign else "default"


def test_a_router_makes_room_by_unloading_what_another_router_left(
    registry: Registry, names: list[str]
) -> None:
    backend = FakeBackend(place=SERVER, max_loaded=2)
    with Router(registry, backend) as router:
        router.activate(names[0])
        backend.load(registry.get(names[1]))
        router.activate(names[2])
        assert router.generate(ASK).revision == names[2]
        assert names[1] not in backend.list_loaded()


def test_a_revision_stays_loaded_on_a_server_when_the_router_closes(
    registry: Registry, names: list[str]
) -> None:
    backend = FakeBackend(place=SERVER)
    with Router(registry, backend) as router:
        router.activate(names[0])
    assert backend.list_loaded() == (names[0],)
    [pin] = find_pins(registry.home.pins)
    assert (pin.revision_id, pin.place, pin.alive) == (names[0], SERVER, False)
    with Router(registry, backend):
        assert held(registry) == {names[0]}


def test_a_revision_in_quarantine_is_not_loaded(registry: Registry, names: list[str]) -> None:
    backend = FakeBackend()
    with Router(registry, backend) as router:
        registry.quarantine(names[0], "it swears")
        with pytest.raises(RevisionError, match="it swears"):
            router.activate(names[0])
        assert backend.calls == [("unload", names[0])]
        assert held(registry) == set()


def break_files(registry: Registry, name: str) -> None:
    file = registry.get(name).path / WEIGHTS_FILE
    file.chmod(0o644)
    file.write_bytes(b"!" + file.read_bytes()[1:])


def test_a_revision_whose_files_are_broken_is_put_into_quarantine(
    registry: Registry, names: list[str]
) -> None:
    with Router(registry, FakeBackend()) as router:
        break_files(registry, names[0])
        with pytest.raises(InvalidAdapter):
            router.activate(names[0])
        assert WEIGHTS_FILE in (registry.get(names[0]).quarantine_reason or "")
        with pytest.raises(RevisionError, match="in quarantine"):
            registry.promote(names[0])


def test_a_reason_may_name_a_file_that_is_not_utf_8(registry: Registry, names: list[str]) -> None:
    with Router(registry, FakeBackend()) as router:
        Path(os.fsdecode(os.fsencode(registry.get(names[0]).path) + b"/\xff")).touch()
        with pytest.raises(InvalidAdapter) as refused:
            router.activate(names[0])
        assert str(refused.value).encode()  # a log and a terminal take it
        assert "\\udcff" in (registry.get(names[0]).quarantine_reason or "")


def test_a_revision_that_fails_its_probe_is_put_into_quarantine(
    registry: Registry, names: list[str]
) -> None:
    with Router(registry, FakeBackend(fail_probe={names[0]})) as router:
        with pytest.raises(SwapFailed):
            router.activate(names[0])
        assert registry.get(names[0]).quarantined_at is not None


def test_a_revision_that_is_damaged_when_the_engine_loads_it_is_put_into_quarantine(
    registry: Registry, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend()

    def fail(*_: object) -> None:
        raise InvalidAdapter("a tensor is missing")

    monkeypatch.setattr(backend, "load", fail)
    with Router(registry, backend) as router:
        with pytest.raises(InvalidAdapter):
            router.activate(names[0])
        assert registry.get(names[0]).quarantine_reason == "a tensor is missing"


@pytest.mark.parametrize("error", [WrongBase, SwapFailed])
def test_a_revision_is_not_put_into_quarantine_when_the_engine_fails(
    registry: Registry,
    names: list[str],
    error: Callable[[str], Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = FakeBackend()

    def fail(*_: object) -> None:
        raise error("no")

    monkeypatch.setattr(backend, "validate" if error is WrongBase else "load", fail)
    with Router(registry, backend) as router:
        with pytest.raises((WrongBase, SwapFailed)):
            router.activate(names[0])
        assert registry.get(names[0]).quarantined_at is None


def test_a_swap_raises_its_own_error_when_the_quarantine_cannot_be_written(
    registry: Registry,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RevisionError("no")

    with Router(registry, FakeBackend()) as router:
        break_files(registry, names[0])
        monkeypatch.setattr(registry, "quarantine", fail)
        with pytest.raises(InvalidAdapter):
            router.activate(names[0])
    assert f"{names[0]} is not in quarantine" in caplog.text
