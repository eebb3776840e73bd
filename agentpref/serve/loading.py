"""Making a revision ready: it is checked, loaded, and asked a probe, before it may serve.

One that is to blame itself, whose files are broken or which answers nothing finite, is put into
quarantine. Knows nothing of routes, leases and holds: whoever loads holds the revision already.
"""

from __future__ import annotations

import logging

from agentpref.errors import (
    AgentprefError,
    BackendClosed,
    InvalidAdapter,
    ProbeFailed,
    ServingError,
    SwapFailed,
)
from agentpref.serve.backend import Revision, ServingBackend
from agentpref.serve.registry import Registry

_logger = logging.getLogger(__name__)


def validate(backend: ServingBackend, registry: Registry, revision: Revision) -> None:
    """Check a revision before the engine sees it.

    Raises:
        InvalidAdapter: its files are broken; it is in quarantine now.
        WrongBase: it was trained on another base model.
    """
    try:
        backend.validate(revision)
    except InvalidAdapter as error:
        _condemn(registry, revision, error)
        raise


def load(
    backend: ServingBackend, registry: Registry, revision: Revision, *, serving: str | None
) -> None:
    """Load a revision beside what serves, which an error names, and probe it.

    Raises:
        SwapFailed: it could not be loaded, or answered the probe with nonsense.
        BackendClosed: the backend was closed before.
    """
    name = revision.revision_id
    try:
        backend.load(revision)
        backend.probe(name)
    except BackendClosed:
        raise
    except ServingError as error:
        if isinstance(error, ProbeFailed):
            _condemn(registry, revision, error)
        raise SwapFailed(
            f"{name} could not be made ready: {error}; {serving or 'the base model'} still serves"
        ) from error


def _condemn(registry: Registry, revision: Revision, error: AgentprefError) -> None:
    """Put a revision that is to blame itself where nobody promotes it again."""
    try:
        registry.quarantine(revision.revision_id, str(error))
    except AgentprefError:
        _logger.warning("%s is not in quarantine", revision.revision_id, exc_info=True)
    else:
        _logger.warning("%s is in quarantine now: %s", revision.revision_id, error)
