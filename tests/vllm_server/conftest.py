"""A real vLLM server, homes with revisions that answer differently, and the oracle.

The server holds the bundled model in float32, on this machine's processor, and is shared by all
tests; a test that kills it starts it again. The oracle is transformers and peft, in the
process of the tests. Prompts are longer than a block of vLLM's key-value cache, which short ones
never fill, and so never reuse.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from asked import EXTRA, MAX_LORAS

from agentpref.home import Home
from agentpref.models.base_files import BaseFiles, read_base
from agentpref.serve.backend import GenerationRequest, Reply, Revision
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import write_adapter
from agentpref_adapters._vllm_process import VllmProcess, vllm_process
from agentpref_adapters.transformers import TransformersBackend
from agentpref_adapters.vllm import VllmBackend

# What a GPU host leaves unset.
ON_A_PROCESSOR = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests be told where vLLM is."""
    parser.addoption(
        "--vllm-python", default=".venv-vllm/bin/python", help="the interpreter that has vLLM"
    )


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> str:
    """The interpreter that has vLLM."""
    python = Path(request.config.getoption("--vllm-python"))
    if not python.exists():
        pytest.exit(f"{python} is not there; run: make test-vllm", returncode=2)
    os.environ.update(ON_A_PROCESSOR)
    return str(python.absolute())


@pytest.fixture(scope="session")
def base() -> BaseFiles:
    """The bundled model."""
    return read_base("tiny")


@pytest.fixture(scope="session")
def server(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """The server that all tests share."""
    logs = tmp_path_factory.mktemp("logs")
    with vllm_process("tiny", *EXTRA, logs=logs, python=vllm_python, max_loras=MAX_LORAS) as server:
        yield server


@pytest.fixture
def open_backend(server: VllmProcess) -> Iterator[Callable[..., VllmBackend]]:
    """Call it for a backend of the shared server; what they loaded is unloaded afterwards."""
    opened: list[VllmBackend] = []

    def make(*urls: str, kind: type[VllmBackend] = VllmBackend, **settings: object) -> VllmBackend:
        how = {"model": "tiny", "max_loras": MAX_LORAS} | settings
        opened.append(kind(*(urls or [server.url]), **how))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()
    with closing(VllmBackend(server.url, model="tiny")) as tidy:
        for name in tidy.list_loaded():
            tidy.unload(name)


@pytest.fixture
def backend(open_backend: Callable[..., VllmBackend]) -> VllmBackend:
    """A backend of the shared server."""
    return open_backend()


@pytest.fixture(scope="session")
def adapters(base: BaseFiles, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six random adapters of all layers, so strong that their answers have little in common."""
    folder = tmp_path_factory.mktemp("adapters")
    assert base.layers is not None
    return [
        write_adapter(folder / str(seed), seed=seed, layers=dict(base.layers)) for seed in range(6)
    ]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """An empty home's registry."""
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def publish(
    registry: Registry, base: BaseFiles, adapters: list[Path]
) -> Callable[..., list[Revision]]:
    """Call ``publish(3)`` for three revisions, none of them live."""

    def make(count: int) -> list[Revision]:
        return [
            registry.publish(folder, parent=None, model=base.identity, training={})
            for folder in adapters[:count]
        ]

    return make


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


@pytest.fixture(scope="session")
def oracle() -> Iterator[TransformersBackend]:
    """The bundled model in this process."""
    with closing(TransformersBackend("tiny", precision="float32")) as backend:
        yield backend


@pytest.fixture
def expected(oracle: TransformersBackend) -> Iterator[Callable[..., Reply]]:
    """Call ``expected(revision, request)`` for what transformers and peft answer."""
    loaded: set[str] = set()

    def answer(revision: Revision | None, request: GenerationRequest) -> Reply:
        if revision is None:
            return oracle.generate("base", request)
        oracle.load(revision)
        loaded.add(revision.revision_id)
        return oracle.generate(revision.revision_id, request)

    yield answer
    for name in loaded:
        oracle.unload(name)
