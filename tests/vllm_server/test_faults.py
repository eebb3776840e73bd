"""A real vLLM in trouble: killed under load or in mid-swap, slow, failing, too small, fixed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from asked import EXTRA, MAX_LORAS, QUESTIONS, RANK, ask
from clients import CLIENTS, Load, wrong
from proxy import Proxy

from agentpref.errors import GenerationFailed, ServerUnreachable, SwapFailed
from agentpref.models.base_files import BaseFiles
from agentpref.serve.backend import Reply, Revision
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import write_adapter
from agentpref_adapters._vllm_process import VllmProcess, vllm_process
from agentpref_adapters.vllm import VllmBackend


@pytest.fixture
def proxy(server: VllmProcess) -> Iterator[Proxy]:
    with closing(Proxy(server.url)) as proxy:
        yield proxy


def kill(server: VllmProcess) -> None:
    """Kill the program that answers at the server's port, and not what it has started."""
    port = server.url.rpartition(":")[2]
    (program,) = (
        child
        for child in psutil.Process().children(recursive=True)
        if "api_server" in " ".join(child.cmdline()) and port in child.cmdline()
        if "_vllm_guard" not in " ".join(child.cmdline())
    )
    os.kill(program.pid, signal.SIGKILL)


def restart(server: VllmProcess) -> None:
    """Start a killed server again, as systemd or Kubernetes would."""
    server.stop()
    server.start()


@pytest.mark.guarantee("vllm")
def test_a_server_killed_under_load_is_loaded_again_after_its_restart(
    server: VllmProcess, registry: Registry, revisions, open_backend, expected
) -> None:
    backend = open_backend(patience=300.0)
    with Router(registry, backend) as router:
        load = Load(router, stream=False)
        with load.running():
            load.more(CLIENTS)
            kill(server)
            restart(server)
            load.more(4 * CLIENTS)
        assert load.failed == []
        assert wrong(load, revisions, expected) == []
        assert backend.list_loaded() == (revisions[0].revision_id,)
        router.activate(revisions[1].revision_id)
        assert router.generate(ask(QUESTIONS[0])).revision == revisions[1].revision_id


class KilledAfter(VllmBackend):
    """Has a server killed as soon as a step of a swap, told in ``after``, is done."""

    after: Callable[[], None] = staticmethod(lambda: None)
    step = ""

    def load(self, revision: Revision) -> None:
        super().load(revision)
        self._done("load")

    def probe(self, revision_id: str) -> Reply:
        reply = super().probe(revision_id)
        self._done("probe")
        return reply

    def _done(self, step: str) -> None:
        if step == self.step:
            self.step = ""
            self.after()


@pytest.mark.guarantee("vllm")
@pytest.mark.parametrize("step", ["load", "probe"])
def test_a_server_killed_in_mid_swap_leaves_the_old_or_the_new_revision_serving(
    step: str, server: VllmProcess, registry: Registry, revisions, open_backend, expected
) -> None:
    old, new = (revision.revision_id for revision in revisions[:2])
    backend = open_backend(patience=300.0, kind=KilledAfter)
    with Router(registry, backend) as router:
        load = Load(router, stream=False)
        backend.step, backend.after = step, lambda: kill(server)
        with load.running():
            load.more(CLIENTS)
            if step == "load":
                with pytest.raises(SwapFailed, match=f"{old} still serves"):
                    router.activate(new)
            else:
                router.activate(new)
            restart(server)
            load.more(4 * CLIENTS)
        serves = old if step == "load" else new
        assert router.serving.live == registry.state().live == serves
        assert router.generate(ask(QUESTIONS[0])).revision == serves
        assert load.failed == []
        assert wrong(load, revisions, expected) == []
        router.activate(new)
        assert router.generate(ask(QUESTIONS[0])).revision == new


