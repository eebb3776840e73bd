"""A home with revisions of a small model, and the backend that serves them in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agentpref.home import Home
from agentpref.serve.registry import Registry

if TYPE_CHECKING:
    from served import Served

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

    backend = TransformersBackend(served.base)
    yield backend
    backend.close()
