"""The public fakes behave as documented."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agentpref.errors import BackendClosed, GenerationFailed, InvalidAdapter, SwapFailed
from agentpref.home import Home
from agentpref.models.adapter_files import WEIGHTS_FILE, read_adapter
from agentpref.serve.backend import GenerationRequest, Reply, Revision, ServingBackend
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_adapter
from agentpref.testing import FakeBackend, write_adapter
from agentpref.types import BASE

ASK = GenerationRequest(messages=({"role": "user", "content": "ahoy"},))


@pytest.fixture
def revision(tmp_path: Path) -> Revision:
    registry = Registry(Home.create(tmp_path / "home"))
    return registry.publish(write_adapter(tmp_path / "a"), parent=None, model={}, training={})


def test_the_fake_is_a_serving_backend() -> None:
    assert isinstance(FakeBackend(), ServingBackend)


def test_the_fake_answers_the_same_each_time_and_names_the_revision(revision: Revision) -> None:
    backend = FakeBackend()
    backend.load(revision)
    reply = backend.generate(revision.revision_id, ASK)
    assert reply == backend.generate(revision.revision_id, ASK)
    assert reply.message["content"] == f"{revision.revision_id} heard: ahoy"
    assert len(reply.token_ids) == len(reply.logprobs)
    *pieces, last = backend.stream(revision.revision_id, ASK)
    assert last == reply
    assert len(pieces) == 3
    assert "".join(map(str, pieces)) == reply.message["content"]


def test_answers_can_be_scripted_with_tool_calls() -> None:
    call = '<tool_call>{"name": "search", "arguments": {}}</tool_call>'
    reply = FakeBackend(lambda revision, request: call).generate(BASE, ASK)
    assert reply.message["tool_calls"][0]["function"]["name"] == "search"


def test_the_fake_serves_only_loaded_revisions(revision: Revision) -> None:
    backend, name = FakeBackend(), revision.revision_id
    with pytest.raises(GenerationFailed, match="not loaded"):
        backend.generate(name, ASK)
    backend.load(revision)
    assert backend.list_loaded() == (name,)
    backend.unload(name)
    backend.unload(name)
    assert backend.list_loaded() == ()
    assert backend.calls == [
        ("generate", name), ("load", name), ("unload", name), ("unload", name)
    ]  # fmt: skip


def test_the_fake_fails_for_the_revisions_in_its_sets(revision: Revision) -> None:
    backend, name = FakeBackend(fail_load={revision.revision_id}), revision.revision_id
    with pytest.raises(SwapFailed, match="fail_load"):
        backend.load(revision)
    backend.fail_load.clear()
    backend.load(revision)
    backend.fail_probe.add(name)
    with pytest.raises(SwapFailed, match="fail_probe"):
        backend.probe(name)
    backend.fail_probe.clear()
    assert backend.probe(name).revision == name
    backend.fail_generate.add(name)
    with pytest.raises(GenerationFailed, match="fail_generate"):
        backend.generate(name, ASK)


def test_the_fake_checks_the_published_files(revision: Revision) -> None:
    backend = FakeBackend()
    backend.validate(revision)
    weights = revision.path / WEIGHTS_FILE
    weights.chmod(0o644)
    weights.write_bytes(b"")
    with pytest.raises(InvalidAdapter):
        backend.validate(revision)


def test_the_fake_loads_at_most_max_loaded_revisions(revision: Revision) -> None:
    backend = FakeBackend(max_loaded=0)
    assert backend.capabilities().max_loaded == 0
    with pytest.raises(SwapFailed, match="does not fit"):
        backend.load(revision)


def test_a_gate_holds_requests_in_flight() -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(backend.generate, BASE, ASK)
        while not backend.calls:
            threading.Event().wait(0.001)
        assert not reply.done()
        gate.set()
        assert isinstance(reply.result(), Reply)


def test_a_closed_fake_raises_backend_closed() -> None:
    backend = FakeBackend()
    backend.close()
    with pytest.raises(BackendClosed):
        backend.generate(BASE, ASK)


def test_written_adapters_pass_every_check_and_differ_by_seed(tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(n), seed=seed) for n, seed in enumerate((0, 0, 1))]
    for folder in folders:
        check_adapter(folder)
    first, again, other = (read_adapter(folder).digests[WEIGHTS_FILE] for folder in folders)
    assert first == again != other


def test_the_fakes_import_nothing_heavy() -> None:
    code = "import sys, agentpref.testing; print({'torch', 'numpy', 'peft'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