def test_while_a_server_fails_requests_wait_and_swaps_are_refused(
    proxy: Proxy, registry: Registry, revisions, open_backend, expected
) -> None:
    with Router(registry, open_backend(proxy.url, patience=60.0)) as router:
        load = Load(router, stream=False)
        with load.running():
            load.more(CLIENTS)
            proxy.failing = True
            with pytest.raises(SwapFailed, match=f"{revisions[0].revision_id} still serves"):
                router.activate(revisions[1].revision_id)
            proxy.failing = False
            load.more(CLIENTS)
            assert router.serving.live == revisions[0].revision_id
            router.activate(revisions[1].revision_id)
            load.more(CLIENTS)
        assert load.failed == []
        assert wrong(load, revisions, expected) == []


def test_a_server_that_keeps_failing_is_quoted(proxy: Proxy, open_backend) -> None:
    backend = open_backend(proxy.url, patience=0.5)
    proxy.failing = True
    with pytest.raises(ServerUnreachable, match="500"):
        backend.generate("base", ask(QUESTIONS[0]))


def test_a_request_that_timed_out_is_not_repeated(proxy: Proxy, open_backend) -> None:
    backend = open_backend(proxy.url, timeout=0.5, patience=30.0)
    proxy.delay = 2.0
    with pytest.raises(ServerUnreachable, match=r"no answer in 0\.5 seconds"):
        backend.generate("base", ask(QUESTIONS[0]))
    proxy.delay = 0.0
    assert backend.generate("base", ask(QUESTIONS[0])).finish_reason in ("stop", "length")


def test_a_stream_that_breaks_off_is_an_error(proxy: Proxy, publish, open_backend) -> None:
    backend = open_backend(proxy.url, patience=1.0)
    (revision,) = publish(1)
    backend.load(revision)
    backend.probe(revision.revision_id)
    proxy.cut_after = 2000
    pieces = backend.stream(revision.revision_id, ask(QUESTIONS[0], max_tokens=60))
    assert isinstance(next(pieces), str)
    with pytest.raises(ServerUnreachable):
        list(pieces)


def test_a_revision_that_was_never_loaded_is_refused(backend: VllmBackend, publish) -> None:
    (revision,) = publish(1)
    with pytest.raises(GenerationFailed, match="not loaded; load it first"):
        backend.generate(revision.revision_id, ask(QUESTIONS[0]))


def test_a_rank_above_the_servers_is_refused_and_the_old_revision_serves(
    registry: Registry, revisions, backend: VllmBackend, base: BaseFiles, tmp_path: Path
) -> None:
    assert base.layers is not None
    folder = write_adapter(tmp_path / "wide", rank=2 * RANK, layers=dict(base.layers))
    wide = registry.publish(folder, parent=None, model=base.identity, training={})
    with Router(registry, backend) as router:
        with pytest.raises(SwapFailed, match="--max-lora-rank"):
            router.activate(wide.revision_id)
        assert router.generate(ask(QUESTIONS[0])).revision == revisions[0].revision_id
        assert wide.revision_id not in backend.list_loaded()


def test_a_revision_beyond_the_servers_room_is_refused(
    backend: VllmBackend, publish: Callable[[int], list[Revision]]
) -> None:
    *fitting, last = publish(MAX_LORAS + 1)
    for revision in fitting:
        backend.load(revision)
    with pytest.raises(SwapFailed, match=f"{last.revision_id} does not fit: .* --max-loras"):
        backend.load(last)
    assert set(backend.list_loaded()) == {revision.revision_id for revision in fitting}


def test_a_server_without_runtime_updating_is_refused_with_the_cure(
    vllm_python: str, registry: Registry, publish, tmp_path: Path, monkeypatch
) -> None:
    """It knows the path as little as it knows the adapter, and says 404 to both."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "False")
    (revision,) = publish(1)
    with (
        vllm_process("tiny", *EXTRA, logs=tmp_path, python=vllm_python) as fixed,
        closing(VllmBackend(fixed.url, model="tiny", max_loras=MAX_LORAS)) as backend,
    ):
        with pytest.raises(SwapFailed, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            backend.load(revision)
        with Router(registry, backend) as router:
            with pytest.raises(SwapFailed, match="the base model still serves"):
                router.activate(revision.revision_id)
            assert router.generate(ask(QUESTIONS[0])).revision == "base"
