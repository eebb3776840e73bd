"""Several processes at one server: apps, a pruning, and `agentpref serve` itself."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import orjson
import psutil
import pytest
from asked import EXTRA, QUESTIONS, ask

from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref_adapters._vllm_process import VllmProcess, vllm_process
from agentpref_adapters.vllm import VllmBackend, has_loaded, open_router

# An app of its own: it says what answered, each time it is asked to by a line.
APP = """
import sys
from agentpref.serve.backend import GenerationRequest
from agentpref_adapters.vllm import open_router
home, url = sys.argv[1:]
with open_router(home, url, model="tiny", follow=None) as router:
    print("open", flush=True)
    for line in sys.stdin:
        if line.strip() == "sync":
            router.sync()
        request = GenerationRequest(({"role": "user", "content": line},), max_tokens=4)
        print(router.generate(request).revision, flush=True)
"""


class App:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        return self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def an_app(registry: Registry, url: str) -> Iterator[App]:
    command = [sys.executable, "-c", APP, str(registry.home.path), url]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        app = App(process)
        try:
            assert app.read() == "open"
            yield app
        finally:
            process.kill()


def test_a_revision_that_another_app_serves_is_not_unloaded(
    registry: Registry, revisions: list[Revision], server: VllmProcess, backend: VllmBackend
) -> None:
    first, second, third = (revision.revision_id for revision in revisions)
    with an_app(registry, server.url) as app, Router(registry, backend) as router:
        assert app.ask("hello") == first
        router.activate(second)
        router.activate(third)
        assert first in backend.list_loaded(), "the app has not followed yet"
        assert app.ask("hello") == first
        assert app.ask("sync") == third
        assert set(backend.list_loaded()) == {first, second, third}, "a rollback would find it"


def test_revisions_that_a_killed_app_left_loaded_are_unloaded(
    registry: Registry, revisions: list[Revision], server: VllmProcess, backend: VllmBackend
) -> None:
    first, second = (revision.revision_id for revision in revisions[:2])
    with an_app(registry, server.url) as app:
        app.process.kill()
        app.process.wait()
    assert backend.list_loaded() == (first,)
    registry.promote(second)
    with Router(registry, backend):
        assert backend.list_loaded() == (second,)


def test_a_revision_that_a_server_has_loaded_is_not_pruned(
    registry: Registry, publish: Callable[[int], list[Revision]], server, backend: VllmBackend
) -> None:
    names = [revision.revision_id for revision in publish(6)]
    registry.promote(names[0])
    with Router(registry, backend) as router:
        registry.promote(names[1])
        registry.promote(names[2])
        kept = registry.prune(keep=1, ask=has_loaded).kept
        assert names[0] in kept, "the router serves it still"
        assert router.generate(ask(QUESTIONS[0])).revision == names[0]
        router.sync()
    pruned = registry.prune(keep=1, ask=has_loaded)
    assert names[2] in pruned.kept
    backend.unload(names[0])
    again = registry.prune(keep=1, ask=has_loaded)
    assert names[0] in {*pruned.removed, *again.removed}
    assert not (registry.home.adapters / names[0]).exists()


SERVE = ("-m", "agentpref_cli", "serve", "--model", "tiny", "--port", "0", "--json")


def said(process: subprocess.Popen[str], event: str) -> dict[str, object]:
    """Read on until something was said, or it ended."""
    assert process.stdout is not None
    for line in process.stdout:
        value: dict[str, object] = orjson.loads(line)
        if value["event"] == event:
            return value
    raise AssertionError(f"it ended before it said {event}")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_agentpref_serve_follows_a_promotion_and_leaves_nothing_running(
    vllm_python: str, registry: Registry, revisions: list[Revision], expected, signum: int
) -> None:
    home = str(registry.home.path)
    command = [sys.executable, *SERVE, "--home", home, "--python", vllm_python, "--"]
    with subprocess.Popen([*command, *EXTRA], stdout=subprocess.PIPE, text=True) as process:
        url = str(said(process, "starting")["url"])
        assert said(process, "serving")["live"] == revisions[0].revision_id
        registry.promote(revisions[1].revision_id)
        assert said(process, "serving")["live"] == revisions[1].revision_id
        request = ask(QUESTIONS[0])
        with open_router(home, url, model="tiny") as router:
            reply = router.generate(request)
        assert reply.revision == revisions[1].revision_id
        assert reply.token_ids == expected(revisions[1], request).token_ids
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("EngineCore" in " ".join(child.cmdline()) for child in children)
        process.send_signal(signum)
        process.communicate()
    assert process.returncode == (143 if signum == signal.SIGTERM else -signum)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


GUIDE = Path(__file__).parents[2] / "docs" / "vllm.md"
READ_BY_ANYBODY = (
    "/metrics", "/load", "/version", "/kv_event_sources", "/health", "/ping",
    "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json",
)  # fmt: skip
ANYBODY = {"model": "base", "prompt": "Hello", "max_tokens": 1}
BY_REVISION = {"X-Amzn-SageMaker-Adapter-Identifier": "mine"}  # /invocations reads no "model"


def unguarded(adapter: Path) -> list[tuple[str, str, dict[str, object]]]:
    """What anybody can have done, in this order: what is loaded is used, and then unloaded."""
    score = {"query": "Yes?", "items": ["No"], "label_token_ids": [1]}
    return [
        ("POST", "/adapters", {"json": {"name": "mine", "src": str(adapter)}}),
        ("POST", "/invocations", {"json": ANYBODY, "headers": BY_REVISION}),
        ("POST", "/generative_scoring", {"json": score}),
        ("DELETE", "/adapters/{name}", {}),
        ("POST", "/scale_elastic_ep", {"json": {"new_data_parallel_size": 1}}),
        ("POST", "/tokenize", {"json": {"prompt": "Hello"}}),
        ("POST", "/detokenize", {"json": {"tokens": [1, 300]}}),
        ("POST", "/is_scaling_elastic_ep", {}),
        *(("GET", path, {}) for path in READ_BY_ANYBODY),
    ]


PATHS = {path for _, path, _ in unguarded(Path())}


def test_the_api_key_does_not_guard_these_paths(
    vllm_python: str, adapters: list[Path], tmp_path: Path, monkeypatch
) -> None:
    """Why a server belongs on loopback, or behind an allowlist: each of these works without it."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with (
        vllm_process("tiny", *EXTRA, logs=tmp_path, python=vllm_python) as guarded,
        httpx.Client(base_url=guarded.url, timeout=60, trust_env=False) as client,
    ):
        assert client.get("/v1/models").status_code == 401
        assert client.post("/v1/completions", json=ANYBODY).status_code == 401
        for method, path, what in unguarded(adapters[0]):
            answer = client.request(method, path.format(name="mine"), **what)
            assert answer.status_code == 200, (path, answer.text)
            if path == "/invocations":
                assert answer.json()["model"] == "mine"
        with closing(VllmBackend(guarded.url, model="tiny", key="secret")) as backend:
            assert backend.generate("base", ask(QUESTIONS[0])).revision == "base"


def test_each_path_that_the_guide_names_was_tried_without_the_key() -> None:
    """Its table has all routes of the server: see ``test_guide``."""
    rows = re.findall(r"^\| (`/.*?) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`([^`]+)`", " ".join(rows))) == PATHS
