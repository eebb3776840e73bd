"""Swaps on a real vLLM, under load: nothing is dropped, and nothing is answered by another."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, cycle, islice

import pytest
from conftest import QUESTIONS, ask

from agentpref.serve.backend import Reply, Revision
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref_adapters.vllm import VllmBackend

CLIENTS = 4
SWAPS = 12


@pytest.fixture
def revisions(publish: Callable[[int], list[Revision]], registry: Registry) -> list[Revision]:
    """Three revisions, the first of them live: on a processor, the base is no good beside them."""
    made = publish(3)
    registry.promote(made[0].revision_id)
    return made


@pytest.fixture
def router(registry: Registry, revisions, backend: VllmBackend) -> Iterator[Router]:
    with Router(registry, backend) as router:
        yield router


class Load:
    """Clients that ask without a pause; half of them stream."""

    def __init__(self, router: Router) -> None:
        self.answered: list[tuple[str, Reply]] = []
        self.failed: list[Exception] = []
        self._router = router
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the clients ask for as long as the block takes."""
        threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def more(self, replies: int) -> None:
        """Wait until so many more were answered, or one failed."""
        wanted = len(self.answered) + replies
        while len(self.answered) < wanted and not self.failed:
            threading.Event().wait(0.01)

    def _ask(self, client: int) -> None:
        for turn, question in enumerate(cycle(QUESTIONS)):
            if self._over.is_set():
                return
            request, thread_id = ask(question, max_tokens=12), f"{client}-{turn % 5}"
            try:
                if client % 2:
                    *_, reply = self._router.stream(request, thread_id=thread_id)
                else:
                    reply = self._router.generate(request, thread_id=thread_id)
            except Exception as error:
                self.failed.append(error)
                return
            self.answered.append((question, reply))


def wrong(load: Load, revisions: Sequence[Revision], expected: Callable[..., Reply]) -> list[Reply]:
    """The replies that are not what the revision they name answers."""
    by_name = {revision.revision_id: revision for revision in revisions}
    right = {
        (name, question): expected(revision, ask(question, max_tokens=12)).token_ids
        for name, revision in by_name.items()
        for question in QUESTIONS
    }
    return [
        reply
        for question, reply in load.answered
        if reply.token_ids != right[reply.revision, question]
    ]


def test_swaps_under_load_drop_and_mix_nothing(
    router: Router, revisions: list[Revision], expected
) -> None:
    load = Load(router)
    names = cycle(revision.revision_id for revision in (*revisions[1:], revisions[0]))
    with load.running():
        for name in islice(names, SWAPS):
            router.activate(name)
            load.more(2 * CLIENTS)
    assert load.failed == []
    assert wrong(load, revisions, expected) == []
    assert len({reply.revision for _, reply in load.answered}) == 3


def test_once_activate_returns_new_requests_are_answered_by_the_new_one(
    router: Router, revisions: list[Revision], expected
) -> None:
    request = ask(QUESTIONS[0])
    for revision in (*revisions, *revisions):
        router.activate(revision.revision_id)
        reply = router.generate(request)
        assert reply.revision == revision.revision_id
        assert reply.token_ids == expected(revision, request).token_ids


def test_a_canary_serves_its_threads_and_a_rollback_loads_nothing(
    router: Router, revisions: list[Revision], expected, backend: VllmBackend, monkeypatch
) -> None:
    live, canary, _ = revisions
    router.canary(canary.revision_id, 0.5)
    request = ask(QUESTIONS[1], max_tokens=8)
    served = {n: router.generate(request, thread_id=f"thread-{n}") for n in range(16)}
    for n, reply in served.items():
        assert router.generate(request, thread_id=f"thread-{n}").revision == reply.revision
    shares = Counter(reply.revision for reply in served.values())
    assert set(shares) == {live.revision_id, canary.revision_id}
    router.activate(canary.revision_id)

    def load(revision: Revision) -> None:
        raise AssertionError(f"{revision.revision_id} was still loaded")

    monkeypatch.setattr(backend, "load", load)
    router.rollback()
    reply = router.generate(request)
    assert reply.revision == live.revision_id
    assert reply.token_ids == expected(live, request).token_ids


def test_what_is_no_longer_wanted_is_unloaded(
    router: Router, revisions: list[Revision], backend: VllmBackend
) -> None:
    for revision in revisions:
        router.activate(revision.revision_id)
    assert set(backend.list_loaded()) == {r.revision_id for r in revisions[1:]}


def test_another_process_makes_live_and_it_is_followed(
    registry: Registry, revisions: list[Revision], server, expected
) -> None:
    from agentpref_adapters.vllm import open_router

    with open_router(registry.home, server.url, base="tiny", follow=0.05) as router:
        registry.promote(revisions[1].revision_id)
        request = ask(QUESTIONS[2])
        for _ in count():
            reply = router.generate(request)
            assert reply.revision in {r.revision_id for r in revisions[:2]}
            if reply.revision == revisions[1].revision_id:
                break
        assert reply.token_ids == expected(revisions[1], request).token_ids
