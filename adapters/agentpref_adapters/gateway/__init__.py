"""A gateway for any app that speaks OpenAI's API, or Anthropic's, or Langfuse's scores.

An app sets a base URL, and its calls are answered by what is live, logged, and open to feedback by
the id of the reply. ``agentpref gateway`` runs it; :func:`create_app` is the same for an ASGI
server of your own.
"""

from __future__ import annotations

from agentpref.errors import MissingDependency

try:
    import aiohttp  # noqa: F401
    import itsdangerous  # noqa: F401  (checked first, for a clear error)
    import limits  # noqa: F401
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
except ImportError as error:
    raise MissingDependency(
        f"the gateway needs {error.name}; install it with: pip install 'agentpref[gateway]'"
    ) from error

from agentpref_adapters.gateway.access import Access
from agentpref_adapters.gateway.app import Gateway, create_app
from agentpref_adapters.gateway.keys import ApiKey, Keys
from agentpref_adapters.gateway.proxied import Proxied
from agentpref_adapters.gateway.routed import Routed

__all__ = ["Access", "ApiKey", "Gateway", "Keys", "Proxied", "Routed", "create_app"]
