"""Middleware for the agents of LangChain 1.x: each thread of an agent asks its own revision.

>>> agent = create_agent(                                                       # doctest: +SKIP
...     "openai:gpt-5", tools, middleware=[ServeRevisions(model)]
... )

The agent stays as it is; what it asks is the model of the middleware. An agent that is built anew
with :class:`~agentpref_adapters.langchain.AgentprefChatModel` needs none of this.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from agentpref.errors import ConfigError, MissingDependency

try:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
except ImportError as error:
    raise MissingDependency(
        "agentpref_adapters.langchain_agents needs langchain 1.0 or newer, which is not installed: "
        "run pip install 'agentpref[langchain]' langchain"
    ) from error

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import ensure_config

from agentpref_adapters._langchain_messages import first_id

__all__ = ["ServeRevisions"]


class ServeRevisions(AgentMiddleware[Any, Any, Any]):
    """Answers an agent's model calls with the revision that serves the agent's thread.

    The thread is the config's ``thread_id``, so that all calls of a conversation stay on one side
    of a canary. A call without one is the live revision's.

    Args:
        model: an ``AgentprefChatModel``.

    Raises:
        ConfigError: ``model`` is another kind of model, which has no revisions.
    """

    def __init__(self, model: BaseChatModel) -> None:
        super().__init__()
        if "router" not in type(model).model_fields:
            raise ConfigError(
                f"the model is {type(model).__name__}, which has no revisions; pass an "
                "AgentprefChatModel"
            )
        self._model = model

    def wrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], ModelResponse[Any]],
    ) -> ModelResponse[Any]:
        """Ask the thread's revision in the place of the agent's model."""
        return handler(self._routed(request))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """As :meth:`wrap_model_call`."""
        return await handler(self._routed(request))

    def _routed(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        config = ensure_config()
        thread = first_id("thread_id", config.get("metadata"), config.get("configurable"))
        known = {} if thread is None else {"thread_id": thread}
        return request.override(model=self._model.model_copy(update=known))
