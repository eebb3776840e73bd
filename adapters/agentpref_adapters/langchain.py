"""LangChain: a callback that logs every model call, and a chat model that the router serves.

Either works without the other. Needs langchain-core alone: no part of this integration imports
langchain or langgraph, whose agents are used through the interfaces of langchain-core.
"""

from __future__ import annotations

from agentpref.errors import MissingDependency

try:
    import langchain_core  # noqa: F401  (only to say, before anything else, that it is missing)
except ImportError as error:
    raise MissingDependency(
        "agentpref_adapters.langchain needs langchain-core, which is not installed: "
        "run pip install 'agentpref[langchain]'"
    ) from error

from agentpref_adapters._langchain_callback import AgentprefCallback, CallbackCounts
from agentpref_adapters._langchain_model import AgentprefChatModel

__all__ = ["AgentprefCallback", "AgentprefChatModel", "CallbackCounts"]
