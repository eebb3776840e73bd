"""Swaps on a real vLLM, under load: nothing is dropped, and nothing is answered by another."""

from __future__ import annotations

from collections import Counter
from itertools import cycle, islice

import pytest
from asked import QUESTIONS, ask
from clients import CLIENTS, Load, wrong

from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref_adapters.vllm import VllmBackend, open_router

SWAPS = 12


@pytest.mark.guarantee("vllm", f"{SWAPS} swaps of a real vLLM")
def test_swaps_under_load_drop_and_mix_no_request(
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


def test_after_activate_new_requests_are_answered_by_the_new_revision(
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


def test_revisions_that_no_longer_serve_are_unloaded(
    router: Router, revisions: list[Revision], backend: VllmBackend
) -> None:
    for revision in revisions:
        router.activate(revision.revision_id)
    assert set(backend.list_loaded()) == {r.revision_id for r in revisions[1:]}


def test_a_promotion_by_another_process_is_followed(
    registry: Registry, revisions: list[Revision], server, expected
) -> None:
    with open_router(registry.home, server.url, model="tiny", follow=0.05) as router:
        registry.promote(revisions[1].revision_id)
        request = ask(QUESTIONS[2])
        replies = (router.generate(request) for _ in range(200))
        reply = next(one for one in replies if one.revision != revisions[0].revision_id)
        assert reply.revision == revisions[1].revision_id
        assert reply.token_ids == expected(revisions[1], request).token_ids
