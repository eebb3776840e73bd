"""A gateway in front of a fake upstream, both served for real, and the home that it logs to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import agentpref
from agentpref.home import Home
from agentpref_adapters.gateway import Access, Gateway, Keys, Proxied, create_app

sys.path.insert(0, str(Path(__file__).parent))

from web import FakeOpenAI, serving


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


@pytest.fixture
def upstream() -> FakeOpenAI:
    return FakeOpenAI()


@pytest.fixture
def upstream_url(upstream: FakeOpenAI) -> Iterator[str]:
    with serving(upstream.app) as url:
        yield f"{url}/v1"
    upstream.go_on.set()


@pytest.fixture
def start(home: Home, upstream_url: str) -> Iterator[Callable[..., str]]:
    """Starts a gateway with some settings; gives its address."""
    with ExitStack() as stack:

        def start(*, origins: tuple[str, ...] = (), timeout: float = 20.0, **settings: Any) -> str:
            mine = {k: settings.pop(k) for k in [*settings] if k.startswith("token_")}
            gateway = Gateway(
                lambda namespace: agentpref.Log(home.path, namespace=namespace),
                lambda namespace: Proxied(upstream_url, key="sk-upstream", timeout=timeout),
                Access(Keys(home), origins=origins, **mine),
                **settings,
            )
            return stack.enter_context(serving(create_app(gateway, origins=origins)))

        yield start


@pytest.fixture
def url(start: Callable[..., str]) -> str:
    return start()


@pytest.fixture
def runs(home: Home) -> Callable[..., list[Any]]:
    """The runs that the home has, once the log has written."""

    def read(namespace: str = "default", least: int = 1) -> list[Any]:
        import time

        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                found = [*home.runs(namespace=namespace)]
            except agentpref.AgentprefError:
                found = []
            if len(found) >= least:
                return found
            time.sleep(0.02)
        return []

    return read
