"""Making a revision ready: it is checked, loaded and probed before it may serve.

A revision that is broken itself, because its files are damaged or its numbers are not finite, goes
into quarantine. The caller has pinned the revision.
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
    """Check a revision before the engine loads it.

    Raises:
        InvalidAdapter: its files are broken; it is in quarantine now.
        WrongBase: it was trained on another base model.
    """
    try:
        backend.validate(revision)
    except InvalidAdapter as error:
        _quarantine(registry, revision, error)
        raise


def load(
    backend: ServingBackend, registry: Registry, revision: Revision, *, serving: str | None
) -> None:
    """Load a revision beside the one that is ``serving``, which errors name, and probe it.

    Raises:
        SwapFailed: it could not be loaded, or its answer to the probe is not finite.
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
            _quarantine(registry, revision, error)
        raise SwapFailed(
            f"{name} could not be made ready: {error}; {serving or 'the base model'} still serves"
        ) from error


def _quarantine(registry: Registry, revision: Revision, error: AgentprefError) -> None:
    try:
        registry.quarantine(revision.revision_id, str(error))
    except AgentprefError:
        _logger.warning("%s is not in quarantine", revision.revision_id, exc_info=True)
    else:
        _logger.warning("%s is in quarantine now: %s", revision.revision_id, error)
