"""LangChain: a callback that logs every model call, and a chat model that the router serves.

Each works without the other. Both import langchain-core only, and work with the agents of langchain
and langgraph through its interfaces.
"""

from __future__ import annotations

from agentpref.errors import MissingDependency

try:
    import langchain_core  # noqa: F401  (checked first, for a clear error)
except ImportError as error:
    raise MissingDependency(
        "agentpref_adapters.langchain needs langchain-core, which is not installed: "
        "run pip install 'agentpref[langchain]'"
    ) from error

from agentpref_adapters._langchain_callback import AgentprefCallback, CallbackCounts
from agentpref_adapters._langchain_model import AgentprefChatModel

__all__ = ["AgentprefCallback", "AgentprefChatModel", "CallbackCounts"]
