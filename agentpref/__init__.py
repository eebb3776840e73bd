"""Agents that learn from the people they serve: record, prefer, learn, prove, serve.

The names below are the front door; each is imported when first used, so that an app that only logs
pays for nothing else, torch least of all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentpref.adoption import adopt
    from agentpref.config import UpdateConfig
    from agentpref.errors import AgentprefError
    from agentpref.evaluation import Evaluation, evaluate
    from agentpref.home import Home
    from agentpref.pipeline import update
    from agentpref.record.ingest.redaction import redact
    from agentpref.record.log import Log
    from agentpref.serve.chat import Chat
    from agentpref.serve.registry import Registry
    from agentpref.serve.router import Router
    from agentpref.types import Comparison, Example, Feedback, Run, UpdateReport

__version__ = "0.1.0"

_HOMES = {
    "AgentprefError": "agentpref.errors",
    "Chat": "agentpref.serve.chat",
    "Comparison": "agentpref.types",
    "Evaluation": "agentpref.evaluation",
    "Feedback": "agentpref.types",
    "Home": "agentpref.home",
    "Log": "agentpref.record.log",
    "Example": "agentpref.types",
    "Registry": "agentpref.serve.registry",
    "Router": "agentpref.serve.router",
    "Run": "agentpref.types",
    "UpdateConfig": "agentpref.config",
    "UpdateReport": "agentpref.types",
    "adopt": "agentpref.adoption",
    "evaluate": "agentpref.evaluation",
    "redact": "agentpref.record.ingest.redaction",
    "update": "agentpref.pipeline",
}

__all__ = [
    "AgentprefError",
    "Chat",
    "Comparison",
    "Evaluation",
    "Example",
    "Feedback",
    "Home",
    "Log",
    "Registry",
    "Router",
    "Run",
    "UpdateConfig",
    "UpdateReport",
    "adopt",
    "evaluate",
    "redact",
    "update",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agentpref' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
