"""A home with revisions of a small model, the backend that serves them, and a log."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.serve.registry import Registry
from agentpref.types import Run

if TYPE_CHECKING:
    from openai import OpenAI
    from openai_stand_in import OpenAIServer
    from served import Served

    from agentpref_adapters.langchain import AgentprefCallback
    from agentpref_adapters.transformers import TransformersBackend


@pytest.fixture(scope="session")
def served(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    from served import make_home

    return make_home(str(random_base), tmp_path_factory.mktemp("served"))


@pytest.fixture
def registry(served: Served, tmp_path: Path) -> Registry:
    """A home of the test's own, with the revisions of the shared one."""
    registry = Registry(Home.create(tmp_path / "own"))
    shared = Registry(served.home)
    for name in served.names:
        revision = shared.get(name)
        registry.publish(revision.path, parent=None, model=revision.manifest["base"], training={})
    assert tuple(r.revision_id for r in registry.list()) == served.names
    return registry


@pytest.fixture
def backend(served: Served) -> Iterator[TransformersBackend]:
    from agentpref_adapters.transformers import TransformersBackend

    backend = TransformersBackend(served.base, precision="float32")
    yield backend
    backend.close()


# A log of the test's own, and the callback of LangChain that writes to it.


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def log(home: Path) -> Iterator[Log]:
    with closing(Log(home)) as log:
        yield log


@pytest.fixture
def name(log: Log) -> Callable[[str], str]:
    """What the home keeps in the place of a user's id."""
    return Pseudonyms.of(log.home).name


@pytest.fixture
def runs(home: Path, log: Log) -> Callable[[], list[Run]]:
    def read() -> list[Run]:
        log.flush(timeout=10)
        with closing(connect(Home.open(home), readonly=True)) as connection:
            return list(Store(connection).runs("default"))

    return read


@pytest.fixture
def callback(log: Log) -> AgentprefCallback:
    from agentpref_adapters.langchain import AgentprefCallback

    return AgentprefCallback(log)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine, as those of LangChain's standard suites are."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture
def openai_server() -> Iterator[OpenAIServer]:
    from openai_stand_in import OpenAIServer

    with OpenAIServer().running() as server:
        yield server


@pytest.fixture
def openai_client(openai_server: OpenAIServer, log: Log) -> Iterator[OpenAI]:
    """A wrapped client of that server, which does not try again."""
    from openai import OpenAI

    from agentpref_adapters.openai import wrap

    with OpenAI(api_key="none", base_url=openai_server.url, max_retries=0) as client:
        yield wrap(client, log)
