"""Puts a revision into quarantine where it is found damaged, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agentpref.errors import AgentprefError, InvalidAdapter, ProbeFailed
from agentpref.serve.backend import Revision
from agentpref.serve.validate import check_published

if TYPE_CHECKING:
    from agentpref.serve.registry import Registry

_logger = logging.getLogger(__name__)


@contextmanager
def quarantining(registry: Registry, revision: Revision) -> Iterator[None]:
    """Put a revision in quarantine if its files are damaged or its numbers are not finite."""
    name = revision.revision_id
    try:
        yield
    except (InvalidAdapter, ProbeFailed) as broken:
        try:
            registry.quarantine(name, str(broken))
            _logger.warning("%s is in quarantine now: %s", name, broken)
        except AgentprefError:
            _logger.warning("%s is not in quarantine", name, exc_info=True)
        raise


def intact_previous(registry: Registry) -> str | None:
    """What a rollback makes live, its files checked; damaged ones go into quarantine.

    Raises:
        RevisionError: nothing was promoted, or everything was rolled back.
    """
    while (name := registry.previous()) is not None:
        try:
            check_published(registry.get(name))
        except InvalidAdapter as damage:  # noqa: PERF203
            if registry.previous() == name:  # else it was pruned just now
                registry.quarantine(name, str(damage))
                _logger.warning("%s is passed over and in quarantine now: %s", name, damage)
        else:
            break
    return name
